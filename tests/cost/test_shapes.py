"""Models: parameters, KV and attention to the digit, against the published figures and against transformers itself."""

from __future__ import annotations

import json

import pytest
import torch

from tts_kernels.cost import ModelShape
from tts_kernels.cost.shapes import MODEL_TYPES, model_table

# Parameters as the checkpoints have them; kappa, g and a by hand from the public configs.
GOLDEN = {
    "qwen2.5-7b": (7_615_616_512, 57_344, 7, 401_408),
    "qwen2.5-14b": (14_770_033_664, 196_608, 5, 983_040),
    "qwen2.5-32b": (32_763_876_352, 262_144, 5, 1_310_720),
    "qwen3-0.6b": (596_049_920, 114_688, 2, 229_376),
    "qwen3-1.7b": (1_720_574_976, 114_688, 2, 229_376),
    "qwen3-4b": (4_022_468_096, 147_456, 4, 589_824),
    "qwen3-8b": (8_190_735_360, 147_456, 4, 589_824),
    "qwen3-14b": (14_768_307_200, 163_840, 5, 819_200),
    "qwen3-32b": (32_762_123_264, 262_144, 8, 2_097_152),
    "llama-3.1-8b": (8_030_261_248, 131_072, 4, 524_288),
    "llama-3.2-3b": (3_212_749_824, 114_688, 3, 344_064),
    "llama-3.3-70b": (70_553_706_496, 327_680, 8, 2_621_440),
    "r1-distill-qwen-1.5b": (1_777_088_000, 28_672, 6, 172_032),
    "r1-distill-qwen-7b": (7_615_616_512, 57_344, 7, 401_408),
    "deepseek-r1": (671_026_404_352, 70_272, None, 16_990_208),
}
# Billions of parameters as commonly printed; 8.190 and 1.720 are cut off rather than rounded.
PRINTED = {
    "qwen2.5-7b": 7.615, "qwen2.5-14b": 14.77, "qwen2.5-32b": 32.76, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.720,
    "qwen3-4b": 4.022, "qwen3-8b": 8.190, "qwen3-14b": 14.77, "qwen3-32b": 32.76, "llama-3.1-8b": 8.030,
    "llama-3.2-3b": 3.213, "llama-3.3-70b": 70.55, "r1-distill-qwen-1.5b": 1.777, "deepseek-r1": 671,
}  # fmt: skip


@pytest.mark.parametrize("name", model_table())
def test_golden(name):
    parameters, kappa, group, attention = GOLDEN[name]
    model = ModelShape.preset(name)
    assert model.num_parameters == parameters
    assert model.kv_bytes_per_token == kappa
    assert model.attention_flops_per_key == attention
    if group:
        assert model.attention_intensity == group == model.num_heads / model.num_kv_heads
    assert model.name == name and model.max_positions >= 40_960


@pytest.mark.parametrize("name, printed", PRINTED.items())
def test_billions_as_printed(name, printed):
    unit = 10 ** -len(str(printed).partition(".")[2].ljust(3 if printed < 10 else 0, "0"))
    assert abs(ModelShape.preset(name).num_parameters / 1e9 - printed) < unit


def test_deepseek():
    """671 billion, 37 of them for a token; latent attention is as intense unshared as 242 shared heads of one byte."""
    model = ModelShape.preset("deepseek-r1")
    assert 36.6e9 < model.active_parameters - model.head_weights < model.active_parameters < 37.6e9
    assert model.attention_intensity == pytest.approx(241.8, abs=0.05)
    assert model.attention_flops_per_key / model.num_layers == 2 * 128 * (576 + 512) == 278_528
    assert model.prefill_flops_per_key / model.num_layers == 2 * 128 * (192 + 128)
    assert model.touched_body_weights(1) == pytest.approx(model.active_body_weights, rel=1e-12)
    assert model.active_body_weights < model.touched_body_weights(64) < model.body_weights
    assert model.touched_body_weights(1e6) == pytest.approx(model.body_weights)


@pytest.mark.parametrize("name", model_table())
def test_as_transformers_counts(name):
    """The same config, made by transformers on the meta device."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**model_table()[name]["config"])
    assert _counted(transformers, config) == ModelShape.preset(name).num_parameters
    assert ModelShape.from_config(config, name=name) == ModelShape.preset(name)


TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    "kind, extra",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"head_dim": 8}),
        ("qwen2", {"head_dim": 8, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 64}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
        ("qwen3_moe", MOE),
        ("qwen3_moe", {**MOE, "mlp_only_layers": [1]}),
        ("qwen3_moe", {**MOE, "decoder_sparse_step": 2}),
        ("deepseek_v3", {"q_lora_rank": 12}),
        ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2}),
    ],
)  # fmt: skip
def test_every_architecture_as_transformers_counts(kind, extra):
    transformers = pytest.importorskip("transformers")
    latent = {
        "kv_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
    }  # fmt: skip
    fields = {**TINY, **(latent if kind == "deepseek_v3" else {}), **extra}
    config = transformers.AutoConfig.for_model(kind, **fields)
    assert ModelShape.from_config(config).num_parameters == _counted(transformers, config)


def test_every_architecture_is_tested():
    marks = test_every_architecture_as_transformers_counts.pytestmark
    assert {kind for kind, _ in marks[0].args[1]} == set(MODEL_TYPES)


def test_from_files(tmp_path):
    config = model_table()["qwen3-8b"]["config"]
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert ModelShape.from_config(folder) == ModelShape.from_config(folder / "config.json")
    assert ModelShape.from_config(str(folder)).name == "my-model"
    assert ModelShape.from_config(config, name="qwen3-8b") == ModelShape.preset("Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ModelShape.preset("qwen2.5-7"), r"model: expected one of .*nearest: qwen2.5-7b.*got 'qwen2.5-7'"),
        (lambda: ModelShape.preset("gpt-9"), "model: expected one of deepseek-r1, .*, got 'gpt-9'"),
        (lambda: ModelShape.preset(7), "model: expected the name of a preset, got 7"),
        (lambda: ModelShape.from_config({"model_type": "mamba"}), "model_type: expected one of llama.*got 'mamba'"),
        (lambda: ModelShape.from_config({"model_type": "llama"}), "hidden_size: expected a whole number, got none"),
        (
            lambda: ModelShape.from_config({**TINY, "model_type": "mistral", "sliding_window": 8}),
            "sliding_window.*got 8",
        ),
        (lambda: ModelShape.from_config(3), "config: expected a dict, a path or a transformers config, got int"),
        (lambda: ModelShape("x", 1, 8, 3, 2, 4, 8, 8, 8), "num_heads: expected a multiple of num_kv_heads = 2, got 3"),
        (lambda: ModelShape("x", 0, 8, 2, 2, 4, 8, 8, 8), "num_layers: expected at least 1, got 0"),
        (lambda: ModelShape("x", 1.5, 8, 2, 2, 4, 8, 8, 8), "num_layers: expected an int, got 1.5"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config: expected JSON, got .*config.json"):
        ModelShape.from_config(tmp_path)


def _counted(transformers, config) -> int:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
