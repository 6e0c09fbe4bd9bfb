"""README and guides are true: their Python runs, their links lead somewhere, the site lists all."""

import doctest
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY, finished_run

import pldr_jax
from pldr_jax.training.freeze.freeze import freeze
from pldr_jax.training.freeze.settings import FreezeConfig

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
GUIDES = sorted(path.name for path in (REPOSITORY / "docs").glob("*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made on the web."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in LINK.findall(page.read_text()):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{file}#{anchor}"


def test_the_index_and_the_site_list_every_guide() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text()
    site = (REPOSITORY / "mkdocs.yml").read_text()
    for name in GUIDES:
        assert name in site, name
        assert name in ("index.md", "gallery.md") or f"]({name})" in index, name


@pytest.fixture
def nano(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Path:
    """A folder with a finished run at runs/nano, which is the working directory."""
    run_dir, _ = finished_run(tmp_path_factory.getbasetemp())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "nano").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "nano"


def run_blocks(page: str, names: dict[str, Any]) -> None:
    text = (REPOSITORY / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        # The run of the test has other steps than that of the guide.
        exec(compile(re.sub(r", step=\d+", "", block), page, "exec"), names)


def test_the_readme_runs(nano: Path) -> None:
    run_blocks("README.md", {})


@pytest.mark.slow
@pytest.mark.parametrize("page", ["analysis", "decoding", "deductive_outputs", "low_rank"])
def test_the_python_of_the_guides_runs(nano: Path, page: str) -> None:
    """With what a guide says that its blocks begin with: a model, its rows, a G_LM."""
    lm = pldr_jax.load(nano)
    rows_RC = np.random.default_rng(0).integers(5, 60, (8, lm.config.context_length + 1))
    names = {"pldr_jax": pldr_jax, "lm": lm, "tokens_BT": rows_RC[:1, :8], "rows_RC": rows_RC}
    names["g_lm"] = lm(rows_RC[:1, :8]).deductive.G_LM[:, 0]
    if page == "low_rank":
        freeze(nano, nano.parent / "nano_frozen", FreezeConfig(rows=4, eval_rows=4))
    run_blocks(f"docs/{page}.md", names)


@pytest.mark.slow
@pytest.mark.parametrize("name", pldr_jax.__all__)
def test_the_examples_of_docstrings_run(nano: Path, name: str) -> None:
    names = {"pldr_jax": pldr_jax}
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    found = finder.find(getattr(pldr_jax, name), name, module=False, globs=names)  # type: ignore[arg-type]
    assert any(test.examples for test in found)
    for test in found:
        assert runner.run(test).failed == 0, test.name


def test_the_gallery_shows_every_picture() -> None:
    gallery = (REPOSITORY / "docs" / "gallery.md").read_text()
    pictures = sorted(path.name for path in (REPOSITORY / "docs" / "images").iterdir())
    assert [name for name in pictures if f"(images/{name})" not in gallery] == []
