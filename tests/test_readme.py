"""The README's Python blocks run as they stand and print what their comments say; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line above the first, code) of each block."""
    return [(text[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)]


BLOCKS = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("line, code", [pytest.param(*block, id=f"line-{block[0]}") for block in BLOCKS])
def test_block(line, code, capsys):
    if "transformers import" in code:
        pytest.importorskip("transformers")
    # Moved down to its place, so that a traceback names the README's lines.
    exec(compile("\n" * line + code, str(ROOT / "README.md"), "exec"), {"__name__": "readme"})  # noqa: S102
    expected = re.findall(r"^print\(.*\)  # (.+)$", code, re.M)
    assert expected, "a block that prints nothing shows nothing"
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        file = ROOT / (file or name)
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target
