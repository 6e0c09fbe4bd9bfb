"""What is in prepared text: counts, the lengths of documents, samples of them."""

import dataclasses
import random
from collections.abc import Iterator

import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.copies import readable_path
from pldr_jax.data.shards.prepared import MANIFEST, Manifest, open_tokens, read_prepared
from pldr_jax.data.shards.records import ENDING, Shard
from pldr_jax.data.shards.units import describe_problems

_BAR = 40


def open_shards(path: str) -> tuple[Manifest, list[str]]:
    """The manifest of a folder, and the names of its shards; of a shard's path, of that alone.

    Raises:
      ConfigError: neither prepared text nor a shard of it.
    """
    file = readable_path(path, "--path")
    manifest = read_prepared(file.parent if file.name.endswith(ENDING) else file, "--path")
    names = [shard.name for shards in manifest.splits.values() for shard in shards]
    if not file.name.endswith(ENDING):
        return manifest, names
    if file.name.removesuffix(ENDING) not in names:
        raise ConfigError(f"--path={path}: is not a shard that {MANIFEST} beside it knows")
    return manifest, [file.name.removesuffix(ENDING)]


def describe(manifest: Manifest, names: list[str], samples: int, seed: int = 0) -> Iterator[str]:
    """Lines: what the text was made of, and of each split counts, a histogram and samples.

    Raises:
      DataError: a shard is damaged.
    """
    yield f"folder       {manifest.folder}"
    yield f"tokenizer    {manifest.vocab_size:,} pieces, sha256 {manifest.tokenizer_digest[:16]}"
    yield f"seed         {manifest.settings['seed']}"
    yield from describe_problems(manifest.problems, manifest.examples) or ["left out: nothing"]
    for split, shards in manifest.splits.items():
        chosen = tuple(shard for shard in shards if shard.name in names)
        if chosen:
            yield from _describe_split(manifest, split, chosen, samples, seed)


def _describe_split(
    manifest: Manifest, split: str, shards: tuple[Shard, ...], samples: int, seed: int
) -> Iterator[str]:
    part = dataclasses.replace(manifest, splits={split: shards})
    tokens = open_tokens(part, split)
    lengths = tokens.lengths
    yield ""
    yield (
        f"{split}: {tokens.n_documents:,} documents, {tokens.n_tokens:,} tokens, "
        f"{tokens.n_bytes:,} bytes, {tokens.bytes_per_token:.3f} bytes a token, "
        f"{len(shards)} shard{'' if len(shards) == 1 else 's'}"
    )
    middle, high = np.percentile(lengths, [50, 99])
    yield (
        f"tokens of a document: least {lengths.min():,}, median {middle:,.0f}, mean "
        f"{lengths.mean():,.1f}, 99% below {high:,.0f}, most {lengths.max():,}"
    )
    yield from histogram(lengths)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    chosen = random.Random(seed).sample(range(len(lengths)), min(samples, len(lengths)))
    for k in chosen:
        start, length = int(starts[k]), int(lengths[k])
        ids = tokens.read(start, start + min(length, 100))
        text = manifest.tokenizer.decode(ids)
        more = " ..." if length > 100 else ""
        yield f"document {k} ({length:,} tokens): {text!r}{more}"


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """A line for each power of two that occurs: bounds, count, bar."""
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(bins)
    for k in range(int(bins.min()), len(counts)):
        bar = "#" * round(_BAR * counts[k] / counts.max())
        yield f"{2**k:>10,} - {2 ** (k + 1) - 1:<10,} {counts[k]:>12,}  {bar}".rstrip()
