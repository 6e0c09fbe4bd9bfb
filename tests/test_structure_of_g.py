"""Matrices, distributions and attention maps against plain NumPy."""

import copy
import dataclasses
import math

import numpy as np
import pytest
from conftest import load_golden

from pldr_jax.analysis.section import Settings
from pldr_jax.analysis.structure import measure as structure
from pldr_jax.analysis.structure.attention_maps import describe_attention, prompt_attention
from pldr_jax.analysis.structure.distributions import LINEAR_BINS, EntryHistograms
from pldr_jax.analysis.structure.figures import evenly_spaced, structure_figures
from pldr_jax.analysis.structure.matrices import describe_matrices, effective_rank
from pldr_jax.analysis.structure.measure import Structure
from pldr_jax.analysis.structure.tables import structure_tables
from pldr_jax.analysis.structure.words import matrix_kind, structure_words
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.model.low_rank import numerical_rank, singular_values
from pldr_jax.training.freeze.calibrate import without_plga

RNG = np.random.default_rng(0)
ROWS = RNG.integers(1, 61, (6, 13)).astype(np.int32)
DECOMPOSED = 4


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    golden = load_golden("tiny")
    return LanguageModel(golden.config, golden.params)


@pytest.fixture(scope="module")
def section(model: LanguageModel) -> Structure:
    return Structure.measure(model, ROWS, Settings(4), DECOMPOSED, 9)


@pytest.fixture(scope="module")
def tensors(model: LanguageModel) -> dict[str, np.ndarray]:
    """Deductive outputs [L,R,N,H,J] of all rows, float64."""
    outputs = model(ROWS[:, :-1]).deductive
    return {name: np.asarray(x, np.float64) for name, x in outputs.items()}


def test_the_mean_tensor_is_that_of_the_rows(section: Structure, tensors) -> None:
    for name, x in tensors.items():
        mean = x.mean(1)
        np.testing.assert_allclose(section.tensors[f"mean_{name}"], mean, rtol=1e-4, atol=1e-6)
        values = np.linalg.svd(mean, compute_uv=False)
        np.testing.assert_allclose(
            section.tensors[f"singular_values_{name}"], values, rtol=1e-4, atol=1e-5
        )
        of = section.numbers["outputs"][name]["mean_tensor"]
        for layer in range(2):
            for head in range(2):
                m, s = mean[layer, head], values[layer, head]
                assert of["rank_0.1"][layer][head] == np.linalg.matrix_rank(m, tol=0.1 * s[0])
                assert of["rank_0.01"][layer][head] == np.linalg.matrix_rank(m, tol=0.01 * s[0])
                assert of["asymmetry"][layer][head] == pytest.approx(
                    math.sqrt(((m - m.T) ** 2).sum() / (m**2).sum()), rel=1e-4
                )
                small = (np.abs(m) < 0.1 * np.abs(m).max()).mean()
                assert of["small_0.1"][layer][head] == pytest.approx(small, abs=1e-9)
                if s[-1] > 1e-3 * s[0]:
                    assert of["condition"][layer][head] == pytest.approx(s[0] / s[-1], rel=1e-2)


def test_rows_are_decomposed_one_by_one(section: Structure, tensors) -> None:
    assert section.numbers["decomposed_rows"] == DECOMPOSED
    for name, x in tensors.items():
        of = section.numbers["outputs"][name]["of_rows"]
        norms = np.linalg.norm(x[:, :DECOMPOSED], axis=(-2, -1))
        for summary in ("mean", "min", "max"):
            expected = getattr(np, summary)(norms, axis=1)
            np.testing.assert_allclose(of["norm"][summary], expected, rtol=1e-4)
    norms = section.numbers["outputs"]["G_LM"]["of_rows"]["norm"]
    assert np.any(np.array(norms["max"]) - norms["min"] > 1e-3)  # rows differ


def test_dag_losses_are_those_of_the_definition(section: Structure, tensors) -> None:
    assert "dag_loss" not in section.numbers["outputs"]["A"]["of_rows"]
    for name in ("A_LM", "A_P", "G_LM"):
        of = section.numbers["outputs"][name]["of_rows"]["dag_loss"]
        eigenvalues = np.linalg.eigvals(np.square(tensors[name]))
        expected = np.abs(np.log(np.exp(eigenvalues).sum(-1).real / 8))  # tr exp(M)
        np.testing.assert_allclose(of["mean"], expected.mean(1), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(of["max"], expected.max(1), rtol=1e-3, atol=1e-5)


def test_distributions_hold_every_entry(section: Structure, tensors) -> None:
    edges = section.tensors["log10_magnitude_edges"]
    for name, x in tensors.items():
        of = section.numbers["outputs"][name]["entries"]
        for layer in range(2):
            entries = x[layer]
            assert of["mean"][layer] == pytest.approx(entries.mean(), rel=1e-3, abs=1e-6)
            assert of["std"][layer] == pytest.approx(entries.std(), rel=1e-4)
            assert of["min"][layer] == pytest.approx(entries.min(), rel=1e-3)
            assert of["negative"][layer] == pytest.approx((entries < 0).mean(), abs=1e-3)
            positive = section.tensors[f"positive_counts_{name}"][layer]
            negative = section.tensors[f"negative_counts_{name}"][layer]
            assert positive.sum() + negative.sum() == entries.size
            below = positive[edges[1:] <= 0].sum() + negative[edges[1:] <= 0].sum()
            assert below == pytest.approx((np.abs(entries) < 1).sum(), abs=2)


def test_batches_change_nothing(model: LanguageModel, section: Structure) -> None:
    done: list[int] = []
    other = Structure.measure(model, ROWS, Settings(5, advance=done.append), DECOMPOSED, 9)
    assert sum(done) == len(ROWS)
    for name, expected in section.tensors.items():
        if "counts" in name:  # an entry at an edge may fall to either side
            moved = np.abs(other.tensors[name] - expected).sum()
            assert moved <= 8 + 0.01 * expected.sum(), name
        else:
            np.testing.assert_allclose(other.tensors[name], expected, rtol=1e-3, atol=1e-4)


def test_statistics_keep_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a statistic holds is as large after many rows as after one."""
    monkeypatch.setattr(
        structure, "describe_matrices", lambda x: {"norm": np.linalg.norm(x, axis=(-2, -1))}
    )
    statistics = structure.OutputStatistics()
    sizes = []
    for _ in range(20):
        x = RNG.normal(size=(2, 2, 8, 8)).astype(np.float32)
        statistics.add(x, np.zeros((2, 2)), decompose=True)
        sizes.append(held(statistics))
    assert len(set(sizes)) == 1 and sizes[0] > 0


def held(thing: object) -> int:
    """Entries of all arrays reachable from a statistic."""
    if isinstance(thing, np.ndarray):
        return thing.size
    if isinstance(thing, (list, tuple)):
        return sum(held(x) for x in thing)
    parts = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
    return sum(held(x) for x in parts.values())


def test_describe_of_known_matrices() -> None:
    identity, zero = np.eye(8), np.zeros((8, 8))
    outer = np.outer(np.arange(1, 9), np.ones(8))
    turned = np.triu(np.ones((8, 8)), 1) - np.tril(np.ones((8, 8)), -1)
    of = describe_matrices(np.stack([identity, outer, turned, zero]))
    assert of["rank_1e-06"].tolist() == [8, 1, 8, 0]
    np.testing.assert_allclose(of["effective_rank"][:2], [8, 1])
    assert of["condition"][0] == pytest.approx(1) and of["condition"][1] > 1e12
    assert of["condition"][3] == math.inf
    np.testing.assert_allclose(of["asymmetry"][[0, 2, 3]], [0, 2, 0])
    np.testing.assert_allclose(of["diagonal_share"][[0, 2]], [1, 0])
    np.testing.assert_allclose(of["small_0.001"][[0, 1]], [7 / 8, 0])
    np.testing.assert_allclose(of["norm"][:2], [math.sqrt(8), np.linalg.norm(outer)])
    assert np.isnan(singular_values(np.full((2, 2), np.inf))).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_matrices_that_are_not_finite_have_no_numbers(broken: float) -> None:
    x = np.stack([np.full((4, 4), broken), np.eye(4)])
    x[0, 1:] = 0
    for name, (first, second) in describe_matrices(x).items():
        assert np.isnan(first) and np.isfinite(second), name
    assert describe_matrices(x)["rank_0.1"][1] == 4


def test_histograms_of_a_layer_without_a_finite_entry() -> None:
    entries = EntryHistograms()
    entries.add(np.stack([np.full((1, 2, 2), np.nan), [[[1.0, 2.0], [np.nan, 4.0]]]]))
    results = entries.results()
    assert results["mean"][1] == pytest.approx(7 / 3) and results["not_finite"].tolist() == [
        1,
        1 / 4,
    ]
    for name in ("mean", "std", "min", "max", "negative", "zero"):
        assert np.isnan(results[name][0]) and np.isfinite(results[name][1]), name
    assert entries.linear_counts.sum(1).tolist() == [0, 3] == entries.log_counts.sum(1).tolist()


def test_ranks_count_singular_values_above_the_tolerance() -> None:
    values = np.array([10.0, 1.5, 0.02, 0.0])
    assert [int(numerical_rank(values, t)) for t in (0.5, 0.1, 1e-3, 1e-9)] == [1, 2, 3, 3]
    p = values[:3] / values.sum()
    assert effective_rank(values) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def test_histograms_are_those_of_numpy() -> None:
    x = RNG.normal(0.5, 2, (7, 1, 2, 5, 5))
    x[3, 0, 0, 0] = [0.0, 1e-20, -1e20, np.nan, np.inf]
    entries = EntryHistograms()
    for row in x:
        entries.add(row)
    finite = x[np.isfinite(x)]
    edges = entries.linear_edges[0]
    assert len(edges) == LINEAR_BINS + 1
    counts = np.histogram(finite, LINEAR_BINS, (edges[0], edges[-1]))[0]
    np.testing.assert_array_equal(entries.linear_counts[0], counts)
    seen = finite[(finite != 0) & (np.abs(finite) > 1e-12) & (np.abs(finite) < 1e12)]
    expected = np.histogram(np.log10(np.abs(seen)), entries.log_edges)[0]
    expected[0] += 1  # 1e-20
    expected[-1] += 1  # -1e20
    np.testing.assert_array_equal(entries.log_counts[0], expected)
    assert entries.zero_count == 1 and entries.not_finite == 2
    densities = entries.densities()[1][0] * np.diff(entries.log_edges)
    assert densities.sum() == pytest.approx(1 - 1 / len(finite))
    results = entries.results()
    assert results["mean"] == pytest.approx(finite.mean())
    assert results["std"] == pytest.approx(finite.std())
    assert (results["min"], results["max"]) == (finite.min(), finite.max())
    assert results["not_finite"] == 2 / x.size and results["zero"] == 1 / len(finite)
    assert results["negative"] == (finite < 0).mean()


def test_attention_maps_make_the_attention_output(model: LanguageModel) -> None:
    """The rest of the decoder in NumPy, on these weights and the model's values, gives its hidden
    states.
    """
    prompt = ROWS[0, :9]
    weights = prompt_attention(model, prompt)
    assert weights.shape == (2, 2, 9, 9)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert not np.triu(weights, 1).any()
    outputs = model(prompt[None])
    v_LTNH = np.asarray(outputs.layers.v_BTNH, np.float64)[:, 0]
    layers = model.params["layers"]
    attention = layers["attention"]
    embedding = model.params["embedding"]
    x_TD = normed(np.asarray(embedding["table"], np.float64)[prompt] * 4.0, embedding["norm"])
    for layer in range(2):
        mixed = np.einsum("NTS,SNH->TNH", weights[layer], v_LTNH[layer])
        out = at(attention["out"], layer)
        attended = np.einsum("TNH,NHD->TD", mixed, out["kernel"]) + out["bias"]
        x_TD = normed(x_TD + attended, at(layers["attention_norm"], layer))
        ffn = at(layers["ffn"], layer)
        x_TD = normed(x_TD + glu(x_TD, ffn), at(layers["ffn_norm"], layer))
    np.testing.assert_allclose(x_TD, outputs.hidden[0], atol=1e-4)


def at(tree: dict, layer: int) -> dict:
    return {
        name: at(leaf, layer) if isinstance(leaf, dict) else np.asarray(leaf[layer], np.float64)
        for name, leaf in tree.items()
    }


def normed(x: np.ndarray, norm: dict) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return scaled * np.asarray(norm["scale"]) + np.asarray(norm["bias"])


def glu(x: np.ndarray, ffn: dict) -> np.ndarray:
    gate, up, down = ffn["w1"], ffn["w2"], ffn["w3"]
    hidden = x @ gate["kernel"] + gate["bias"]
    hidden = hidden / (1 + np.exp(-hidden)) * (x @ up["kernel"] + up["bias"])
    return hidden @ down["kernel"] + down["bias"]


def test_what_heads_look_at() -> None:
    size = 5
    uniform = np.tril(np.ones((size, size))) / np.arange(1, size + 1)[:, None]
    itself, before = np.eye(size), np.eye(size, k=-1)
    before[0, 0] = 1
    of = describe_attention(np.stack([uniform, itself, before])[None])
    np.testing.assert_allclose(of["entropy"], [[1, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(of["distance"][0], [np.mean([0.5, 1, 1.5, 2]), 0, 1])
    np.testing.assert_allclose(of["on_itself"][0], [np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5]), 1, 0])
    np.testing.assert_allclose(of["previous"][0, 1:], [0, 1])
    np.testing.assert_allclose(of["first"][0, 1:], [0, 1 / 4])


@pytest.mark.parametrize("g_source", ["identity", "external"])
def test_predefined_g_lm_is_measured_as_it_is(model: LanguageModel, g_source: str) -> None:
    config = dataclasses.replace(model.config, g_source=g_source)
    g_lm = RNG.normal(size=(2, 1, 2, 8, 8)).astype(np.float32)
    if g_source == "identity":
        g_lm = None
    predefined = LanguageModel(config, without_plga(model.params), g_lm)
    section = Structure.measure(predefined, ROWS, prompt_tokens=5)
    assert set(section.numbers["outputs"]) == {"G_LM"}
    of = section.numbers["outputs"]["G_LM"]["mean_tensor"]
    if g_source == "identity":
        assert np.array(of["rank_1e-06"]).tolist() == [[8, 8], [8, 8]]
        np.testing.assert_allclose(of["condition"], 1)
        np.testing.assert_allclose(of["asymmetry"], 0)
        assert section.words()[0].startswith("G_LM is of full rank, symmetric, sparse.")
        assert section.numbers["verdict"] == "of full rank, symmetric, sparse"
        dag = section.numbers["outputs"]["G_LM"]["of_rows"]["dag_loss"]["mean"]
        np.testing.assert_allclose(dag, 1, rtol=1e-5)  # log(tr(exp(I)) / H)
    else:
        np.testing.assert_allclose(of["norm"], np.linalg.norm(g_lm[:, 0], axis=(-2, -1)), rtol=1e-6)
        assert "not symmetric" in section.words()[0]
    assert "predefined" in section.words()[1]


def test_tables_have_a_row_for_each_head_or_each_layer(section: Structure) -> None:
    tables = structure_tables(section.numbers)
    assert [len(table.rows) for table in tables] == [4, 4, 4, 4, 12, 4]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    many = np.arange(120.0).reshape(2, 60)
    attention = {name: many.tolist() for name in section.numbers["attention"]}
    wide = structure_tables({**section.numbers, "attention": attention})[-1]
    assert wide.rows[1][:2] == (1, "60 / 89.5 / 119")


def test_a_model_that_is_not_finite_is_said_to_be(section: Structure) -> None:
    numbers = copy.deepcopy(section.numbers)
    numbers["outputs"]["G_LM"]["mean_tensor"]["norm"][1][0] = math.nan
    assert matrix_kind("G_LM", numbers) == ("not finite",)
    assert structure_words(numbers)[0] == "G_LM is not finite in 1 of 4 heads."
    assert "not finite" not in structure_words(section.numbers)[0]


def test_grids_are_capped_and_say_so() -> None:
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert (
        len(evenly_spaced(40, 8)) == 8
        and evenly_spaced(40, 8)[0] == 0
        and evenly_spaced(40, 8)[-1] == 39
    )


def test_the_pictures_are_there(section: Structure) -> None:
    names = [picture.name for picture in section.figures()]
    assert len(set(names)) == len(names) == 10
    assert all(picture.png.startswith(b"\x89PNG") for picture in section.figures())
    # Of a predefined G_LM there is less to draw.
    few = {name: x for name, x in section.tensors.items() if name.endswith("G_LM")}
    entries = EntryHistograms()
    entries.add(few["mean_G_LM"])
    pictures = structure_figures(few, {"G_LM": entries}, {}, np.full((2, 2, 4, 4), 0.25))
    assert [picture.name for picture in pictures] == [
        "structure_spectra",
        "structure_distributions",
        "structure_G_LM",
        "structure_attention",
    ]


@pytest.mark.parametrize(
    "settings,named",
    [({"batch_size": 0}, "batch_size"), ({"spectrum_rows": 0}, "spectrum_rows"),
     ({"prompt_tokens": 1}, "prompt_tokens")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line(model, settings, named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named} = ") as caught:
        batch_size = settings.pop("batch_size", 8)
        Structure.measure(model, ROWS, Settings(batch_size), **settings)
    assert "\n" not in str(caught.value)
