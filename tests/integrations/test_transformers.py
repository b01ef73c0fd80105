"""`generate` over a shared tree against stock `model.generate`: in float32 the tokens are equal.

The models are tiny and seeded. Prompts are longer than the windows and than a page; questions of a batch have different
lengths; page_size 4 makes samples reserve pages more than once.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import LogitsProcessorList, StoppingCriteriaList  # noqa: E402
from transformers_models import MODELS, SMALL, VOCAB, build  # noqa: E402

from tts_kernels.integrations import transformers_attention as attention  # noqa: E402
from tts_kernels.integrations.transformers import generate  # noqa: E402
from tts_kernels.integrations.transformers_attention import unsupported_reasons  # noqa: E402
from tts_kernels.integrations.transformers_cache import TreeCache  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models: more threads cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return build("qwen3")


def prompts(lengths=(21, 13), seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded (input_ids, attention_mask)."""
    torch.manual_seed(seed)
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return torch.randint(3, VOCAB, (len(lengths), width)) * mask, mask


def both(model, input_ids, seed=7, **kwargs):
    """Stock and ours, from the same seed."""
    stock_kwargs = {key: value for key, value in kwargs.items() if key not in ("page_size", "backend")}
    torch.manual_seed(seed)
    stock = model.generate(input_ids, **stock_kwargs)
    torch.manual_seed(seed)
    return stock, generate(model, input_ids, **kwargs)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_stock(name, backend):
    model = build(name)
    input_ids, mask = prompts()
    before = model.config._attn_implementation
    stock, ours = both(model, input_ids[:1], max_new_tokens=14, do_sample=False, page_size=4, backend=backend)
    assert ours.tolist() == stock.tolist()
    stock, ours = both(
        model, input_ids, attention_mask=mask, max_new_tokens=14, do_sample=True, num_return_sequences=5, page_size=4,
        backend=backend,
    )  # fmt: skip
    assert ours.tolist() == stock.tolist()
    assert len({tuple(row) for row in ours[:5].tolist()}) > 1  # samples do differ
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("lengths", [(1,), (1, 5, 4), (3, 3)])
def test_short_questions(model, lengths):
    input_ids, mask = prompts(lengths)
    for new_tokens in (1, 2, 9):
        stock, ours = both(
            model, input_ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True, num_return_sequences=3,
            page_size=4,
        )  # fmt: skip
        assert ours.tolist() == stock.tolist()


SETTINGS = {
    "temperature, top-k, top-p": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min-p": {"min_p": 0.02},
    "repetition penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    "min new tokens": {"min_new_tokens": 6, "eos_token_id": list(range(3, 40))},
    "max length": {"max_new_tokens": None, "max_length": 29},
    "prefill in chunks": {"prefill_chunk_size": 6},
    "pages of one token": {"page_size": 1},
    "bad words": {"bad_words_ids": [[5], [6, 7]]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_generation_parameters(model, settings):
    input_ids, mask = prompts()
    settings = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 4, "pad_token_id": 0, **settings}
    stock, ours = both(model, input_ids, attention_mask=mask, **settings)
    assert ours.tolist() == stock.tolist()


def test_end_token_in_the_middle(model):
    input_ids, mask = prompts()
    kwargs = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": True, "num_return_sequences": 4}
    stock, ours = both(model, input_ids, eos_token_id=list(range(3, 12)), pad_token_id=0, **kwargs)
    assert ours.tolist() == stock.tolist()
    new = ours[:, input_ids.shape[1] :]
    assert (new == 0).any() and (new[:, 0] >= 12).any()


def test_padding_is_found_from_the_pad_token(model):
    input_ids, _ = prompts()
    stock, ours = both(model, input_ids, max_new_tokens=8, pad_token_id=0, eos_token_id=2)
    assert ours.tolist() == stock.tolist()
    stock, ours = both(model, input_ids, max_new_tokens=8, pad_token_id=0, eos_token_id=0)  # then zeros are tokens
    assert ours.tolist() == stock.tolist()


def test_generation_config_object(model):
    input_ids, mask = prompts()
    config = transformers.GenerationConfig(max_new_tokens=9, do_sample=True, num_return_sequences=3, top_k=0)
    stock, ours = both(model, input_ids, attention_mask=mask, generation_config=config)
    assert ours.shape[0] == 6 and ours.tolist() == stock.tolist()
    torch.manual_seed(7)
    ours = generate(model, input_ids, attention_mask=mask, generation_config=config, num_return_sequences=2)
    assert ours.shape[0] == 4
    assert config.num_return_sequences == 3


def test_returned_scores_and_cache(model):
    input_ids, mask = prompts()
    stock, ours = both(
        model, input_ids, attention_mask=mask, max_new_tokens=7, do_sample=True, num_return_sequences=4, page_size=4,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    assert ours.sequences.tolist() == stock.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(stock.scores), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-4, rtol=1e-4)

    cache = ours.past_key_values
    assert isinstance(cache, TreeCache)
    token = 2 * 2 * 2 * 32 * 4  # K and V, layers, heads, head_dim, bytes
    assert cache.kv_bytes_per_token == token
    assert cache.kv_bytes_held == token * 4 * (6 + 4 + 8 * 2)  # pages: 21 and 13 tokens, 8 samples of 6 tokens
    figures = cache.kv_bytes_per_step()  # steps 1..6
    assert figures["read"] == figures["least"] == token * (21 + 13 + 8 * 3.5)
    assert figures["replicated"] == token * 4 * (21 + 13 + 2 * 3.5)


def test_least_bytes_with_a_window():
    model = build("mistral-window")
    input_ids, _ = prompts((21,))
    out = generate(
        model, input_ids, max_new_tokens=4, do_sample=True, num_return_sequences=3, return_dict_in_generate=True
    )
    figures, token = out.past_key_values.kv_bytes_per_step(), out.past_key_values.kv_bytes_per_token
    assert figures["least"] == pytest.approx(token * sum(9 - s + 3 * s for s in (1, 2, 3)) / 3)
    assert figures["read"] == pytest.approx(token * (21 + 3 * 2))


class Recorder(transformers.generation.BaseStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def test_streamer_processor_and_criterion_of_the_user(model):
    input_ids, _ = prompts((17,))
    seen = []

    def favour_seven(ids, scores):
        seen.append(ids.shape)
        return scores + 2 * (torch.arange(VOCAB) == 7)

    def stop_at_length(ids, scores):
        return torch.full((ids.shape[0],), ids.shape[1] >= 24)

    streamers = Recorder(), Recorder()
    results = []
    for run, streamer in zip((model.generate, lambda *a, **k: generate(model, *a, **k)), streamers):
        torch.manual_seed(3)
        results.append(
            run(
                input_ids,
                max_new_tokens=20,
                do_sample=True,
                num_return_sequences=3,
                streamer=streamer,
                logits_processor=LogitsProcessorList([favour_seven]),
                stopping_criteria=StoppingCriteriaList([stop_at_length]),
            )
        )
    assert results[0].shape[1] == 24
    assert results[0].tolist() == results[1].tolist()
    assert streamers[0].got == streamers[1].got
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_samples_take_more_pages_when_the_guess_was_short(model, monkeypatch):
    monkeypatch.setattr("tts_kernels.integrations.transformers_cache.FIRST_ROOM", 3)
    input_ids, mask = prompts()
    stock, ours = both(
        model, input_ids, attention_mask=mask, max_new_tokens=25, do_sample=True, num_return_sequences=3, page_size=2
    )
    assert ours.tolist() == stock.tolist()


def test_half_precision_runs(model):
    half = build("qwen3").to(torch.bfloat16)
    input_ids, mask = prompts()
    torch.manual_seed(0)
    out = generate(half, input_ids, attention_mask=mask, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 27)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "beams": ({"num_beams": 4}, "beam_search"),
    "beam sampling": ({"num_beams": 4, "do_sample": True}, "beam_sample"),
    "beam groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group_beam_search"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    "equal samples": ({"num_return_sequences": 3}, "do_sample"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "another cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "cache given": ({"past_key_values": transformers.DynamicCache()}, "past_key_values"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds"),
    "misspelt": ({"max_new_tokenz": 3}, "max_new_tokenz"),
}


@pytest.mark.parametrize("kwargs, reason", REFUSED.values(), ids=REFUSED)
def test_settings_refused_before_the_model_runs(model, monkeypatch, kwargs, reason):
    monkeypatch.setattr(model.model, "forward", None)
    with pytest.raises(ValueError, match=reason):
        generate(model, prompts()[0], **kwargs)


@pytest.mark.parametrize("n, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("a", TypeError)])
def test_number_of_samples_refused(model, n, error):
    with pytest.raises(error, match=r"^num_return_sequences: expected"):
        generate(model, prompts()[0], num_return_sequences=n)


def test_assistant_model_refused(model):
    with pytest.raises(ValueError, match="assisted_generation"):
        generate(model, prompts((5,))[0], assistant_model=model)


def test_every_reason_is_listed(model):
    with pytest.raises(ValueError, match=r"use_cache=False.*guidance_scale=2"):
        generate(model, prompts()[0], use_cache=False, guidance_scale=2.0)


@pytest.mark.parametrize(
    "model_class, config_class, settings, reason",
    [
        (
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            {"num_hidden_layers": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
             "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
             "n_routed_experts": 8, "head_dim": None},
            "latent attention",
        ),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2},
            "encoder-decoder",
        ),
        ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 1}, "recurrent state"),
        ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "position_ids"),
        ("FalconForCausalLM", "FalconConfig", {"num_hidden_layers": 1, "alibi": True, "head_dim": None}, "ALiBi"),
        (
            "Lfm2ForCausalLM",
            "Lfm2Config",
            {"hidden_size": 64, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
            "layers of type conv",
        ),
        (
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            {"num_hidden_layers": 2, "num_local_experts": 2, "intermediate_size_mlp": 64,
             "layer_types": ["chunked_attention", "full_attention"]},
            "layers of type chunked_attention",
        ),
    ],
)  # fmt: skip
def test_models_refused(model_class, config_class, settings, reason):
    shared = {"vocab_size": VOCAB} if "Config" in config_class and "d_model" in settings else SMALL
    config = getattr(transformers, config_class)(
        **{key: value for key, value in {**shared, **settings}.items() if value is not None}
    )
    with torch.device("meta"):
        refused = getattr(transformers, model_class)(config)
    assert any(reason in found for found in unsupported_reasons(refused)), unsupported_reasons(refused)
    with pytest.raises(ValueError, match=reason):
        generate(refused, prompts((5,))[0], max_new_tokens=2)


def test_training_with_dropout_refused():
    model = build("llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="attention_dropout"):
        generate(model, prompts((5,))[0], max_new_tokens=2)


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0]], [[0, 1, 0, 1]], [[0, 0, 0, 0]]])
def test_only_left_padding(model, mask):
    with pytest.raises(ValueError, match=r"attention_mask.*left"):
        generate(model, torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor(mask), max_new_tokens=2)


def test_bad_arguments(model):
    ids = prompts((5,))[0]
    with pytest.raises(TypeError, match="model"):
        generate(torch.nn.Linear(2, 2), ids)
    for wrong in (ids[0], ids.float(), [1, 2]):
        with pytest.raises(TypeError, match="input_ids"):
            generate(model, wrong)
    with pytest.raises(ValueError, match="input_ids"):
        generate(model, ids[:, :0])
    with pytest.raises(ValueError, match="attention_mask"):
        generate(model, ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"^page_size: expected at least 1, got 0"):
        generate(model, ids, page_size=0)
    with pytest.raises(TypeError, match=r"^page_size: expected an int, got 4.0"):
        generate(model, ids, page_size=4.0)
    assert generate(model, ids, page_size=np.int64(4), max_new_tokens=2).shape == (1, 7)
    with pytest.raises(ValueError, match="backend"):
        generate(model, ids, backend="abacus", max_new_tokens=2)


def test_implementation_is_put_back_after_an_error(model):
    before = model.config._attn_implementation

    def fail(ids, scores):
        raise KeyError("stop here")

    with pytest.raises(KeyError):
        generate(model, prompts((5,))[0], logits_processor=LogitsProcessorList([fail]), max_new_tokens=2)
    assert model.config._attn_implementation == before
    stock, ours = both(model, prompts((5,))[0], max_new_tokens=4)
    assert ours.tolist() == stock.tolist()


def test_attention_outside_generate_is_refused(model):
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    try:
        with pytest.raises(ValueError, match="keys and values are not the ones"):
            model.generate(prompts((5,))[0], max_new_tokens=2)
    finally:
        model.set_attn_implementation(before)


def test_going_on_from_the_returned_cache_is_refused(model):
    """Without the switched attention it would see the new tokens alone. Its figures stay as they are."""
    kwargs = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    out = generate(model, prompts()[0], max_new_tokens=3, **kwargs)
    cache = out.past_key_values
    figures = cache.kv_bytes_held, cache.kv_bytes_per_step(), cache.get_seq_length()
    for go_on in (
        lambda: model.generate(out.sequences, past_key_values=cache, max_new_tokens=4),
        lambda: model(out.sequences[:, -1:], past_key_values=cache),
        lambda: model(out.sequences, past_key_values=cache),
    ):
        with pytest.raises(ValueError, match=r"^past_key_values: expected .* got that of a .* which is over"):
            go_on()
        assert (cache.kv_bytes_held, cache.kv_bytes_per_step(), cache.get_seq_length()) == figures
    with pytest.raises(ValueError, match="argument past_key_values"):
        generate(model, out.sequences, past_key_values=cache)


def test_bidirectional_mask_is_refused():
    model = build("gemma3-window", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="neither causal"):
        generate(model, prompts((5,))[0], max_new_tokens=2)


def test_layer_that_changes_its_keys_is_refused(monkeypatch):
    model = build("llama")
    update = transformers.cache_utils.Cache.update
    monkeypatch.setattr(TreeCache, "update", lambda self, *args: tuple(x * 1 for x in update(self, *args)))
    with pytest.raises(ValueError, match="keys and values are not the ones"):
        generate(model, prompts((5,))[0], max_new_tokens=2)


def test_window_that_mask_and_layer_disagree_on_is_refused():
    model = build("mistral-window")
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(**{**SMALL, "sliding_window": 5})
        layer.self_attn.config._attn_implementation_internal = attention.NAME
    with pytest.raises(ValueError, match="sliding_window is 5, but its mask has 9"):
        generate(model, prompts((5,))[0], max_new_tokens=2)
