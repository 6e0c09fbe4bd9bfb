"""Throughput of a queue of short prompts through `infer.py`, of one checkout beside another.

    python benchmarks/infer.py --checkouts /path/to/before . --layers 5 --heads 14 --head_dim 64

writes a random checkpoint, and lets each checkout continue 8 prompts and then all of them, in
turns. The difference of the two times is that of the other prompts, without start and compilation;
programs are compiled before the first round. Prints a line for each checkout, with the ratio of
each round to the first one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from safetensors.numpy import save_file

from pldr_jax.config import ModelConfig
from pldr_jax.interop.config_json import PieceIds, config_json
from pldr_jax.interop.transformers import to_source
from pldr_jax.model.decoder import Params, init_params

FEW = 8


def write_prompts(path: Path, count: int, vocab: int) -> None:
    """Prompts of 2 to 15 token ids, which share a bucket, and no two of which are the same."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(count):
            ids = rng.integers(1, vocab, int(rng.integers(2, 16))).tolist()
            file.write(json.dumps({"tokens": ids}) + "\n")


def write_checkpoint(folder: Path, model: ModelConfig, params: Params) -> None:
    """In the transformers layout, which every checkout reads."""
    folder.mkdir()
    fields = config_json(model, PieceIds(1, 2, 3), "some/code")
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(to_source(model, params, None), folder / "model.safetensors", {"format": "pt"})


def seconds(checkout: Path, folder: Path, prompts: Path, options: argparse.Namespace) -> float:
    """Wall time of one `infer.py`."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PLDR_CACHE": str(folder / "cache")}
    output = folder / "out.jsonl"
    output.unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            str(checkout / "infer.py"),
            f"--checkpoint={folder / 'run'}",
            f"--prompt_file={prompts}",
            f"--output={output}",
            f"--batch_size={options.batch_size}",
            f"--max_new_tokens={options.new}",
        ],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    taken = time.perf_counter() - start
    count = len(output.read_text().splitlines())
    assert count == len(prompts.read_text().splitlines()), "some prompts have no result"
    return taken


def main() -> None:
    """Parses the command line and prints the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[Path()])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new", type=int, default=16, help="tokens of each continuation")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = ModelConfig(
        vocab_size=options.vocab,
        num_layers=options.layers,
        num_heads=options.heads,
        head_dim=options.head_dim,
        unroll=False,
    )
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    checkouts = [path.resolve() for path in options.checkouts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "run", model, params)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        write_prompts(few, FEW, options.vocab)
        write_prompts(many, options.prompts, options.vocab)
        for checkout in checkouts:
            seconds(checkout, folder, many, options)  # compiles
        times: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
        for _ in range(options.rounds):
            for checkout in checkouts:
                start = seconds(checkout, folder, few, options)
                times[checkout].append(seconds(checkout, folder, many, options) - start)
    for checkout, taken in times.items():
        rate = (options.prompts - FEW) * options.new / statistics.median(taken)
        first = times[checkouts[0]]
        ratios = " ".join(f"{a / b:.2f}" for a, b in zip(first, taken, strict=True))
        print(f"{checkout}: {rate:.1f} tokens/s; times the first checkout, by round: {ratios}")


if __name__ == "__main__":
    main()
