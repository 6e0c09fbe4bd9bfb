"""`pldr-analyze`: files of a report, text to rows, and one line for what is wrong."""

import errno
import html.parser
import json
import math
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import REPOSITORY, contents, corpus_of, run_here, tiny_config, untrained_run

from pldr_jax.analysis.report.analyze import ReportProgress, attempt
from pldr_jax.analysis.report.comparison import Comparison
from pldr_jax.analysis.report.files import RunReport, json_values, run_labels, write_report
from pldr_jax.analysis.report.html import cell_text
from pldr_jax.analysis.section import Picture, RenderedSection, Table
from pldr_jax.analysis.sections import SECTIONS, chosen_sections
from pldr_jax.analysis.texts import rows_of_file
from pldr_jax.cli.analyze import analyze_main
from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import new_folder
from pldr_jax.model.deductive import read_g_lm
from pldr_jax.plots import new_figure, png
from pldr_jax.runs.checkpoint import Checkpointer, read_weights
from pldr_jax.terminal import Display

CONFIG = ModelConfig(num_layers=2, num_heads=2, head_dim=8)
VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects attributes, text and the names of tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def make_run(label: str, order: float, seed: int = 0) -> RunReport:
    figure, axes = new_figure()
    axes[0, 0].plot([1, 2])
    section = RenderedSection(
        "invariance",
        "Title of <it> & more",
        (f"{label} is <invariant>.",),
        (Table("T", ("a", "b"), (("x<y", None), (1234, math.inf))),),
        (Picture("lines", 'A "line"', png(figure)),),
        {
            "order_parameter": order,
            "deep": {"rank": np.int64(3), "list": [1, np.nan]},
            "never": -math.inf,
        },
        {"spectrum": np.arange(3.0)},
    )
    g_lm = np.random.default_rng(seed).normal(size=(2, 2, 8, 8))
    return RunReport(label, {"step": 3, "model": {"x": 1}}, (section,), g_lm)


@pytest.fixture
def one(tmp_path):
    write_report(tmp_path, [make_run("run", 0.5)], tensors=True)
    return tmp_path


def test_the_page_is_whole_and_needs_nothing_else(one) -> None:
    text = (one / "report.html").read_text()
    page = Page(text)
    assert ("meta", "name", "viewport") in page.attributes
    assert page.seen.count("img") == 1 and not {"script", "link"} & set(page.seen)
    for _, name, value in page.attributes:
        if name == "src":
            assert value.startswith("data:image/png;base64,")
        if name == "href":
            assert value.startswith("#") and ("id", value[1:]) in {a[1:] for a in page.attributes}
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "prefers-color-scheme: dark" in text and "max-width" in text and "overflow-x" in text
    for piece in ("run is <invariant>.", "Title of <it> & more", "x<y", "1,234", "∞"):
        assert piece in page.text


def test_the_json_is_strict(one) -> None:
    def refuse(name):
        raise AssertionError(name)

    content = json.loads((one / "report.json").read_text(), parse_constant=refuse)
    numbers = content["runs"]["run"]["sections"]["invariance"]["numbers"]
    assert numbers == {
        "order_parameter": 0.5,
        "deep": {"rank": 3, "list": [1, "NaN"]},
        "never": "-Infinity",
    }
    figures = content["runs"]["run"]["sections"]["invariance"]["figures"]
    assert figures == ["figures/lines.png"]
    assert (one / figures[0]).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(TypeError, match="set"):
        json_values({"x": {1}})


def test_tensors_can_be_trained_with(one) -> None:
    stored = dict(np.load(one / "tensors.npz"))
    assert set(stored) == {"G_LM", "invariance.spectrum"}
    g_lm = read_g_lm(one / "tensors.npz", CONFIG)
    np.testing.assert_array_equal(g_lm[:, 0], np.float32(make_run("run", 0.5).g_lm))


def test_several_runs_are_compared(tmp_path) -> None:
    runs = [make_run("a", 0.5), make_run("b", 1e-4, seed=1)]
    across = Comparison.of_runs(runs).rendered()
    write_report(tmp_path, runs, [across], tensors=True)
    assert sorted(p.name for p in tmp_path.glob("**/*") if p.is_file()) == [
        "a_lines.png", "b_lines.png", "comparison_numbers.png", "comparison_spectra.png",
        "report.html", "report.json", "tensors_a.npz", "tensors_b.npz",
    ]  # fmt: skip
    table = across.tables[0]
    assert table.columns == ("number", "a", "b")
    assert ("order_parameter", 0.5, 1e-4) in table.rows and ("deep.rank", 3, 3) in table.rows
    values = np.linalg.svd(runs[0].g_lm, compute_uv=False)
    expected = np.median(values / values[..., :1], axis=1)
    np.testing.assert_allclose(across.numbers["singular_values"]["a"], expected)
    assert "a is <invariant>." in across.words[0] and "b is <invariant>." in across.words[1]
    page = Page((tmp_path / "report.html").read_text())
    assert page.seen.count("img") == 4 and page.seen.count("h2") == 3


def test_a_comparison_takes_what_a_run_lacks() -> None:
    lacking = RunReport("c", {"text": "other"}, ())
    found = Comparison.of_runs([make_run("a", 0.5), lacking]).rendered()
    assert ("order_parameter", 0.5, None) in found.tables[0].rows
    assert "different texts" in found.words[-1]


def test_labels_differ() -> None:
    assert run_labels(["runs/a", "other/a", "b c/"]) == ["a", "a_2", "b_c"]
    assert run_labels(["x/a", "y/a_2", "z/a"]) == ["a", "a_2", "a_3"]


@pytest.mark.parametrize(
    "value,text",
    [
        (None, ""),
        (0.0, "0"),
        (1.5e-7, "1.50e-07"),
        (0.25, "0.25"),
        (-math.inf, "-∞"),
        (True, "True"),
    ],
)
def test_cells(value, text) -> None:
    assert cell_text(value) == text


def test_progress_on_and_off_a_terminal(capsys) -> None:
    for terminal in (False, True):
        now = [0.0]
        display = Display(terminal=terminal, clock=lambda now=now: now[0])
        with ReportProgress(2, display) as progress:
            progress.start("one", 4)
            progress.advance(2)
            now[0] = 11.0
            progress.advance(1)
            progress.print("[note]")
        err = capsys.readouterr().err
        assert "[1/2] one" in err and "[note]" in err
        assert ("rows 0/4  [1/2] one" in err and "rows 3/4  [1/2] one" in err) is not terminal


def test_sections_are_chosen_in_the_order_of_the_report() -> None:
    assert chosen_sections(None) == list(SECTIONS.values())
    assert chosen_sections(" invariance,") == [SECTIONS["invariance"]]
    for text, named in (("invariance,nope", "nope"), (",", "nothing")):
        with pytest.raises(ConfigError, match=f"'{named}' is no section; there are invariance"):
            chosen_sections(text)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return untrained_run(tmp_path_factory.getbasetemp())


def test_text_becomes_rows(run_dir, tmp_path) -> None:
    tokenizer = Tokenizer.load(run_dir / "tokenizer.model")
    documents = ["def return self", "the value of a token", "for else"] * 3
    tokens = [t for text in documents for t in (*tokenizer.encode(text), tokenizer.eos_id)]
    plain, jsonl = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("\n\n".join(documents) + "\n")
    rows = [{"prompt": documents[0]}, documents[1], *({"text": text} for text in documents[2:])]
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    n_rows = len(tokens) // 7
    for path in (plain, jsonl):
        found = rows_of_file(path, tokenizer, 0, 7)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, np.reshape(tokens[: n_rows * 7], (n_rows, 7)))
        np.testing.assert_array_equal(rows_of_file(path, tokenizer, 3, 7), found[:3])


@pytest.mark.parametrize(
    "flags,line",
    [
        (["--prompts=empty.txt"], "--prompts=empty.txt: holds no text"),
        (["--prompts=short.txt"], "too few for two rows of 32"),
        (["--prompts=no.txt"], "--prompts=no.txt: no such file"),
        (["--prompts=bad.jsonl"], "--prompts=bad.jsonl:2: is no JSON"),
        (["--prompts=keys.jsonl"], "--prompts=keys.jsonl:1: holds no text"),
        (["--prompts=latin.txt"], "--prompts=latin.txt: is not UTF-8 text"),
        (["--sections=nope"], "'nope' is no section"),
        (["--rows=1"], "--rows=1: "),
        (["--rows=-1"], "--rows=-1: must be at least 0"),
        (["--batch_size=0"], "--batch_size=0: must be at least 1"),
        (["--length=33"], "has a context of 32 tokens"),
        (["--step=99"], "no checkpoint of step 99"),
        (["--step=7", "--over_checkpoints"], "--over_checkpoints: cannot be given together"),
        (["--out=."], "--out=.: is not an empty folder"),
        (["no_such_run"], "'no_such_run': no such folder"),
        (["--nope"], "--nope: no such flag"),
    ],
)
def test_what_is_wrong_is_one_line_and_keeps_the_report(
    run_dir, tmp_path, monkeypatch, capsys, flags, line
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "short.txt").write_text("def return\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    (tmp_path / "keys.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    before = contents(tmp_path)
    given = [run_dir, "--out=out", *flags]
    status, printed, err = run_here(capsys, analyze_main, *given)
    assert status in (1, 2) and printed == ""
    assert line in err.splitlines()[-1] and "Traceback" not in err
    assert contents(tmp_path) == before
    assert sum("error: " in text for text in err.splitlines()) == 1


@pytest.fixture(scope="module")
def broken_run(run_dir, tmp_path_factory):
    """The untrained run, with NaN where the G_LM of one head of the last layer is made."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    config = tiny_config(
        corpus_of(tmp_path_factory.getbasetemp()),
        {"Model.unroll": False, "Model.num_gated_units": 1},
    )
    params = read_weights(run_dir).params
    plga = params["layers"]["attention"]["plga"]
    plga["a"] = jnp.asarray(plga["a"]).at[1, 0, 0, 0].set(jnp.nan)
    with Checkpointer(folder, config.checkpoint) as checkpointer:
        state = {"params": params, "g_lm": None}
        checkpointer.save(1, state, {}, config_to_dict(config), {}, wait=True)
    (folder / "tokenizer.model").write_bytes((run_dir / "tokenizer.model").read_bytes())
    (folder / "prompts.txt").write_text("def return self the value " * 40)
    return folder


def test_sections_that_fail_are_lines_and_the_others_stand(broken_run, tmp_path, capsys) -> None:
    flags = [f"--out={tmp_path / 'out'}", "--rows=3", "--length=16", "--over_checkpoints"]
    flags += [f"--prompts={broken_run / 'prompts.txt'}", "--tensors"]
    status, printed, err = run_here(capsys, analyze_main, broken_run, *flags)
    assert status == 1 and "Traceback" not in err
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    sections = content["runs"]["run"]["sections"]
    assert list(sections) == [*SECTIONS, "emergence"]
    failed = [key for key, section in sections.items() if "error" in section["numbers"]]
    assert failed == [
        "invariance", "causality", "alteration", "low_rank", "symmetry", "decoding",
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    for key in failed:
        words = sections[key]["words"][0]
        assert words.startswith("Could not be measured: ") and "not finite" in words
        assert f"error: run, {key}: {words}" in err.splitlines() and words in page
    structure = sections["structure"]["numbers"]
    assert "run, structure: G_LM is not finite in 1 of 4 heads" in printed
    mean = structure["outputs"]["G_LM"]["mean_tensor"]
    assert mean["rank_0.001"][1][0] == "NaN" and "NaN" not in mean["rank_0.001"][0]
    entries = structure["outputs"]["G_LM"]["entries"]
    assert entries["not_finite"][0] == 0 < entries["not_finite"][1] <= 1 / 16
    assert all(math.isfinite(entries[name][1]) for name in ("mean", "std", "min", "max"))
    assert sections["emergence"]["numbers"]["checkpoints"][0]["rank"][1][0] == "NaN"


def test_a_section_that_raises_anything_is_a_line(monkeypatch) -> None:
    def raises(*_: object) -> None:
        raise np.linalg.LinAlgError("SVD did not converge\nat all")

    section = attempt(SECTIONS["structure"], raises)
    assert section.words == ("Could not be measured: LinAlgError: SVD did not converge",)
    assert section.numbers == {"error": "LinAlgError: SVD did not converge"}
    # The measurement may succeed and a figure fail.
    finished = SECTIONS["causality"](numbers={}, tensors={})
    assert "KeyError" in attempt(SECTIONS["causality"], lambda: finished).numbers["error"]


def test_an_output_that_cannot_be_written_is_one_line(
    run_dir, tmp_path, capsys, monkeypatch
) -> None:
    """Whether it cannot be from the start, or the disk is full at the end."""
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text("{}")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def return self the value " * 40)
    before = contents(tmp_path)
    flags = [f"--prompts={prompts}", "--rows=2", "--length=8", "--sections=structure", "--tensors"]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for out, reason in (
        ("/proc/nope/report", "cannot be written to"),
        (tmp_path / "file" / "report", "cannot be written to"),
        (tmp_path / "old", "No space left on device"),
    ):
        if out == tmp_path / "old":
            monkeypatch.setattr(np, "savez_compressed", full)
        status, printed, err = run_here(capsys, analyze_main, run_dir, f"--out={out}", *flags)
        assert status == 2 and printed == "" and "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith(f"error: --out={out}: cannot be written to") and reason in last
        assert contents(tmp_path) == before


@pytest.mark.parametrize("backend", ["nonsense", "module://no_such.backend_inline", "tkagg"])
def test_figures_need_no_backend(backend: str, tmp_path) -> None:
    """A notebook names its own in the environment of what it starts."""
    code = "from pldr_jax.plots import new_figure, png; assert png(new_figure()[0])[1:4] == b'PNG'"
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_is_needed(capsys) -> None:
    assert run_here(capsys, analyze_main)[::2] == (
        2,
        "pldr-analyze: error: RUN is required: run folder, or folder with config.json and "
        "model.safetensors; several are compared\n",
    )


def test_a_folder_without_held_out_text_asks_for_one(golden, capsys, tmp_path) -> None:
    status, _, err = run_here(
        capsys, analyze_main, golden("tiny").folder, f"--out={tmp_path / 'o'}"
    )
    assert status == 2 and "--prompts: none was given" in err and not (tmp_path / "o").exists()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mark").write_text("old")
    with pytest.raises(ZeroDivisionError), new_folder(out, "--out", "mark") as folder:
        (folder / "mark").write_text("new")
        raise ZeroDivisionError
    assert contents(out) == {"mark": b"old"}
    with new_folder(out, "--out", "mark") as folder:
        (folder / "mark").write_text("new")
        assert contents(out) == {"mark": b"old"}
    assert contents(tmp_path) == {"out/mark": b"new"}
    with pytest.raises(ConfigError, match="not an empty folder"), new_folder(out):
        pass
