"""What the record of the small reasoner is made to say: its tables, and sentences that turn around with its numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from report_page import Page

from tts_kernels import cli
from tts_kernels.cost import claim, sections

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "reasoner" / "results.json"
VOTE = f"weighted_vote {claim.AGGREGATES['reasoner']}"
BEST = f"best_of_n {claim.AGGREGATES['reasoner']}"


@pytest.fixture(scope="module")
def record():
    return claim.read(RESULTS)


@pytest.fixture
def other(record):
    return copy.deepcopy(record)


def told(record) -> str:
    return " ".join(claim.findings(record))


def test_readme_block_is_generated(record):
    assert claim.block(record) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_figure_is_that_of_the_record(record):
    assert claim.section(record).svg == (ROOT / claim.FIGURE).read_bytes()


def test_table_holds_the_records_numbers(record):
    _, rows = claim.claim_rows(record)
    cells = {row[0]: row[1:] for row in rows}
    for i, name in enumerate(claim.SYSTEMS):
        system = record["systems"][name]
        assert cells["1 sample"][i] == claim.percent(system["curves"]["pass"][0])
        assert cells["greedy"][i] == claim.percent(system["greedy"])
        assert cells[f"any of {claim.N} (oracle)"][i] == claim.percent(claim.at(system, "pass", claim.N))
    assert cells[f"beam search {claim.N}"][0] == claim.NONE  # direct answers have no steps
    assert cells[f"beam search {claim.N}"][1] == claim.percent(claim.at(record["systems"]["reasoner"], "beam_search", 16))


def test_cost_table_holds_the_records_numbers(record):
    _, rows = claim.cost_rows(record)
    costs = [row for name in claim.SYSTEMS for row in record["systems"][name]["costs"]]
    assert [row[1] for row in rows] == [f"{cost['stock_seconds']:.2f}" for cost in costs]
    assert [row[2] for row in rows] == [f"{cost['tts_seconds']:.2f}" for cost in costs]


def test_best_of_n_below_the_majority_is_said(other):
    for point in other["systems"]["reasoner"]["curves"][BEST]:
        point["value"] = 0.0
    assert "Best-of-N is below the majority at N = 2, 4" in told(other)
    for point in other["systems"]["reasoner"]["curves"][BEST]:
        point["value"] = 1.0
    assert "Best-of-N is above the majority at every N" in told(other)


def test_over_optimisation_is_said(other):
    points = other["systems"]["reasoner"]["curves"][BEST]
    for i, point in enumerate(points):
        point["value"] = 0.5 + 0.01 * i
    assert "Best-of-N still rises" in told(other)
    points[-1]["value"] = 0.1
    assert f"Best-of-N over-optimises: {100 * points[-2]['value']:.1f} at N = {points[-2]['n']}, 10.0" in told(other)


def test_external_scaling_that_replaces_the_internal_is_said(other):
    for point in other["systems"]["direct"]["curves"]["pass"]:
        point.update(value=1.0, low=0.99, high=1.0)
    assert "does not replace" not in told(other)
    assert "do not clearly beat" in told(other)


@pytest.mark.parametrize("search", list(claim.SEARCHES))
def test_a_search_that_pays_or_loses_is_said(other, search):
    point = claim.at(other["systems"]["reasoner"], search, claim.N)
    title = claim.SEARCHES[search]
    title = title[0].upper() + title[1:]
    point.update(value=1.0, low=0.9999, high=1.0)
    assert f"{title} with {claim.N} candidates pays" in told(other)
    point.update(value=0.0, low=0.0, high=0.0)
    assert f"{title} with {claim.N} candidates loses" in told(other)
    point.update(claim.at(other["systems"]["reasoner"], VOTE, claim.N) | {"tokens": 1.0})
    assert f"{title} with {claim.N} candidates is no better" in told(other)


@pytest.mark.parametrize("text, said", [("{", "expected JSON"), ("{}", "field problems"), ("[]", "field problems")])
def test_read_names_what_is_missing(tmp_path, text, said):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        claim.read(path)


def test_read_names_a_system_that_is_missing(tmp_path, record):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**record, "systems": {"reasoner": record["systems"]["reasoner"]}}))
    with pytest.raises(ValueError, match=r"systems\.direct\.curves"):
        claim.read(path)


def test_readme_without_markers_is_refused(tmp_path, record):
    path = tmp_path / "README.md"
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="one line <!-- claim: begin"):
        claim.write(path, record)
    assert path.read_text() == "nothing\n"


def test_a_readme_is_rewritten(tmp_path, record):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{claim.BEGIN}\nold\n{claim.END}\nafter\n")
    assert cli.main(["report", "--readme", str(path), "--claim", str(RESULTS)]) == 0
    assert path.read_text() == f"before\n{claim.block(record)}\nafter\n"
    assert (tmp_path / claim.FIGURE).read_bytes() == claim.section(record).svg


def test_a_report_has_the_section(tmp_path, monkeypatch, record):
    monkeypatch.setattr(sections, "COUNTS", (1, 2))
    for name in ("growth", "parts"):  # they take long
        monkeypatch.setattr(sections, name, lambda *_: sections.Section("stub", "Stub", ""))
    file = tmp_path / "r.html"
    assert cli.main(["report", "--output", str(file), "--scenario", "D", "--claim", str(RESULTS)]) == 0
    found = Page(file.read_text()).sections["claim"]
    header, rows = claim.claim_rows(record)
    assert found["tables"]["Accuracy"] == (header, rows)
    assert found["tables"]["Cost of a query"] == claim.cost_rows(record)
    assert record["date"] in found["caption"]
