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


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("documents", ["file", "line", "paragraph", "block"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_text(tmp_path, documents: str, pack) -> None:
    ending = "" if pack is bytes else ".gz"
    (tmp_path / f"a.txt{ending}").write_bytes(pack(MARK + b"one\n"))
    (tmp_path / f"b.jsonl{ending}").write_bytes(pack(MARK + jsonl()))
    items = read_all(find_inputs([str(tmp_path)]), documents=documents)
    assert [text.rstrip("\n") for text in texts(items)] == ["one", *TEXTS] and not kinds(items)


def test_a_marked_file_in_parts_loses_no_row(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(MARK + jsonl())
    for unit_bytes in (1, 5, 30, 4000):
        units = plan_units(find_inputs([str(tmp_path)]), unit_bytes, by_line=False)
        assert texts(read_all([p for unit in units for p in unit.pieces])) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("documents", ["file", "line"])
def test_wide_text_with_a_mark_is_read(tmp_path, encoding: str, documents: str) -> None:
    lines = ["one", "zwei äöü", "三 文字"]
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode(encoding))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl().decode().encode(encoding)))
    pieces = find_inputs([str(tmp_path)])
    units = plan_units(pieces, 10, by_line=documents == "line")
    items = read_all([p for unit in units for p in unit.pieces], documents=documents)
    expected = ["\n".join(lines)] if documents == "file" else lines
    assert texts(items) == [*expected, *TEXTS] and not kinds(items)
    (tmp_path / "a.txt").write_bytes("one".encode(encoding)[:-1])  # half a character
    assert kinds(read_all(find_inputs([str(tmp_path / "a.txt")]))) == ["bad_utf8"]


@pytest.mark.parametrize("window", [27, 28, 31])
def test_zstandard_with_a_long_window(tmp_path, window: int) -> None:
    """A frame of unknown size, as a pipe gives it, asks for all of its window."""
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters(window_log=window, hash_log=10, chain_log=10)
    content = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    packed = content.compress(jsonl()) + content.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert texts(read_all(find_inputs([str(tmp_path)]))) == TEXTS
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-9])
    assert kinds(read_all(find_inputs([str(tmp_path)])))[-1] == "damaged"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.zst"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "I/O")])
def test_what_cannot_be_read_is_not_damaged(tmp_path, monkeypatch, name: str, error) -> None:
    (tmp_path / name).write_bytes(b"")
    pieces = find_inputs([str(tmp_path)])

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("builtins.open", refuse)
    (problem,) = read_all(pieces)
    assert isinstance(problem, Problem) and problem.kind == "unreadable"
    assert name in str(problem) and error.strerror in str(problem)


@pytest.mark.parametrize("name", ["a.parquet", "b.arrow"])
def test_columns_that_cannot_be_read_are_not_damaged(tmp_path, name: str) -> None:
    pytest.importorskip("pyarrow")
    (problem,) = read_all([Piece(str(tmp_path / name), inputs.kind_of(name), 0)])
    assert isinstance(problem, Problem) and problem.kind == "unreadable"


@pytest.mark.parametrize("cut", [4, 100])
def test_a_cut_parquet_file_of_any_size_is_named(tmp_path, cut: int) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=1)
    path = tmp_path / "a.parquet"
    path.write_bytes(path.read_bytes()[:-cut])
    for unit_bytes in (50, 1 << 20):
        units = plan_units(find_inputs([str(path)]), unit_bytes, by_line=False)
        items = read_all([p for unit in units for p in unit.pieces])
        assert kinds(items) == ["damaged"] and "a.parquet" in str(items[0])
