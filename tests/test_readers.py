"""Every kind of input gives its documents, and names what it cannot use."""

import bz2
import gzip
import json
import lzma
import sys
import types

import pytest

from pldr_jax.config import ConfigError
from pldr_jax.data.text import inputs
from pldr_jax.data.text.inputs import Piece, find_inputs, plan_units
from pldr_jax.data.text.readers import Document, Problem, ReadSettings, read_documents

TEXTS = ["one\nline", "zwei äöü", "三 文字", "d" * 5000]


def read_all(pieces: list[Piece], **settings: object) -> list[Document | Problem]:
    return [item for piece in pieces for item in read_documents(piece, ReadSettings(**settings))]  # type: ignore[arg-type]


def texts(items: list[Document | Problem]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def kinds(items: list[Document | Problem]) -> list[str]:
    return [item.kind for item in items if isinstance(item, Problem)]


def jsonl(field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text, "n": 1}).encode() + b"\n" for text in TEXTS)


def packed_zst(content: bytes) -> bytes:
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    half = len(content) // 2
    return compress(content[:half]) + compress(content[half:])  # two frames


@pytest.mark.parametrize(
    "ending,pack",
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", packed_zst),
    ],
)
def test_jsonl_in_every_packing(tmp_path, ending, pack) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(jsonl("body")))
    items = read_all(find_inputs([str(tmp_path)]), text_field="body")
    assert texts(items) == TEXTS
    assert items[2].where.endswith(f"a.jsonl{ending}:3")


@pytest.mark.parametrize("ending,pack", [(".gz", gzip.compress), (".zst", packed_zst)])
def test_a_cut_file_is_named(tmp_path, ending, pack) -> None:
    content = b"".join(json.dumps({"text": str(k) * 50}).encode() + b"\n" for k in range(9999))
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(content)[:-2000])
    items = read_all(find_inputs([str(tmp_path)]))
    assert kinds(items)[-1] == "damaged" and f"a.jsonl{ending}:" in items[-1].where


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "\xff"}',
        b'{"text": "half',
        b"[1]",
        b'{"other": "x"}',
        b'{"text": 3}',
        b'{"text": " "}',
        b'{"text": "\\ud800"}',
        b"",
        json.dumps({"text": "x" * 101}).encode(),
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    items = read_all(find_inputs([str(tmp_path / "a.jsonl")]), max_document_bytes=100)
    assert texts(items) == ["good", "last"]
    assert [(i.kind, int(i.where.split(":")[-1])) for i in items if isinstance(i, Problem)] == [
        ("bad_utf8", 2),
        ("broken_line", 3),
        ("broken_line", 4),
        ("no_text", 5),
        ("no_text", 6),
        ("empty", 7),
        ("bad_utf8", 8),
        ("empty", 9),
        ("huge", 10),
    ]


def test_a_line_that_would_not_fit_in_memory_is_passed_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pldr_jax.data.text.readers._LINE_SLACK", 0)
    long = json.dumps({"text": "x" * 3_000_000}).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n')
    items = read_all(find_inputs([str(tmp_path)]), max_document_bytes=100)
    assert texts(items) == ["a", "b"] and kinds(items) == ["huge"]


def test_what_a_document_of_a_text_file_is(tmp_path) -> None:
    content = "a b\nc\n\n\nd\r\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    pieces = find_inputs([str(tmp_path)])
    assert texts(read_all(pieces)) == [content]
    assert texts(read_all(pieces, documents="line")) == ["a b", "c", "d"]
    assert texts(read_all(pieces, documents="paragraph")) == ["a b\nc\n", "d\r\n"]
    assert kinds(read_all(pieces, max_document_bytes=3)) == ["huge"]
    assert kinds(read_all(pieces, documents="paragraph", max_document_bytes=5)) == ["huge"]


def test_binary_and_bad_text_files(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    items = read_all(find_inputs([str(tmp_path)]))
    assert kinds(items) == ["binary", "bad_utf8"] and texts(items) == ["with a mark"]


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000])
def test_files_of_lines_are_cut_between_lines(tmp_path, unit_bytes: int) -> None:
    """Whatever the size of the parts, every document is read once and in order."""
    lines = [json.dumps({"text": f"text {k} " + "ä" * (k % 11)}) for k in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    units = plan_units(find_inputs([str(tmp_path)]), unit_bytes, by_line=False)
    assert len(units) > 1 and [unit.number for unit in units] == list(range(len(units)))
    items = read_all([piece for unit in units for piece in unit.pieces])
    assert texts(items) == [json.loads(line)["text"] for line in lines]


def test_parquet_is_cut_between_row_groups(tmp_path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet as parquet

    rows = [*TEXTS, None, ""]
    table = arrow.table({"text": rows, "n": list(range(len(rows)))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    units = plan_units(find_inputs([str(tmp_path)]), 200, by_line=False)
    assert len(units) == 3
    items = read_all([piece for unit in units for piece in unit.pieces])
    assert texts(items) == TEXTS and kinds(items) == ["no_text", "empty"]
    assert items[-1].where.endswith("row 5")
    with pytest.raises(ConfigError, match=r"^--text_field=body: .*has the columns text, n"):
        read_all(units[0].pieces, text_field="body")


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_and_datasets_saved_to_disk(tmp_path, stream: bool) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Arrow needs pyarrow")
    table = arrow.table({"text": TEXTS})
    new = arrow.ipc.new_stream if stream else arrow.ipc.new_file
    with new(tmp_path / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert texts(read_all(find_inputs([str(tmp_path)]))) == TEXTS
    (tmp_path / "b.arrow").write_bytes(b"no arrow")
    items = read_all(find_inputs([str(tmp_path / "b.arrow")]))
    assert kinds(items) == ["damaged"]


def test_several_inputs_globs_and_a_file_named_twice(tmp_path) -> None:
    for name in ("b/1.txt", "a/2.txt", "a/deep/3.txt", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    found = find_inputs([str(tmp_path / "b"), str(tmp_path / "**/*.txt")])
    assert [piece.path.removeprefix(f"{tmp_path}/") for piece in found] == [
        "b/1.txt",
        "a/2.txt",
        "a/deep/3.txt",
    ]
    with pytest.raises(
        ConfigError, match=r"^Data\.source = .*no/such': no text files found; name a"
    ):
        find_inputs([str(tmp_path / "no/such")])


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        ConfigError, match=r"a\.jsonl\.zst': needs zstandard; pip install 'pldr_jax"
    ):
        read_all(find_inputs([str(tmp_path)]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"^Data\.source = 'hf:some/name': needs datasets; pip install"
    ):
        find_inputs(["hf:some/name"])


class Streamed:
    """What `datasets.load_dataset(..., streaming=True)` gives, as far as it is used."""

    num_shards = 2

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows

    def shard(self, num_shards: int, index: int) -> list[dict[str, object]]:
        return self.rows[index::num_shards]


def test_hub_datasets_are_streamed_part_by_part(monkeypatch) -> None:
    asked = []

    def load_dataset(*arguments: object, **keywords: object) -> Streamed:
        asked.append((arguments, keywords))
        return Streamed([{"text": text} for text in TEXTS] + [{"text": None}])

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    units = plan_units(find_inputs(["hf:owner/name:en"]), 1000, by_line=False)
    assert len(units) == inputs.open_hub("owner/name").num_shards == 2
    items = read_all([piece for unit in units for piece in unit.pieces])
    assert texts(items) == [TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[3]] and kinds(items) == ["no_text"]
    assert asked[0] == (("owner/name", "en"), {"split": "train", "streaming": True})


def test_without_a_network_the_message_says_so(monkeypatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(ConfigError, match=r"is there a network.*Couldn't reach the hub") as error:
        find_inputs(["hf:owner/name"])
    assert "\n" not in str(error.value)
