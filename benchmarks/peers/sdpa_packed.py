"""torch's attention over KV that is stored once for each sample, with the query heads of a group as its queries."""

import torch.nn.functional as F

from ..cases import GROUP, HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS
from ..machine import memory_shortage

NAME = "sdpa packed"


def reason_against(case):
    return memory_shortage(case.replicated_kv_bytes)


def prepare(inputs):
    n = inputs.case.num_samples
    q = inputs.q.view(n, NUM_KV_HEADS, GROUP, HEAD_DIM)
    k, v = inputs.replicated
    return lambda: F.scaled_dot_product_attention(q, k, v).view(n, NUM_Q_HEADS, HEAD_DIM)


def bytes_read(case):
    return case.replicated_kv_bytes + case.row_bytes
