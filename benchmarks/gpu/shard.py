"""A pytest plugin of the stage `test`: takes every k-th test, and writes the outcome of each as a line of JSON, so that
what ran before a crash is known. Memory that a large test took is given back, for the other shards to have it."""

from __future__ import annotations

import gc
import json
import os

import pytest
import torch

KEPT_BYTES = 1 << 30


@pytest.hookimpl(trylast=True)  # after tests were deselected
def pytest_collection_modifyitems(config, items) -> None:
    index, count = map(int, os.environ["TTS_SHARD"].split("/"))
    items[:] = items[index::count]


def pytest_runtest_logstart(nodeid, location) -> None:
    write({"begin": nodeid})


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        what = "skipped" if report.skipped else report.outcome
        text = report.longreprtext.strip().splitlines() if report.failed else []
        errors = [line for line in text if line.startswith("E ")]
        write({"test": report.nodeid, "outcome": what, "error": (errors or text[-1:] or [""])[0][:300]})


def pytest_runtest_logfinish(nodeid, location) -> None:
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        gc.collect()
        torch.cuda.empty_cache()


def pytest_sessionfinish(session, exitstatus) -> None:
    write({"exit": int(exitstatus)})


def write(line: dict) -> None:
    with open(os.environ["TTS_SHARD_LOG"], "a") as log:
        print(json.dumps(line), file=log)
