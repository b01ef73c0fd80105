"""The peers' adapters on a CPU: FlashInfer by its names, on stand-ins that compute what its documentation says;
FlexAttention without a compiler; what each says of a case that it cannot run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # plain `pytest` does not have it

pytest.importorskip("tts_kernels.measure.compiling", exc_type=ImportError)
from benchmarks import peers  # noqa: E402
from benchmarks.gpu import bench  # noqa: E402
from benchmarks.gpu.cases import TreeCase  # noqa: E402
from benchmarks.gpu.scoring import ScoringCase  # noqa: E402
from benchmarks.peers import flashinfer, flex  # noqa: E402
from tts_kernels.integrations import flashinfer as ours  # noqa: E402
from tts_kernels.measure import timing  # noqa: E402
from tts_kernels.measure.inputs import Geometry  # noqa: E402

GEOMETRY = Geometry.parse("8/2 d32 fp32")
CASES = {
    "star": {"n": 3, "prefix": 48, "suffix": 21},
    "questions": {"count": 2, "n": 3, "prefix": 32, "suffix": 5},
    "beam": {"leaves": 6, "parents": 2, "depth": 4, "prefix": 32, "step": 16},
    "steps": {"n": 3, "prefix": 32, "history": 16, "step": 7},
    "chain": {"depth": 3, "tokens": 16},
    "lone": {"n": 2, "tokens": 37},
}


def tree_case(kind, **more):
    return TreeCase("group", kind, CASES[kind], replace(GEOMETRY, **more), "cpu", flex=True)


def check(case, peer, sets=2):
    """Each input set by a call of its own."""
    given = case.sets(sets)
    calls = [peer.prepare(one) for one in given]
    for call, one in zip(calls, given):
        assert case.error(call(), case.reference(one)) <= case.tolerance(False)


class Paged:
    """FlashInfer's prefill and decode wrappers: every segment is a root of the drop-in's cascade of one level."""

    def __init__(self, workspace, kv_layout, **options):
        assert workspace.dtype == torch.uint8 and not workspace.any() and kv_layout == "NHD"
        self.options = options

    def plan(self, *arguments, causal=False, q_data_type="float16"):
        if len(arguments) == 7:  # decode: no qo_indptr, a row each
            arguments = (torch.arange(len(arguments[2]) + 1, dtype=torch.int32), *arguments)
        *tables, heads, kv_heads, head_dim, page_size = arguments
        assert all(table.dtype == torch.int32 for table in tables)
        self.wrapper = ours.MultiLevelCascadeAttentionWrapper(1, torch.empty(1), "NHD")
        self.wrapper.plan(
            *([table] for table in tables), heads, kv_heads, head_dim, page_size, causal=causal, q_data_type=q_data_type
        )

    def run(self, q, caches, out):
        return out.copy_(self.wrapper.run(q, caches))


class Cascade(ours.MultiLevelCascadeAttentionWrapper):
    """Its inner wrappers replaced, only those that were put in count for what backend it runs."""

    seen = []  # noqa: RUF012

    def run(self, q, caches):
        Cascade.seen.append([w.options for w in getattr(self, "_batch_prefill_wrappers", [])])
        return super().run(q, caches)


@pytest.fixture
def installed(monkeypatch):
    module = ModuleType("flashinfer")
    module.MultiLevelCascadeAttentionWrapper = Cascade
    module.BatchPrefillWithPagedKVCacheWrapper = module.BatchDecodeWithPagedKVCacheWrapper = Paged
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(flashinfer, "chosen", lambda case: "fa3")
    monkeypatch.setattr(Cascade, "seen", [])
    return module


@pytest.mark.parametrize("kind", ["star", "questions", "beam", "steps"])
@pytest.mark.parametrize("backend", ["auto", "fa2"])
def test_flashinfer_cascade(installed, kind, backend):
    case = tree_case(kind)
    check(case, flashinfer.Cascade(backend))
    depth = max(map(len, case.tree.paths))
    assert Cascade.seen[-1] == ([] if backend == "auto" else [{"backend": "fa2"}] * depth)


@pytest.mark.parametrize("kind", CASES)
def test_flashinfer_unshared(installed, kind):
    check(tree_case(kind), flashinfer.Unshared())


def test_flashinfer_says_why_not(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(flashinfer, "ERRORS", tmp_path / "errors.json")
    bf16 = tree_case("star", dtype="bf16")
    shipped, fa2, unshared = flashinfer.Cascade("auto"), flashinfer.Cascade("fa2"), flashinfer.Unshared()
    assert fa2.reason_against(bf16) == "its cascade kernels are not built: make gpu STAGES=compile"
    flashinfer.ERRORS.write_text('{"cascade": "", "fa2 d32": "", "fa3 d32": "error: no curand_kernel.h"}')
    assert fa2.reason_against(bf16) == unshared.reason_against(bf16) == ""
    assert shipped.reason_against(bf16) == "its fa3 d32 kernels were not built: error: no curand_kernel.h"
    assert fa2.reason_against(tree_case("lone", dtype="bf16")) == "nothing is shared"
    assert "bf16 alone" in fa2.reason_against(tree_case("star", dtype="bf16", kv_dtype="fp8"))
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: None)
    assert fa2.reason_against(bf16) == shipped.reason_against(bf16) == "FlashInfer is not installed"


def test_flashinfer_builds_what_it_can(installed, monkeypatch, tmp_path, capsys):
    def gen(backend, *arguments):
        assert arguments == (torch.bfloat16,) * 3 + (torch.int32, 128, 128, 0, False, False, False)

        def build(verbose):
            if backend == "fa3":
                raise RuntimeError("Ninja build failed.\nx.cu(3): fatal error: curand_kernel.h: No such file\nmore")

        return SimpleNamespace(build=build)

    jit, cascade = ModuleType("flashinfer.jit"), ModuleType("flashinfer.jit.cascade")
    jit.gen_batch_prefill_module = gen
    cascade.gen_cascade_module = lambda: SimpleNamespace(build=lambda verbose: None)
    monkeypatch.setitem(sys.modules, "flashinfer.jit", jit)
    monkeypatch.setitem(sys.modules, "flashinfer.jit.cascade", cascade)
    monkeypatch.setattr(flashinfer, "ERRORS", tmp_path / "gpu" / "errors.json")
    monkeypatch.setenv("MAX_JOBS", "1")
    flashinfer.build({128})
    assert "FlashInfer fa3 d128: x.cu(3): fatal error: curand_kernel.h: No such file" in capsys.readouterr().out
    case = replace(tree_case("star", dtype="bf16"), geometry=Geometry.parse("8/2 d128"))
    assert flashinfer.Cascade("fa2").reason_against(case) == ""
    assert "curand_kernel.h" in flashinfer.Cascade("auto").reason_against(case)


def test_flashinfer_that_cannot_be_imported_says_so(installed, monkeypatch, tmp_path):
    """As without one of the packages that it needs: it is there, and its kernels are not built."""
    monkeypatch.setitem(sys.modules, "flashinfer.jit", None)
    monkeypatch.setattr(flashinfer, "ERRORS", tmp_path / "errors.json")
    monkeypatch.setenv("MAX_JOBS", "1")
    flashinfer.build({32})
    why = flashinfer.Unshared().reason_against(tree_case("star", dtype="bf16"))
    assert why.startswith("its fa2 d32 kernels were not built: import of flashinfer.jit halted")


def test_copies_for_each_sample_are_made_once(monkeypatch):
    """Of a set, for both of torch's kernels: the largest take half of a GPU. Those that do not fit are named."""
    made, prepare = [], peers.sdpa_packed.prepare
    monkeypatch.setattr(peers.sdpa_packed, "prepare", lambda inputs: made.append(inputs.which) or prepare(inputs))
    case = tree_case("star")
    sets = case.sets(2)
    for kernel in (peers.sdpa_kernels.FLASH, peers.sdpa_kernels.CUDNN):
        assert kernel.reason_against(case) == "" and [kernel.prepare(one) for one in sets]
    assert made == [0, 1]
    monkeypatch.setattr(peers.sdpa_packed, "memory_shortage", lambda needed, device: f"needs {needed} bytes")
    monkeypatch.setattr(TreeCase, "peers", (peers.sdpa_kernels.FLASH, peers.unshared))
    entry = bench.measure(case, torch.device("cpu"), CEILINGS, 2, only_ours=False)
    needed = case.replicated_kv_bytes * 3 // 2
    assert entry["missing"]["sdpa flash"].startswith(f"MemoryError: needs {needed} bytes (")
    assert list(entry["methods"]) == ["ours", "ours, not shared"]


@pytest.mark.parametrize("kind", CASES)
def test_flex(kind, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = tree_case(kind)
    assert flex.reason_against(case) == "" and flex.reason_against(replace(case, flex=False))
    check(case, flex)


@pytest.mark.parametrize("kind", CASES)
def test_peers_without_a_library(kind):
    case = tree_case(kind)
    for peer in (peers.cascade, peers.sdpa_kernels.FLASH, peers.sdpa_packed, peers.unshared):
        if not peer.reason_against(case):
            check(case, peer)
        assert peer.bytes_read(case) >= case.least_bytes
    assert bool(peers.cascade.reason_against(case)) == (kind != "star")
    assert bool(peers.sdpa_packed.reason_against(case)) == (kind == "steps")


@pytest.mark.parametrize("kind, vocabulary", [("mlp", 0), ("vocab_rows", 90), ("logprobs", 90)])
def test_scoring_peers(kind, vocabulary, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = ScoringCase("group", kind, 50, 50 if kind == "logprobs" else 20, 32, vocabulary, "fp32", "cpu")
    ran = []
    for peer in (peers.head_eager, peers.head_compiled, peers.full_logits):
        reason = peer.reason_against(case)
        if reason and "GPUs alone" not in reason:
            continue
        ran.append(peer.NAME)
        check(case, peer)
        assert peer.bytes_read(case) > 0
    assert (
        ran
        == {
            "mlp": ["eager head", "compiled head"],
            "vocab_rows": ["eager head", "compiled head", "full logits"],
            "logprobs": ["full logits"],
        }[kind]
    )
    one = case.sets(1)[0]
    assert case.error(case.ours(one)(), case.reference(one)) <= case.tolerance(True)
    assert case.error(case.ours(one)() + 0.3, case.reference(one)) > case.tolerance(False)


CEILINGS = {"bytes_per_s": 1e9, "flops_per_s": {"fp32": 1e9}, "cache_bytes": 0}


def test_a_wrong_peer_has_no_time(monkeypatch):
    def prepare(inputs):
        attend = peers.unshared.prepare(inputs)
        return lambda: attend() * 1.5

    wrong = SimpleNamespace(
        NAME="wrong", prepare=prepare, reason_against=lambda case: "", bytes_read=peers.unshared.bytes_read
    )
    monkeypatch.setattr(TreeCase, "peers", (wrong, peers.unshared))
    entry = bench.measure(tree_case("star"), torch.device("cpu"), CEILINGS, 2, only_ours=False)
    assert entry["status"] == "ok" and list(entry["methods"]) == ["ours", "ours, not shared"]
    assert entry["wrong"]["wrong"].startswith("error 0.5, allowed") and not entry["missing"]


def test_what_an_earlier_call_left_does_not_pass_for_a_result(monkeypatch):
    class Still(timing.HostLoop):
        def replay(self):
            self.outputs = self.outputs or [call() for call in self.calls]

    monkeypatch.setattr(bench, "capture", lambda calls, device: Still(calls))
    entry = bench.measure(tree_case("star"), torch.device("cpu"), CEILINGS, 2, only_ours=True)
    assert entry["status"] == "wrong" and entry["wrong"]["ours"].startswith("error inf") and not entry["methods"]


def test_triton_beside_cuda(monkeypatch):
    """A peer where the call itself takes the CUDA kernels, and none where it takes Triton's."""
    case = tree_case("star")
    assert peers.portable.reason_against(case) == "it is for GPUs"
    assert peers.portable.reason_against(SimpleNamespace(device="cuda")) == ""
    chosen = peers.portable.api.BACKENDS
    monkeypatch.setattr(type(chosen), "choose", lambda *_: "triton")
    with pytest.raises(RuntimeError, match="by itself"):
        peers.portable.prepare(case.sets(1)[0])
    monkeypatch.setattr(type(chosen), "choose", lambda *_: "cuda")
    if reasons := peers.portable.api.BACKENDS.unsupported_reasons("tree_attention", "triton"):
        pytest.skip("; ".join(reasons))
    check(case, peers.portable)
