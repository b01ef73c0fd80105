"""`tts-kernels report`: the page asks the network for nothing, says what it shows and where from, and its numbers are
those of `query_cost`. Two scenarios and few N, since a page of all takes long to draw; the README's table has all."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from report_page import Page, words_of

from tts_kernels import cli
from tts_kernels.cost import PLANNED, Scenario, query_cost, sections
from tts_kernels.cost.readme import BEGIN, END, FIGURE, block
from tts_kernels.cost.scenario import scenarios
from tts_kernels.cost.sections import Study
from tts_kernels.cost.table import number, ratio
from tts_kernels.cost.traces import synthetic

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COUNTS = (1, 4, 32)
MONEY = ("--price", "2 USD", "--train-cost", "14 USD", "--internal-accuracy")
INVENTED = ("--traces", "synthetic", "--model", "qwen3-8b")
FIGURES = ["headline", "measured", "growth", "parts-isolated", "parts-saturated", "accuracy", "break-even"]


def profile_of(scenario: str, slower: float) -> list[dict]:
    """As `QueryCost.to_dict()` has it, every part measured to be so many times slower than modelled."""
    found = Scenario.load(scenario)
    costs = [query_cost(found.workload, found.model, "h100", sharing=sharing) for sharing in ("paged", "tree")]
    return [
        cost.with_measured({p: slower * part.seconds for p, part in cost.parts.items()}).to_dict() for cost in costs
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a report with everything in it, and what it printed to stderr."""
    folder = tmp_path_factory.mktemp("report")
    profile = folder / "profile.json"
    profile.write_text(json.dumps({"date": "2026-11-01T10:00:00", "ways": profile_of("B", 2.0)}))
    with pytest.MonkeyPatch.context() as patch, open(folder / "progress", "w") as progress:
        patch.setattr(sections, "COUNTS", COUNTS)
        patch.setattr(sys, "stderr", progress)
        status = cli.main(
            ["report", "--output", str(folder / "r.html"), "--figures", str(folder / "figures"), "--scenario", "A",
             "--scenario", "D", "--profile", str(profile), *INVENTED, *MONEY, "0.6"]
        )  # fmt: skip
    assert status == 0
    return folder


@pytest.fixture(scope="module")
def page(site):
    return Page((site / "r.html").read_text())


def report(tmp_path, capsys, *arguments, status=0) -> tuple[str, Page | None]:
    file = tmp_path / "r.html"
    assert cli.main(["report", "--output", str(file), "--scenario", "D", *arguments]) == status
    return capsys.readouterr().err, Page(file.read_text()) if file.exists() else None


@pytest.fixture
def quick(monkeypatch):
    """Without the figures that take long."""
    monkeypatch.setattr(sections, "COUNTS", (1, 2))
    for name in ("growth", "parts"):
        monkeypatch.setattr(sections, name, lambda *_: sections.Section("stub", "Stub", ""))


def test_page_needs_no_network(page):
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name, value in attrs.items():
            if name == "href":
                assert value[0] == "#" and value[1:] in ids
            elif name == "src":
                assert value.startswith("data:image/svg+xml;base64,")
            else:
                assert "//" not in value and "url(" not in value, (name, value)
    assert "http" not in page.text and "//" not in page.text


def test_style_needs_no_network(site):
    style = re.search(r"<style>(.*?)</style>", (site / "r.html").read_text(), re.S)[1]
    assert "url(" not in style and "@import" not in style and "//" not in style
    for svg in (site / "figures").glob("*.svg"):
        assert not re.search(r'(href|src)="(?!#)', svg.read_text()), "drawings refer to their own parts only"


def test_every_figure_says_what_it_is(page):
    assert list(page.sections) == FIGURES
    assert ("html", {"lang": "en"}) in page.tags
    for name, found in page.sections.items():
        assert len(found["alt"]) > 80 and found["title"] and not found["missing"], name
        assert re.search("modelled|model", found["caption"]) and re.search(r"202\d-\d\d-\d\d", found["caption"])
        assert "tts_kernels 0" in found["caption"] and re.search("commit [0-9a-f]{10}|installed", found["caption"])
        assert ("NVIDIA H100" if name == "measured" else "NVIDIA H200") in found["caption"]
        words = "\n".join(words_of(found["svg"])).replace("\xa0", " ")
        assert re.search("modelled|SYNTHETIC", words) and "tts_kernels 0" in words, "a copied drawing still says it"
        assert found["tables"], name


def test_axes_have_units(page):
    units = {
        "headline": ["2P/S: .*(ratio)", "V1/V2: .*(ratio)"],
        "measured": ["seconds a query (s)"],
        "growth": ["N (candidates)", "m(N) .*(ratio)"],
        "parts-isolated": ["GPU seconds a query (s)"],
        "parts-saturated": ["GPU seconds a query (s)"],
        "accuracy": ["cost of 1,000 queries (USD)", "accuracy, best_of_n (% of questions)"],
        "break-even": ["queries .*(number)", "total cost (USD)"],
    }
    assert list(units) == FIGURES
    for name, labels in units.items():
        words = words_of(page.sections[name]["svg"])
        for label in labels:
            pattern = re.escape(label).replace(r"\.\*", ".*")
            assert any(re.fullmatch(pattern, text) for text in words), (name, label)


def test_control_and_ceiling_are_labelled(page):
    words = words_of(page.sections["headline"]["svg"])
    assert "A: control" in words and "ceiling 1 + 2P/S (KV reads only)" in words and "B, measured" not in words
    assert "nothink-bon, measured" in words
    assert "control" in page.sections["headline"]["alt"]


def cost(scenario, n, regime, sharing):
    found = Scenario.load(scenario).with_n(n)
    return query_cost(found.workload, found.model, "h200", sharing=sharing, regime=regime, efficiency=PLANNED)


def test_numbers_are_those_of_query_cost(page):
    header, rows = page.sections["headline"]["tables"]["Whole query and decode alone, V1/V2"]
    assert [(row[0][0], row[1]) for row in rows] == [("A", "4"), ("A", "32"), ("A", "64"), ("D", "4"), ("D", "32")]
    for row in rows:
        for regime in ("isolated", "saturated"):
            paged, tree = (cost(row[0][0], int(row[1]), regime, sharing) for sharing in ("paged", "tree"))
            assert row[header.index(regime)] == ratio(paged.seconds / tree.seconds)
            assert row[header.index(f"{regime}, decode")] == ratio(paged.decode_seconds / tree.decode_seconds)
        assert row[2] == number(tree.workload.sharing_ratio) and row[3] == ratio(1 + tree.workload.sharing_ratio)
    header, rows = page.sections["growth"]["tables"]["m(N)"]
    assert header == ["scenario", "regime", "N", "V0", "V1", "V2"] and len(rows) == 2 * (4 + 3)
    for row in rows:
        for cell, sharing in zip(row[3:], ("copies", "paged", "tree")):
            found = cost(row[0][0], int(row[2]), row[1], sharing)
            assert cell == number(found.m) + ("" if found.fits else ", does not fit")
    for regime in ("isolated", "saturated"):
        header, rows = page.sections[f"parts-{regime}"]["tables"]["GPU seconds of each part"]
        assert len(rows) == 6
        for row in rows:
            sharing = {"V0": "copies", "V1": "paged", "V2": "tree"}[row[1][:2]]
            found = cost(row[0][0], 64 if row[0][0] == "A" else 32, regime, sharing)
            expected = [*(number(part.seconds) for part in found.parts.values()), number(found.seconds)]
            assert row[2:] == expected and header[2:] == [*found.parts, "sum"]
            assert ("does not fit" in row[1]) == (found.fits is False)


def test_measured_stands_beside_modelled(page):
    header, rows = next(iter(page.sections["measured"]["tables"].values()))
    assert header == ["part", *(f"{v}{c}" for v in ("V1", "V2") for c in (" model, s", " measured, s"))][:1] + [
        cell for v in ("V1", "V2") for cell in (f"{v} model, s", f"{v} measured, s", "measured / model")
    ]
    found = query_cost(Scenario.load("B").workload, Scenario.load("B").model, "h100", sharing="paged")
    for row, part in zip(rows, found.parts.values()):
        assert row[1:3] == [number(part.seconds), number(2 * part.seconds)]
        assert row[3] == ("2.00x" if part.seconds else "-")
    assert rows[-1][:3] == ["sum", number(found.seconds), number(2 * found.seconds)]
    assert "2026-11-01" in page.sections["measured"]["caption"]
    _, points = page.sections["headline"]["tables"]["Measured"]
    assert points[0][0] == "nothink-bon" and points[0][2] == points[0][3], "twice as slow, both of them"


def test_synthetic_samples_are_marked_wherever_they_are_shown(page):
    for name in ("accuracy", "break-even"):
        found = page.sections[name]
        assert "(synthetic samples)" in found["title"] and "SYNTHETIC" in found["caption"]
        assert any("synthetic samples" in title for title in found["tables"])
        assert re.search("synthetic", "\n".join(words_of(found["svg"])), re.I)
    assert "Synthetic" in page.sections["accuracy"]["alt"]


def test_accuracies_and_costs_are_those_of_the_traces(page):
    traces = synthetic()
    _, rows = next(iter(page.sections["accuracy"]["tables"].values()))
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16"]
    last = traces.cost(16, "qwen3-8b", "h200", price="2 USD", efficiency=PLANNED)
    assert rows[-1][1] == f"{traces.accuracy(16).value:.3f}" and rows[-1][4] == number(1000 * last)


def test_traces_of_a_file(tmp_path, capsys, quick):
    invented, own = tmp_path / "invented.jsonl", tmp_path / "own.jsonl"
    synthetic(3, 4).write(invented)
    other = synthetic(3, 4, seed=1)
    other.write(own)
    for file, marked in ((invented, True), (own, False)):
        _, page = report(tmp_path, capsys, "--traces", str(file), *INVENTED[2:], *MONEY, "0.999")
        assert ("synthetic" in page.sections["accuracy"]["title"]) == marked
        assert "Refused: external_accuracy: expected at least" in page.text and "equal accuracy" in page.text
        assert "alt" not in page.sections["break-even"]


def test_what_is_not_shown_is_said(tmp_path, capsys, quick):
    _, page = report(tmp_path, capsys)
    assert "measured" not in page.sections
    for name, word in (("accuracy", "--traces FILE"), ("break-even", "--train-cost, --price, --internal-accuracy")):
        assert "alt" not in page.sections[name] and word in page.text


def test_progress_and_files(site):
    progress = (site / "progress").read_text()
    assert re.findall(r"\[(\d)/7\].* \d+\.\d s", progress) == list("1234567")
    assert sorted(p.stem for p in (site / "figures").glob("*.svg")) == sorted(FIGURES)
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (site / "figures").glob("*.png"))
    assert not list(site.glob(".*"))


def test_interrupted(tmp_path, capsys, quick, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sections, "parts", interrupt)
    err, page = report(tmp_path, capsys, status=130)
    assert "interrupted" in err and "[3/6]" in err and "[4/6]" not in err
    assert "svg" in page.sections["headline"], "what was finished is kept"
    assert page.text.count("The run was interrupted before this figure was made.") == 4


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    err, page = report(tmp_path, capsys, status=1)
    assert "matplotlib is not installed; pip install 'tts-kernels[bench]'" in err and page is None


def test_profile_of_another_form(tmp_path, capsys):
    file = tmp_path / "p.json"
    model = [c.to_dict() for c in [cost("D", 2, "isolated", "tree")]]
    broken = profile_of("B", 1.0)
    del broken[0]["parts"]["prm_head"]
    cases = ("[", "p.json: expected JSON"), ("{}", "expected measured seconds"), (json.dumps(model), "measured seconds")
    cases += ((json.dumps(broken), "parts\\['prm_head'\\]\\['ceiling_seconds'\\]: expected a number, got nothing"),)
    cases += ((json.dumps([{**broken[1], "sharing": "V9"}]), "sharing: expected one of copies, paged, tree"),)
    for text, message in cases:
        file.write_text(text)
        err, page = report(tmp_path, capsys, "--profile", str(file), status=1)
        assert re.search(message, err) and page is None, err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--output", "no/such/r.html"), "output: expected a file in a directory that exists"),
        (("--scenario", "Z"), "scenario: expected one of"),
        (("--traces", "synthetic", "--price", "2 USD"), "--model: expected the model that the samples are of"),
        (("--traces", "synthetic", "--model", "qwen3-8b"), "--price: expected the price of a GPU hour"),
        ((*MONEY, "1.2", "--external-accuracy", "0.5"), "--internal-accuracy: expected at most 1"),
        ((*MONEY, "0.5", "--external-accuracy", "0.5", "--external", "Z"), "scenario: expected one of"),
        ((*MONEY[:3], "14 EUR", MONEY[4], "0.5", "--external-accuracy", "0.5"), "--train-cost: expected an amount in"),
        (("--traces", "synthetic", "--model", "qwen3-8b", *MONEY[:2], "--regime", "both"), "--regime: expected one of"),
        (("--readme", "no-readme.md"), "No such file"),
    ],
)  # fmt: skip
def test_errors(tmp_path, capsys, arguments, message):
    err, page = report(tmp_path, capsys, *arguments, status=1)
    assert err.startswith("tts-kernels report: ") and message in err and page is None


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert "tts-kernels report --readme README.md" in capsys.readouterr().out.partition("examples:")[2]


def test_readme_without_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    for text in ("# none\n", f"{END}\n{BEGIN}\n"):
        readme.write_text(text)
        err, _ = report(tmp_path, capsys, "--readme", str(readme), status=1)
        assert "README.md: expected one line <!-- costs: begin" in err and readme.read_text() == text


def test_readme_is_rewritten_between_its_markers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sections, "COUNTS", (1, 2))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    report(tmp_path, capsys, "--readme", str(readme))
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["before", BEGIN] and lines[-2:] == [END, "after"] and "old" not in lines
    assert any(line.startswith("| D longctx-bon ") for line in lines)
    assert (tmp_path / FIGURE).read_text().startswith("<?xml")


def test_the_readme_has_what_the_command_gives():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", text, re.S)
    assert found, "README.md has no markers; see tts_kernels/cost/readme.py"
    hardware = sections.Hardware.preset("h200")
    assert found[0] == block(Study(scenarios(), hardware, PLANNED)), "run tts-kernels report --readme README.md"
    assert (ROOT / FIGURE).stat().st_size < 200_000


PROBE = """<script>window.onload = () => { const images = [...document.images];
document.title = JSON.stringify({loaded: images.map(i => i.complete && i.naturalWidth > 300 && i.width > 300),
wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
asked: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:"))
.map(e => e.name)}); }</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [1280, 520])
def test_in_chromium(site, tmp_path, width):
    """Every figure is drawn, nothing is wider than the window, nothing is asked for."""
    html = (site / "r.html").read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    probed = tmp_path / "probed.html"
    probed.write_text(html.replace("</body>", PROBE + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", probed.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    told = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    assert told == {"loaded": [True] * len(FIGURES), "wide": 0, "asked": []}


def test_a_scenario_with_listed_lengths_keeps_its_n():
    found = Scenario.load("D")
    listed = dataclasses.replace(found, workload=dataclasses.replace(found.workload, n=3, suffix=(5, 6, 7)))
    assert Study([listed], sections.Hardware.preset("h200"), PLANNED).counts_of(listed) == [3]
