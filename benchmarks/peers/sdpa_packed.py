"""torch's attention over KV that is stored once for each sample, with the query heads of a group as its queries."""

import torch.nn.functional as F

from ..machine import memory_shortage

NAME = "sdpa packed"


def reason_against(case):
    return shape_reason(case) or copy_reason(case)


def shape_reason(case):
    if case.rows_each != 1:
        return "several rows for each sample"
    if not case.equal_paths:
        return "paths of different lengths"
    return ""


def copy_reason(case):
    return memory_shortage(case.replicated_kv_bytes * 3 // 2, case.device)  # and, for a while, K once more


def prepare(inputs):
    case, (k, v) = inputs.case, inputs.replicated
    q = inputs.q.view(case.num_samples, case.num_kv_heads, case.group_size, case.head_dim)
    return lambda: F.scaled_dot_product_attention(q, k, v).reshape(case.num_samples, case.num_q_heads, case.head_dim)


def bytes_read(case):
    return case.replicated_kv_bytes + case.row_bytes
