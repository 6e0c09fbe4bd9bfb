"""Checkpoints of PyTorch: read without running code, and without PyTorch."""

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits
from safetensors.numpy import load_file
from test_convert import FORWARD, QUIET, assert_same_tensors, refused, variant

import pldr_jax
from pldr_jax.interop.convert import export_run, import_checkpoint
from pldr_jax.interop.transformers import G_STATUS, G_VALUES


class _Harm:
    """What a pickle may run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.path.touch, ())


def save_pth(path: Path, tensors: dict[str, np.ndarray], **more: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch reads .pth files; pip install torch")
    state = {
        name: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if x.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(x)
        for name, x in tensors.items()
    }
    torch.save({"model_state_dict": state, "loss": 3.5, **more}, path)


def test_pth(tmp_path: Path) -> None:
    path, out, back = tmp_path / "model.pth", tmp_path / "run", tmp_path / "back"
    tensors = variant(tmp_path / "source", dtype=ml_dtypes.bfloat16)
    save_pth(path, tensors, accuracy=0.25)
    refused("no tensor says Model.context_length", path, out)
    given = ["Model.context_length=48", "Model.rope_layout=interleaved"]
    refused("Model.g_source", path, out, overrides=[*given, "Model.g_source=identity"])
    refused("'decoder.embedding.weight' has the shape .*needs \\(62, 16\\)", path, out,
            overrides=[*given, "Model.vocab_size=62"])  # fmt: skip
    check = import_checkpoint(path, out, overrides=given, **QUIET)
    assert check.difference < FORWARD
    lm, theirs = pldr_jax.load(out), pldr_jax.load(tmp_path / "source")
    assert lm.config == theirs.config
    assert_same_bits(lm.params, theirs.params)
    export_run(out, back, **QUIET)
    assert_same_tensors(load_file(back / "model.safetensors"), tensors)


def test_pth_without_plga(tmp_path: Path) -> None:
    """The native code keeps a predefined G_LM in a file of its own."""
    path, out = tmp_path / "model.pth", tmp_path / "run"
    tensors = variant(tmp_path / "source", custom="external")
    g_lm = tensors.pop(G_VALUES)[:, 2, 0]
    del tensors[G_STATUS]
    save_pth(path, tensors)
    np.savez(tmp_path / "g.npz", G_LM=g_lm)
    given = [f"Model.{x}" for x in ("context_length=48", "num_heads=2", "head_dim=8")]
    refused("no tensor says Model.g_source", path, out, overrides=given)
    refused("contradicts", path, out, overrides=[*given, "Model.g_source=random"])
    given += ["Model.g_source=external", f"Model.g_file={tmp_path / 'g.npz'}"]
    import_checkpoint(path, out, overrides=given, **QUIET)
    lm = pldr_jax.load(out)
    assert (lm.config.g_source, lm.config.g_file) == ("external", None)
    assert np.asarray(lm.g_lm)[:, 0].tobytes() == g_lm.tobytes()
    theirs = pldr_jax.load(tmp_path / "source")
    assert_same_bits(lm.params, theirs.params)


def test_pth_never_runs_code(tmp_path: Path) -> None:
    path, harm = tmp_path / "model.pth", tmp_path / "harm"
    save_pth(path, {"a": np.zeros(2, np.float32)}, optimizer_state_dict=_Harm(harm))
    refused("would run code", path, tmp_path / "out")
    assert not harm.exists()
    save_pth(path, {"decoder.embedding.weight": np.zeros((2, 2), np.float32)})
    refused("'decoder.dec_layers.0.ffn.gluw1.weight' is missing", path, tmp_path / "out",
            overrides=["Model.context_length=4"])  # fmt: skip
    import torch

    torch.save({"weights": 1}, path)
    refused("holds no 'model_state_dict'", path, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:50])
    refused("cannot be read", path, tmp_path / "out")


def test_pth_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pth").write_bytes(b"")
    refused("pip install 'pldr_jax\\[torch\\]'", tmp_path / "model.pth", tmp_path / "out")
