"""`pldr-verify`: what is right passes, what is wrong is found, and the exit status says which."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import one_device_mesh

from pldr_jax.cli import verify as program
from pldr_jax.cli.common import run
from pldr_jax.config import ExperimentConfig, MeshConfig, ModelConfig
from pldr_jax.inference.decode import prefill
from pldr_jax.interop.weights import Checkpoint
from pldr_jax.training.step import create_state
from pldr_jax.verify import checkpoint as of_checkpoints
from pldr_jax.verify import package
from pldr_jax.verify.findings import Finding, difference
from pldr_jax.verify.published import PUBLISHED, measured, published_findings, recognised


@functools.cache
def checkpoint(dtype: str = "float32") -> Checkpoint:
    model = ModelConfig(
        vocab_size=40,
        num_layers=1,
        num_heads=2,
        head_dim=8,
        num_residual_layers=1,
        num_gated_units=1,
        context_length=24,
        dtype=dtype,  # type: ignore[arg-type]
        unroll=False,
    )
    config = ExperimentConfig(model=model)
    params = create_state(config, one_device_mesh(MeshConfig())).params
    return Checkpoint(Path("models"), None, config, params, None, None)


def wrong(findings: Any) -> list[str]:
    return [f"{one.part}: {one.what}" for one in findings if not one.right]


def test_the_equations_are_right_and_a_wrong_weight_is_found() -> None:
    case = package.PackageCase()
    findings = list(package._outputs(case, "float32"))
    assert not wrong(findings) and len(findings) > 10
    head = case.params["head"]
    case.params["head"] = {**head, "bias": head["bias"].at[3].add(0.01)}
    found = wrong(package._outputs(case, "float32"))
    assert "equations, float32: logits" in found and "losses, float32: loss" in found
    assert "equations, float32: G_LM" not in found


@pytest.mark.slow
def test_the_whole_package_is_right() -> None:
    findings = list(package.package_findings())
    assert not wrong(findings)
    parts = {one.part for one in findings}
    assert {"caches", "predefined G_LM", "training laws", "equations, bfloat16"} <= parts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_agrees_with_itself(dtype: str) -> None:
    findings = list(of_checkpoints.checkpoint_findings(checkpoint(dtype)))
    assert not wrong(findings), findings
    assert {one.part for one in findings} == {"logits", "batches", "padding", "caches", "frozen"}


@pytest.mark.slow
def test_padding_that_is_summed_over_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(
        config: Any, params: Any, tokens: Any, length: Any, *rest: Any, **more: Any
    ) -> Any:
        return prefill(config, params, tokens, length * 0 + tokens.shape[1], *rest, **more)

    monkeypatch.setattr(of_checkpoints, "prefill", careless)
    found = wrong(of_checkpoints.checkpoint_findings(checkpoint()))
    assert "padding: other tokens behind the prompt" in found


def test_a_published_checkpoint_is_known_by_its_revision(tmp_path: Path) -> None:
    for published in PUBLISHED:
        folder = tmp_path / "snapshots" / f"{published.revision:0<40}"
        assert recognised(dataclasses.replace(checkpoint(), folder=folder)) is published
    assert recognised(checkpoint()) is None
    soc5, found = PUBLISHED[1], measured(checkpoint())
    assert set(found) == set(soc5.figures) and all(map(math.isfinite, found.values()))
    assert len(wrong(published_findings(checkpoint(), soc5))) >= 7  # it is another model
    itself = dataclasses.replace(soc5, figures=found)
    assert not wrong(published_findings(checkpoint(), itself))


@pytest.mark.parametrize("value,status", [(0.0, 0), (2.0, 1), (math.nan, 1)])
def test_the_exit_status_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float, status: int
) -> None:
    one = Finding("caches", "tokens", value, 1.0)
    monkeypatch.setattr(package, "package_findings", lambda: iter([one]))
    found = 0
    try:
        run(program.verify_main, [])
    except SystemExit as end:
        found = int(end.code or 0)
    assert found == status
    printed = capsys.readouterr().out
    assert ("WRONG" in printed) == bool(status) and "1 checks" in printed


def test_other_shapes_are_no_agreement() -> None:
    assert math.isnan(difference(np.zeros(3), np.zeros((3, 1))))
