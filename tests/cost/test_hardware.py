"""The table of devices: dense figures, ridge points, and what is measured here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tts_kernels import ceilings, cost
from tts_kernels.cost import Hardware
from tts_kernels.cost.hardware import hardware_table

# TFLOP/s in bf16 and fp8, TB/s, GB, FLOP per byte: data sheets, dense. And TFLOP/s with sparsity that pages print as
# dense ones.
GOLDEN = {
    "a100": (312, None, 2.039, 80, 153, (624,)),
    "h100": (989, 1979, 3.35, 80, 295, (1979, 3958)),
    "h200": (989, 1979, 4.8, 141, 206, (1970, 1979, 3958)),
    "b200": (2250, 4500, 8.0, 180, 281, (4500, 9000)),
    "mi300x": (1307, 2615, 5.3, 192, 247, (2615, 5230)),
}


@pytest.mark.parametrize("name", hardware_table())
def test_golden(name):
    bf16, fp8, bandwidth, memory, ridge, _ = GOLDEN[name]
    device = Hardware.preset(name)
    assert device.bf16_flops == bf16 * 1e12 and device.memory == memory * 1e9
    assert device.bandwidth == pytest.approx(bandwidth * 1e12, rel=1e-15)
    assert device.fp8_flops == (fp8 and fp8 * 1e12)
    assert round(device.ridge) == ridge


@pytest.mark.parametrize("name", hardware_table())
def test_sparse_is_never_dense(name):
    """Every row has the figure with sparsity beside the dense one, twice as large, and nothing takes it."""
    row, device = hardware_table()[name], Hardware.preset(name)
    assert row["bf16_sparse_flops"] == pytest.approx(2 * row["bf16_flops"], rel=1e-3)
    assert device.bf16_flops == row["bf16_flops"]
    for sparse in GOLDEN[name][-1]:
        assert device.bf16_flops < 0.6 * sparse * 1e12
    if device.fp8_flops:  # dense fp8 has twice the rate of dense bf16
        assert device.fp8_flops == pytest.approx(2 * device.bf16_flops, rel=1e-3)


@pytest.mark.parametrize("name", hardware_table())
def test_every_row_has_a_source_and_a_date(name):
    row = hardware_table()[name]
    assert "data sheet" in row["source"] and re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"])
    assert Hardware.preset(name.upper()).source == row["source"]


def test_measured(monkeypatch):
    """Built on the ceilings that are measured in this process; here with figures that are known."""
    found = ceilings.Ceilings(2e10, {"bfloat16": 3e11})
    monkeypatch.setattr(ceilings, "measured", lambda device, dtype: found)
    device = Hardware.measured("cpu")
    assert (device.bandwidth, device.bf16_flops, device.source) == (2e10, 3e11, "measured here")
    assert device.ridge == 15 and device.memory > 1e8 and re.fullmatch(r"20\d\d-\d\d-\d\d", device.date)
    assert "thread" in device.name


def test_formulas_are_plain_python():
    """No module of tts_kernels.cost imports torch, numpy or the like, but where something is measured or plotted."""
    for file in Path(cost.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("torch", "numpy", "transformers", "matplotlib"), (file, name)


WITHOUT_TORCH = """
import sys, types
sys.modules.update(dict.fromkeys(("torch", "numpy", "transformers", "matplotlib")))  # importing one of them fails
package = sys.modules["tts_kernels"] = types.ModuleType("tts_kernels")
package.__path__ = [sys.argv[1]]
from tts_kernels.cost import Scenario, kv_saving, pass_at_k, query_cost
from tts_kernels.cost import command, economics_command
scenario = Scenario.load("B")
print(query_cost(scenario.workload, scenario.model, "h200").m > 1, kv_saving(2, 3, 4) > 1, pass_at_k(4, 2, 1))
"""


def test_formulas_run_without_torch():
    """The formulas and the commands that print them; the package around them, whose own imports need torch, is left
    out."""
    folder = Path(cost.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, folder], capture_output=True, text=True, check=False)
    assert done.stdout == "True True 0.5\n", done.stderr
