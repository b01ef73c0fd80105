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
    searched = claim.at(record["systems"]["reasoner"], "beam_search", claim.N)
    assert cells[f"beam search {claim.N}"][1] == claim.percent(searched)


def test_cost_table_holds_the_records_numbers(record):
    _, rows = claim.cost_rows(record)
    costs = [row for name in claim.SYSTEMS for row in record["systems"][name]["costs"]]
    assert [row[1] for row in rows] == [f"{cost['stock_seconds']:.2f}" for cost in costs]
    assert [row[2] for row in rows] == [f"{cost['tts_seconds']:.2f}" for cost in costs]


def put(point, value, spread=0.0):
    point.update(value=value, low=value - spread, high=value + spread)


def differ(system, name, sign, n=None):
    """Makes a paired difference clearly above 0, below it, or neither; of every n or of one."""
    for point in system["paired"][name]:
        if n in (None, point["n"]):
            put(point, 0.1 * sign, 0.02)


def test_best_of_n_beside_the_majority_is_said(other):
    reasoner = other["systems"]["reasoner"]
    for sign, said in ((-1, "below"), (1, "above"), (0, "not clearly different from")):
        differ(reasoner, f"{BEST} - majority", sign)
        assert f"Best-of-N is {said} the majority at every N from 2 to {other['n']}." in told(other)
    differ(reasoner, f"{BEST} - majority", 1, 2)
    differ(reasoner, f"{BEST} - majority", -1, 4)
    said = (
        "Best-of-N is above the majority at N = 2, below the majority at N = 4, not clearly different from the "
        "majority at N = 8, 16"
    )
    assert said in told(other)


def test_over_optimisation_is_said_where_the_difference_is_clear(other):
    reasoner = other["systems"]["reasoner"]
    points = reasoner["curves"][BEST]
    for i, point in enumerate(points):
        put(point, 0.5 + 0.05 * i, 0.01)
    assert f"Best-of-N is highest at N = {points[-1]['n']}" in told(other)
    peak = f"{100 * points[-2]['value']:.1f} at N = {points[-2]['n']}"
    put(points[-1], 0.1, 0.01)
    differ(reasoner, f"{BEST} - its best", 0)
    assert f"Best-of-N falls, not clearly: {peak}, 10.0" in told(other)
    differ(reasoner, f"{BEST} - its best", -1)
    assert f"Best-of-N over-optimises: {peak}, 10.0" in told(other)


def test_external_scaling_beside_the_internal_is_said(other):
    direct, chain = other["systems"]["direct"]["curves"], other["systems"]["reasoner"]["curves"]["pass"][0]
    greedy = other["systems"]["reasoner"]["greedy"]
    put(chain, 0.5, 0.02)
    put(greedy, 0.4, 0.02)
    put(claim.at(other["systems"]["reasoner"], VOTE, claim.N), 0.8, 0.02)
    for points in direct.values():
        put(points[-1], 0.1, 0.02)
    assert "does not replace" in told(other)
    assert "Together they beat either" in told(other)
    put(greedy, 0.79, 0.02)  # the better way to decode one chain is what has to be beaten
    assert "Together they do not clearly beat either" in told(other)
    put(greedy, 0.4, 0.02)
    put(direct["majority"][-1], 0.49, 0.02)  # one good way to choose is enough
    assert "apart, do not clearly differ: " in told(other)
    put(direct["majority"][-1], 0.9, 0.02)
    assert "External scaling alone beats the internal foundation alone" in told(other)
    assert "by the majority, which does best" in told(other)
    assert "Together they do not clearly beat either" in told(other)


def test_what_beats_one_greedy_chain_is_said(other):
    reasoner = other["systems"]["reasoner"]
    put(reasoner["greedy"], 0.8, 0.02)
    put(reasoner["curves"]["pass"][0], 0.6, 0.02)
    for name in reasoner["paired"]:
        if name.endswith("- greedy"):
            differ(reasoner, name, 0)
    assert "one chain, decoded greedily, is nothing; not so majority of 16, best of 16" in told(other)
    differ(reasoner, f"{VOTE} - greedy", 1, claim.N)
    assert "is weighted vote of 16; not so majority of 16, best of 16, beam search 16, DVTS 16." in told(other)


def test_what_beats_one_sampled_chain_is_said(other):
    reasoner = other["systems"]["reasoner"]
    put(reasoner["greedy"], 0.6, 0.02)
    put(reasoner["curves"]["pass"][0], 0.8, 0.02)
    for method, n in claim.methods("reasoner").values():
        if method != "pass":
            put(claim.at(reasoner, method, n), 0.81, 0.02)
    assert "one chain, sampled, is nothing; not so majority of 16, best of 16" in told(other)
    put(claim.at(reasoner, VOTE, claim.N), 0.9, 0.02)
    assert "is weighted vote of 16; not so majority of 16, best of 16, beam search 16, DVTS 16." in told(other)


def test_a_verifier_that_tells_nothing_is_said(other):
    curves = other["systems"]["direct"]["curves"]
    put(curves["pass"][0], 0.02, 0.01)
    best = claim.at(other["systems"]["direct"], f"best_of_n {claim.AGGREGATES['direct']}", other["n"])
    put(best, 0.03, 0.01)
    assert "verifier does not visibly tell right from wrong" in told(other)
    put(best, 0.3, 0.01)
    assert "verifier tells right from wrong" in told(other)


@pytest.mark.parametrize("search", list(claim.SEARCHES))
def test_a_search_beside_the_vote_is_said(other, search):
    title = claim.sentence_case(claim.SEARCHES[search])
    for sign, said in ((1, "beats"), (-1, "loses to"), (0, "is not clearly different from")):
        differ(other["systems"]["reasoner"], f"{search} - weighted_vote", sign, claim.N)
        assert f"{title} with {claim.N} candidates {said} a weighted vote of {claim.N}" in told(other)


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


def test_read_names_the_points_that_fewer_samples_lack(tmp_path, other):
    for points in other["systems"]["reasoner"]["curves"].values():
        points[:] = [point for point in points if point["n"] < claim.N]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=f"majority of {claim.N} of systems.reasoner"):
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
