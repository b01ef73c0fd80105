"""Records of `make gpu`: what the schema refuses, how two runs become one record, and that the table stays short."""

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # plain `pytest` does not have it

pytest.importorskip("tts_kernels.measure.compiling", exc_type=ImportError)
from benchmarks.gpu import figures, page, record, report  # noqa: E402

TIMES = {"median": 2e-5, "q1": 1.9e-5, "q3": 2.2e-5, "least": 1.8e-5, "samples": 11}


def method(seconds, ours=False, **more):
    return {
        "ours": ours, "cold": TIMES | {"median": seconds}, "warm": TIMES, "host_s": 1e-5, "launches": 2,
        "bytes_moved": 1200, "error": 1e-3, "of_floor": 1e-5 / seconds, "sets": 2,
    } | more  # fmt: skip


def entry(name="a", **more):
    return {
        "name": name, "op": "tree_attention", "group": "decode", "kind": "star", "case": {"n": 8, "prefix": 128},
        "sets": 2, "least_bytes": 1000, "flops": 5000, "floor_s": 1e-5, "bound": "memory", "status": "ok",
        "methods": {"ours": method(2e-5, True), "ours, not shared": method(1e-5, True), "x": method(3e-5),
                    "y": method(4e-5)},
        "missing": {"z": "not here"}, "wrong": {}, "seconds": 1.0,
    } | more  # fmt: skip


CEILINGS = {"bytes_per_s": 4.3e12, "flops_per_s": {"bf16": 7.9e14}, "cache_bytes": 60 << 20}


def whole(entries=(), **more):
    bench = {
        "status": "passed", "seconds": 1.5, "budget_s": 170, "lines": [], "ceilings": CEILINGS,
        "ceilings_after": CEILINGS, "cases": list(entries) or [entry()], "not_run": [],
    }  # fmt: skip
    return {
        "kind": "gpu", "version": record.VERSION, "date": "2026-12-01T10:00:00+00:00", "grid": "full",
        "commit": {"id": "0123456789abcdef", "dirty": False},
        "device": {"name": "NVIDIA H200", "arch": "sm_90", "memory_bytes": 1, "l2_bytes": 1, "multiprocessors": 132,
                   "driver": "580"},
        "software": {"torch": "2.11.0", "triton": None}, "stages": {"bench": bench},
    } | more  # fmt: skip


def change(path, value):
    changed = copy.deepcopy(whole())
    *above, last = path
    at = changed
    for key in above:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return changed


BENCH = ("stages", "bench")
CASE = (*BENCH, "cases", 0)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("device",), None, "record: expected a member 'device'"),
        (("extra",), 1, "record: expected no member 'extra'"),
        (("version",), True, "record.version: expected integer, got True"),
        (("version",), 1, "record.version: expected one of 2, got 1"),
        (("stages", "models"), {"status": "passed"}, "record.stages.models: expected a member 'seconds'"),
        (("kind",), "cpu", "record.kind: expected one of gpu"),
        ((*BENCH, "status"), "fine", "record.stages.bench.status: expected one of passed"),
        ((*BENCH, "ceilings", "bytes_per_s"), 0.0, "ceilings.bytes_per_s: expected at least 1, got 0.0"),
        ((*CASE, "methods", "x", "cold"), 3.0, r"cases\[0\].methods.x.cold: expected object, got 3.0"),
        ((*CASE, "methods", "x", "cold", "median"), None, "cold: expected a member 'median'"),
        ((*CASE, "missing", "z"), 7, r"cases\[0\].missing.z: expected string, got 7"),
        ((*CASE, "flops"), -1, "flops: expected at least 1, got -1"),
    ],
)
def test_the_schema_refuses(path, value, message, tmp_path):
    record.check(whole())
    with pytest.raises(ValueError, match=message):
        record.save(change(path, value), tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_the_schema_is_json_schema():
    """`check` knows all keywords that schema.json uses, and another validator agrees, where there is one."""
    known = {"$schema", "$defs", "title", "type", "enum", "required", "properties", "additionalProperties", "items",
             "minimum", "$ref"}  # fmt: skip

    def keywords(schema):
        found = set(schema)
        for name in ("properties", "$defs"):
            for below in schema.get(name, {}).values():
                found |= keywords(below)
        for name in ("items", "additionalProperties"):
            if isinstance(schema.get(name), dict):
                found |= keywords(schema[name])
        return found

    assert keywords(record.SCHEMA) <= known
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(whole(), record.SCHEMA)


def test_runs_of_a_day_become_one_record(tmp_path):
    first = whole()
    path = record.save(first, tmp_path)
    assert path == tmp_path / "nvidia-h200" / "2026-12-01-0123456789.json"
    stage = {"status": "failed", "seconds": 1.0, "budget_s": 9, "lines": ["no"]}
    record.save(whole() | {"date": "2026-12-01T11:00:00+00:00", "stages": {"test": stage}}, tmp_path)
    (found,) = record.load_all(tmp_path)
    assert found["date"].startswith("2026-12-01T11") and set(found["stages"]) == {"bench", "test"}
    dirty = whole(commit={"id": "0123456789abcdef", "dirty": True}, grid="dry")
    assert record.path_of(dirty, tmp_path).name == "2026-12-01-0123456789-dirty-dry.json"


def test_the_best_peer_is_none_of_ours():
    assert figures.best_peer(entry()) == ("x", pytest.approx(1.5))
    s = figures.summary([entry(), entry("b", bound="compute", methods={"ours": method(4e-5, True), "x": method(2e-5)})])
    assert s.over_best == pytest.approx((1.5 * 0.5) ** 0.5) and (s.least_over_best, s.least_at) == (0.5, "b")
    assert s.of_memory_floor == pytest.approx(0.5) and s.of_floor == pytest.approx((0.5 * 0.25) ** 0.5)


def test_the_table_is_short_whatever_happens():
    many = [
        entry(f"case {i}", group=f"group {i}", missing={f"peer {i}": "why " * 50}, wrong={"x": "error 1"})
        for i in range(80)
    ]
    written = whole(many)
    written["stages"] |= {
        f"stage{i}": {"status": "failed", "seconds": 1.0, "budget_s": 1.0, "lines": ["line " * 100] * 50}
        for i in range(7)
    }
    table = report.table(written)
    assert len(table.splitlines()) < report.MOST_LINES and "more lines: the record has all" in table
    assert all(len(line) <= 170 for line in table.splitlines())
    assert "x ours" not in report.table(whole()) and "1.50x" in report.table(whole())


def test_the_page_shows_the_last_record_with_benchmarks(tmp_path):
    record.save(whole(), tmp_path)
    stage = {"status": "passed", "seconds": 1.0, "budget_s": 9, "lines": []}
    record.save(whole(date="2026-12-02T10:00:00+00:00", stages={"test": stage}), tmp_path)
    text = page.pages(tmp_path)[tmp_path / "README.md"].decode()
    assert "2026-12-01 10:00" in text and "| a | memory | 20.0 ±1.5 |" in text
    assert "no z: not here (1 cases)" in text and "4.3 TB/s, 790 TFLOP/s bf16" in text
    assert "## NVIDIA H100 80GB HBM3\n\nNot yet measured." in text


def test_records_in_the_repository_are_as_the_schema_says():
    for path in record.RESULTS.glob("*/*.json"):
        found = json.loads(path.read_text())
        if found.get("kind") == record.KIND:
            record.check(found)
