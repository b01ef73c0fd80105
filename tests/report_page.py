"""A report's page as a reader without a browser sees it."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """tags: (name, attributes); text: all of it; sections: by id, each with title, alt, caption, svg, and tables by
    caption as (header, rows)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.sections: dict[str, dict] = {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.now = self.sections[found["id"]] = {"title": "", "missing": "", "tables": {}}
        elif tag == "img":
            self.now |= {"alt": found["alt"], "caption": "", "svg": svg_of(found["src"])}
        elif tag == "table":
            self.caption, self.header, self.rows = "", [], []
        elif tag == "tr" and "tbody" in self.open:
            self.rows.append([])
        elif tag in ("th", "td"):
            (self.rows[-1] if "tbody" in self.open else self.header).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag
        if tag == "table":
            self.now["tables"][self.caption] = self.header, self.rows

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        inner = self.open[-1] if self.open else ""
        if inner == "h2":
            self.now["title"] += data
        elif inner == "figcaption":
            self.now["caption"] += data
        elif inner == "caption":
            self.caption += data
        elif inner in ("th", "td"):
            (self.rows[-1] if "tbody" in self.open else self.header)[-1] += data
        elif inner == "p" and "section" in self.open:
            self.now["missing"] += data if "missing" in self.tags[-1][1].get("class", "") else ""
            self.now["missing"] += data if self.tags[-1][0] == "strong" else ""


def svg_of(src: str) -> str:
    kind, _, data = src.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def words_of(svg: str) -> list[str]:
    """What stands in a drawing: matplotlib leaves it as a comment beside the letters' outlines."""
    return re.findall(r"<!-- (.+?) -->", svg, re.S)
