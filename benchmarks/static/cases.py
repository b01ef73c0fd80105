"""The launches that are compiled: the backend's own, recorded from calls with tensors that have no memory.

To add a case, add a line to `attention` or `others` (another geometry or option), or a call of a new op to `others`.
Then `python -m benchmarks.static --update-limits`, and read the change of limits.json before it is committed. A new
entry in tts_kernels/configs/tree_attention.json for a device needs that device's architecture in DEVICES.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tts_kernels import configs
from tts_kernels.attention import triton as backend
from tts_kernels.attention.rope import Rope
from tts_kernels.measure.compiling import as_device, meta, recorded_launches, tree_attention_launches
from tts_kernels.scoring import triton as scoring
from tts_kernels.tree import prefix_triton

from .archs import ARCHS
from .compiling import StaticCase

# Devices for which configs are shipped.
DEVICES = {
    "NVIDIA A100-SXM4-80GB": "sm_80",
    "NVIDIA H100 80GB HBM3": "sm_90",
    "NVIDIA H200": "sm_90",
    "NVIDIA B200": "sm_100",
    "AMD Instinct MI300X": "gfx942",
}
# Tiles of 64 rows and half precision have to become these.
MMA = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
FP16, BF16, FP32, FP8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn


@dataclass(frozen=True)
class Attention:
    """A decode step: a launch of tree_tiles and one of merge_tree."""

    name: str
    q: torch.dtype = BF16
    cache: torch.dtype | None = None  # q's
    heads: tuple[int, int] = (28, 4)  # of q, of the caches
    head_dim: int = 128
    page_size: int = 16
    softcap: float = 0.0
    window: int = -1
    extras: bool = False  # sinks, k_scale, v_scale and lse
    cache_bytes: int = 8 << 30
    archs: tuple[str, ...] = tuple(ARCHS)

    def takes(self, entry: dict, arch: str) -> bool:
        """Whether it is compiled with this entry of tree_attention.json, as far as shapes go."""
        sizes = configs.block_dim(self.head_dim), self.q.itemsize, (self.cache or self.q).itemsize
        return arch in self.archs and sizes == (entry["block_dim"], entry["q_bytes"], entry["kv_bytes"])


ATTENTION = (
    Attention("bf16"),
    Attention("bf16 capped window", softcap=30.0, window=4096, extras=True),
    # On AMD, Triton addresses tensors below 2 GiB in another way.
    Attention("bf16 small cache", cache_bytes=1 << 30, archs=("gfx942",)),
    Attention("bf16 one head each", heads=(32, 32)),
    Attention("bf16 D=64", heads=(32, 8), head_dim=64),
    Attention("bf16 D=80", heads=(32, 32), head_dim=80),
    Attention("bf16 D=256", heads=(16, 8), head_dim=256, page_size=32),
    Attention("fp16", FP16, archs=("sm_90", "gfx942")),
    Attention("bf16 fp8", BF16, FP8, extras=True),
    Attention("bf16 fp8 D=64", BF16, FP8, heads=(32, 8), head_dim=64, archs=("sm_90", "sm_100")),
    Attention("bf16 fp8 D=256", BF16, FP8, heads=(16, 8), head_dim=256, archs=("sm_90", "sm_100")),
    Attention("fp32", FP32),
)


def cases(arch: str) -> Iterator[StaticCase]:
    shipped = {entry["for"] for entry in configs.shipped("tree_attention")}
    if unknown := shipped - DEVICES.keys() - set(DEVICES.values()):
        raise ValueError(f"DEVICES: expected every device of tree_attention.json, got none for {sorted(unknown)}")
    for entry in configs.shipped("tree_attention"):
        if DEVICES.get(entry["for"], entry["for"]) == arch and not any(a.takes(entry, arch) for a in ATTENTION):
            raise ValueError(f"ATTENTION: expected a case for every entry of tree_attention.json, got none for {entry}")
    for device in (arch, *(name for name in DEVICES if DEVICES[name] == arch and name in shipped)):
        with as_device(device, arch):
            yield from attention(arch, "" if device == arch else f" {device}")
    yield from others()
    yield from scorings(arch)


def attention(arch: str, suffix: str) -> Iterator[StaticCase]:
    for a in ATTENTION:
        if arch not in a.archs:
            continue
        num_q_heads, num_kv_heads = a.heads
        cache = a.cache or a.q
        num_pages = a.cache_bytes // (a.page_size * num_kv_heads * a.head_dim * cache.itemsize)
        q = meta(63, num_q_heads, a.head_dim, dtype=a.q)
        k_cache = meta(num_pages, a.page_size, num_kv_heads, a.head_dim, dtype=cache)
        config = backend.config_of(q, k_cache)
        lse, sinks = (meta(63, num_q_heads), meta(num_q_heads)) if a.extras else (None, None)
        k_scale, v_scale = (meta(num_kv_heads), meta(num_kv_heads)) if a.extras else (None, None)
        launches = tree_attention_launches(
            q, k_cache, config, lse=lse, softcap=a.softcap, window=a.window, sinks=sinks, k_scale=k_scale,
            v_scale=v_scale,
        )  # fmt: skip
        tiles, merge = launches
        # load_kv reads K and V through `pointer`.
        mma = MMA[arch] if a.q.itemsize == 2 and config.wide_rows >= 64 else None
        # In narrow tiles of fp8, Triton lays V out for mma.sync in pieces of 8 elements, and copies such pieces.
        nvidia_fp8 = cache == FP8 and arch.startswith("sm_")
        yield StaticCase(
            f"tiles {a.name}{suffix}", *tiles, wide=("pointer",), load_bytes=8 if nvidia_fp8 else 16, mma=mma
        )
        if a.name in ("bf16", "bf16 capped window", "fp32"):
            yield StaticCase(f"merge {a.name}{suffix}", *merge)


def others() -> Iterator[StaticCase]:
    """Kernels that have no configs: append_kv, merge_states, and the comparison of block tables."""
    k = meta(63, 4, 128, dtype=BF16)
    for dtype in (BF16, FP8):
        cache = meta(65536, 16, 4, 128, dtype=dtype)
        with recorded_launches() as launches:
            backend.append_kv(k, k, cache, cache, meta(63, dtype=torch.int64))
        (launch,) = launches
        yield StaticCase(f"append_kv bf16 to {'bf16' if dtype == BF16 else 'fp8'}", *launch)
        q = meta(63, 28, 128, dtype=BF16)
        rope = Rope(meta(4096, 128), meta(63, dtype=torch.int64), True, q, torch.empty_like(q))
        with recorded_launches() as launches:
            backend.append_kv(k, k, cache, cache, meta(63, dtype=torch.int64), rope)
        (launch,) = launches
        yield StaticCase(f"append_kv bf16 to {'bf16' if dtype == BF16 else 'fp8'}, rope", *launch)
    for dtype in (BF16, FP32):
        with recorded_launches() as launches:
            backend.merge_states(meta(3, 63, 28, 128, dtype=dtype), meta(3, 63, 28))
        (launch,) = launches
        yield StaticCase(f"merge_states {'bf16' if dtype == BF16 else 'fp32'}", *launch)
    with recorded_launches() as launches:
        table = meta(63, 999, dtype=torch.int32)
        prefix_triton.compare_rows(table, table[:, 0], None, page_size=16, reserve=0)
    # Neighbours are compared twice, in the same way.
    for kernel, launch in {launch[0]: launch for launch in launches}.items():
        yield StaticCase(kernel.__name__, *launch)


def scorings(arch: str) -> Iterator[StaticCase]:
    """Step scores by a linear head, a few rows of an LM head and an MLP; selection; log-probabilities."""
    dim, num_rows = 3584, 999
    positions, offsets = meta(num_rows, dtype=torch.int64), meta(63, dtype=torch.int64)

    def launches_of(function, *arguments) -> dict[str, tuple]:
        with recorded_launches() as launches:
            function(*arguments)
        return {kernel.__name__: (kernel, args, kwargs) for kernel, args, kwargs in launches}

    def logits(dtype: torch.dtype, hidden_layer: bool, norm: bool) -> dict[str, tuple]:
        hidden = meta(9999, dim, dtype=dtype)
        w1, b1 = (meta(dim, dim, dtype=dtype), meta(dim, dtype=dtype)) if hidden_layer else (None, None)
        w2, b2 = meta(2, dim, dtype=dtype), meta(2, dtype=dtype)
        weight = meta(dim, dtype=dtype) if norm else None
        act = "gelu" if norm else "relu"
        return launches_of(scoring.logits, hidden, positions, w1, b1, act, w2, b2, weight, 1e-6)

    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        yield StaticCase(f"linear_logits {name}", *logits(dtype, hidden_layer=False, norm=False)["linear_logits"])
        launches = logits(dtype, hidden_layer=True, norm=False)
        mma = MMA[arch] if dtype == BF16 else None
        yield StaticCase(f"mlp_tiles {name}", *launches["mlp_tiles"], wide=("hidden_rows", "w1_rows"), mma=mma)
    yield StaticCase("linear_logits bf16 norm", *logits(BF16, hidden_layer=False, norm=True)["linear_logits"])
    launches = logits(BF16, hidden_layer=True, norm=True)
    yield StaticCase("mlp_tiles bf16 norm", *launches["mlp_tiles"])
    yield StaticCase("sum_parts", *launches["sum_parts"])
    for activation in ("softmax", "sigmoid", "identity"):
        launches = launches_of(scoring.reduce, meta(num_rows, 2), offsets, activation, 1)
        yield StaticCase(f"reduce_steps {activation}", *launches["reduce_steps"])
    answers = meta(62, dtype=torch.int64)
    for method in ("weighted_vote", "majority"):
        launches = launches_of(scoring.select, meta(62), meta(9, dtype=torch.int64), answers, method, 3)
        yield StaticCase(f"count_votes {method}", *launches["count_votes"])
    yield StaticCase("select_best vote", *launches["select_best"])
    launches = launches_of(scoring.select, meta(62), meta(9, dtype=torch.int64), None, "best", 1)
    yield StaticCase("select_best", *launches["select_best"])
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        launches = launches_of(
            scoring.token_logprobs, meta(num_rows, dim, dtype=dtype), meta(152064, dim, dtype=dtype), positions, None
        )
        yield StaticCase(
            f"vocabulary_tiles {name}", *launches["vocabulary_tiles"], wide=("hidden_rows", "weight_rows"),
            mma=MMA[arch] if dtype == BF16 else None,
        )  # fmt: skip
    yield StaticCase("join_vocabulary", *launches["join_vocabulary"])
