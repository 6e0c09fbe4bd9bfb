"""README and guides are true: their Python runs, their links lead somewhere, the site lists all."""

import re
from pathlib import Path

import pytest
from helpers import REPOSITORY, finished_run

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


def test_the_readme_runs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_dir, _ = finished_run(tmp_path_factory.getbasetemp())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "nano").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
