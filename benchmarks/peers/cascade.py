"""Cascade of torch's flash attention: the prefix for all samples at once, each suffix alone, merged by their lse."""

import torch

NAME = "two-pass flash"
OPS = {"cpu": "_scaled_dot_product_flash_attention_for_cpu", "cuda": "_scaled_dot_product_flash_attention"}


def reason_against(case):
    if not case.two_level:
        return "not one prefix with a suffix for each row"
    if not hasattr(torch.ops.aten, OPS[case.device]):
        return "this torch has no attention op that returns the lse"
    return ""


def prepare(inputs):
    case, q, prefix, suffix = inputs.case, inputs.q, inputs.prefix, inputs.suffix
    attention = getattr(torch.ops.aten, OPS[case.device])
    n, heads, group, dim = case.num_samples, case.num_kv_heads, case.group_size, case.head_dim

    def run():
        by_head = q.view(n, heads, group, dim).transpose(0, 1)  # [Hkv, N, G, D]
        packed = by_head.reshape(1, heads, n * group, dim)
        out_prefix, lse_prefix, *_ = attention(packed, *prefix)
        out_suffix, lse_suffix, *_ = attention(q.view(n, heads, group, dim), *suffix)
        out_prefix = out_prefix.view(heads, n, group, dim).transpose(0, 1)
        lse_prefix = lse_prefix.view(heads, n, group).transpose(0, 1)
        weight = torch.sigmoid(lse_prefix - lse_suffix)[..., None]  # of the prefix, fp32
        return torch.lerp(out_suffix.float(), out_prefix.float(), weight).to(q.dtype).view(n, heads * group, dim)

    return run


def bytes_read(case):
    return case.least_bytes
