"""One unit of work: documents read, sorted into splits, tokenised, written as shards."""

import collections
import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from pldr_jax.data.shards.prepared import SPLITS
from pldr_jax.data.shards.records import DataError, ShardWriter
from pldr_jax.data.text.chat import ChatFormat
from pldr_jax.data.text.inputs import Unit
from pldr_jax.data.text.readers import PROBLEMS, Document, Problem, ReadSettings, read_documents
from pldr_jax.data.text.tokenizer import Tokenizer, id_dtype

LONG_TEXT = 1 << 18
"""Characters above which a text is tokenised in parts, cut where no piece crosses."""

_BATCH_CHARS = 1 << 18
_CUT = re.compile(r"\S(?= )")

Report = Callable[[int, int, int], None]
"""Takes bytes of input, documents and tokens, as they are done."""


@dataclasses.dataclass(frozen=True)
class UnitSettings:
    """How the documents of a unit become shards.

    Attributes:
      validation_fraction, test_fraction: shares of the documents held out.
      seed: of the hash that chooses them.
      on_error: what a problem does: it is counted and left out, or it ends the work.
    """

    read: ReadSettings = ReadSettings()
    validation_fraction: float = 0.05
    test_fraction: float = 0.0
    seed: int = 0
    on_error: Literal["skip", "fail"] = "skip"

    def dtype(self, tokenizer: Tokenizer) -> str:
        """Of the ids in shards. Of conversations, a token of an answer is kept as its id plus the
        size of the vocabulary.
        """
        return id_dtype(tokenizer.vocab_size * (1 if self.read.chat is None else 2))


class Problems:
    """What was left out: `counts` by kind, and the first of each kind in `examples`."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    def add(self, problem: Problem) -> None:
        """Counts a problem."""
        self.counts[problem.kind] += 1
        self.examples.setdefault(problem.kind, problem.place)


def describe_problems(counts: dict[str, int], examples: dict[str, str]) -> list[str]:
    """`left out: 3 empty, first a.jsonl:7`, a line for each kind."""
    return [
        f"left out: {n:,} {PROBLEMS[kind]}, first {examples[kind]}" for kind, n in counts.items()
    ]


def hash_of(text: str, seed: int = 0) -> float:
    """A number from 0 to 1 that follows from a text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(text: str, settings: UnitSettings) -> str:
    """The split of a document, by a hash of its text: copies of it land in the same one."""
    value = hash_of(text, settings.seed)
    if value < settings.validation_fraction:
        return "validation"
    held_out = settings.validation_fraction + settings.test_fraction
    return "test" if value < held_out else "train"


def documents_of(unit: Unit, settings: UnitSettings, problems: Problems) -> Iterator[Document]:
    """The documents of a unit; problems are counted.

    Raises:
      DataError: a problem, where `settings.on_error` is "fail".
    """
    for piece in unit.pieces:
        for item in read_documents(piece, settings.read):
            if isinstance(item, Document):
                yield item
                continue
            if settings.on_error == "fail":
                raise DataError(
                    f"{item}; mend it, or count and leave out such documents with --on_error=skip"
                )
            problems.add(item)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of texts one after another, int32, each with the end piece, and how many each has.

    A long text is tokenised in parts. There must be one text at least.
    """
    parts = [[text] if len(text) <= LONG_TEXT else _parts(text) for text in texts]
    firsts = np.cumsum([0, *map(len, parts[:-1])])
    ids_of_parts = tokenizer.encode_arrays(list(itertools.chain.from_iterable(parts)))
    lengths = np.add.reduceat(np.asarray([len(ids) for ids in ids_of_parts]), firsts)
    ids = np.insert(np.concatenate(ids_of_parts), np.cumsum(lengths), tokenizer.eos_id)
    return ids, lengths + 1


def tokenize_answers(
    tokenizer: Tokenizer, chat: ChatFormat, documents: Sequence[Document]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of every prompt and its answer one after another, int32, and how many each pair has; of
    an answer's tokens, the id plus the size of the vocabulary.
    """
    rows = []
    for pair in itertools.chain.from_iterable(document.pairs for document in documents):
        before, after = chat.encode_pair(tokenizer, pair)
        ids = np.asarray([*before, *after], np.int32)
        ids[len(before) :] += tokenizer.vocab_size
        rows.append(ids)
    return np.concatenate(rows), np.asarray([len(ids) for ids in rows])


def _parts(text: str) -> list[str]:
    """Cuts a long text before a space that follows another character, where there is one.

    No piece of an ordinary SentencePiece model reaches over such a place.
    """
    parts, start = [], 0
    while len(text) - start > LONG_TEXT:
        cut = _CUT.search(text, start + LONG_TEXT // 2, start + LONG_TEXT)
        end = cut.end() if cut else start + LONG_TEXT
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def write_unit(
    unit: Unit,
    folder: pathlib.Path,
    settings: UnitSettings,
    tokenizer: Tokenizer,
    report: Report,
) -> dict[str, Any]:
    """Writes the shards of a unit, `SPLIT-NUMBER`, and returns what they hold, fit for JSON."""
    problems = Problems()
    writers: dict[str, ShardWriter] = {}
    reported, chat, dtype = 0, settings.read.chat, settings.dtype(tokenizer)
    for batch in document_batches(documents_of(unit, settings, problems)):
        by_split: dict[str, list[Document]] = {}
        for document in batch:
            by_split.setdefault(split_of(document.text, settings), []).append(document)
        n_bytes = n_tokens = 0
        for split, documents in by_split.items():
            if split not in writers:
                writers[split] = ShardWriter(folder, f"{split}-{unit.number:06d}", dtype)
            texts = [document.text for document in documents]
            if chat is not None:
                tokens, lengths = tokenize_answers(tokenizer, chat, documents)
                texts = ["".join(pair) for document in documents for pair in document.pairs]
            else:
                tokens, lengths = tokenize(tokenizer, texts)
            size = sum(len(text.encode()) for text in texts)
            writers[split].add(tokens, lengths, size)
            n_bytes, n_tokens = n_bytes + size, n_tokens + len(tokens)
        # Of compressed input the size of the text says little: never more than the unit's own.
        n_bytes = min(n_bytes, max(unit.size - reported, 0)) if unit.size else n_bytes
        reported += n_bytes
        report(n_bytes, len(batch), n_tokens)
    shards = {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()}
    report(max(unit.size - reported, 0), 0, 0)
    return {
        "splits": {split: shards[split] for split in SPLITS if split in shards},
        "problems": {kind: problems.counts[kind] for kind in PROBLEMS if problems.counts[kind]},
        "examples": problems.examples,
    }


def document_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents to tokenise together, until they have some 262,144 characters."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
