"""torch's attention over KV that is stored once for each sample."""

import torch.nn.functional as F

from ..machine import memory_shortage

NAME = "sdpa"


def reason_against(case):
    return memory_shortage(case.replicated_kv_bytes, case.device)


def prepare(inputs):
    q = inputs.q[:, :, None]  # [N, Hq, 1, D]
    k, v = inputs.replicated
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]


def bytes_read(case):
    return case.replicated_kv_bytes + case.row_bytes
