"""What `train.py --plan` predicts of the 110M model's step, by a process of its own on the CPU.

    python benchmarks/gpu_memory.py BATCH... [Model.field=VALUE ...]

prints JSON, which `benchmarks/gpu.py --plan` reads; without that it asks for it.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def planned(batches: list[int], settings: list[str], seconds: float) -> dict[str, Any]:
    """Batch, as text -> what is predicted, by a new process that may take so many seconds."""
    command = [sys.executable, __file__, *map(str, batches), *settings]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no plan"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def predict_all(batches: list[int], settings: list[str]) -> dict[str, Any]:
    """The predictions, in this process."""
    import jax

    from pldr_jax.config.load import load_config
    from pldr_jax.partition import build_mesh
    from pldr_jax.training.plan.chips import CHIPS
    from pldr_jax.training.plan.compile import make_plan, predict

    found = {}
    for batch in batches:
        overrides = [*settings, f"Data.batch_size={batch}"]
        config = load_config([ROOT / "configs" / "pldr_110m.gin"], overrides)
        mesh = build_mesh(config.mesh, jax.devices()[:1])
        plan = make_plan(config, mesh, "the CPU's")
        row = dataclasses.asdict(plan)
        if config.model.dtype == "bfloat16":
            row["h100"] = dataclasses.asdict(predict(config, plan, CHIPS["h100"]))
        found[str(batch)] = row
    return found


def main() -> None:
    """Prints the predictions for the batches and settings of the command line."""
    sys.path.insert(0, str(ROOT))
    batches = [int(x) for x in sys.argv[1:] if x.isdigit()]
    print(json.dumps(predict_all(batches, [x for x in sys.argv[1:] if "=" in x])))


if __name__ == "__main__":
    main()
