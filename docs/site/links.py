"""Links of the guides that lead out of docs/: to the page that shows the file, or to plain text."""

import re
from typing import Any

PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "about/architecture.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "CHANGELOG.md": "about/changelog.md",
}
"""Files of the repository that are pages of the site."""

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook of MkDocs."""
    return _OUTSIDE.sub(_inside, markdown)


def _inside(link: re.Match[str]) -> str:
    text, file, anchor = link[1], link[2], link[3] or ""
    return f"[{text}]({PAGES[file]}{anchor})" if file in PAGES else text
