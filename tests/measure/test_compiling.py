"""What is compiled ahead is what calls launch. In a process of its own: kernels are no compilable functions under the
interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
triton = pytest.importorskip("triton")
if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
    pytest.skip("triton comes without ptxas here", allow_module_level=True)

SAME = """
import torch
from tts_kernels.attention import triton as backend
from tts_kernels.measure.compiling import as_device, geometry_launches, recorded_launches, specialised, target_of
from tts_kernels.measure.inputs import Geometry, Inputs, beam, star, steps

def keys(launches):
    target = target_of("sm_90")
    found = [specialised(launch, target) for launch in launches]
    return {source.hash() + str(sorted(options.items(), key=str)) for source, options in found}

for text in ("32/8 d128", "16/8 d256", "28/4 d64 bf16+fp8"):
    geometry = Geometry.parse(text)
    ahead = keys(geometry_launches(geometry, "NVIDIA H200", "sm_90"))
    assert len(ahead) == 2
    for tree in (star(5, 100, 21), steps(3, 48, 16, 9), beam(4, 2, 3, 32, 16)):
        inputs = Inputs(tree, geometry, torch.device("cpu"), 2)
        plan = inputs.plan()
        with as_device("NVIDIA H200", "sm_90"), recorded_launches() as launches:
            q, k, v = inputs.q[1], inputs.k_cache[1], inputs.v_cache[1]
            work = backend.prepare(plan, q, k)
            backend.tree_attention(
                torch.empty_like(q), None, q, k, v, plan.nodes, plan.pages, plan.rows, 16, True, 0.1, 0.0, -1,
                None, None, None, (work.table, work.scratch, work.tile),
            )
        assert keys(launches) == ahead, (text, len(tree.length))
print("same")
"""

ERRORS = """
import triton, triton.language as tl
from tts_kernels.measure.compiling import compile_ahead, meta, target_of

@triton.jit
def fine(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)

@triton.jit
def broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), no_such_name)

launches = [(kernel, (meta(8),), {"N": 16}) for kernel in (fine, broken, fine)]
print(compile_ahead(launches, target_of("sm_90"), 2))
"""


def python(code, **environment):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_launches_of_calls(tmp_path):
    (tmp_path / "same.py").write_text(SAME)
    assert python(str(tmp_path / "same.py"), PYTHONPATH=str(ROOT)) == "same\n"


def test_a_kernel_that_does_not_compile_is_named(tmp_path):
    (tmp_path / "errors.py").write_text(ERRORS)
    cache = tmp_path / "cache"
    told = python(str(tmp_path / "errors.py"), PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(cache))
    assert re.match(r"\(2, \[.broken: .*no_such_name", told), told
    assert list(cache.glob("*/fine.cubin"))
