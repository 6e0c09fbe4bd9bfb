"""What each device of a mesh holds of a model that is loaded, and that has generated.

A random checkpoint of a config is written layer by layer in the transformers layout and loaded by
another process, on simulated devices where there is a CPU alone. The exit status is 1 if a device
then holds more than 1.2 times its share of the checkpoint's bytes:

    python benchmarks/load_mesh.py --config pldr_1b.gin
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MESH = {"data": 1, "fsdp": 4, "tensor": 2}
LIMIT = 1.2


def held_by_devices(arrays: list[Any]) -> dict[Any, int]:
    """Bytes on each device, views of the same buffer counted once."""
    import jax

    held: dict[Any, dict[int, int]] = {device: {} for device in jax.devices()}
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return {device: sum(buffers.values()) for device, buffers in held.items()}


def write(config: Any, folder: Path) -> None:
    """A checkpoint with random weights, of which no more than a layer is in memory."""
    import flax.linen as nn
    import jax
    from safetensors.numpy import save_file

    from pldr_jax.interop.config_json import PieceIds, config_json
    from pldr_jax.interop.names import to_tensors
    from pldr_jax.interop.tensors import INDEX
    from pldr_jax.interop.transformers import CONFIG
    from pldr_jax.model.decoder import init_params

    folder.mkdir()
    one = dataclasses.replace(config.model, num_layers=1)
    draw = jax.jit(lambda key: nn.unbox(init_params(one, key)))
    place, total, first = {}, 0, "decoder.dec_layers.0."
    for layer in range(config.model.num_layers):
        tensors = to_tensors(one, jax.device_get(draw(jax.random.key(layer))))
        tensors = {
            name.replace(first, f"decoder.dec_layers.{layer}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(first) or layer == 0
        }
        file = f"model-{layer + 1:05}-of-{config.model.num_layers:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        place |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / CONFIG).write_text(
        json.dumps(config_json(config.model, PieceIds(1, 2, 3), "some/code"))
    )


def watch(most: list[int], done: threading.Event) -> None:
    """Notes the largest number of bytes that a device holds, every 50 ms."""
    import jax

    while not done.wait(0.05):
        with contextlib.suppress(RuntimeError):  # an array was deleted meanwhile
            most[0] = max(most[0], *held_by_devices(jax.live_arrays()).values())


def load(folder: Path, tokens: int) -> None:
    """Prints what was held, as JSON."""
    import jax

    import pldr_jax
    from pldr_jax.config import MeshConfig, SamplingConfig
    from pldr_jax.inference.request import DecodeOptions

    begun = time.monotonic()
    most, done = [0], threading.Event()
    threading.Thread(target=watch, args=(most, done), daemon=True).start()
    lm = pldr_jax.load(folder, mesh=MeshConfig(**MESH))
    leaves = jax.block_until_ready(jax.tree.leaves(lm.params))
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    del leaves
    share = size / jax.device_count()
    seconds = [time.monotonic() - begun]
    loaded = max(held_by_devices(jax.live_arrays()).values())
    sampling = SamplingConfig(max_new_tokens=tokens)
    requests = [lm.request([1, 2, 3, 4, 5], sampling, False)]
    (_, result), *_ = [x for x in lm.run(requests, DecodeOptions(1, capacity=64), None)][-1:]
    seconds.append(time.monotonic() - begun - seconds[0])
    gc.collect()
    after = max(held_by_devices(jax.live_arrays()).values())
    done.set()
    row = {
        "parameters": count,
        "dtype": lm.config.dtype,
        "checkpoint_gb": size / 1e9,
        "share_mb": share / 1e6,
        "loaded_over_share": loaded / share,
        "generated_over_share": after / share,
        "most_over_share": max(most[0], loaded, after) / share,
        "tokens": len(result.tokens),
        "seconds_to_load_and_generate": [round(s, 1) for s in seconds],
        "process_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    print(json.dumps(row))
    if max(loaded, after) > LIMIT * share:
        sys.exit(f"a device holds {max(loaded, after) / share:.2f} times its share")


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
                done = subprocess.run([sys.executable, *sys.argv, place, *more], check=False)
                if done.returncode:
                    sys.exit(done.returncode)
        return
    import jax

    jax.config.update("jax_num_cpu_devices", options.devices)
    # The CPU's usual schedule begins all gathers of a step at once, which no accelerator's does.
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}"
    from pldr_jax.config.load import load_config

    mesh = [f"Mesh.{axis}={size}" for axis, size in MESH.items()]
    config = load_config([options.config], [*options.set, *mesh])
    if options.writes:
        write(config, options.folder)
    else:
        load(options.folder, options.tokens)


if __name__ == "__main__":
    main()
