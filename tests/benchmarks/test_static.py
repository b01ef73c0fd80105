"""benchmarks.static: what it reads in compilers' output, and that a kernel which breaks a rule or limit fails the run.

The kernels are small ones made for this; what the shipped kernels compile to is checked by `make static` alone.
"""

import json
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

sys.path.insert(0, str(ROOT))  # plain `pytest` does not have it
from benchmarks.static import assembly  # noqa: E402
from benchmarks.static.archs import ARCHS  # noqa: E402

PTXAS = """
ptxas info    : 11 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'tiles' for 'sm_80'
ptxas info    : Function properties for tiles
    56 bytes stack frame, 44496 bytes spill stores, 47104 bytes spill loads
ptxas info    : Used 184 registers, used 1 barriers, 96 bytes smem, 432 bytes cmem[0]
"""
AMD_METADATA = """
  - .agpr_count:     0
    .group_segment_fixed_size: 64
    .private_segment_fixed_size: 184
    .sgpr_count:     98
    .sgpr_spill_count: 35
    .vgpr_count:     240
    .vgpr_spill_count: 142
"""
SOURCE = """\
def tile(k, pages):
    page = load(pages)
    keys = load(
        k + page,
    )
"""
PTX = """
	.loc	1 2 11
	@%p6 ld.global.b32 { %r12 }, [ %rd30 + 0 ];
	ld.global.nc.L1::evict_last.v2.b16 	{%rs1, %rs2}, [%rd1];
	ld.shared.v4.b32 	{%r1, %r2, %r3, %r4}, [%r9];
	.loc	1 4 9, function_name $L__info_string0, inlined_at 1 2 4
	cp.async.cg.shared.global [ %r98 + 0 ], [ %rd1 + 0 ], 0x10, %r99;
	cp.async.ca.shared.global [ %r98 + 0 ], [ %rd1 + 0 ], 0x8, %r99;
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
	cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r2, %r3}], [%r1];
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 0;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r1};
	@%p30 tcgen05.mma.cta_group::1.kind::f16 [ %r520 + 0 ], %rd113, %rd114, %r144, %p29;
	fma.rn.f32 	%f4, %f1, %f2, %f3;
"""
AMD = """
	.loc	1 2 11 is_stmt 0                ; k.py:2:11
	buffer_load_dword v1, v2, s[4:7], 0 offen
	global_load_ushort v1, v[2:3], off
	s_load_dwordx8 s[0:7], s[8:9], 0x0
	.loc	1 3 9 is_stmt 1                 ; k.py:3:9 @[ k.py:2:4 ]
	global_load_dwordx4 v[4:7], v[2:3], off
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
"""


def test_resources():
    assert assembly.ptxas_resources(PTXAS) == {
        "registers": 184,
        "shared": 96,
        "spills": {"bytes stored": 44496, "bytes loaded": 47104},
    }
    assert assembly.amd_resources(AMD_METADATA) == {
        "registers": 240,
        "shared": 64,
        "spills": {"VGPRs": 142, "SGPRs": 35, "bytes of scratch": 184},
    }
    # Not read is not the same as none.
    with pytest.raises(ValueError, match="log: expected"):
        assembly.ptxas_resources("ptxas info    : 11 bytes gmem")
    with pytest.raises(ValueError, match=r"text: expected .*vgpr_spill_count"):
        assembly.amd_resources(AMD_METADATA.replace("vgpr_spill", "v_spill"))


def test_loads(tmp_path):
    (tmp_path / "k.py").write_text(SOURCE)
    page, keys = "page = load(pages)", "keys = load( k + page, )"
    text = PTX + f'\t.file\t1 "{tmp_path / "k.py"}"\n'
    assert sorted(assembly.loads(text)) == [(keys, 8, 1), (keys, 16, 3), (page, 4, 2)]
    text = f'\t.file\t1 "{tmp_path}" "k.py"\n' + AMD
    assert sorted(assembly.loads(text)) == [(keys, 16, 1), (page, 2, 1), (page, 4, 1)]
    assert assembly.loads("\tglobal_load_dwordx4 v[4:7], v[2:3], off") == [("", 16, 1)]
    for row in ("ld.global.v4.new {%r1}, [%rd1];", "global_load_dwordx64 v[4:7], v[2:3], off"):
        with pytest.raises(ValueError, match="row: expected a load"):
            assembly.loads(row)


def test_tensor_core_instructions():
    counts = assembly.instructions(PTX)
    assert counts["wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"] == 2 and counts["fma"] == 1
    assert assembly.mma_kinds(counts) == {"wgmma": 2, "mma.sync": 1, "tcgen05": 1}
    assert assembly.mma_kinds(assembly.instructions(AMD)) == {"mfma": 1}
    assert assembly.mma_kinds({"fma": 3}) == {"fma": 3}
    assert assembly.mma_kinds({"fma": 0}) == {}


@pytest.mark.parametrize(
    "arch, registers, shared, warps, blocks",
    [
        # By hand from the sources that archs.py names; in turn what limits: warps, blocks, registers, shared memory.
        ("sm_80", 32, 0, 8, 8),
        ("sm_80", 16, 0, 1, 32),
        ("sm_80", 168, 0, 4, 3),  # 16384 // (168 * 32) = 3 warps in each partition
        ("sm_80", 169, 0, 4, 2),  # allocated as 176
        ("sm_80", 255, 0, 8, 1),
        ("sm_80", 255, 0, 16, 0),
        ("sm_80", 32, 81 << 10, 4, 2),  # 2 * (81 + 1) = 164
        ("sm_80", 32, (81 << 10) + 1, 4, 1),
        ("sm_80", 32, (163 << 10) + 1, 4, 0),
        ("sm_90", 32, 227 << 10, 4, 1),
        ("sm_90", 32, 75 << 10, 4, 3),
        ("gfx942", 64, 0, 4, 8),
        ("gfx942", 32, 0, 1, 32),
        ("gfx942", 32, 0, 2, 16),
        ("gfx942", 240, 0, 4, 2),
        ("gfx942", 257, 0, 4, 1),
        ("gfx942", 64, 20 << 10, 4, 3),
        ("gfx942", 64, (64 << 10) + 1, 4, 0),
    ],
)
def test_blocks(arch, registers, shared, warps, blocks):
    assert ARCHS[arch].blocks(registers, shared, warps) == blocks


def test_blocks_of_tensor_memory():
    assert [ARCHS["sm_100"].blocks(32, 0, 4, columns) for columns in (128, 256, 512, 544)] == [4, 2, 1, 0]
    assert ARCHS["sm_90"].blocks(32, 0, 4, 128) == 0


CASES = """
import torch
import triton
import triton.language as tl

from benchmarks.static.compiling import StaticCase


@triton.jit
def load_kv(pointer):
    return tl.load(pointer)


@triton.jit
def attention(q, k, out, num_tokens, k_slot, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    queries = tl.load(q + tl.arange(0, M)[:, None] * D + d[None, :])
    acc = tl.zeros((M, D), tl.float32)
    for start in range(0, num_tokens, N):
        keys = load_kv(k + (start + tl.arange(0, N))[:, None] * k_slot + d[None, :])
        scores = tl.dot(queries, tl.trans(keys))
        acc = tl.dot(scores.to(keys.dtype), keys, acc)
    tl.store(out + tl.arange(0, M)[:, None] * D + d[None, :], acc)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def case(name, M, k_slot=512, offset=0, warps=4, **options):
    k = meta(1 << 23, 512)[:, offset:]
    arguments = (meta(M, 128), k, meta(M, 128, dtype=torch.float32), 99, k_slot)
    constants = dict(M=M, N=64, D=128, num_warps=warps, num_stages=2)
    return StaticCase(name, attention, arguments, constants, wide=("pointer",), **options)


def cases(arch):
    mma = "wgmma" if arch == "sm_90" else "mfma"
    yield case("good", 64, mma=mma)
    if arch == "sm_90":
        yield case("low", 16, mma="wgmma")
        yield case("odd stride", 64, k_slot=513)
        yield case("odd pointer", 64, offset=1)
        yield case("huge", 256, warps=2)
        yield case("no tile", 24)
"""


def run(folder, *arguments, cases=CASES):
    (folder / "cases.py").write_text(cases)
    files = {"--cases": "cases.py", "--limits": "limits.json", "--json": "figures.json", "--cache": "cache"}
    options = [text for option, file in files.items() for text in (option, str(folder / file))]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.static", *options, *arguments],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def test_broken_rules(tmp_path):
    done = run(tmp_path, "--arch", "sm_90", "--update-limits")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "6 kernels, 6 compiled now" in done.stdout
    errors = dict(re.findall(r"^error: sm_90 ([^:]*): (.*)$", done.stderr, re.MULTILINE))
    assert errors.keys() == {"low", "odd stride", "odd pointer", "huge", "no tile"}, done.stderr
    assert errors["low"] == "mma: expected wgmma among them, got mma.sync"
    assert re.match(r"\d+ loads of 2 bytes, not 16: return tl.load\(pointer\)", errors["odd stride"])
    assert re.match(r"\d+ loads of 2 bytes, not 16: return tl.load\(pointer\)", errors["odd pointer"])
    assert re.match(r"spills: \d{2,} bytes stored, \d{2,} bytes loaded", errors["huge"])
    assert errors["no tile"].startswith("not compiled: ValueError: arange's range must be a power of 2")
    figures = json.loads((tmp_path / "figures.json").read_text())["cases"]["sm_90"]
    assert figures["huge"]["spills"]["bytes stored"] > 0
    assert figures["good"]["mma"] == {
        "wgmma": 12
    }  # 64 x 64 x 128 and 64 x 128 x 64 by m64nNk16, in one body of the loop


def test_limits(tmp_path):
    limits = tmp_path / "limits.json"
    done = run(tmp_path, "--only", "good", "--arch", "sm_90", "--arch", "gfx942", "--keep", str(tmp_path / "asm"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {arch} good: no limits: python -m benchmarks.static --update-limits" for arch in ("sm_90", "gfx942")
    ]
    # LLVM's own occupancy, which does not know of dynamic shared memory.
    figures = json.loads((tmp_path / "figures.json").read_text())["cases"]["gfx942"]["good"]
    (occupancy,) = re.findall(r"; Occupancy: (\d+)", (tmp_path / "asm" / "gfx942 good.amdgcn").read_text())
    assert ARCHS["gfx942"].blocks(figures["registers"], 0, figures["num_warps"]) == int(occupancy)

    done = run(tmp_path, "--only", "good", "--arch", "sm_90", "--arch", "gfx942", "--update-limits")
    assert done.returncode == 0, done.stderr
    assert "2 kernels, 0 compiled now" in done.stdout
    table = json.loads(limits.read_text())
    assert {arch: list(cases) for arch, cases in table["limits"].items()} == {"gfx942": ["good"], "sm_90": ["good"]}
    entry = table["limits"]["sm_90"]["good"]
    steps = {"registers": -1, "shared": -1, "blocks": 1, "wide_share": 0.01}
    changed = entry | {name: entry[name] + step for name, step in steps.items()} | {"mma": "mma.sync"}
    limits.write_text(json.dumps(table | {"limits": {"sm_90": {"good": changed}}}))
    done = run(tmp_path, "--only", "good", "--arch", "sm_90")
    assert done.returncode == 1
    broken = re.findall(r"^error: sm_90 good: (\w+): expected .*, got .*$", done.stderr, re.MULTILINE)
    assert sorted(broken) == sorted([*steps, "mma"]), done.stderr

    limits.write_text(json.dumps(table | {"triton": "0.0", "limits": {}}))
    done = run(tmp_path, "--only", "good", "--arch", "sm_90")
    assert done.returncode == 0 and "limits are for triton 0.0" in done.stdout


def test_limits_without_a_case(tmp_path):
    limits = {"triton": triton.__version__, "limits": {"sm_90": {"gone": {}}}}
    (tmp_path / "limits.json").write_text(json.dumps(limits))
    only_good = CASES + "\n\ndef cases(arch):\n    return [case('good', 64)] if arch == 'gfx942' else []\n"
    done = run(tmp_path, cases=only_good)
    assert done.returncode == 1
    assert "error: sm_90 gone: has limits, but there is no such case" in done.stderr
    done = run(tmp_path, "--update-limits", cases=only_good)
    assert done.returncode == 0, done.stderr


def test_no_cases(tmp_path):
    done = run(tmp_path, cases=CASES + "\n\ndef cases(arch):\n    return []\n")
    assert done.returncode == 1 and "error: no cases" in done.stderr


def test_shipped_launches(tmp_path):
    """Cases are recorded from the backend's own calls: those of its smallest kernel, on every architecture."""
    done = run(tmp_path, "--cases", "benchmarks.static.cases", "--only", "append_kv bf16 to bf16", "--update-limits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * len(ARCHS)} kernels" in done.stdout  # with and without rope


VARIANTS = """
import torch
from unittest import mock
from benchmarks.static.archs import ARCHS
from tts_kernels.measure.compiling import recorded_launches, specialised
from tts_kernels.attention import triton as backend
from tts_kernels.tree.plan import TreePlan

seen = {}
with mock.patch.object(backend, "device_kind", return_value=("NVIDIA H200", "sm_90")):
    for leaves in range(1, 33):
        for chain in range(1, 5):
            parent = [i - 1 for i in range(chain)] + [chain - 1] * leaves
            lengths = [32] * chain + [20] * leaves
            pages = [[2 * i, 2 * i + 1] for i in range(len(lengths))]
            plan = TreePlan.from_nodes(parent, lengths, pages, [0] * chain + [1] * leaves, page_size=16)
            q = torch.empty(leaves, 28, 128, dtype=torch.bfloat16)
            k, v = torch.empty(2, 300, 16, 4, 128, dtype=torch.bfloat16)
            work = backend.prepare(plan, q, k)
            given = (plan.nodes, plan.pages, plan.rows, 16, True, 0.1, 0.0, leaves, None, None, None)
            lists = (work.table, work.scratch, work.tile)
            with recorded_launches() as launches:
                backend.tree_attention(torch.empty_like(q), None, q, k, v, *given, lists)
            for kernel, args, kwargs in launches:
                source, options = specialised((kernel, args, kwargs), ARCHS["sm_90"].target)
                seen.setdefault(kernel.__name__, set()).add((source.hash(), str(options)))
print({name: len(variants) for name, variants in seen.items()})
"""


def test_a_tree_of_another_size_compiles_nothing():
    """Any number of rows, nodes and window positions: one kernel of each kind, while heads, dtypes and options stay.
    What depends on them is an argument that Triton does not specialise for."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", VARIANTS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'tree_tiles': 1, 'merge_tree': 1}"
