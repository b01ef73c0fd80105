"""A pytest plugin of the stage `test`: takes every k-th test, and writes the outcome of each as a line of JSON, so that
what ran before a crash is known; started again, it goes on behind that. A test that does not end, or after which the
device or torch's memory is lost, takes the process down. Memory that a large test took is given back, for the other
shards to have it."""

from __future__ import annotations

import faulthandler
import gc
import inspect
import json
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch

KEPT_BYTES = 1 << 28  # of a process; there are up to 14, and a test may take 13 GB
LOST = 71  # exit status
STDERR = os.dup(2)  # before pytest takes it
failed: list[str] = []


def without_hypothesis() -> ModuleType:
    """In its place, where it is not installed: what it would give numbers to is skipped, tests beside that run."""

    def given(*values, **named):
        def marked(test):
            names = list(inspect.signature(test).parameters)
            names = names[: len(names) - len(values)]

            def left_out(**fixtures):
                pytest.skip("hypothesis is not installed")

            kind = inspect.Parameter.KEYWORD_ONLY
            left_out.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names if n not in named])
            left_out.__name__ = test.__name__
            return left_out

        return marked

    module = ModuleType("hypothesis")
    module.__spec__ = ModuleSpec("hypothesis", None)
    module.given, module.strategies = given, MagicMock()
    module.settings = module.example = lambda *_, **__: lambda test: test
    module.assume, module.HealthCheck = MagicMock(), MagicMock()
    return module


if find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = without_hypothesis()


@pytest.hookimpl(trylast=True)  # after tests were deselected
def pytest_collection_modifyitems(config, items) -> None:
    index, count = map(int, os.environ["TTS_SHARD"].split("/"))
    log = Path(os.environ["TTS_SHARD_LOG"])
    lines = log.read_text().splitlines() if log.exists() else []
    done = {line["begin"] for line in map(json.loads, lines) if "begin" in line}
    items[:] = [item for item in items[index::count] if item.nodeid not in done]


def pytest_collectreport(report) -> None:
    if report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        write({"test": report.nodeid, "outcome": "failed", "error": (lines or ["cannot be collected"])[-1][:300]})


def pytest_runtest_logstart(nodeid, location) -> None:
    write({"begin": nodeid})
    faulthandler.dump_traceback_later(float(os.environ["TTS_SHARD_SECONDS"]), exit=True, file=STDERR)


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        what = "skipped" if report.skipped else report.outcome
        text = report.longreprtext.strip().splitlines() if report.failed else []
        errors = [line for line in text if line.startswith("E ")]
        write({"test": report.nodeid, "outcome": what, "error": (errors or text[-1:] or [""])[0][:300]})
        if report.failed:
            failed.append(report.nodeid)


def pytest_runtest_logfinish(nodeid, location) -> None:
    faulthandler.cancel_dump_traceback_later()
    if not torch.cuda.is_initialized():
        return
    if failed[-1:] == [nodeid]:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            os.write(STDERR, f"after {nodeid}: {error}\n".encode())
            os._exit(LOST)
    if torch.cuda.memory_reserved() > KEPT_BYTES:
        gc.collect()
        torch.cuda.empty_cache()


def pytest_sessionfinish(session, exitstatus) -> None:
    write({"exit": int(exitstatus)})


def write(line: dict) -> None:
    with open(os.environ["TTS_SHARD_LOG"], "a") as log:
        print(json.dumps(line), file=log)
