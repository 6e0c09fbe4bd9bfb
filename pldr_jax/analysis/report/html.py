"""A report as one HTML file that contains its figures and loads nothing; light and dark."""

import base64
import html
import math
from collections.abc import Iterator, Sequence

from pldr_jax.analysis.section import Cell, Picture, RenderedSection, Table

Chapter = tuple[str, Sequence[RenderedSection]]
"""A heading and the sections below it."""

_STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --back: #ffffff; --line: #d5dae0;
  --soft: #f3f5f8; --link: #2a6fbb; }
@media (prefers-color-scheme: dark) { :root { --text: #dde3ea; --back: #14181d; --line: #38414b;
  --soft: #1e242b; --link: #7db3ea; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.35rem; margin-top: 2.5rem;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1.1rem; margin-top: 2rem; }
a { color: var(--link); }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.3rem 0; font-weight: 600; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { background: var(--soft); } th:first-child, td:first-child, td.text { text-align: left; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { font-size: 0.85rem; }
"""


def page(title: str, head: Table, chapters: Sequence[Chapter]) -> str:
    """The whole file.

    Args:
      head: what was measured.
      chapters: runs and comparisons.
    """
    lines = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{html.escape(title)}</h1>",
        *_table(head),
        *_contents(chapters),
    ]
    for i, (heading, sections) in enumerate(chapters):
        lines.append(f'<h2 id="chapter{i}">{html.escape(heading)}</h2>')
        for section in sections:
            lines += _section(section, f"chapter{i}_{section.key}")
    return "\n".join([*lines, "</body>\n</html>\n"])


def cell_text(value: Cell) -> str:
    """A cell as text: numbers with four digits."""
    if value is None:
        return ""
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "not a number")
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _contents(chapters: Sequence[Chapter]) -> Iterator[str]:
    yield "<nav><ul>"
    for i, (heading, sections) in enumerate(chapters):
        links = "".join(
            f'<li><a href="#{html.escape(f"chapter{i}_{section.key}")}">'
            f"{html.escape(section.title)}</a></li>"
            for section in sections
        )
        yield f'<li><a href="#chapter{i}">{html.escape(heading)}</a><ul>{links}</ul></li>'
    yield "</ul></nav>"


def _section(section: RenderedSection, anchor: str) -> Iterator[str]:
    yield f'<h3 id="{html.escape(anchor)}">{html.escape(section.title)}</h3>'
    for paragraph in section.words:
        yield f"<p>{html.escape(paragraph)}</p>"
    for picture in section.figures:
        yield from _picture(picture)
    for table in section.tables:
        yield from _table(table)


def _picture(picture: Picture) -> Iterator[str]:
    data = base64.b64encode(picture.png).decode()
    caption = html.escape(picture.caption)
    yield f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
    yield f"<figcaption>{caption}</figcaption></figure>"


def _table(table: Table) -> Iterator[str]:
    yield f'<div class="scroll"><table><caption>{html.escape(table.title)}</caption>'
    columns = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    yield f"<thead><tr>{columns}</tr></thead><tbody>"
    for row in table.rows:
        yield f"<tr>{''.join(map(_cell, row))}</tr>"
    yield "</tbody></table></div>"


def _cell(cell: Cell) -> str:
    kind = ' class="text"' if isinstance(cell, str) else ""
    return f"<td{kind}>{html.escape(cell_text(cell))}</td>"
