"""Random damage to `config.json`, indices, records and safetensors: a result or one line, within
seconds, and nothing written outside of the named folder.

`PLDR_FUZZ=1000` tries that many cases of each kind.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import contents
from test_convert import QUIET, TINY, variant

from pldr_jax.config import ConfigError
from pldr_jax.interop.config_json import model_from_json
from pldr_jax.interop.record import make_record, read_record, record_files
from pldr_jax.interop.tensors import read_folder

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

CASES = int(os.environ.get("PLDR_FUZZ", "60"))
QUICKLY = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
RAW = json.loads((TINY / "config.json").read_text())
NAMES = [
    "../../x",
    "/tmp/x",
    ".",
    "..",
    "",
    "a/b",
    "x.safetensors",
    "layout.json",
    "\0",
    "~",
    "x\n",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def one_line(call: Any) -> None:
    try:
        call()
    except ConfigError as error:
        assert "\n" not in str(error)


FIELDS = [*RAW, "rope_parameters", "rope_scaling", "rope_type", "partial_rotary_factor", "extra"]


@QUICKLY
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_config_json(changes: dict[str, Any]) -> None:
    one_line(lambda: model_from_json(RAW | changes, "config.json"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    variant(folder, shards=2)
    return folder


@QUICKLY
@given(VALUES, st.sampled_from(["weight_map", "file", "bytes"]), st.binary(max_size=40))
def test_index(sharded: Path, value: Any, where: str, data: bytes) -> None:
    path = sharded / "model.safetensors.index.json"
    index = path.read_bytes()
    try:
        raw = json.loads(index)
        if where == "bytes":
            path.write_bytes(data)
        else:
            change = {"weight_map": value} if where == "weight_map" else {}
            if where == "file":
                raw["weight_map"][sorted(raw["weight_map"])[0]] = value
            path.write_text(json.dumps(raw | change))
        one_line(lambda: read_folder(sharded))
    finally:
        path.write_bytes(index)


@QUICKLY
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=8), st.booleans())
def test_safetensors(sharded: Path, at: int, data: bytes, cut: bool) -> None:
    path = sharded / "model-00001-of-00002.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:at] + (b"" if cut else data + whole[at + len(data) :]))
        one_line(lambda: read_folder(sharded))
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, sharded: Path) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "here" / "run"
    for name, data in record_files(make_record(read_folder(sharded), sharded)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@QUICKLY
@given(st.sampled_from(["name", "files", "metadata", "dtypes", "others"]), VALUES, st.booleans())
def test_record(run_dir: Path, field: str, value: Any, inside: bool) -> None:
    path = run_dir / "transformers" / "layout.json"
    layout = path.read_bytes()
    before = contents(run_dir.parent)
    raw = json.loads(layout)
    if inside and isinstance(raw[field], list):
        value = [*raw[field], value]
    if inside and isinstance(raw[field], dict):
        value = {**raw[field], str(value)[:9]: value}
    try:
        path.write_text(json.dumps(raw | {field: value}))

        def read() -> None:
            record = read_record(run_dir)
            assert record is not None
            for name in (*record.files, *record.others):
                assert Path(name).name == name and name not in (".", "..")

        one_line(read)
    finally:
        path.write_bytes(layout)
    assert contents(run_dir.parent) == before


def test_nothing_is_left_of_a_failed_import(sharded: Path, tmp_path: Path) -> None:
    from pldr_jax.interop.convert import import_checkpoint

    shutil.copytree(sharded, tmp_path / "bad")
    (tmp_path / "bad" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError):
        import_checkpoint(tmp_path / "bad", tmp_path / "out", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
