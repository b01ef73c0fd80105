"""Tiny seeded transformers models, one for each thing that a family adds to attention."""

from __future__ import annotations

import torch
import transformers

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA = {"sliding_window": 7, "query_pre_attn_scalar": 24, "layer_types": ["sliding_attention", "full_attention"]}
# (model class, config class, what it shows, kernel of the stock run where the default is another)
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"head_dim": None}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "mistral-window": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 9}),
    "qwen2-one-layer-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"head_dim": None, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "gemma2-softcap-window": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, "attn_logit_softcapping": 0.5}),
    "gemma3-window": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "gpt-oss-sinks": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gpt-neox-mha": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"head_dim": None, "num_key_value_heads": None}),
}  # fmt: skip


def build(name: str, **changes):
    model_class, config_class, own = MODELS[name]
    settings = {key: value for key, value in {**SMALL, **own, **changes}.items() if value is not None or "token" in key}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 or "sinks" in MODELS[name][2]:  # norms stay; logits spread out so that no two tie
            torch.nn.init.normal_(parameter, std=0.12)
    return model
