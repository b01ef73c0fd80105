"""A report as one HTML page that asks the network for nothing: styles and drawings lie in it, and no scripts."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from .sections import Section, Table

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1.5rem; }}
h1 {{ line-height: 1.2; margin: 0 0 .5rem; }}
h2 {{ line-height: 1.25; margin: 0 0 .5rem; }}
section {{ border-top: 1px solid #bbb; margin-top: 2.5rem; padding-top: 1.5rem; }}
p {{ max-width: 46rem; }}
a {{ color: #005a9c; }}
figure {{ margin: 1rem 0; }}
figure img {{ display: block; max-width: 100%; min-width: 42rem; height: auto; }}
figcaption {{ font-size: .875rem; color: #444; margin-top: .5rem; max-width: 52rem; }}
.missing {{ border-left: .3rem solid #D55E00; padding: .5rem 1rem; background: #faf3ee; }}
.scroll {{ overflow-x: auto; margin: .75rem 0; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding: .25rem 0; }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
thead th {{ border-bottom: 2px solid #777; white-space: normal; vertical-align: bottom; }}
th:first-child {{ text-align: left; }}
tbody th {{ font-weight: 400; }}
summary {{ cursor: pointer; color: #005a9c; }}
@media print {{ figure img {{ min-width: 0; }} }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
{intro}
<nav aria-label="Figures"><ul>
{links}
</ul></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""
LONG = 24  # rows of a table from which on it is folded


def page(title: str, intro: Iterable[str], sections: Iterable[Section], rendered: dict[str, str]) -> str:
    """rendered: keeps the HTML of finished sections by name, so that a page can be written again as it grows."""
    sections = list(sections)
    for section in sections:
        if section.figure and section.name not in rendered:
            rendered[section.name] = section_html(section)
    return PAGE.format(
        title=escape(title),
        intro="\n".join(f"<p>{escape(text)}</p>" for text in intro),
        links="\n".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in sections),
        sections="\n".join(rendered.get(section.name) or section_html(section) for section in sections),
    )


def section_html(section: Section) -> str:
    lines = [f'<section id="{section.name}" aria-labelledby="{section.name}-title">',
             f'<h2 id="{section.name}-title">{escape(section.title)}</h2>']  # fmt: skip
    if section.text:
        lines.append(f"<p>{escape(section.text)}</p>")
    if section.missing:
        lines.append(f'<p class="missing"><strong>No figure.</strong> {escape(section.missing)}</p>')
    if section.figure:
        data = base64.b64encode(section.svg).decode()
        lines += [
            f'<figure><div class="scroll"><img src="data:image/svg+xml;base64,{data}" alt="{escape(section.alt)}">',
            f"</div><figcaption>{escape(section.provenance)}</figcaption></figure>",
        ]
    lines += map(table_html, section.tables)
    return "\n".join([*lines, "</section>"])


def table_html(table: Table) -> str:
    title = escape(table.title)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    text = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">\n<table><caption>{title}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )
    if len(table.rows) < LONG:
        return text
    return f"<details><summary>{title}: {len(table.rows)} rows</summary>\n{text}</details>"
