"""Audits against the authors' float64 figures, closed forms, and plain NumPy."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, load_golden
from safetensors.numpy import load_file

from pldr_jax.analysis.audits.contract import FrozenContract
from pldr_jax.analysis.audits.decoding import Decoding
from pldr_jax.analysis.audits.row_map import RowMap
from pldr_jax.analysis.audits.symmetry import Symmetry
from pldr_jax.analysis.section import Settings
from pldr_jax.api import LanguageModel
from pldr_jax.config import ModelConfig
from pldr_jax.interop import reference
from pldr_jax.interop.names import to_tensors
from pldr_jax.model import audits
from pldr_jax.training.freeze import contract
from pldr_jax.training.freeze.calibrate import RowSet, without_plga

RNG = np.random.default_rng(0)
STUDY = ModelConfig(num_layers=1, num_heads=2, head_dim=64)
ROWS = RNG.integers(1, 61, (5, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    folder = GOLDENS / "audit"
    return load_file(folder / "golden.safetensors") | json.loads(
        (folder / "golden.json").read_text()
    )


@pytest.fixture(scope="module")
def float64() -> dict[str, np.ndarray]:
    """Logits [B,T,V], deductive outputs and LayerNorm(Q^T Q) [L,B,N,H,J] of `deep`."""
    deep = load_golden("deep")
    tensors = to_tensors(deep.config, deep.params)
    rows: list[dict[str, np.ndarray]] = []
    visited: list[np.ndarray] = []
    deductive = reference._Layers.deductive

    def record(self: Any, name: str, q_NTH: np.ndarray) -> dict[str, np.ndarray]:
        visited.append(self.norm(f"{name}.layernorm1", np.swapaxes(q_NTH, 1, 2) @ q_NTH))
        return deductive(self, name, q_NTH)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference._Layers, "deductive", record)
        for tokens in deep.rows[:, :-1]:
            logits, outputs = reference.reference_outputs(deep.config, tensors, tokens, None)
            rows.append(outputs | {"logits": logits[None], "visited": np.stack(visited)})
            visited.clear()
    return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}


def test_the_authors_figures(figures: dict[str, Any], float64: dict[str, np.ndarray]) -> None:
    """Their rotations are float32 also in float64, which moves queries by 1e-7 and the figures by
    what is allowed here; `phi` itself is exact.
    """
    deep = load_golden("deep")
    A, G_LM = float64["A"], float64["G_LM"]
    close = {"rtol": 0, "atol": 2e-8}
    np.testing.assert_allclose(audits.row_contrast(A), figures["row_variance_ratio_LBN"], **close)
    residual = audits.commutant_residual(deep.config, G_LM)
    np.testing.assert_allclose(residual, figures["commutant_residual_LBN"], **close)
    assert np.median(residual) == pytest.approx(figures["commutant_median"], abs=1e-9)
    for name, x in (("A", A), ("G_LM", G_LM)):
        expected = figures[f"order_rms_{name}_rows_0_1"]
        assert audits.stabilised_order(x[:, 0], x[:, 1]) == pytest.approx(expected, abs=2e-8)
    margins = audits.decode_margins(float64["logits"][0])
    np.testing.assert_allclose(margins, figures["margin_BT"], atol=1e-6)
    with jax.enable_x64(True):
        rows_LRH = jnp.asarray(float64["visited"][:, 0].reshape(3, -1, 16))
        phi_LRH, jacobians = audits.row_map_jacobians(deep.config, deep.params, rows_LRH)
        np.testing.assert_allclose(phi_LRH, A[:, 0].reshape(3, -1, 16), atol=1e-13)
        values_LRH = np.linalg.svd(np.asarray(jacobians), compute_uv=False)
    np.testing.assert_allclose(values_LRH, figures["rowmap_singular_values_LRH"], atol=1e-6)
    np.testing.assert_allclose(
        values_LRH.max((1, 2)), figures["rowmap_sigma_max_per_layer"], rtol=1e-6
    )
    np.testing.assert_allclose(
        audits.median_sigma(values_LRH[..., 0]),
        figures["rowmap_sigma_max_median_per_layer"],
        rtol=1e-6,
    )


def test_the_figures_from_float32_outputs(figures: dict[str, Any]) -> None:
    deep = load_golden("deep")
    tokens_BT = jnp.asarray(deep.rows[:, :-1])
    outputs = LanguageModel(deep.config, deep.params)(tokens_BT)
    A, G_LM = np.asarray(outputs.deductive.A), np.asarray(outputs.deductive.G_LM)
    close = {"rtol": 0, "atol": 1e-4}
    np.testing.assert_allclose(audits.row_contrast(A), figures["row_variance_ratio_LBN"], **close)
    residual = audits.commutant_residual(deep.config, G_LM)
    np.testing.assert_allclose(residual, figures["commutant_residual_LBN"], **close)
    np.testing.assert_allclose(
        audits.decode_margins(np.asarray(outputs.logits)), figures["margin_BT"], **close
    )
    rows = audits.visited_rows(deep.config, deep.params, tokens_BT)[:, 0].reshape(3, -1, 16)
    sigma_LR = audits.largest_singular_values(deep.config, deep.params, rows)
    expected = figures["rowmap_singular_values_LRH"][..., 0]
    np.testing.assert_allclose(sigma_LR, expected, **close)
    quick = jax.jit(audits.quick_audits, static_argnums=(0, 4))(
        deep.config, deep.params, tokens_BT, None, rows.shape[1]
    )
    assert quick["order_rms/A"] == pytest.approx(figures["order_rms_A_rows_0_1"], abs=1e-4)
    assert quick["order_rms/G_LM"] == pytest.approx(figures["order_rms_G_LM_rows_0_1"], abs=1e-4)
    assert quick["row_contrast"] == pytest.approx(audits.row_contrast(A).mean(), abs=1e-4)
    assert 1.5 < quick["rowmap_sigma"] < 2  # medians by layer are 1.74, 1.81 and 1.76
    padded = jnp.pad(tokens_BT, ((0, 0), (0, 3)), constant_values=7)
    length_B = jnp.full(2, tokens_BT.shape[1], jnp.int32)
    again = audits.quick_audits(deep.config, deep.params, padded, length_B, rows.shape[1])
    for name, value in quick.items():
        assert float(again[name]) == pytest.approx(float(value), rel=1e-4), name


def test_the_constants_of_the_twirl() -> None:
    frequencies = audits.twirl_frequencies(STUDY)
    assert len(frequencies) == 2016
    largest = (1 / np.abs(np.sin(frequencies / 2))).max()
    assert largest == pytest.approx(44968.27712271532, rel=1e-12)
    medians = {64: 0.27497705612426776, 256: 0.05372221955183145, 1024: 0.012758660064596179}
    for positions, median in medians.items():
        damping = audits.twirl_damping(frequencies, positions)
        assert np.median(damping) == pytest.approx(median, rel=1e-12)
    slowest = audits.twirl_damping(2 * audits.rope_frequencies(STUDY)[31], 1024)
    assert slowest == pytest.approx(0.9968951306183299, rel=1e-12)


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_rotations_commute_and_the_twirl_is_the_mean_over_positions(layout: str) -> None:
    config = ModelConfig(num_layers=1, num_heads=1, head_dim=8, rope_layout=layout)

    def rotation(position: float) -> np.ndarray:
        turned = reference._rotate(config, np.repeat(np.eye(8)[:, None], 2, axis=1))[:, 1]
        return np.linalg.matrix_power(turned.T, int(position))

    alternating = np.diag([1.0, -1.0] * 4 if layout == "interleaved" else [1.0] * 4 + [-1.0] * 4)
    x = np.stack([np.eye(8), rotation(3), alternating, np.zeros((8, 8))])
    np.testing.assert_allclose(audits.commutant_residual(config, x), [0, 0, 1, 0], atol=1e-15)
    matrix = RNG.normal(size=(8, 8))
    mean = np.mean([rotation(s).T @ matrix @ rotation(s) for s in range(7)], axis=0)
    np.testing.assert_allclose(audits.twirled(config, matrix, 7), mean, atol=1e-13)
    many = audits.twirled(config, matrix, 200_000)
    assert (
        audits.commutant_residual(config, many) < 0.05 < audits.commutant_residual(config, matrix)
    )


def test_order_contrast_and_margins_by_hand() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert audits.stabilised_order(x, x) == 0 == audits.stabilised_order(0 * x, 0 * x)
    assert audits.stabilised_order(x, -x) == 2 and audits.stabilised_order(x, 0 * x) == 2
    assert audits.row_contrast(np.tile([1.0, 2.0, 5.0], (3, 1))) == 0
    assert audits.row_contrast(np.full((3, 3), 2.0)) == 0
    assert audits.row_contrast(np.tile([[1.0], [2.0], [5.0]], (1, 3))) == 1
    np.testing.assert_allclose(
        audits.decode_margins(np.array([[1.0, 4.0, 2.5], [1, 1, 0]])), [1.5, 0]
    )
    ratios, diameter = audits.contraction(
        np.array([[0.0], [1], [3], [3]]), np.array([[0.0], [2], [3], [3]])
    )
    assert sorted(ratios) == [0.5, 0.5, 1, 1, 2] and diameter == 3
    difference, size = audits.centred_squares(np.array([1.0, 3]), np.array([4.0, 8]))
    assert (difference, size) == (2, 2)  # (-1, 1) and (-2, 2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tiny = load_golden("tiny")
    return LanguageModel(tiny.config, tiny.params)


@pytest.mark.parametrize("section", [RowMap, Symmetry, Decoding, FrozenContract])
def test_sections_do_not_depend_on_batches(model: LanguageModel, section: Any) -> None:
    done: list[int] = []
    first = section.measure(model, ROWS, Settings(2, advance=done.append))
    second = section.measure(model, ROWS, Settings(3))
    assert sum(done) == len(ROWS)
    rendered = first.rendered()
    assert rendered.words and all(figure.png[1:4] == b"PNG" for figure in rendered.figures)
    for table in rendered.tables:
        assert table.rows and {len(row) for row in table.rows} == {len(table.columns)}

    def compare(x: Any, y: Any, path: str) -> None:
        if isinstance(x, dict):
            for name in x:
                compare(x[name], y[name], f"{path}.{name}")
        elif isinstance(x, (float, list)) and "with_and_without" not in path:
            if not (isinstance(x, list) and isinstance(x[0], dict)):
                np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4, err_msg=path)

    compare(first.numbers, second.numbers, section.key)


def test_the_row_map_section(model: LanguageModel) -> None:
    section = RowMap.measure(model, ROWS, Settings(2), visited=20)
    assert section.numbers["rows"] == 20 and section.numbers["verdict"] == "not flat"
    tokens_BT = ROWS[:, :-1]
    rows = np.asarray(audits.visited_rows(model.config, model.params, tokens_BT))
    A = np.asarray(model(tokens_BT).deductive.A)
    np.testing.assert_allclose(
        section.numbers["row_contrast"], audits.row_contrast(A.astype(float)).mean(1), atol=1e-4
    )
    phi, _ = audits.row_map_jacobians(model.config, model.params, rows.reshape(2, -1, 8))
    np.testing.assert_allclose(phi, A.reshape(2, -1, 8), atol=1e-4)
    attention = model.params["layers"]["attention"]
    small = jax.tree.map(lambda leaf: 1e-3 * leaf, attention["plga"]["residual"]["norm"])
    plga = {**attention["plga"], "residual": {**attention["plga"]["residual"], "norm": small}}
    layers = {**model.params["layers"], "attention": {**attention, "plga": plga}}
    flat = RowMap.measure(LanguageModel(model.config, {**model.params, "layers": layers}), ROWS)
    assert flat.numbers["verdict"] == "flat" and flat.numbers["sigma"] < audits.FLAT


def test_padding_is_probed(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    section = Decoding.measure(model, ROWS, Settings(2))
    probe = section.numbers["padding"]
    assert probe["between_paddings"] == 0 and probe["with_and_without"] < 1e-4
    assert section.words()[0].startswith("Padding does not reach real tokens")
    logits = np.asarray(model(ROWS[:, :-1]).logits, np.float64)
    top = np.sort(logits, axis=-1)
    certain = (top[..., -1] - top[..., -2] > 0.02).mean()
    assert section.numbers["certain"]["0.01"] == pytest.approx(certain, abs=0.02)
    assert section.numbers["tokens"] == logits[..., 0].size


def test_the_contract(model: LanguageModel) -> None:
    lengths = contract.frozen_contract(model.config, model.params, ROWS[:2], ROWS[2:], (8, 32, 64))
    assert [entry["length"] for entry in lengths] == [8, 32]
    tokens = ROWS[:, :32]
    outputs = model(tokens)
    g_lm = np.asarray(outputs.deductive.G_LM[:, :2], np.float64).mean(1)
    own, frozen = (
        np.asarray(x, np.float64)
        for x in (outputs.logits[2:], model(tokens[2:], g_lm.astype(np.float32)).logits)
    )
    centred = [x - x.mean(-1, keepdims=True) for x in (own, frozen)]
    rms = np.sqrt(np.square(centred[1] - centred[0]).mean() / np.square(centred[0]).mean())
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (own, frozen))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    found = lengths[1]
    assert found["centred_relative_rms"] == pytest.approx(rms, rel=1e-3)
    assert found["kl"] == pytest.approx(kl, rel=1e-2)
    assert found["passes"] == (rms <= 0.25 and kl <= 0.03)
    assert found["norms"]["G_LM"] == pytest.approx(np.linalg.norm(g_lm), rel=1e-5)
    short = FrozenContract.measure(model, ROWS[:, :8])
    assert short.numbers["verdict"] == "not measured" and "shorter than 32" in short.words()[0]


def test_documents_of_a_length(model: LanguageModel) -> None:
    """Of every packing, and those that are too short are left out."""
    short = [*ROWS[:2, :20], *ROWS[2:3, :40]]
    lengths = contract.frozen_contract(model.config, model.params, ROWS[3:], short, (16, 32, 64))
    assert [(one["length"], one["compared"]) for one in lengths] == [(16, 3), (32, 1)]
    packed = np.zeros((2, 3, 9), np.int32)
    packed[:, 0], packed[0, 2, :4], packed[0, 2, 4:6], packed[1, 2] = ROWS[:2, :9], 1, 2, 1

    class Packed:
        def __getitem__(self, k: int) -> np.ndarray:
            return packed[k]

    found = contract.row_documents(RowSet(Packed(), np.array([1, 0])))
    np.testing.assert_array_equal(found[0], ROWS[1, :9])
    np.testing.assert_array_equal(found[1], ROWS[0, :4])
    assert (
        "does not pass: "
        in contract.contract_lines(
            [{"length": 8, "centred_relative_rms": None, "kl": None, "passes": False}]
        )["contract at 8 tokens"]
    )


def test_a_predefined_g_lm_is_audited_where_it_can_be(model: LanguageModel) -> None:
    config = dataclasses.replace(model.config, g_source="identity")
    bare = LanguageModel(config, without_plga(model.params))
    for section in (RowMap, FrozenContract):
        measured = section.measure(bare, ROWS)
        assert measured.numbers == {"by_construction": True} and measured.rendered().words
    assert np.max(Symmetry.measure(bare, ROWS).numbers["commutant_residual"]) < 1e-15
    assert Decoding.measure(bare, ROWS).numbers["padding"]["between_paddings"] == 0
