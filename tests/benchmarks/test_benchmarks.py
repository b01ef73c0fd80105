"""The benchmark suite on tiny shapes, whose figures mean nothing: it runs, and prints no speed of a wrong op."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("pytest_benchmark")

WRONG_OP = """
from tts_kernels.attention import api

right = api.tree_attention

def tree_attention(q, *arguments, **options):
    out = right(q, *arguments, **options)
    if q.shape[0] > 1:  # where something is shared
        out[-1, 0, 0] *= 1.5
    return out

api.tree_attention = tree_attention
"""
MILLISECONDS = re.compile(r"\d ±\d")


def run(folder, *arguments, plugin=""):
    (folder / "plugin.py").write_text(plugin)
    command = [sys.executable, "-m", "pytest", "benchmarks", "--grid", "tiny", "--results", str(folder), "-p", "plugin"]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    # pytest-benchmark times nothing where it is told of xdist, which runs these tests, not the benchmarks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def test_tiny_run(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("= benchmarks =")[2]
    assert len(re.findall(r"^(?:bf16|fp32) N=[13] .*\d ±\d", table, re.MULTILINE)) == 4, table
    assert "from_nodes" in table and "advance_" in table and "append_kv" in table

    # Where the two threads cannot be kept apart, and on nothing else, there is no record.
    if "no record is written" in table:
        pytest.skip(table.partition("no record is written: ")[2].splitlines()[0])
    (path,) = tmp_path.glob("*/*.json")
    record = json.loads(path.read_text())
    shared = next(b for b in record["benchmarks"] if "N3" in b["name"])
    extra = shared["extra_info"]
    assert extra["floor_s"] > 0 and extra["flops"] == 4 * 28 * 128 * 3 * (40 + 20)
    assert extra["least_bytes"] == 2 * (2 * (40 + 3 * 20) * 4 * 128 + 2 * 3 * 28 * 128)
    assert extra["bytes_read"]["sdpa"] == 2 * (2 * 3 * (40 + 20) * 4 * 128 + 2 * 3 * 28 * 128)
    assert extra["time_over_floor"] == shared["stats"]["median"] / extra["floor_s"]
    assert set(extra["peers"]) == {"two-pass flash", "sdpa", "sdpa packed"}
    # As often as ours, and every raw time is kept.
    assert all(len(p["data"]) == p["rounds"] == shared["stats"]["rounds"] for p in extra["peers"].values())
    assert not list(tmp_path.glob("*/.*")), "something half-written was left"

    again = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0] in table


def test_wrong_result_prints_no_speed(tmp_path):
    done = run(tmp_path, plugin=WRONG_OP)
    assert done.returncode == 1, done.stdout + done.stderr
    table = done.stdout.partition("= benchmarks =")[2].partition("= short test summary")[0]
    assert "N=1" in table and MILLISECONDS.search(table), "what is right is still measured"
    assert "N=3 P=" not in table
    assert len(re.findall(r"^FAILED .*N3", done.stdout, re.MULTILINE)) == 2, done.stdout
    assert "wrong result, not timed: error {'ours'" in done.stdout
    assert "no record is written" in table
    assert not list(tmp_path.glob("*/*.json"))
