"""Options, what a run measures once, and the record that it leaves."""

import os
import sys
from datetime import datetime, timezone
from pathlib import Path

# Two OpenMP threads may otherwise land on one CPU. The runtime reads this when torch is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_PROC_BIND", "true")

import pytest

from . import machine, report
from .cases import DTYPES, GRIDS

RECORDED = pytest.StashKey[list]()
MACHINE = pytest.StashKey[dict]()
COMMIT = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("tts_kernels")
    group.addoption("--grid", choices=GRIDS, default="quick", help="the shapes to measure (default: %(default)s)")
    group.addoption(
        "--results", type=Path, default=report.RESULTS, metavar="DIR", help="where the record and its plot go"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[RECORDED] = []
    config.option.benchmark_quiet = True  # the table below says more than pytest-benchmark's


def pytest_benchmark_generate_machine_info(config):
    return config.stash.get(MACHINE, None) or machine.describe()


@pytest.fixture(scope="session")
def grid(request):
    return GRIDS[request.config.getoption("grid")]


@pytest.fixture(scope="session", autouse=True)
def machine_info(request):
    info = machine.describe() | {"thread_cpus": machine.thread_cpus()}
    request.config.stash[MACHINE] = info
    request.config.stash[COMMIT] = machine.commit()  # before the run: the checkout may move on during it
    return info


@pytest.fixture(scope="session")
def ceilings(grid):
    return machine.ceilings(grid.ceiling_bytes, grid.gemm_sizes, DTYPES)


@pytest.fixture(scope="session")
def evict_caches():
    return machine.cache_evictor()


@pytest.fixture(autouse=True)
def recorded(request, benchmark):
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled")
    yield
    if benchmark.stats:
        request.config.stash[RECORDED].append(benchmark.stats.as_dict(include_data=True))


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    benchmarks = config.stash[RECORDED]
    if not benchmarks:
        return
    record = {
        "machine_info": config.stash[MACHINE],
        "commit_info": config.stash[COMMIT],
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "grid": config.getoption("grid"),
        "benchmarks": benchmarks,
    }
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(report.table(record))
    warning = report.thread_warning(record["machine_info"])
    if exitstatus != pytest.ExitCode.OK:
        terminalreporter.write_line("no record is written: not everything passed")
    elif warning:
        terminalreporter.write_line(f"no record is written: {warning}")
    else:
        for path in report.save(record, config.getoption("results")):
            terminalreporter.write_line(f"wrote {path}")
