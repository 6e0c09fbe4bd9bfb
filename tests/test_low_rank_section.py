"""The section of G_LM of low rank in an analysis: what each budget costs and saves, by hand."""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest
from test_low_rank import CONFIG, LEARNED, g_lm_of, params_of

from pldr_jax.analysis.low_rank import LowRank
from pldr_jax.analysis.section import Settings
from pldr_jax.api import LanguageModel
from pldr_jax.model.low_rank import factorize, smallest_ranks


@functools.cache
def section_of(
    source: str = "external", budgets: tuple[float, ...] = (0.0, 0.1)
) -> tuple[LanguageModel, np.ndarray, Any, list[int]]:
    config = dataclasses.replace(
        CONFIG, **(LEARNED if source == "learned" else {"g_source": source})
    )
    g_lm = g_lm_of() if source == "external" else None
    lm = LanguageModel(config, params_of(config), g_lm)
    rows_RC = np.random.default_rng(5).integers(1, CONFIG.vocab_size, (5, 16)).astype(np.int32)
    seen: list[int] = []
    section = LowRank.measure(lm, rows_RC, Settings(2, advance=seen.append), budgets)
    return lm, rows_RC, section, seen


def test_measured_by_hand() -> None:
    lm, rows_RC, section, seen = section_of()
    assert seen == [2, 2, 1]
    exact, rough = section.numbers["budgets"]
    assert section.numbers["g_lm"] == "the model's own"
    low_rank = factorize(g_lm_of(), 0.1)
    p, q = (np.asarray(lm(rows_RC[:, :-1], g).logits, np.float64) for g in (None, low_rank.G_LM))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    before, after = (
        -np.take_along_axis(x, rows_RC[:, 1:, None], axis=-1).mean() for x in (log_p, log_q)
    )
    close = {"rel": 1e-3, "abs": 1e-6}
    assert rough["loss"]["before"] == pytest.approx(before, **close)
    assert rough["loss"]["after"] == pytest.approx(after, **close)
    assert rough["kl"]["mean"] == pytest.approx(
        (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), **close
    )
    assert rough["logit_difference"]["max"] == pytest.approx(np.abs(p - q).max(), **close)
    assert rough["logit_difference"]["mean"] == pytest.approx(np.abs(p - q).mean(), **close)
    agreement = (p.argmax(-1) == q.argmax(-1)).mean()
    assert rough["greedy_agreement"] == pytest.approx(agreement) and agreement < 1
    assert exact["logit_difference"]["max"] < 1e-5 and exact["greedy_agreement"] == 1
    assert (exact["cache"], exact["keys"]) == (1, {"ideal": 1, "kept": 1, "padded": 1})
    values_LNH = section.tensors["low_rank/singular_values"]
    ranks_LN = smallest_ranks(values_LNH, 0.1)
    assert rough["rank"] == ranks_LN.tolist() and rough["kept"] == low_rank.ranks.tolist()
    assert rough["keys"]["ideal"] == 64 / ranks_LN.sum()
    assert rough["keys"]["kept"] == 64 / low_rank.ranks.sum()
    assert rough["keys"]["padded"] == 64 / (4 * ranks_LN.max(-1).sum())
    assert rough["cache"] == pytest.approx(128 / (64 + low_rank.ranks.sum()))


def test_the_report_of_it() -> None:
    _, _, section, _ = section_of()
    json.dumps(section.numbers)
    assert [picture.name for picture in section.figures()] == ["low_rank_spectra", "low_rank_trade"]
    assert all(picture.png.startswith(b"\x89PNG") for picture in section.figures())
    for table in section.tables():
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert section.tables()[0].rows[1][:2] == (
        "0.1",
        np.mean(section.numbers["budgets"][1]["rank"]),
    )
    assert "relative error of 0.1" in section.words()[0]


def test_other_models_have_a_g_lm_too() -> None:
    """The mean over the rows where it is learned, and what nobody can compress."""
    lm, rows_RC, section, _ = section_of("learned", (0.1,))
    mean_LNHJ = np.asarray(lm(rows_RC[:, :-1]).deductive.G_LM, np.float64).mean(1)
    expected = np.linalg.svd(mean_LNHJ, compute_uv=False)
    found = section.tensors["low_rank/singular_values"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())
    assert section.numbers["g_lm"] == "the mean over the rows"
    _, _, section, _ = section_of("identity", (0.1,))
    assert "full rank" in section.words()[0]
    assert section.numbers["budgets"][0]["keys"]["ideal"] == 1
