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

import copy
import inspect

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from tts_kernels.errors import check_int

from .transformers_attention import attention_switched, describe, layer_types, refuse, unsupported_reasons
from .transformers_cache import TreeCache


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
        result's `past_key_values` is the `TreeCache`, which counts its bytes. A model refuses to go on from it.

    Raises:
        TypeError: `model`, `input_ids`, `num_return_sequences` or `page_size` is of another kind.
        ValueError: the model or the call cannot run over a shared tree (all reasons are listed; a few can be seen only
            once the model runs), or padding that is not on the left.

    The model's attention implementation is switched during the call and put back after it: for one model, one call at
    a time.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"model: expected a transformers model that can generate, got {type(model).__name__}")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise TypeError(f"input_ids: expected an integer tensor [B, L], got {describe(input_ids)}")
    if not input_ids.numel():
        raise ValueError(f"input_ids: expected at least one question and one token, got shape {tuple(input_ids.shape)}")
    if num_return_sequences is not None:
        check_int("num_return_sequences", num_return_sequences, 1)
        generate_kwargs = _with_samples(generate_kwargs, num_return_sequences)
    config, model_kwargs = _merge_settings(model, generate_kwargs)
    reasons = unsupported_reasons(model) + _unsupported_settings(config, model_kwargs, generate_kwargs)
    if reasons:
        refuse(f"{type(model).__name__}: " + "; ".join(reasons))
    mask = _padding_mask(input_ids, attention_mask, config)

    cache = TreeCache(
        layer_types(model),
        lengths=mask.sum(-1).tolist(),
        num_samples=config.num_return_sequences or 1,
        width=input_ids.shape[1],
        page_size=page_size,
        expected_tokens=_expected_tokens(config, input_ids.shape[1]),
        backend=backend,
    )
    with attention_switched(model), torch.no_grad():
        _prefill(model, cache, input_ids, mask, config.prefill_chunk_size)
        result = model.generate(input_ids, attention_mask=mask, past_key_values=cache, **generate_kwargs)
    cache.expect_nothing()
    return result


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
            f"attention_mask: expected shape {tuple(input_ids.shape)} like input_ids, got {describe(attention_mask)}"
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
