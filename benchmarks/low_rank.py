"""What the rank of a G_LM saves: key caches by error budget, and decode speed.

    python benchmarks/low_rank.py G_LM.npz                   # [L,N,H,H], or [L,1,N,H,H], alone
    python benchmarks/low_rank.py G_LM.npz --rounds 0        # the table of ranks only
    python benchmarks/low_rank.py --rank 16                  # no file: every head of this rank

The first table needs nothing but the tensor: the smallest rank of each head within each error
budget (relative, Frobenius norm), and how many times fewer numbers a key takes.

The second table times the decode step as `benchmarks/decode.py` does (`STEPS` greedy tokens a call,
caches half full at the first, all variants in turn, round after round) of a model of the tensor's
size with random weights: ordinary attention (SDPA), one whole G_LM for all rows (frozen), and its
low-rank form at each budget. `to_frozen` is the median over rounds of the ratio of two steps that
were timed one after the other, with its quartiles.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from decode import Bandwidth, Compilations, Variant, measure

from pldr_jax.cli.huge_pages import use_huge_pages
from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.model.decoder import init_params
from pldr_jax.model.deductive import read_tensor
from pldr_jax.model.low_rank import factorize, singular_values
from pldr_jax.training.freeze.rank_budget import savings

COLUMNS = {
    "batch": "5d",
    "context": "7d",
    "variant": ">10s",
    "step_ms": "9.2f",
    "tokens_s": "9.1f",
    "to_sdpa": "8.3f",
    "to_frozen": "9.3f",
    "quartiles": ">13s",
    "cache_MiB": "9.1f",
}


def synthetic(rank: int) -> np.ndarray:
    """A random G_LM [L,N,H,J] of the 110M model, every head of this rank."""
    rng = np.random.default_rng(0)
    shape = (5, 14, 64, rank)
    return rng.normal(size=shape) @ np.swapaxes(rng.normal(size=shape), -1, -2)


def print_ranks(g_lm: np.ndarray, budgets: list[float]) -> None:
    """The table of what the tensor allows."""
    values_LNH = singular_values(g_lm[:, 0] if g_lm.ndim == 5 else g_lm)
    print("\nnumbers cached as keys, times fewer          smallest rank of each head")
    print("   budget    ideal     kept   padded   cache")
    for budget in budgets:
        saved = savings(values_LNH, factorize(g_lm, budget), budget)
        keys = (saved["keys"][name] for name in ("ideal", "kept", "padded"))
        cells = [f"{budget:9g}", *(f"{x:8.2f}" for x in keys), f"{saved['cache']:7.2f}"]
        for layer, ranks in enumerate(saved["rank"]):
            lead = " ".join(cells) if layer == 0 else " " * 44
            print(f"{lead}  layer {layer}: {' '.join(map(str, ranks))}")


def line(row: dict[str, Any]) -> str:
    """A row of the table of speeds."""
    low, high = row["to_frozen_quartiles"]
    row = row | {"quartiles": f"{low:.3f}-{high:.3f}"}
    return " ".join(format(row[name], form) for name, form in COLUMNS.items())


def main() -> None:
    """Parses the command line and prints the tables."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("g_lm", nargs="?", help="npz, npy or safetensors file", metavar="FILE")
    parser.add_argument("--rank", type=int, default=16, help="of every head, without a file")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0, 1e-4, 1e-3, 1e-2])
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=15, help="0: no speeds")
    parser.add_argument("--json", help="also write the rows to this file", metavar="PATH")
    options = parser.parse_args()
    try:
        g_lm = read_tensor(options.g_lm) if options.g_lm else synthetic(options.rank)
        print_ranks(g_lm, options.budgets)
    except ConfigError as error:
        parser.error(str(error))
    if options.rounds:
        rows = time_steps(g_lm, options)
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


def time_steps(g_lm: np.ndarray, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints and returns the table of speeds."""
    layers, heads, head_dim = g_lm.shape[0], *g_lm.shape[-3:-1]
    config = ModelConfig(
        vocab_size=options.vocab,
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        context_length=max(options.contexts),
        dtype=options.dtype,
        g_source="external",
        unroll=False,
    )
    params = jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0))
    whole = jnp.asarray(g_lm, jnp.float32).reshape(layers, 1, heads, head_dim, head_dim)
    variants = [Variant("SDPA", config, params), Variant("frozen", config, params, whole)]
    variants += [
        Variant(f"{budget:g}", config, params, factorize(whole, budget))
        for budget in options.budgets
    ]
    compilations, bandwidth = Compilations(), Bandwidth()
    device = jax.devices()[0]
    print(f"\n{device.platform} ({device.device_kind}), {options.dtype}, {options.rounds} rounds")
    print(" ".join(f"{name:>{form.strip('>dfs').split('.')[0]}}" for name, form in COLUMNS.items()))
    rows = []
    for context in options.contexts:
        for batch in options.batches:
            case = measure(variants, batch, context, options.rounds, bandwidth, compilations, False)
            print("\n".join(line(row) for row in case), flush=True)
            rows += case
    return rows


if __name__ == "__main__":
    use_huge_pages()
    main()
