"""Batches as vLLM's runner gives them to an attention backend, small ones, and a plain softmax beside them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

HQ, HKV, D, BLOCK, BLOCKS = 6, 2, 32, 4, 40
FP8 = torch.float8_e4m3fn

# (blocks, tokens, rows): four that share a prompt of three blocks, two of them a block more; a chunk of a prefill whose
# prompt is shared too; a whole prefill; padding behind them.
BATCH = [
    ([7, 3, 5, 1], 14, 1),
    ([7, 3, 5, 2], 13, 1),
    ([20, 21], 8, 8),
    ([7, 3, 5, 8, 9], 19, 1),
    ([7, 3, 5, 8, 10], 17, 1),
    ([7, 3, 5, 30, 31, 32], 22, 9),
    ([33], 0, 0),
]


def empty_cache(dtype, layout, blocks=BLOCKS):
    """[blocks, Hkv, block, 2 D], as vLLM lays it out, NaN in it."""
    shape = (blocks, HKV, BLOCK, 2 * D) if layout == "heads first" else (blocks, BLOCK, HKV, 2 * D)
    raw = torch.full(shape, math.nan).to(dtype)
    raw = raw.view(torch.uint8) if dtype == FP8 else raw  # vLLM keeps fp8 as bytes
    return raw if layout == "heads first" else raw.transpose(1, 2)


def common_metadata(batch, causal=True):
    table = torch.full((len(batch), 8), 2_000_000_000, dtype=torch.int32)
    for row, (blocks, tokens, _) in enumerate(batch):
        used = -(-tokens // BLOCK)
        table[row, :used] = torch.tensor(blocks[:used], dtype=torch.int32)
    starts = [0]
    for *_, rows in batch:
        starts.append(starts[-1] + rows)
    return SimpleNamespace(
        num_reqs=len(batch), num_actual_tokens=starts[-1], causal=causal, block_table_tensor=table,
        max_query_len=max(rows for *_, rows in batch), query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([tokens for _, tokens, _ in batch], dtype=torch.int32),
    )  # fmt: skip


def builder_of(plugin, dtype=torch.float32, kv_dtype=None, device="cpu", mode=None, sizes=()):
    """mode, sizes: of CUDA graphs."""
    spec = SimpleNamespace(block_size=BLOCK, head_size=D, num_kv_heads=HKV, dtype=kv_dtype or dtype)
    model = SimpleNamespace(dtype=dtype, get_num_attention_heads=lambda parallel: HQ)
    graphs = SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=list(sizes))
    config = SimpleNamespace(model_config=model, parallel_config=None, compilation_config=graphs)
    return plugin.TreeBuilder(spec, ["layer"], config, torch.device(device))


def slots_of(blocks, first, last):
    return [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(first, last)]


def plain(q, k, v, batch, *, scale, causal, window, softcap, sinks):
    """One softmax for each row, in float64. k, v: by slot, [slots, Hkv, D]."""
    out, row = torch.zeros(q.shape, dtype=torch.float64), 0
    for blocks, tokens, rows in batch:
        slots = slots_of(blocks, 0, tokens)
        keys = k[slots].double().repeat_interleave(HQ // HKV, 1)
        values = v[slots].double().repeat_interleave(HQ // HKV, 1)
        for position in range(tokens - rows, tokens):
            score = torch.einsum("hd,thd->ht", q[row].double(), keys) * scale
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            at = torch.arange(tokens)
            hidden = (at > position) & causal
            if window:
                hidden |= at <= position - window
            score[:, hidden] = -math.inf
            if sinks is not None:
                score = torch.cat([score, sinks.double()[:, None]], 1)
            weight = score.softmax(1)[:, :tokens]
            out[row] = torch.einsum("ht,thd->hd", weight, values)
            row += 1
    return out
