"""What the TPU's own compiler makes of the model, on a machine without a TPU.

    pip install libtpu                                                   # the compiler
    python benchmarks/tpu_compile.py                                     # the step of 110M, v5e 2x4
    python benchmarks/tpu_compile.py --chips v5e v5p v6e --models 110m 1b \
        --programs train evaluate prefill decode --attention auto flash
    python benchmarks/tpu_compile.py --mesh 1 4 2 --programs decode --batch 8 --layers 2

A compilation takes minutes on a few cores; a line on stderr says how many so far. A model's depth
hardly matters (layers are scanned), except for `decode`, whose layers are not. For each program:

    HBM          bytes of a chip: arguments and temporaries
    FLOPs        the model's own, counted from its products (`model/counts/flops.py`), of a chip
    traffic      bytes that instructions read and write, loops counted as often as they run
    links        bytes that a chip sends, by ring algorithms, and how many times what its parameters
                 take in the compute dtype
    copies       bytes that are only moved into another layout
    padding      what rounding up to whole tiles adds to the bytes of results (heads of 64 in lanes
                 of 128)
    seconds      at the chip's stated rates: products, memory, links

and below it the collectives, the largest first.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling touches no chip, so that what another process left or holds in the way of a lock is none
# of its business.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from hlo import collectives, instructions

from pldr_jax.config import ConfigError, ExperimentConfig, MeshConfig, ModelConfig
from pldr_jax.config.load import load_config
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.model.cache import empty_cache
from pldr_jax.model.counts.flops import forward_flops, training_flops
from pldr_jax.model.counts.shapes import count_params
from pldr_jax.model.decoder import unstack_layers
from pldr_jax.partition import batch_sharding
from pldr_jax.training.losses import token_loss
from pldr_jax.training.plan.chips import CHIPS, Chip
from pldr_jax.training.plan.compile import plan_mesh
from pldr_jax.training.rows import forward_rows
from pldr_jax.training.step import abstract_state, jit_train_step

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {"tiny": "nano.gin", "110m": "pldr_110m.gin", "1b": "pldr_1b.gin"}
PROGRAMS = ("train", "evaluate", "prefill", "decode")
NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "iota",
}  # fmt: skip


def lower(program: str, config: ExperimentConfig, mesh: Any, batch: int) -> Any:
    """The program of a mesh in scope, lowered on abstract arrays.

    `batch` rows are trained on, evaluated, prefilled or decoded; prompts are half a context long.
    """
    model, context = config.model, config.model.context_length
    state = abstract_state(config, mesh)

    def split(shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, "int32", sharding=batch_sharding(mesh, shape))

    with jax.set_mesh(mesh):
        if program == "train":
            return jit_train_step(config, mesh, state).lower(state, split((batch, context)))
        if program == "evaluate":

            def evaluate(params: Any, rows: jax.Array) -> Any:
                outputs, targets_BT, _ = forward_rows(model, params, rows)
                return token_loss(outputs.logits, targets_BT)

            return jax.jit(evaluate).lower(state.params, split((batch, context)))
        if program == "prefill":

            def admit(params: Any, tokens_BT: jax.Array, length_B: jax.Array) -> Any:
                return prefill(model, params, tokens_BT, length_B, None, context)

            return jax.jit(admit).lower(state.params, split((batch, context // 2)), split((batch,)))
        unstack = jax.jit(lambda params: unstack_layers(model, params))
        cache = jax.jit(lambda: empty_cache(model, batch, context, None, "G_LM", model.dtype))

        def decode(unstacked: Any, tokens_B: jax.Array, cache: Any) -> Any:
            return decode_step(model, unstacked, tokens_B, cache)

        lowered = jax.jit(decode, donate_argnums=2)
        return lowered.lower(placed(unstack, state.params), split((batch,)), placed(cache))


def placed(function: Any, *arguments: Any) -> Any:
    """What a jitted function returns, as abstract arrays where the compiler puts them."""
    lowered = function.lower(*arguments)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )


def measure(
    program: str, config: ExperimentConfig, mesh: Any, chip: Chip, batch: int
) -> dict[str, Any]:
    """Compiles a program and reads off what it needs."""
    start = time.perf_counter()
    compiled = lower(program, config, mesh, batch).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    shapes = {i.name: i.shapes for i in instructions(text)}
    fused = {name for i in instructions(text) if i.op == "fusion" for name in i.called}
    traffic = copies = plain = padded = 0
    for i in instructions(text):
        if i.computation in fused or i.op in NO_TRAFFIC or i.op.endswith("-done"):
            continue
        result = sum(shape.nbytes for shape in i.shapes)
        read = sum(s.nbytes for name in i.operands for s in shapes.get(name, ()))
        traffic += i.times * (result + read)
        plain += i.times * result
        padded += i.times * sum(shape.padded for shape in i.shapes)
        copies += i.times * result * (i.op in ("copy", "copy-start", "transpose"))
    found = collectives(text)
    links = sum(one.link_bytes for one in found)
    parameters = count_params(config.model) * jnp.dtype(config.model.dtype).itemsize
    flops = model_flops(program, config.model, batch) / mesh.size
    return {
        "program": program,
        "attention": config.model.attention_kernel,
        "HBM": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "FLOPs": flops,
        "traffic": traffic,
        "links": links,
        "links_over_parameters": links / parameters,
        "copies": copies,
        "padding": padded / max(plain, 1) - 1,
        "seconds": [flops / chip.flops, traffic / chip.bandwidth, links / chip.link],
        "compile_s": time.perf_counter() - start,
        "collectives": [
            {
                "kind": one.kind,
                "shapes": " ".join(map(str, one.shapes)),
                "times": one.times,
                "devices": len(one.groups[0]) if one.groups else 1,
                "bytes": one.link_bytes,
                "scope": one.scope,
            }
            for one in sorted(found, key=lambda one: -one.link_bytes)
        ],
    }


def model_flops(program: str, model: ModelConfig, batch: int) -> float:
    """The model's own operations in a call of the program."""
    context = model.context_length
    if program == "train":
        return training_flops(model, batch, context - 1)
    if program == "decode":  # half a cache of keys; the metric learner is not run
        one = forward_flops(dataclasses.replace(model, g_source="identity"), 1)
        cached = 4 * model.num_layers * model.model_dim * context / 2
        return batch * (sum(one.values()) + cached)
    return batch * sum(
        forward_flops(model, context if program == "evaluate" else context // 2).values()
    )


@contextlib.contextmanager
def alive(what: str) -> Iterator[None]:
    """Says on stderr, while something takes minutes, that it goes on."""
    done = threading.Event()

    def report() -> None:
        start = time.perf_counter()
        while not done.wait(20):
            print(f"compiling {what}: {time.perf_counter() - start:.0f} s", file=sys.stderr)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def print_row(row: dict[str, Any], shown: int) -> None:
    """One program, and its largest collectives."""
    mb = {name: f"{row[name] / 1e6:,.0f}" for name in ("HBM", "traffic", "links", "copies")}
    seconds = ", ".join(f"{1e3 * x:.2f}" for x in row["seconds"])
    print(
        f"{row['program']:9s}{row['attention']:7s} HBM {mb['HBM']} MB  FLOPs {row['FLOPs']:.3e}  "
        f"traffic {mb['traffic']} MB  links {mb['links']} MB = "
        f"{row['links_over_parameters']:.2f} x parameters  copies {mb['copies']} MB  "
        f"padding {row['padding']:.0%}  "
        f"products, memory, links {seconds} ms  ({row['compile_s']:.0f} s)"
    )
    for one in row["collectives"][:shown]:
        print(
            f"    {one['bytes'] / 1e6:9.2f} MB {one['kind']:15s} {one['times']:4d} x of "
            f"{one['devices']} {one['shapes'][:60]:60s} {one['scope'][-60:]}"
        )
    rest = row["collectives"][shown:]
    if rest:
        kinds = collections.Counter(one["kind"] for one in rest)
        print(f"    {sum(one['bytes'] for one in rest) / 1e6:9.2f} MB in {dict(kinds)}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    tpus = [name for name, chip in CHIPS.items() if chip.topologies]
    parser.add_argument("--chips", nargs="+", choices=tpus, default=["v5e"])
    parser.add_argument("--devices", type=int, default=8, help="chips in the slice")
    parser.add_argument(
        "--mesh", type=int, nargs=3, metavar=("DATA", "FSDP", "TENSOR"), default=(1, -1, 1)
    )
    parser.add_argument("--models", nargs="+", choices=FILES, default=["110m"])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=["train"])
    parser.add_argument(
        "--attention", nargs="+", choices=("auto", "flash", "xla"), default=["auto"]
    )
    parser.add_argument("--batch", type=int, default=64, help="rows of the slice")
    parser.add_argument("--layers", type=int, help="another depth than the config's")
    parser.add_argument("--context", type=int, help="another context than the config's")
    parser.add_argument("--collectives", type=int, default=8, help="printed of each program")
    parser.add_argument("--json", help="also write the rows to this file", metavar="PATH")
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        parser.error("the TPU's compiler is not here: pip install libtpu")
    for chip in options.chips:
        if options.devices not in CHIPS[chip].topologies:
            parser.error(f"--devices: {chip} has slices of {sorted(CHIPS[chip].topologies)}")
    return options


def main() -> None:
    """Compiles what the command line names and prints the table."""
    options = parse()
    rows = []
    cases = [(c, m, p, a) for c in options.chips for m in options.models
             for p in options.programs for a in options.attention]  # fmt: skip
    for chip, name, program, attention in cases:
        sets = [f"Model.attention_kernel='{attention}'", f"Data.batch_size={options.batch}"]
        sets += [f"Model.num_layers={options.layers}"] * bool(options.layers)
        sets += [f"Model.context_length={options.context}"] * bool(options.context)
        sets += ["Model.dtype='bfloat16'"]
        config = load_config([CONFIGS / FILES[name]], sets)
        config = dataclasses.replace(config, mesh=MeshConfig(*options.mesh))
        mesh, compiler = plan_mesh(config.mesh, options.devices, CHIPS[chip])
        if mesh.devices.flat[0].platform != "tpu":
            sys.exit(f"error: this libtpu does not know {chip}: pip install --upgrade libtpu")
        print(f"{name} on {chip}, mesh {tuple(mesh.shape.values())}, {compiler}", flush=True)
        with alive(f"{program} of {name} for {chip}"):
            row = measure(program, config, mesh, CHIPS[chip], options.batch)
        rows.append({"chip": chip, "model": name, "mesh": tuple(mesh.shape.values()), **row})
        print_row(rows[-1], options.collectives)
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "lockfile" not in str(error) and "already in use" not in str(error):
            raise
        sys.exit(
            "error: another compilation holds /tmp/libtpu_lockfile, or one that was killed left "
            "it: wait for it, or remove that file"
        )
