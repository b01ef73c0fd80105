"""`make gpu` on a CPU: the whole pipeline in its dry run; a planted wrong result, a case that takes its process down
and a stage that fails are named, hide nothing else, and make the exit status 1."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # plain `pytest` does not have it

pytest.importorskip("tts_kernels.measure.compiling", exc_type=ImportError)
from benchmarks.gpu import __main__ as pipeline  # noqa: E402
from benchmarks.gpu import cases, page, record, report, stages  # noqa: E402
from benchmarks.gpu.bench import all_cases  # noqa: E402
from tts_kernels import configs  # noqa: E402
from tts_kernels.measure.timing import set_count  # noqa: E402

STAR = "4/2 d16 fp32 star n=3 prefix=32 suffix=20"
IN_BENCH = "import sys\nif 'benchmarks.gpu.bench' in sys.orig_argv:\n"
WRONG_OP = """
    from tts_kernels.attention import api

    right = api.tree_attention

    def tree_attention(q, *arguments, backend=None, **options):
        out = right(q, *arguments, backend=backend, **options)
        if backend is None and q.shape[0] == 3:
            out[-1, 0, 0] *= 1.5
        return out

    api.tree_attention = tree_attention
"""
CRASH = """
    import os
    from benchmarks.peers import unshared

    prepare = unshared.prepare

    def crash(inputs):
        if inputs.q.shape[0] == 3:
            print("gone", flush=True)
            os._exit(77)
        return prepare(inputs)

    unshared.prepare = crash
"""
HANG = """
    import faulthandler, time
    from benchmarks.gpu import cases

    later, ours = faulthandler.dump_traceback_later, cases.TreeCase.ours
    faulthandler.dump_traceback_later = lambda seconds, exit: later(min(seconds, 8), exit=exit)

    def hang(case, given):
        if case.num_rows == 3:
            time.sleep(100)
        return ours(case, given)

    cases.TreeCase.ours = hang
"""


def run(folder, *arguments, plant=""):
    if plant:
        (folder / "sitecustomize.py").write_text(IN_BENCH + plant)
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--results", str(folder / "results"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    found = [path for path in (folder / "results").glob("*/*.json") if path.parent.name != "tables"]
    return done, json.loads(found[0].read_text()) if found else None


def by_name(written):
    return {entry["name"]: entry for entry in record.cases(written)}


def short_table(done):
    return done.stdout[done.stdout.index("cpu, dry run, commit") :].splitlines()


def test_the_whole_pipeline(tmp_path):
    done, written = run(tmp_path, "--stages", "build compile test sanitize bench models tune")
    assert done.returncode == 0, done.stdout + done.stderr
    record.check(written)
    status = {name: stage["status"] for name, stage in written["stages"].items()}
    assert set(status.values()) == {"passed"}
    assert list(status) == ["build", "compile", "test", "sanitize", "bench", "models", "tune"]
    told = "\n".join(written["stages"]["tune"]["lines"])
    for op in configs.KEYS:
        assert f"{op}, " in told and (tmp_path / "results" / "tables" / configs.table_name(op, "interpreter")).exists()
    decode = written["stages"]["models"]["decode"][0]
    assert set(decode["methods"]) == {"ours", "not shared", "stock"} and decode["methods"]["ours"]["eager_s"] > 0
    assert "2 Triton kernels for sm_90" in written["stages"]["compile"]["lines"][0]
    assert written["stages"]["test"]["counts"]["passed"] > 3

    entries = by_name(written)
    assert set(entries) == {case.name for case in all_cases(cases.grid("dry"), "cpu")}
    ours = entries[STAR]["methods"]["ours"]
    token, rows = 2 * 2 * 16 * 4, 3 * 4 * 16 * 4
    assert entries[STAR]["least_bytes"] == (32 + 3 * 20) * token + 2 * rows
    assert entries[STAR]["flops"] == 4 * 4 * 16 * 3 * 52
    assert ours["bytes_moved"] >= entries[STAR]["least_bytes"] and ours["cold"]["samples"] == 2
    assert ours["of_floor"] == entries[STAR]["floor_s"] / ours["cold"]["median"]
    assert set(entries[STAR]["methods"]) >= {"ours", "two-pass flash", "sdpa flash", "ours, not shared"}
    # A peer that is missing is named, and fatal to nothing.
    assert entries[STAR]["missing"]["flashinfer cascade"] == "FlashInfer is not installed"
    table = short_table(done)
    assert (
        len(table) <= report.MOST_LINES and "no flashinfer cascade fa2: FlashInfer is not installed (5 cases)" in table
    )
    assert done.stdout.splitlines()[-1].startswith("wrote ")

    made = page.pages(tmp_path / "results")
    text = made[tmp_path / "results" / "README.md"].decode()
    assert "## NVIDIA H200\n\nNot yet measured." in text and f"| {STAR} | " in text and "Where sharing pays" in text


def test_a_wrong_result_has_no_time(tmp_path):
    done, written = run(tmp_path, "--stages", "bench", plant=WRONG_OP)
    assert done.returncode == 1
    entries = by_name(written)
    assert entries[STAR]["status"] == "wrong" and entries[STAR]["methods"] == {}
    assert re.match(r"error 0\.\d+, allowed", entries[STAR]["wrong"]["ours"])
    # "ours, not shared" of the other cases is right, and so are they.
    assert all(e["status"] == "ok" and "ours" in e["methods"] for name, e in entries.items() if name != STAR)
    table = "\n".join(short_table(done))
    assert f"wrong result: ours, {STAR}" in table and re.search(r"^decode +1 +0 +- +- +- +-$", table, re.MULTILINE)
    assert written["stages"]["bench"]["status"] == "failed"
    record.check(written)


def test_a_crash_hides_nothing(tmp_path):
    done, written = run(tmp_path, "--stages", "bench", plant=CRASH)
    assert done.returncode == 1
    entries = by_name(written)
    assert len(entries) == len(all_cases(cases.grid("dry"), "cpu")) and not written["stages"]["bench"]["not_run"]
    # Again, without the peer that did it; the others are there, in this case too.
    why = f"it took the process down in {STAR}: status 77: gone"
    assert entries[STAR]["missing"]["ours, not shared"] == why and "two-pass flash" in entries[STAR]["methods"]
    assert written["stages"]["bench"]["lines"] == [f"crashed in {STAR}, ours, not shared: status 77: gone"]
    assert all(e["status"] == "ok" and "ours" in e["methods"] for e in entries.values())
    stars = [e for name, e in entries.items() if " star " in name]
    assert len(stars) == 3 and all(e["missing"]["ours, not shared"] == why and len(e["methods"]) > 2 for e in stars)
    record.check(written)


def test_a_case_that_does_not_end_hides_nothing(tmp_path):
    done, written = run(tmp_path, "--stages", "bench", plant=HANG)
    assert done.returncode == 1
    bench = written["stages"]["bench"]
    assert bench["not_run"] == [STAR] and bench["status"] == "failed"
    assert bench["lines"] == [f"crashed in {STAR}, ours: it did not end"]
    assert len(by_name(written)) == len(all_cases(cases.grid("dry"), "cpu")) - 1
    record.check(written)


def test_a_run_that_is_out_of_time_says_what_is_missing(tmp_path):
    done, written = run(tmp_path, "--stages", "bench", "--budget", "bench=0.5")
    assert done.returncode == 1
    assert written["stages"]["bench"]["status"] == "timed out" and len(written["stages"]["bench"]["not_run"]) == 8
    assert "out of time: 8 cases not run" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "bench dance"], "got dance"),
        (["--budget", "bench=long"], "--budget: expected STAGE=SECONDS, got 'bench=long'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", *arguments])
    with pytest.raises(SystemExit) as ended:
        pipeline.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_stage_that_raises_is_a_failed_stage(tmp_path):
    def broken(run, end):
        raise OSError("no such thing")

    got = pipeline.perform(stages.Stage("x", 5, broken, "breaks"), stages.Run(True, "dry", tmp_path), 5)
    assert got["status"] == "failed" and got["lines"] == ["OSError: no such thing"] and got["budget_s"] == 5


def test_the_record_of_a_bench_that_raised_is_valid(tmp_path, monkeypatch, capsys):
    """And one that is not valid is kept aside."""

    def broken(run, end):
        raise OSError("no such thing")

    found = {"gpu": False, "software": {"torch": "1"}, "device": {"name": "cpu, dry run", "arch": "", "memory_bytes": 0,
             "l2_bytes": 0, "multiprocessors": 0}}  # fmt: skip
    monkeypatch.setattr(pipeline, "describe", lambda run: found)
    monkeypatch.setattr(pipeline, "STAGES", (stages.Stage("bench", 5, broken, "breaks"),))
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--results", str(tmp_path)])
    assert pipeline.main() == 1
    (path,) = tmp_path.glob("*/*.json")
    assert json.loads(path.read_text())["stages"]["bench"]["lines"] == ["OSError: no such thing"]
    del found["device"]["arch"]
    assert pipeline.main() == 1
    assert "expected a member 'arch'" in capsys.readouterr().out
    assert json.loads((tmp_path / "invalid-record.json").read_text())["stages"]["bench"]["status"] == "failed"


def test_a_job_out_of_time_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "WORK", tmp_path)
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'input()'] + [])"
    run = stages.Run(True, "dry", tmp_path)
    job = stages.Job(run, "slow", [sys.executable, "-c", child.replace("input()", "import time; time.sleep(60)")])
    start = time.monotonic()
    done = job.wait(start + 3)
    assert done.timed_out and time.monotonic() - start < 30
    result = stages.judge(stages.Result(), done, "slow")
    assert result.status == "timed out" and result.lines == ["slow: ran out of its time"]


class FakeJob:
    """Ends at once; `outputs` by name of the job."""

    outputs: ClassVar[dict] = {}
    seen: ClassVar[dict] = {}

    def __init__(self, run, name, command, **environment):
        self.name = name
        self.seen[name] = environment

    def wait(self, end):
        code, output = self.outputs.get(self.name, (0, ""))
        return stages.Done(code, False, output)


@pytest.mark.parametrize(
    "arch, nvcc, asked, wanted",
    [("sm_90", True, None, "90a"), ("sm_89", True, None, "89"), ("sm_90", True, "80 90a", None),
     ("sm_90", False, None, None), ("gfx942", True, None, None), ("", True, None, None)],
)  # fmt: skip
def test_what_the_build_is_for(arch, nvcc, asked, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "Job", FakeJob)
    monkeypatch.setattr(stages.shutil, "which", lambda *_, **__: "nvcc" if nvcc else None)
    monkeypatch.delenv("TTS_KERNELS_CUDA_ARCHS", raising=False)
    if asked:
        monkeypatch.setenv("TTS_KERNELS_CUDA_ARCHS", asked)
    assert stages.build(stages.Run(False, "full", tmp_path, arch), time.monotonic() + 5).status == "passed"
    assert FakeJob.seen["build"] == ({"TTS_KERNELS_CUDA_ARCHS": wanted} if wanted else {})


REFUSED = (1, "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the docs\n")
CLEAN = (0, "0 wrong results\n========= ERROR SUMMARY: 0 errors\n")
RACE = (9, "========= RACECHECK SUMMARY: 2 hazards displayed\n")


@pytest.mark.parametrize(
    "memcheck, racecheck, status, line",
    [
        (CLEAN, CLEAN, "passed", "memcheck: ERROR SUMMARY: 0 errors"),
        (REFUSED, REFUSED, "skipped", "racecheck: compute-sanitizer does not support this device here"),
        (CLEAN, RACE, "failed", "racecheck: exit status 9"),
    ],
)
def test_what_the_sanitizers_say(memcheck, racecheck, status, line, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "Job", FakeJob)
    monkeypatch.setattr(stages.shutil, "which", lambda *_: "compute-sanitizer")
    monkeypatch.setattr(FakeJob, "outputs", {"sanitize-memcheck": memcheck, "sanitize-racecheck": racecheck})
    result = stages.sanitize(stages.Run(False, "full", tmp_path), time.monotonic() + 5)
    assert result.status == status and line in result.lines
    monkeypatch.setattr(FakeJob, "outputs", {"sanitize": (1, "wrong: x"), "sanitize-memcheck": REFUSED,
                                             "sanitize-racecheck": REFUSED})  # fmt: skip
    assert stages.sanitize(stages.Run(False, "full", tmp_path), time.monotonic() + 5).status == "failed"


SHARDED = """
import os, sys, time
import pytest
from benchmarks.gpu import shard

sys.modules["hypothesis"] = shard.without_hypothesis()
from hypothesis import given, settings
from hypothesis import strategies as st

del sys.modules["hypothesis"]  # where it is installed its plugin of pytest asks for it

@st.composite
def pairs(draw):
    return draw(st.integers()), 1

@pytest.mark.parametrize("i", range(9))
def test_it(i):
    assert i != 3, "three"
    if i == 4:
        os._exit(5)
    if i == 5:
        time.sleep(100)

@pytest.mark.parametrize("i", [1])
@settings(max_examples=3)
@given(pairs(), st.integers(0, 3) | st.just(7))
def test_drawn(i, pair, n):
    raise AssertionError
"""


def test_shards_together_run_every_test_once(tmp_path, monkeypatch):
    """Behind one that takes its process down, too, and behind one that does not end; beside a file that is none."""
    monkeypatch.setattr(stages, "WORK", tmp_path / "work")
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_it.py").write_text(SHARDED)
    (folder / "test_none.py").write_text("import no_such_module\n")
    original = stages.Job

    def here(run, name, command, **environment):
        return original(run, name, [*command[:-1], str(folder)], **environment | {"TTS_SHARD_SECONDS": "5"})

    monkeypatch.setattr(stages, "Job", here)
    result = stages.test(stages.Run(True, "dry", tmp_path), time.monotonic() + 240)
    assert result.status == "failed" and result.data["counts"] == {"passed": 6, "failed": 4, "skipped": 1}
    assert result.lines[0] == "6 passed, 4 failed, 1 skipped in 2 shards" and len(result.lines) == 5
    told = {line["test"].rpartition("::")[2].rpartition("/")[2]: line["error"] for line in result.data["failed"]}
    assert "three" in told.pop("test_it[3]") and "no_such_module" in told.pop("test_none.py")
    assert told == {
        "test_it[4]": "took its process down: status 5: ..",
        "test_it[5]": "took its process down: it did not end",
    }


def test_the_page_is_that_of_the_records():
    for path, content in page.pages(record.RESULTS).items():
        if path.suffix == ".md":
            assert path.read_bytes() == content, "python -m benchmarks.gpu.page"


@pytest.mark.parametrize("name", ["full", "dry"])
def test_grids(name):
    """Every group says why; names tell cases apart; an input set and its tables fit a GPU of 80 GB."""
    chosen = cases.grid(name)
    every = all_cases(chosen, "cuda")
    assert len({case.name for case in every}) == len(every)
    assert all(len(group["reason"]) > 15 for group in chosen["attention"] + chosen["scoring"])
    assert all(case.least_bytes < 10e9 and case.flops > 0 for case in every)
    trees = [case for case in every if case.op == "tree_attention"]
    assert all(case.whole_pages for case in trees)
    for case in trees:  # with the copies of it that one peer makes, on an H100
        sets, copies = (set_count(size, 50 << 20) for size in (case.set_bytes, case.replicated_kv_bytes))
        taken = 2 * sets * case.set_bytes + min(sets, copies) * case.replicated_kv_bytes
        assert taken + case.replicated_kv_bytes // 2 < 72 << 30, case.name
    if name == "full":
        assert {case.tree.num_rows for case in trees} >= {1, 2, 4, 8, 16, 32, 64, 128, 256}
        assert {case.params.get("prefix") for case in trees} >= {128, 256, 512, 2048, 8192, 16384, 32768}
        assert {case.params.get("suffix") for case in trees} >= {64, 256, 1024, 4096, 16384}
        assert {str(case.geometry) for case in trees} >= {
            "28/4 d128", "32/8 d128", "40/8 d128", "64/8 d128", "16/1 d128", "32/8 d64", "16/8 d256",
        }  # fmt: skip
    with pytest.raises(ValueError, match="grid: expected one of full, dry, got 'big'"):
        cases.grid("big")
