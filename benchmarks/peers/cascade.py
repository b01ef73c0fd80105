"""Cascade in plain torch: the prefix for all samples at once, each suffix alone, and the two merged by their lse."""

import torch

from ..cases import GROUP, HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS

NAME = "cascade"


def reason_against(case):
    if not case.shared:
        return "nothing is shared"
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "this torch has no attention op for CPUs that returns the lse"
    return ""


def prepare(inputs):
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    n, q, prefix, suffix = inputs.case.num_samples, inputs.q, inputs.prefix, inputs.suffix

    def run():
        by_head = q.view(n, NUM_KV_HEADS, GROUP, HEAD_DIM).transpose(0, 1)  # [Hkv, N, G, D]
        packed = by_head.reshape(1, NUM_KV_HEADS, n * GROUP, HEAD_DIM)
        out_prefix, lse_prefix = attention(packed, *prefix)
        out_suffix, lse_suffix = attention(q.view(n, NUM_KV_HEADS, GROUP, HEAD_DIM), *suffix)
        out_prefix = out_prefix.view(NUM_KV_HEADS, n, GROUP, HEAD_DIM).transpose(0, 1)
        lse_prefix = lse_prefix.view(NUM_KV_HEADS, n, GROUP).transpose(0, 1)
        weight = torch.sigmoid(lse_prefix - lse_suffix)[..., None]  # of the prefix, fp32
        return torch.lerp(out_suffix.float(), out_prefix.float(), weight).to(q.dtype).view(n, NUM_Q_HEADS, HEAD_DIM)

    return run


def bytes_read(case):
    return case.least_bytes
