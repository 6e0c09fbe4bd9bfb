"""Whatever a command line or a gin file holds: no traceback, no hang, nothing written elsewhere."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from fuzz import check_line, fuzzed, listing, result_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from pldr_jax.cli.common import run
from pldr_jax.cli.convert import convert_main
from pldr_jax.cli.freeze import freeze_main
from pldr_jax.cli.infer import infer_main
from pldr_jax.cli.training.train import train_main
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import FIELDS, config_from_dict, dump_config, load_config

VALUES = st.one_of(
    st.text(max_size=20),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(
        "None True false 'x' \"x\" () (1,2) [0.5] %A %B (%A,%A) 1e999 -0 0x10 1_0 ~ ~/x ~nobody/x "
        "( ) ' \\ # = % bfloat16 packed pack 9999999999999999999999 /dev/zero . ..".split()
    ),
    st.integers(1, 3000).map(lambda n: "(" * n),
    st.integers(1, 6000).map(lambda n: "9" * n),
)
KEYS = st.one_of(
    st.sampled_from(sorted(FIELDS)),
    st.sampled_from(["A", "B", "Model", "Model.", ".x", "Modle.num_layers", "Optimizer.alpha"]),
    st.text(max_size=10),
)
LINES = st.one_of(
    st.tuples(KEYS, st.sampled_from([" = ", "=", " ", " == "]), VALUES).map("".join),
    st.sampled_from(["include 'a.gin'", "include 'b.gin'", "include '/dev/zero'", "include '.'"]),
    st.text(max_size=40),
)
ARGUMENTS = st.one_of(
    st.tuples(st.just("--gin."), KEYS, st.sampled_from(["=", " ", ""]), VALUES).map("".join),
    st.tuples(
        st.sampled_from(
            "--run_dir --sweep --sweep_seeds --sweep_index --sweep_zip --gin_file --chip --devices "
            "--plan --step --rows --text --save_g --rank_budget --prompt --prompt_file --top_k "
            "--seed --temperature --resume --stop --init_from --profile --logit_check".split()
        ),
        st.sampled_from(["=", ""]),
        st.one_of(
            VALUES, st.sampled_from(["Data.seed=1,2", "Model.num_layers=1,x", "a.gin", "pipe"])
        ),
    ).map("".join),
    VALUES,
)
PROGRAMS = {
    "train.py": (train_main, ["--sweep=Optimizer.learning_rate=1e-3", "--sweep_list"]),
    "infer.py": (infer_main, ["--checkpoint=nowhere"]),
    "pldr-freeze": (freeze_main, ["--checkpoint=nowhere", "--output=out"]),
    "pldr-convert": (convert_main, ["import", "nowhere", "out"]),
}
"""Programs, and arguments with which none of them begins any work."""


@pytest.fixture
def folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    (tmp_path / "b.gin").write_text("B = 1\nModel.num_layers = %B\n")
    (tmp_path / "a.gin").write_text("Model.num_layers = 2\n")
    return tmp_path


@given(lines=st.lists(LINES, max_size=6))
@fuzzed
def test_a_gin_file_is_a_config_or_one_line(folder: Path, lines: list[str]) -> None:
    (folder / "a.gin").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    config = result_or_one_line(lambda: load_config(["a.gin"]))
    if isinstance(config, ExperimentConfig):  # and what was read is what is written
        (folder / "c.gin").write_text(dump_config(config))
        assert repr(load_config(["c.gin"])) == repr(config)


@given(content=st.binary(max_size=200))
@fuzzed
def test_a_file_of_any_bytes_is_a_config_or_one_line(folder: Path, content: bytes) -> None:
    (folder / "a.gin").write_bytes(content)
    assert isinstance(
        result_or_one_line(lambda: load_config(["a.gin"])), (ExperimentConfig, ConfigError)
    )


@given(overrides=st.lists(st.tuples(KEYS, VALUES).map("=".join), max_size=4))
@fuzzed
def test_flags_are_a_config_or_one_line(folder: Path, overrides: list[str]) -> None:
    result_or_one_line(lambda: load_config([], overrides))


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    data=st.dictionaries(
        st.sampled_from([*{key.partition(".")[0] for key in FIELDS}, "Modle"]),
        JSON | st.dictionaries(st.sampled_from([key.partition(".")[2] for key in FIELDS]), JSON),
        max_size=3,
    )
)
@fuzzed
def test_a_stored_config_is_a_config_or_one_line(data: Any) -> None:
    result_or_one_line(lambda: config_from_dict(data, "checkpoint"))


@pytest.mark.parametrize("name", PROGRAMS)
@given(arguments=st.lists(ARGUMENTS, max_size=5))
@fuzzed
def test_a_command_line_is_refused_in_one_line(
    folder: Path, name: str, arguments: list[str]
) -> None:
    program, idle = PROGRAMS[name]
    before, status = listing(folder), 0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(program, [*arguments, *idle])
        except SystemExit as end:
            status = end.code
    assert status in (0, 1, 2), status
    if status:
        assert err.getvalue().endswith("\n")
        check_line(err.getvalue()[:-1])
    assert listing(folder) == before
