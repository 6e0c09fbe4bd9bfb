"""Manifests that say what is not so, and folders that hold what they should not."""

import json
import shutil
from pathlib import Path

import pytest
from test_build import DOCUMENTS, prepare

from pldr_jax.config import ConfigError
from pldr_jax.data.shards import prepared as prepared_files
from pldr_jax.data.shards.prepared import ShardedTokens, read_prepared
from pldr_jax.data.shards.records import DataError
from pldr_jax.data.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    """A folder of several shards."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [json.dumps({"text": document}) for document in DOCUMENTS]
    (folder / "a.jsonl").write_text("\n".join(lines))
    tokenizer = Tokenizer.train(DOCUMENTS, 300)
    prepare(str(folder), folder / "out", tokenizer=tokenizer)
    return str(folder / "out")


def rewritten(copy: Path, change) -> None:
    """A manifest that says something else, with a checksum that is right."""
    fields = json.loads((copy / "manifest.json").read_text())
    format_, _ = fields.pop("format"), fields.pop("checksum")
    change(fields)
    checked = {"checksum": prepared_files._checksum(fields), **fields}
    (copy / "manifest.json").write_text(json.dumps({"format": format_, **checked}))


@pytest.mark.parametrize("name", ["../outside/a", "/etc/a", "", "..", 7, None, "a\0b"])
def test_shards_outside_of_their_folder_are_not_opened(prepared, tmp_path, name) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    shutil.copytree(prepared, tmp_path / "outside")
    rewritten(copy, lambda fields: fields["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(ConfigError, match=r"^Data\.source = .*(plain file name|is missing)") as e:
        read_prepared(copy)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["train-000000.array_record", "train-000000.lengths"])
def test_links_out_of_the_folder_are_not_followed(prepared, tmp_path, name: str) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    (copy / name).unlink()
    (copy / name).symlink_to(Path(prepared) / name)
    with pytest.raises(ConfigError, match=r"^Data\.source = .*is a link to elsewhere"):
        read_prepared(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"dtype": 3},
        {"splits": []},
        {"splits": {"train": {"shards": [{"name": "train-000000"}]}}},
        {"vocab_size": None, "splits": {"train": 5}},
    ],
)
def test_what_is_no_manifest_is_one_line(prepared, tmp_path, change) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    rewritten(copy, lambda fields: fields.update(change))
    with pytest.raises(ConfigError, match=r"^Data\.source = .*is not a manifest") as error:
        read_prepared(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe", b"[]", b"7"])
def test_any_other_file_is_no_manifest(tmp_path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^Data\.source = .*is not a manifest"):
        read_prepared(tmp_path)


def test_one_bit_of_a_manifest_is_noticed(prepared, tmp_path) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    text = (copy / "manifest.json").read_text()
    number = str(read_prepared(prepared).splits["train"][0].n_tokens)
    (copy / "manifest.json").write_text(text.replace(number, str(int(number) ^ 1)))
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        read_prepared(copy)
    (copy / "manifest.json").write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(ConfigError, match=r"written by another version"):
        read_prepared(copy)


@pytest.mark.parametrize("damage", ["one bit", "swapped"])
def test_damaged_lengths_are_one_line(prepared, tmp_path, damage: str) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    path = copy / "train-000001.lengths"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    content[4:8], content[8:12] = content[8:12], content[4:8]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000001\.lengths: is damaged") as error:
        _ = ShardedTokens(read_prepared(copy), "train").lengths
    assert "\n" not in str(error.value)
