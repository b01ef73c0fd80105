"""transformers' `generate` over one shared KV tree.

    from tts_kernels.integrations.transformers import generate
    generate(model, input_ids, num_return_sequences=32, do_sample=True, max_new_tokens=512)

is `model.generate(...)` with the same result, but the prompt of each question is computed once and its KV stored once,
and a decode step reads it once for all samples. Three pieces are swapped for the duration of the call; sampling, logits
processors, stopping criteria and streamers stay transformers':

- the cache: `TreeCache`, whose layers write new KV into pages (`append_kv`) instead of concatenating;
- the attention function: one `tree_attention` for each layer, on the plan of the cache that the keys came from;
- the mask function: no mask is built. What the model asks for is checked to be causal, with or without a window.

The prompts are prefilled as one packed forward before `model.generate` runs. The cache then claims to hold all but the
last prompt token, so that transformers feeds this one token for every sample; its KV is there already, and its
attention is computed once for each question. From the second forward on, each sample appends to its own leaf.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.generation import GenerationMode

from .transformers_cache import TreeCache, refuse

NAME = "tts_kernels"  # in AttentionInterface; a name with "flash" in it would make transformers look for a hub kernel


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    num_return_sequences: int | None = None,
    attention_mask: Tensor | None = None,
    page_size: int = 16,
    backend: str | None = None,
    **generate_kwargs,
):
    """`model.generate(input_ids, num_return_sequences=N, ...)` with every prompt computed and stored once.

    Args:
        model: a decoder-only transformers model with its weights on one device.
        input_ids: [B, L] integers, one question a row, padded on the left.
        num_return_sequences: N samples for each question; default as the generation config says (1).
        attention_mask: [B, L], 0 where there is padding. Default as in transformers: found from the pad token where it
            is not an end token too, else no padding.
        page_size: tokens in a page of the KV cache.
        backend: of the attention ops, see `tts_kernels.tree_attention`.
        generate_kwargs: as for `model.generate`: generation parameters, generation_config, logits_processor, ...

    Returns:
        What `model.generate` returns; row b * N + n is sample n of question b. With return_dict_in_generate=True the
        result's `past_key_values` is the `TreeCache`, which counts its bytes.

    Raises:
        TypeError: `model` or `input_ids` is of another kind.
        ValueError: the model or the call cannot run over a shared tree (all reasons are listed; a few can be seen only
            once the model runs), or padding that is not on the left.

    The model's attention implementation is switched during the call and put back after it: for one model, one call at
    a time.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"model: expected a transformers model that can generate, got {type(model).__name__}")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise TypeError(f"input_ids: expected an integer tensor [B, L], got {_describe(input_ids)}")
    if not input_ids.numel():
        raise ValueError(f"input_ids: expected at least one question and one token, got shape {tuple(input_ids.shape)}")
    if num_return_sequences is not None:
        generate_kwargs = _with_samples(generate_kwargs, num_return_sequences)
    config, model_kwargs = _merge_settings(model, generate_kwargs)
    reasons = unsupported_reasons(model) + _unsupported_settings(config, model_kwargs, generate_kwargs)
    if reasons:
        refuse(f"{type(model).__name__}: " + "; ".join(reasons))
    mask = _padding_mask(input_ids, attention_mask, config)

    cache = TreeCache(
        _layer_types(model),
        lengths=mask.sum(-1).tolist(),
        num_samples=config.num_return_sequences or 1,
        width=input_ids.shape[1],
        page_size=page_size,
        expected_tokens=_expected_tokens(config, input_ids.shape[1]),
        backend=backend,
    )
    with _attention_switched(model), torch.no_grad():
        _prefill(model, cache, input_ids, mask, config.prefill_chunk_size)
        return model.generate(input_ids, attention_mask=mask, past_key_values=cache, **generate_kwargs)


def unsupported_reasons(model: PreTrainedModel) -> list[str]:
    """Every reason, as far as its config tells, why `model` cannot generate over a shared KV tree; empty if it can."""
    reasons = []
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder model")
    if getattr(model, "_is_stateful", False):
        reasons.append("it carries a recurrent state, which is not KV of single tokens")
    if getattr(config, "kv_lora_rank", None):
        reasons.append(f"it uses multi-head latent attention (kv_lora_rank {config.kv_lora_rank}), so K and V differ")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        reasons.append("it adds ALiBi biases to the attention scores")
    other = sorted(set(_layer_types(model)) - {"full_attention", "sliding_attention"})
    if other:
        reasons.append(f"it has layers of type {', '.join(other)}; only full_attention and sliding_attention are known")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        reasons.append("its forward takes no position_ids, so questions cannot be packed")
    if not model._can_set_attn_implementation():
        reasons.append("it does not take its attention function from transformers' AttentionInterface")
    if model.training and getattr(config, "attention_dropout", 0):
        reasons.append(f"it is in training mode with attention_dropout {config.attention_dropout}")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or "meta" in devices:
        reasons.append(f"its weights are on {', '.join(devices)}, not on one device")
    return reasons


def _unsupported_settings(config: GenerationConfig, model_kwargs: dict, generate_kwargs: dict) -> list[str]:
    reasons = []
    mode = config.get_generation_mode(generate_kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        reasons.append(f"generation mode {mode.value}; only greedy search and sampling are")
    if mode == GenerationMode.GREEDY_SEARCH and (config.num_return_sequences or 1) > 1:
        reasons.append(f"num_return_sequences {config.num_return_sequences} without do_sample=True gives equal samples")
    if config.use_cache is False:
        reasons.append("use_cache=False")
    for name in ("cache_implementation", "dola_layers", "token_healing", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            reasons.append(f"{name}={getattr(config, name)}")
    if (config.guidance_scale or 1) != 1:
        reasons.append(f"guidance_scale={config.guidance_scale} runs the model on other prompts")
    if generate_kwargs.get("custom_generate") is not None:
        reasons.append("custom_generate")
    for name, value in model_kwargs.items():
        if value is not None and name not in ("output_attentions", "output_hidden_states"):
            reasons.append(f"argument {name}, which is not a generation parameter")
    return reasons


def _with_samples(generate_kwargs: dict, num_return_sequences: int) -> dict:
    """Put N where transformers expects it: in the generation_config where one is given, else with the parameters."""
    given = generate_kwargs.get("generation_config")
    if given is None:
        return {**generate_kwargs, "num_return_sequences": num_return_sequences}
    config = copy.deepcopy(given)
    config.num_return_sequences = num_return_sequences
    return {**generate_kwargs, "generation_config": config}


def _merge_settings(model: PreTrainedModel, generate_kwargs: dict) -> tuple[GenerationConfig, dict]:
    """The generation config `model.generate` will arrive at, and the arguments it would hand on to the model."""
    named = {*inspect.signature(model.generate).parameters, "tokenizer", "assistant_tokenizer", "trust_remote_code"}
    parameters = {name: value for name, value in generate_kwargs.items() if name not in named - {"kwargs"}}
    return model._prepare_generation_config(generate_kwargs.get("generation_config"), **parameters)


def _expected_tokens(config: GenerationConfig, width: int) -> int:
    """How many tokens each sample may append: a guess of the pages to begin with, more are added on demand."""
    longest = config.max_new_tokens or max((config.max_length or 0) - width, 20)
    return longest - 1  # the last token is never fed


def _padding_mask(input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig) -> Tensor:
    """int64 [B, L], checked to be zeros, then at least a one."""
    if attention_mask is None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        pad = config.pad_token_id
        return (input_ids != pad).long() if pad is not None and pad not in ends else torch.ones_like(input_ids).long()
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected shape {tuple(input_ids.shape)} like input_ids, got {_describe(attention_mask)}"
        )
    mask = (attention_mask != 0).long()
    wrong = (mask.diff(dim=-1) < 0).any(-1) | (mask[:, -1] == 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"attention_mask: expected padding on the left only (zeros, then ones), got {attention_mask[row].tolist()} "
            f"in row {row}"
        )
    return mask.to(input_ids.device)


def _prefill(model: PreTrainedModel, cache: TreeCache, input_ids: Tensor, mask: Tensor, chunk_size: int | None) -> None:
    """Run all prompts through the model, packed without their padding: [1, sum of the prompts' lengths]."""
    tokens = input_ids[mask.bool()]
    positions = (mask.cumsum(-1) - 1)[mask.bool()]
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for start in range(0, len(tokens), chunk_size or len(tokens)):
        chunk = slice(start, start + (chunk_size or len(tokens)))
        cache.expect_prompt_tokens(start, len(tokens[chunk]))
        inputs = model.prepare_inputs_for_generation(
            tokens[None, chunk],
            past_key_values=cache,
            position_ids=positions[None, chunk],
            use_cache=True,
            is_first_iteration=True,
            **extra,
        )
        model(**inputs, return_dict=True)
    cache.expect_samples()


@contextlib.contextmanager
def _attention_switched(model: PreTrainedModel) -> Iterator[None]:
    before = _implementations(model.config)
    try:
        model.set_attn_implementation(NAME)
        if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
            refuse(f"{type(model).__name__} does not let its attention implementation be set")
        yield
    finally:
        model.set_attn_implementation(before)


def _implementations(config) -> dict:
    """The attention implementations of a config and its sub-configs, as `set_attn_implementation` takes them."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    below = {key: _implementations(part) if part.sub_configs else part._attn_implementation
             for key, part in parts.items() if part is not None}  # fmt: skip
    return {"": config._attn_implementation, **below}


def _layer_types(model: PreTrainedModel) -> list[str]:
    """One name for each layer that stores KV, as transformers itself picks the layers of its caches."""
    return get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]


# --- what the model calls ---------------------------------------------------------------------------------------------

# Keyword arguments that a model may hand to its attention function and that say nothing about the result.
IGNORED = {"position_ids", "use_cache", "output_hidden_states", "output_router_logits", "num_items_in_batch"}


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, T, D] -> [B, T, Hq, D]. `key` and `value` are what the layer's `TreeLayer`
    handed back; the KV to attend to is in its pages."""
    layer, who = getattr(key, "tts_kernels_layer", None), type(module).__name__
    if layer is None or layer.value is not value:
        refuse(f"{who}'s keys and values are not the ones that the cache of tts_kernels' generate handed out: it "
               "changes them after storing them, shares them or attends to something else")  # fmt: skip
    if not hasattr(attention_mask, "tts_kernels_window"):
        refuse(f"{who}'s mask was not made by transformers' mask functions: {_describe(attention_mask)}")
    visible = attention_mask.tts_kernels_window
    if sliding_window is not None and sliding_window != visible:
        refuse(f"{who}'s sliding_window is {sliding_window}, but its mask has {visible}")
    if is_causal is False or dropout:
        refuse(f"{who} asks for is_causal={is_causal}, dropout={dropout}")
    for name, argument in kwargs.items():
        if name not in IGNORED and argument is not None and argument is not False:
            refuse(f"{who} hands its attention function {name}, whose meaning is not known here")

    rows = query.transpose(1, 2)  # [B, T, Hq, D]
    # transformers' window counts the row's own token, tree_attention's does not
    layer.window = window = -1 if visible is None else visible - 1
    out = layer.attend(
        rows.flatten(0, 1), scale=scaling, softcap=softcap or 0.0, window=window,
        sinks=None if s_aux is None else s_aux.float(),
    )  # fmt: skip
    return out.view(rows.shape), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs,
) -> Tensor:
    """The mask function: an empty tensor that carries the window, after a look whether the mask asked for is causal
    with this window. Padding needs no mask: it is not in the tree."""
    first, last = q_offset, q_offset + q_length - 1
    pairs = [(first, first + 1), (first, last), (last, 0), (last, last)]
    if local_size is not None:
        pairs += [(last, last - local_size), (last, last - local_size + 1)]
    pairs = [(row, col) for row, col in pairs if kv_offset <= col < kv_offset + kv_length]
    wanted = [col <= row and (local_size is None or col > row - local_size) for row, col in pairs]
    row, col = torch.tensor(pairs).unbind(-1)
    if use_vmap or mask_function(torch.zeros_like(row), torch.zeros_like(row), row, col).tolist() != wanted:
        refuse(f"the model asks for a mask that is neither causal nor causal with a window of {local_size} tokens")
    return _mask_with_window(local_size)


@functools.lru_cache
def _mask_with_window(window: int | None) -> Tensor:
    tensor = torch.empty(0, dtype=torch.bool)
    tensor.tts_kernels_window = window
    return tensor


def _describe(thing: object) -> str:
    return f"{thing.dtype} of shape {tuple(thing.shape)}" if isinstance(thing, Tensor) else type(thing).__name__


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
