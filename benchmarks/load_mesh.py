"""What each device of a mesh holds of a model that is loaded, and that has generated.

A random checkpoint of a config is written as a run folder and loaded by a process of its own, on
simulated devices where there are none: python benchmarks/load_mesh.py --config pldr_1b.gin
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def held_by_devices(arrays: list[Any]) -> dict[Any, int]:
    """Bytes on each device, views of the same buffer counted once."""
    import jax

    held: dict[Any, dict[int, int]] = {device: {} for device in jax.devices()}
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return {device: sum(buffers.values()) for device, buffers in held.items()}


def write(config: Any, folder: Path) -> None:
    """A run folder with random weights, which are drawn in their parts."""
    import flax.linen as nn
    import jax

    from pldr_jax.config import MeshConfig
    from pldr_jax.config.load import config_to_dict
    from pldr_jax.model.counts.shapes import param_shardings
    from pldr_jax.model.decoder import init_params
    from pldr_jax.partition import build_mesh
    from pldr_jax.runs.folder import write_run

    places = param_shardings(config.model, build_mesh(MeshConfig(**MESH)))
    draw = jax.jit(lambda key: nn.unbox(init_params(config.model, key)), out_shardings=places)
    params = draw(jax.random.key(0))
    write_run(folder, 0, params, None, config_to_dict(config), {})


def load(folder: Path, tokens: int) -> None:
    """Prints what was held, as JSON."""
    import jax

    import pldr_jax
    from pldr_jax.config import MeshConfig, SamplingConfig
    from pldr_jax.inference.request import DecodeOptions

    begun = time.monotonic()
    lm = pldr_jax.load(folder, mesh=MeshConfig(**MESH))
    jax.block_until_ready(lm.params)
    leaves = jax.tree.leaves(lm.params)
    share = sum(leaf.nbytes for leaf in leaves) / jax.device_count()
    seconds = [time.monotonic() - begun]
    loaded = max(held_by_devices(jax.live_arrays()).values())
    sampling = SamplingConfig(max_new_tokens=tokens)
    requests = [lm.request([1, 2, 3, 4, 5], sampling, False)]
    (_, result), *_ = [x for x in lm.run(requests, DecodeOptions(1, capacity=64), None)][-1:]
    seconds.append(time.monotonic() - begun - seconds[0])
    after = max(held_by_devices(jax.live_arrays()).values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "parameters": sum(leaf.size for leaf in leaves),
                "share_mb": share / 1e6,
                "loaded_over_share": loaded / share,
                "generated_over_share": after / share,
                "tokens": len(result.tokens),
                "seconds_to_load_and_generate": [round(s, 1) for s in seconds],
                "process_peak_gb": peak / 1e9,
            }
        )
    )


def main() -> None:
    """Writes in one process, and loads in another one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="pldr_1b.gin")
    parser.add_argument("--set", action="append", default=[], metavar="Group.field=value")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--devices", type=int, default=8, help="simulated ones")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--writes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            place = f"--folder={folder}/run"
            for more in (["--writes"], []):
                subprocess.run([sys.executable, *sys.argv, place, *more], check=True)
        return
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        import jax

        jax.config.update("jax_num_cpu_devices", options.devices)
    from pldr_jax.config.load import load_config

    mesh = [f"Mesh.{axis}={size}" for axis, size in MESH.items()]
    config = load_config([options.config], [*options.set, *mesh])
    if options.writes:
        write(config, options.folder)
    else:
        load(options.folder, options.tokens)


if __name__ == "__main__":
    main()
