"""Our Triton kernels where the call itself takes the CUDA ones. No peer, but what says which of the two to take."""

from tts_kernels.attention import api

NAME = "ours, triton"
OURS = True


def reason_against(case):
    return "" if case.device == "cuda" else "it is for GPUs"


def prepare(inputs):
    given = inputs.q, inputs.k_cache, inputs.v_cache
    if api.BACKENDS.choose("tree_attention", *given) == "triton":
        raise RuntimeError("the call takes the Triton kernels by itself")
    return lambda: api.tree_attention(*given, inputs.plan, backend="triton")


def bytes_read(case):
    return case.least_bytes
