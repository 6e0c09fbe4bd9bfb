"""The files that inputs name: globs, trees, links, what is no file, and how large ones are cut."""

import gzip
import os

import pytest
from test_readers import TEXTS, kinds, read_all, texts

from pldr_jax.config import ConfigError
from pldr_jax.data.text.inputs import find_inputs
from pldr_jax.data.text.readers import Problem
from pldr_jax.data.text.tokenizer import Tokenizer


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


def tree(folder) -> None:
    """Three texts, and links to a folder above, beside, around and to one of the files."""
    (folder / "sub" / "deep").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt"):
        (folder / name).write_text(name)
    (folder / "sub" / "up").symlink_to("..")
    (folder / "sub" / "self").symlink_to(".")
    (folder / "sub" / "deep" / "around").symlink_to(folder)
    (folder / "twin").symlink_to("sub")
    (folder / "a2.txt").symlink_to("a.txt")


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.txt", "/**/**/*.txt"])
def test_trees_with_links_are_read_once_and_end(tmp_path, pattern: str) -> None:
    tree(tmp_path / "text")
    (tmp_path / "beside.txt").write_text("not asked for")
    found = find_inputs([f"{tmp_path}/text{pattern}"])
    assert sorted(texts(read_all(found))) == ["a.txt", "sub/b.txt", "sub/deep/c.txt"]


def test_a_link_to_texts_elsewhere_is_followed(tmp_path) -> None:
    tree(tmp_path / "elsewhere")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "link").symlink_to(tmp_path / "elsewhere")
    for pattern in (f"{tmp_path}/text", f"{tmp_path}/text/**/*.txt"):
        assert len(texts(read_all(find_inputs([pattern])))) == 3


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/*/*.txt"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, pattern: str) -> None:
    tree(tmp_path / "text")
    lists = {name: getattr(os, name) for name in ("scandir", "listdir")}

    def refuse(name: str):
        def call(path):
            if str(path).endswith("deep" if pattern != "/*/*.txt" else "sub"):
                raise PermissionError(13, "Permission denied", str(path))
            return lists[name](path)

        return call

    for name in lists:
        monkeypatch.setattr(os, name, refuse(name))
    (tmp_path / "text" / "other").mkdir()
    (tmp_path / "text" / "other" / "d.txt").write_text("d")
    items = read_all(find_inputs([f"{tmp_path}/text{pattern}"]))
    assert "unreadable" in kinds(items)
    named = next(item for item in items if isinstance(item, Problem))
    assert "Permission denied" in str(named) and str(tmp_path) in named.where


def test_pipes_devices_and_broken_links_are_not_opened(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    items = read_all(find_inputs([str(tmp_path)]))
    assert texts(items) == ["a"] and kinds(items) == ["special", "special"]
    for path in (tmp_path / "pipe.txt", tmp_path / "gone.txt", "/dev/zero", "/dev/null"):
        with pytest.raises(ConfigError, match=r"^Data\.source = .*: no text files found") as error:
            find_inputs([str(path)])
        assert "\n" not in str(error.value)
        with pytest.raises(ConfigError, match=r"^Data\.tokenizer = .*cannot be read"):
            Tokenizer.load(path)


def test_what_a_dataset_caches_is_no_data(tmp_path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Arrow needs pyarrow")
    table = arrow.table({"text": TEXTS})
    for name in ("data-00000-of-00001", "cache-0123456789abcdef", "tmpab_cd12"):
        with arrow.ipc.new_stream(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "state.json").write_text("{}")
    for pattern in ("", "/*.arrow", "/**/*.arrow"):
        assert texts(read_all(find_inputs([f"{tmp_path}{pattern}"]))) == TEXTS
    (tmp_path / "state.json").unlink()  # then they are files like any others
    assert len(texts(read_all(find_inputs([str(tmp_path)])))) == 3 * len(TEXTS)


def test_large_files_are_cut_into_blocks(tmp_path) -> None:
    lines = "".join(f"line {k} äöü\n" for k in range(2000)).encode()
    (tmp_path / "a.txt").write_bytes(lines)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt").write_text("文" * 9000, encoding="utf-8")  # nowhere a newline
    (tmp_path / "d.txt").write_bytes(lines[: lines.rfind(b"\n", 0, 4096) + 1])
    for name, blocks in (("a.txt", 25), ("b.txt.gz", 25), ("c.txt", 20), ("d.txt", 1)):
        found = read_all(find_inputs([str(tmp_path / name)]), documents="block", block_bytes=1024)
        assert not kinds(found) and len(texts(found)) >= blocks
        content = (tmp_path / name).read_bytes()
        whole = gzip.decompress(content) if name.endswith(".gz") else content
        assert "".join(texts(found)).encode() == whole
        sizes = [len(text.encode()) for text in texts(found)]
        assert max(sizes) <= (4096 if blocks == 1 else 2048)
        if name[0] in "ab":
            assert all(text.endswith("\n") for text in texts(found))


@pytest.mark.parametrize("pattern", ["", "~nobody-of-this-name/text", "a\0b"])
def test_what_is_no_path_is_one_line(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^Data\.source = ") as error:
        find_inputs([pattern])
    assert "\n" not in str(error.value)


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    for pattern in ("~/text", "~/text/a.txt", "~/text/*.txt", "~/**/*.txt"):
        assert texts(read_all(find_inputs([pattern]))) == ["a"]
