"""Which backends there are, what is said of those that are not, and how the CPU one shares the machine with torch."""

import importlib.util
import os
import re
import subprocess
import sys

import attention_cases as cases
import attention_paths as paths
import pytest
import torch
from attention_cases import Case

from tts_kernels.attention import merge_states, tree_attention, unsupported_reasons


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=str(p), marks=[pytest.mark.gpu] if p.device == "cuda" else []) for p in paths.ALL]
)
def test_path_is_available(path):
    """Skipped, with the reason, for what this machine cannot run: the other tests leave it out."""
    reason = path.missing()
    if reason:
        if path.backend == "cpu" and importlib.util.find_spec("tts_kernels._C"):
            assert "this machine cannot run" in reason, f"the native module is there, its backend is not: {reason}"
        pytest.skip(reason)


def test_reference_runs_everything():
    for op in ("tree_attention", "decode_attention", "append_kv", "merge_states"):
        assert unsupported_reasons(op, "reference") == []


def test_an_explicit_backend_raises_and_never_falls_back():
    backend = "cuda"
    inputs = cases.make_inputs(Case())
    reasons = unsupported_reasons("tree_attention", backend, inputs.q, *inputs.caches())
    assert reasons, "CPU tensors, of float32"
    reason = re.escape("; ".join(reasons))
    out = torch.full_like(inputs.q, 7.0)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run tree_attention: {reason}"):
        tree_attention(inputs.q, *inputs.caches(), inputs.forest.plan(), out=out, backend=backend)
    assert (out == 7).all()
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run merge_states: "):
        merge_states(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1), backend=backend)


def test_the_default_on_cpu_tensors():
    inputs = cases.make_inputs(Case())
    k_cache, v_cache = inputs.caches()
    preferred = "reference" if unsupported_reasons("tree_attention", "cpu", inputs.q, k_cache, v_cache) else "cpu"
    got, wanted = (
        tree_attention(inputs.q, k_cache, v_cache, inputs.forest.plan(), backend=name) for name in (None, preferred)
    )
    assert torch.equal(got, wanted)


needs_cpu = pytest.mark.skipif(
    bool(unsupported_reasons("tree_attention", "cpu")), reason="; ".join(unsupported_reasons("tree_attention", "cpu"))
)


@needs_cpu
def test_an_unknown_code_path_is_an_error(monkeypatch):
    inputs = cases.make_inputs(Case())
    monkeypatch.setenv("TTS_KERNELS_CPU_ISA", "sse9")
    with pytest.raises((ValueError, RuntimeError), match="sse9"):
        tree_attention(inputs.q, *inputs.caches(), inputs.forest.plan(), backend="cpu")


@needs_cpu
def test_on_a_wrong_device_the_cpu_backend_says_so():
    meta = torch.zeros(1, 2, 32, device="meta")
    caches = torch.zeros(2, 1, 4, 2, 32, device="meta")
    assert any(
        "device" in reason or "meta" in reason for reason in unsupported_reasons("tree_attention", "cpu", meta, *caches)
    )


def run_python(code: str, **environment: str | None) -> str:
    """With environment variables changed, or removed where None."""
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


ON_CPU_TENSORS = """
import torch, tts_kernels as tts
q, cache = torch.randn(1, 2, 16), torch.randn(1, 4, 2, 16)
print(tts.unsupported_reasons("tree_attention", "triton", q, cache, cache))
plan = tts.TreePlan.from_nodes([-1], [3], [[0]], [1], page_size=4)
try:
    tts.tree_attention(q, cache, cache, plan, backend="triton")
    print("ran")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_takes_cpu_tensors_under_the_interpreter_alone():
    reason = "it runs on CPU tensors only if TRITON_INTERPRET=1 is set before the backend is first used"
    without = run_python(ON_CPU_TENSORS, TRITON_INTERPRET=None).splitlines()
    assert without == [repr([reason]), f"backend 'triton' cannot run tree_attention: {reason}"]
    assert run_python(ON_CPU_TENSORS, TRITON_INTERPRET="1").splitlines() == ["[]", "ran"]


def test_importing_the_package_imports_no_triton():
    assert run_python("import sys, tts_kernels; print('triton' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("path", [path for path in paths.ALL if path.backend == "triton"], ids=str)
def test_batch_invariant_mode(path, monkeypatch):
    if path.missing():
        pytest.skip(path.missing())
    monkeypatch.setenv("TTS_KERNELS_BATCH_INVARIANT", "1")
    inputs = cases.make_inputs(Case(heads=(4, 2)))
    cases.check(inputs, path)
    monkeypatch.setenv("TTS_KERNELS_BATCH_INVARIANT", "yes")
    with pytest.raises(ValueError, match="TTS_KERNELS_BATCH_INVARIANT: expected 0 or 1, got 'yes'"):
        cases.run(inputs, path)


CALL = """
import os
import re
import time
import torch
from tts_kernels.attention import tree_attention
from tts_kernels.tree.plan import TreePlan
torch.set_num_threads({threads})
torch.ones(1 << 22).sum(); torch.randn(256, 256) @ torch.randn(256, 256)
def count(): return len(os.listdir("/proc/self/task"))
def call(n):
    plan = TreePlan.from_nodes([-1] + [0] * 8, [2048] + [16] * 8, [list(range(128))] + [[128 + i] for i in range(8)],
                               [0] + [1] * 8, page_size=16)
    q, cache = torch.randn(8, 8, 64), torch.randn(136, 16, 8, 64)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(n): tree_attention(q, cache, cache, plan, backend="cpu")
    return (time.process_time() - cpu) / (time.perf_counter() - wall)
before = count()
"""


@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestThreads:
    def test_one_pool_with_torch(self):
        """One OpenMP runtime (two would each keep a pool of threads that spin against one another), and no thread that
        torch had not started already."""
        code = CALL.format(threads=2) + (
            "call(20)\n"
            'maps = open("/proc/self/maps").read()\n'
            'print(count() - before, *set(re.findall(r"\\S*lib(?:gomp|omp|iomp5)\\S*", maps)))'
        )
        started, *runtimes = run_python(code).split()
        assert int(started) == 0
        assert len(runtimes) == 1, runtimes

    def test_one_thread_when_torch_has_one(self):
        started, busy = run_python(CALL.format(threads=1) + "busy = call(60); print(count() - before, busy)").split()
        assert int(started) == 0
        assert float(busy) < 1.2
