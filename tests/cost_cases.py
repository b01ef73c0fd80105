"""Workloads, models and a device that are small enough for the costs of a query to be worked out step by step."""

from __future__ import annotations

from hypothesis import strategies as st

from tts_kernels.cost import Efficiency, Hardware, ModelShape, Workload
from tts_kernels.cost.query import REGIMES

# Small enough to be simulated, with a ridge that some of its ops are above and others below. One dense, one with
# experts and latent attention.
DEVICE = Hardware("toy", bf16_flops=3e9, bandwidth=1e8, memory=5e7)
DENSE = ModelShape("dense", 2, 32, 4, 2, 8, 48, 100, 4096)
DEEP = ModelShape.from_config(
    {
        "model_type": "deepseek_v3", "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 16, "vocab_size": 100,
        "max_position_embeddings": 4096, "kv_lora_rank": 16, "q_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    name="deep",
)  # fmt: skip
MODELS = {"dense": DENSE, "deep": DEEP}


@st.composite
def workloads(draw, most=12):
    n, queries = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    search = draw(st.sampled_from(["best_of_n", "best_of_n", "beam", "dvts"]))
    verifier = draw(st.sampled_from(["none", "prm"] if search != "best_of_n" else ["none", "orm", "prm"]))
    steps = draw(st.integers(1, 4))
    keep = None
    if search == "best_of_n":
        lengths = st.integers(1, most)
        suffix = draw(st.one_of(lengths, st.tuples(*[lengths] * (n * queries))))
    else:
        keep = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
        suffix = steps * draw(st.integers(1, 4))
    prompt = draw(st.one_of(st.integers(0, 40), st.tuples(*[st.integers(0, 40)] * 2)))
    trunk = draw(st.sampled_from([0, 0, 1, 9]))
    head = draw(st.sampled_from(["vocab", "mlp", "linear"]))
    return Workload(n, prompt, suffix, trunk, search, keep, steps, verifier, None, head, queries)


every = {  # arguments of query_cost
    "work": workloads(),
    "model": st.sampled_from(list(MODELS.values())),
    "regime": st.sampled_from(list(REGIMES)),
    "efficiency": st.sampled_from([Efficiency(), Efficiency(0.8, 0.6, 0.5), Efficiency(0.1, 1, 1)]),
}


def pass_seconds(rows: int, full: float, weights: int, each: int, rate: float, bandwidth: float) -> float:
    """Of `rows` rows in a pass of `full`: its weights once in bf16, `each` bytes a row."""
    return rows / full * max(2 * weights * full / rate, (2 * weights + each * full) / bandwidth)
