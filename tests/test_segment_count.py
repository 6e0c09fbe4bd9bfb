"""How many documents share a row where nobody says: chosen once, by lengths and cost, and kept."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import QUICK, WORDS, rows_of, shard_of, stored, tiny_config, train_here

from pldr_jax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig
from pldr_jax.config.load import load_config
from pldr_jax.data.mixture import TrainingText, WeightedText
from pldr_jax.data.rows import SegmentRows, filled_share
from pldr_jax.data.segment_count import (
    MOST_SEGMENTS,
    NEAR,
    SegmentCount,
    choose_segment_count,
    with_segment_count,
)
from pldr_jax.data.shards.prepared import ShardedTokens
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.model.counts.flops import row_flops

NANO = ModelConfig(context_length=512)


def choose(lengths: list[np.ndarray], weights: list[float], model: ModelConfig) -> SegmentCount:
    return choose_segment_count(lengths, weights, model.context_length, row_flops(model))


def store(folder: Path, lengths: np.ndarray) -> ShardedTokens:
    return shard_of(folder, np.zeros(lengths.sum(), np.uint16), lengths)


def speed(folder: Path, lengths: np.ndarray, segments: int) -> float:
    """Targets over cost, from the rows themselves."""
    rows = SegmentRows(store(folder, lengths), 512, segments)
    return filled_share(rows) / row_flops(NANO)(segments)


def test_long_documents_have_rows_of_their_own() -> None:
    chosen = choose([np.full(50, 100_000)], [1.0], NANO)
    assert (chosen.max_segments, chosen.gain) == (1, 1)
    # Two fit, but there is next to nothing to win.
    assert choose([np.full(50, 512 * 40 + 250)], [1.0], NANO).max_segments == 1
    assert choose([np.full(50, 400)], [1.0], NANO).max_segments == 1
    assert "more documents side by side would be slower" in str(chosen)


def test_tiny_documents_share_up_to_the_limit() -> None:
    chosen = choose([np.full(5000, 12)], [1.0], NANO)
    assert MOST_SEGMENTS * 0.8 < chosen.max_segments <= MOST_SEGMENTS and chosen.gain > 4
    # Forty would fit and cost nothing.
    free = dataclasses.replace(NANO, g_source="random")
    assert choose([np.full(5000, 12)], [1.0], free).max_segments == MOST_SEGMENTS
    half = choose([np.full(5000, 256)], [1.0], NANO)
    assert half.max_segments == 2 and half.filled_share == pytest.approx(510 / 511, abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_number_is_much_faster(tmp_path: Path, seed: int) -> None:
    """By rows that are made, and costs of each number; and it is never slower than one."""
    rng = np.random.default_rng(seed)
    mean = float(rng.choice([40, 90, 200, 500, 3000]))
    lengths = 2 + rng.lognormal(np.log(mean), 0.8, 800).astype(np.int64)
    chosen = choose([lengths], [1.0], NANO)
    speeds = [speed(tmp_path / f"{k}", lengths, k) for k in range(1, MOST_SEGMENTS + 1)]
    own = speeds[chosen.max_segments - 1]
    assert own >= NEAR * max(speeds)
    assert all(other < NEAR * max(speeds) for other in speeds[: chosen.max_segments - 1])
    assert chosen.gain == pytest.approx(own / speeds[0]) and chosen.gain >= 1


def test_the_model_decides_too() -> None:
    lengths = [np.random.default_rng(0).integers(5, 120, 2000)]
    plain = choose(lengths, [1.0], NANO).max_segments
    deep = choose(lengths, [1.0], dataclasses.replace(NANO, num_residual_layers=32)).max_segments
    free = choose(lengths, [1.0], dataclasses.replace(NANO, g_source="random")).max_segments
    assert 1 <= deep < plain <= free
    cost = row_flops(NANO)
    assert cost(3) > cost(2) > cost(1)


def test_texts_of_a_mixture_count_by_their_weights() -> None:
    lengths = [np.full(50, 100_000), np.full(5000, 120)]
    long, short = (choose(lengths, weights, NANO) for weights in ((0.98, 0.02), (0.02, 0.98)))
    assert long.max_segments == 1
    assert short.max_segments == choose(lengths[1:], [1.0], NANO).max_segments > 2


def test_a_number_that_is_given_stays(tmp_path: Path) -> None:
    tiny = store(tmp_path / "tiny", np.full(900, 12))
    text = TrainingText(Tokenizer(b""), (WeightedText("tiny", 1.0, tiny, tiny),), "")
    lines: list[str] = []

    def data(**fields: Any) -> DataConfig:
        config = ExperimentConfig(model=NANO, data=DataConfig(**fields))
        return with_segment_count(config, text, row_flops(NANO), lines.append).data

    assert data(packing="packed", max_segments=3).max_segments == 3
    assert data(packing="document").max_segments is None and not lines
    count = data(packing="packed").segments_per_row
    (line,) = lines
    assert count > 3 and line.startswith(f"Data.max_segments = {count}: rows ")
    assert "times as fast" in line


def test_an_open_number_is_no_number() -> None:
    assert DataConfig(packing="document").segments_per_row == 1
    with pytest.raises(ConfigError, match=r"^Data\.max_segments = None: .*give a number here$"):
        _ = DataConfig(packing="packed").segments_per_row
    with pytest.raises(ConfigError, match=r"Data\.max_segments = 0: must be at least 1$"):
        load_config([], ["Data.max_segments=0"])
    # What segments do not know is refused before they are counted.
    with pytest.raises(ConfigError, match=r"Training\.eval_prefix_g = True: rows with segments"):
        load_config([], ["Training.eval_prefix_g=True", "Data.packing=packed"])
    load_config([], ["Training.eval_prefix_g=True", "Data.packing=packed", "Data.max_segments=1"])


def test_a_run_goes_on_with_the_number_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And does not choose it again."""
    rng = np.random.default_rng(0)
    for folder, documents, words in (("short", 300, 3), ("long", 12, 900)):
        (tmp_path / folder).mkdir()
        for k in range(documents):
            text = f"{k} " + " ".join(rng.choice(WORDS, words))
            (tmp_path / folder / f"{k}.txt").write_text(text)
    texts = [path.read_text() for path in sorted((tmp_path / "long").iterdir())]
    Tokenizer.train(texts, 300).save(tmp_path / "tok.model")
    fields = {
        **QUICK,
        "Data.packing": "packed",
        "Data.tokenizer": tmp_path / "tok.model",
        "Data.batch_size": 4,
        "Data.cache_dir": tmp_path / "cache",
        "Model.num_layers": 1,
        "Model.unroll": False,
        "Training.eval_rows": 2,
    }

    def run(folder: str, name: str, **more: Any) -> int:
        config = tiny_config(tmp_path / folder, {**fields, **more})
        train_here(config, tmp_path / name)
        return load_config([tmp_path / name / "config.gin"]).data.segments_per_row

    count = run("short", "run")
    assert count > 1
    assert f"Data.max_segments = {count}: rows " in capsys.readouterr().out
    assert run("long", "other") == 1
    with pytest.raises(ConfigError, match=r"^Data\.source.*: not the text"):
        run("long", "run", **{"Training.steps": 3})
    capsys.readouterr()
    assert run("short", "run", **{"Training.steps": 3}) == count
    assert rows_of(tmp_path / "run")[-1]["step"] == 3
    assert stored(tmp_path / "run")[1]["next_row"] == 3 * 4
    assert "Data.max_segments =" not in capsys.readouterr().out.split("continuing")[-1]
    with pytest.raises(ConfigError, match=rf"^Data\.max_segments = {count + 1}: the run in"):
        run("short", "run", **{"Data.max_segments": count + 1, "Training.steps": 4})
