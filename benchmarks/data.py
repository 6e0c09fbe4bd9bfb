"""Times the way of text to the train step: preparation, packing, and the wait for input.

    python benchmarks/data.py                       # all three tables, on Python's own sources
    python benchmarks/data.py --steps 0             # preparation and packing only
    python benchmarks/data.py --documents paragraph # short documents

Preparation is that of one process: MB of UTF-8 text a second through reading, tokenising, and all
of it with the sorting into splits and the writing of shards; then tokens of the shards to rows of
each packing, in shuffled order, and the two together. `rows` decompresses a record for every piece,
as from shards much larger than what a process keeps of them; `rows kept` finds every record kept,
as from shards that are smaller. `batches` are those rows as the train loop gets them: through
Grain, which shuffles anew, with the two threads that are the default. A second is one of the
process's CPU time, all threads together, and beside it one on the clock, which other work on the
machine makes longer; both are the best of `--rounds`.

The train step is that of configs/nano.gin with scanned layers, on the prepared shards. Modes are
timed in turn, step by step, so that a change of the machine's speed meets all alike: targets a
second (padding has none) with their ratio to `document`, what `segment_count.py` expects of that
ratio, and the time that the loop waits for its next batch. `--also 2 4 8` times `packed` with
these many documents in a row too, beside the number that is chosen. The first `--warmup` steps are
left out, compilation among them. Of the waits left there are the median, and the share of all of
them in all of the time, slow ones included. The threads that read also work while other modes have
their turn, so there is `input` too, which no wait shows: the CPU time of making a batch, over the
time of a step.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

from pldr_jax.cli.huge_pages import use_huge_pages
from pldr_jax.config import DataConfig, ExperimentConfig, MeshConfig, ModelConfig
from pldr_jax.data.pipeline import train_iterator
from pldr_jax.data.rows import Rows, filled_share, make_rows, stack_rows
from pldr_jax.data.segment_count import choose_segment_count
from pldr_jax.data.shards import records as shards
from pldr_jax.data.shards.build import BuildSettings, build
from pldr_jax.data.shards.prepared import ShardedTokens, read_prepared
from pldr_jax.data.shards.units import (
    Problems,
    UnitSettings,
    document_batches,
    documents_of,
    tokenize,
    write_unit,
)
from pldr_jax.data.text.inputs import STDLIB, find_inputs, plan_units
from pldr_jax.data.text.readers import ReadSettings
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.model.counts.flops import row_flops
from pldr_jax.partition import build_mesh
from pldr_jax.training.step import create_state, jit_train_step

PACKINGS = ("concat", "document", "packed")


def model_of(options: Any) -> ModelConfig:
    """The model of the train step."""
    return ModelConfig(vocab_size=options.vocab, context_length=options.context, unroll=False)


def segments_of(tokens: ShardedTokens, options: Any) -> int:
    """Documents in a row at most, as asked for or as a run would choose."""
    if options.segments:
        return int(options.segments)
    cost = row_flops(model_of(options))
    return choose_segment_count([tokens.lengths], [1.0], options.context, cost).max_segments


def best(rounds: int, work: Callable[[], Any]) -> np.ndarray:
    """Seconds [CPU, clock] of the fastest of some runs."""
    times = []
    for _ in range(rounds):
        start = np.asarray([time.process_time(), time.perf_counter()])
        work()
        times.append(np.asarray([time.process_time(), time.perf_counter()]) - start)
    return np.min(times, axis=0)


def preparation(
    folder: pathlib.Path, settings: UnitSettings, options: Any
) -> dict[str, list[float]]:
    """MB a second of one process, step by step: of CPU time and on the clock."""
    unit = plan_units(find_inputs([f"{folder}/text"]), 1 << 40, by_line=False)[0]
    tokenizer = Tokenizer.load(folder / "tok.model")
    found = list(documents_of(unit, settings, Problems()))
    mb = sum(len(document.text.encode()) for document in found) / 1e6
    texts = [[document.text for document in batch] for batch in document_batches(found)]
    seconds = {
        "read": best(options.rounds, lambda: list(documents_of(unit, settings, Problems()))),
        "tokenise": best(options.rounds, lambda: [tokenize(tokenizer, b) for b in texts]),
    }

    def whole() -> None:
        with tempfile.TemporaryDirectory() as output:
            write_unit(unit, pathlib.Path(output), settings, tokenizer, lambda *_: None)

    seconds["read, tokenise, write"] = best(options.rounds, whole)
    tokens = ShardedTokens(
        build(
            find_inputs([f"{folder}/text"]),
            tokenizer,
            folder / "out",
            BuildSettings(dataclasses.replace(settings, validation_fraction=0.01)),
            lambda line: None,
        ),
        "train",
    )
    share = mb * 1e6 / tokens.n_bytes
    for packing in PACKINGS:
        config = DataConfig(packing=packing, max_segments=segments_of(tokens, options))

        def pack(config: DataConfig = config) -> None:
            rows = make_rows(tokens, options.context, config)
            order = np.random.default_rng(0).permutation(len(rows))
            for k in range(0, len(rows), options.batch):
                stack_rows(rows, order[k : k + options.batch])

        rows = make_rows(tokens, options.context, config)
        take_all = functools.partial(take, rows, options.batch, len(rows) // options.batch)
        with nothing_kept():
            seconds[f"rows, {packing}"] = best(options.rounds, pack) * share
            seconds[f"batches, {packing}"] = best(options.rounds, take_all) * share
        seconds[f"rows kept, {packing}"] = best(options.rounds + 1, pack) * share
        seconds[f"batches kept, {packing}"] = best(options.rounds, take_all) * share
        for way in ("rows", "rows kept", "batches", "batches kept"):
            seconds[f"all to {way}, {packing}"] = (
                seconds["read, tokenise, write"] + seconds[f"{way}, {packing}"]
            )
    print(f"{mb:.1f} MB, {len(found):,} documents, {tokens.bytes_per_token:.2f} bytes a token")
    return {name: (mb / value).tolist() for name, value in seconds.items()}


def nothing_kept() -> Any:
    """Records are kept as ever, but too few for any to be found again."""
    read = shards._record.__wrapped__
    return mock.patch.object(shards, "_record", functools.lru_cache(16)(read))


def take(rows: Rows, batch_size: int, count: int) -> None:
    """Takes batches as the train loop does."""
    with train_iterator([rows], batch_size, 0) as batches:
        for _ in range(count):
            next(batches)


class Mode:
    """The train step of one packing and its input."""

    def __init__(self, packing: str, segments: int, tokens: ShardedTokens, options: Any) -> None:
        data = DataConfig(
            batch_size=options.batch,
            packing=packing,  # type: ignore[arg-type]
            max_segments=segments,
        )
        self.config = ExperimentConfig(model=model_of(options), data=data)
        self.mesh = build_mesh(MeshConfig(), jax.devices()[:1])
        rows = make_rows(tokens, options.context, data)
        self.segments, self.rows, self.fill = rows.max_segments, len(rows), filled_share(rows)
        self.expected = self.fill / row_flops(self.config.model)(self.segments)
        self.targets = self.fill * data.batch_size * (options.context - 1)
        count = min(100, len(rows) // data.batch_size)
        with nothing_kept():
            self.input = best(3, lambda: take(rows, data.batch_size, count))[0] / count
        self.data = train_iterator([rows], data.batch_size, 0)
        self.state = create_state(self.config, self.mesh)
        self.step = jit_train_step(self.config, self.mesh, self.state)
        self.waits: list[float] = []
        self.times: list[float] = []

    def run(self) -> None:
        """One step."""
        start = time.perf_counter()
        batch = next(self.data)
        got = time.perf_counter()
        self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready(metrics)
        self.waits.append(got - start)
        self.times.append(time.perf_counter() - start)


def training(folder: pathlib.Path, options: Any) -> dict[str, dict[str, float]]:
    """Targets a second, and what the input costs, of each packing."""
    tokens = ShardedTokens(read_prepared(folder / "out"), "train")
    chosen = segments_of(tokens, options)
    modes = {packing: Mode(packing, chosen, tokens, options) for packing in options.packings}
    for count in options.also:
        modes[f"packed of {count}"] = Mode("packed", count, tokens, options)
    for _ in range(options.warmup + options.steps):
        for mode in modes.values():
            mode.run()
    for mode in modes.values():
        del mode.waits[: options.warmup], mode.times[: options.warmup]
    reference = modes.get("document", next(iter(modes.values())))
    results = {}
    for packing, mode in modes.items():
        ratios = [
            (mode.targets / own) / (reference.targets / other)
            for own, other in zip(mode.times, reference.times, strict=True)
        ]
        results[packing] = {
            "segments": mode.segments,
            "rows": mode.rows,
            "filled": mode.fill,
            "ms a step": 1e3 * statistics.median(mode.times),
            "targets/s": mode.targets / statistics.median(mode.times),
            "over document": statistics.median(ratios),
            "expected": mode.expected / reference.expected,
            "median ms of wait": 1e3 * statistics.median(mode.waits),
            "share of waits": sum(mode.waits) / sum(mode.times),
            "input": mode.input / statistics.median(mode.times),
        }
        mode.data.close()
    return results


def main() -> None:
    """Prints the tables, and writes them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=float, default=10.0, help="text, at most")
    parser.add_argument("--documents", default="file", choices=["file", "line", "paragraph"])
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument(
        "--segments", type=int, help="documents in a row at most; default: as a run would choose"
    )
    parser.add_argument("--also", type=int, nargs="+", default=[], metavar="K")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--packings", nargs="+", default=list(PACKINGS), choices=PACKINGS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of each packing, timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    settings = UnitSettings(ReadSettings(documents=options.documents), 0.01)
    with tempfile.TemporaryDirectory() as name:
        folder, size = pathlib.Path(name), 0
        (folder / "text").mkdir()
        texts = []
        (unit,) = plan_units(find_inputs([STDLIB]), 1 << 40, by_line=False)
        whole = UnitSettings(ReadSettings(documents="block"))
        for k, document in enumerate(documents_of(unit, whole, Problems())):
            if size < options.mb * 1e6:
                (folder / "text" / f"{k:05d}.txt").write_text(document.text)
                size += len(document.text.encode())
                texts.append(document.text)
        every = max(1, size // 1_000_000)
        Tokenizer.train(texts[::every], options.vocab).save(folder / "tok.model")
        results: dict[str, Any] = {"MB/s": preparation(folder, settings, options)}
        for step, speed in results["MB/s"].items():
            print(f"{step:<30}{speed[0]:8.1f} MB a CPU second{speed[1]:8.1f} MB/s")
        if options.steps:
            results["training"] = training(folder, options)
            for packing, row in results["training"].items():
                print(packing, *(f"{name} {np.round(value, 5)}" for name, value in row.items()))
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    use_huge_pages()
    main()
