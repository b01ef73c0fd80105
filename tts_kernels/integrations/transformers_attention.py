"""What every transformers model needs to run over a KV tree: the attention function and the mask function that are
swapped in for the duration of a call, and the layers of a cache whose KV lies in the pages of a `KVTree`.

A layer (`TreeLayer.update`) hands the keys back marked with itself; the attention function reads KV from the pages, so
it insists that key and value are those very tensors. The mask is an empty tensor that carries the window, made only
after what the model asks for was seen to be causal, with or without that window. See transformers.py and
transformers_tree.py for the two users.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, get_layer_types_and_kwargs

from ..attention import append_kv, tree_attention
from ..tree.kv_tree import KVTree
from ..tree.plan import TreePlan

NAME = "tts_kernels"  # in AttentionInterface; a name with "flash" in it would make transformers look for a hub kernel


def refuse(reason: str) -> NoReturn:
    raise ValueError(f"cannot run over a shared KV tree: {reason}")


class TreeCall:
    """What the layers of one cache share: the tree, and the plan and slots of the forward that runs."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.kv: KVTree | None = None
        self.plan: TreePlan | None = None
        self.slots: Tensor | None = None  # [R]; None: nothing is stored
        self.equal_rows = 1  # of so many rows in succession one is computed
        self.seen = 0  # tokens that transformers is told are stored
        self.next_layer = 0

    def make_tree(self, key: Tensor) -> KVTree:
        """Where there is none yet when the first layer stores its keys [R, Hkv, D]."""
        raise NotImplementedError

    def begin_forward(self) -> None:
        """Layer 0 is about to store its keys: set `plan`, `slots` and `equal_rows`."""

    def end_forward(self) -> None:
        """The last layer has stored its keys."""

    def enter_layer(self, index: int, key: Tensor, value: Tensor) -> None:
        """A layer is about to store keys and values [R, Hkv, D]: check that it fits, begin a forward with layer 0."""
        if index != self.next_layer:
            refuse(f"expected layer {self.next_layer} to store its KV next, got layer {index}")
        if key.shape != value.shape:
            refuse(f"keys and values differ: [heads, head_dim] {list(key.shape[1:])} and {list(value.shape[1:])}")
        if self.kv is None:
            self.kv = self.make_tree(key)
        like = self.kv.k_cache[index]
        if key.shape[1:] != like.shape[2:] or key.dtype != like.dtype or key.device != like.device:
            refuse(
                f"layers differ in KV heads, head_dim, dtype or device, expected {list(like.shape[2:])} {like.dtype} "
                f"{like.device}, got {list(key.shape[1:])} {key.dtype} {key.device}"
            )
        if index == 0:
            self.begin_forward()
            expected = self.plan.num_rows * self.equal_rows
            if key.shape[0] != expected:
                refuse(f"expected a forward with {expected} tokens, got {key.shape[0]}")
        self.next_layer = (index + 1) % self.num_layers
        if self.next_layer == 0:
            self.end_forward()

    def check_all_layers_stored(self) -> None:
        if self.next_layer:
            refuse(f"layers {self.next_layer} to {self.num_layers - 1} stored no KV")


class TreeLayer(CacheLayerMixin):
    """One layer of a cache over a tree. `update` stores new KV in the pages and hands the very same tensors on, marked,
    for the attention function to find its way back here."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, tree: TreeCall, index: int, backend: str | None):
        super().__init__()
        self.tree, self.index, self.backend = tree, index, backend
        self.value: Tensor | None = None
        self.window = -1

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [1, Hkv, T, D] of packed prompt tokens or [B * N, Hkv, 1, D] of samples."""
        tree = self.tree
        key, value = (states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states))  # [R, Hkv, D]
        tree.enter_layer(self.index, key, value)
        if tree.slots is not None:
            append_kv(
                key, value, tree.kv.k_cache[self.index], tree.kv.v_cache[self.index], tree.slots, backend=self.backend
            )
        self.value = value_states
        key_states.tts_kernels_layer = self
        return key_states, value_states

    def attend(self, query: Tensor, **kwargs) -> Tensor:
        """[R, Hq, D] -> the same, `tree_attention` over this layer's pages. Rows of one question that are known to be
        equal are computed once."""
        tree = self.tree
        out = tree_attention(
            query[:: tree.equal_rows], tree.kv.k_cache[self.index], tree.kv.v_cache[self.index], tree.plan,
            backend=self.backend, **kwargs,
        )  # fmt: skip
        self.value = None
        return out if tree.equal_rows == 1 else out.repeat_interleave(tree.equal_rows, dim=0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: pages are made when the first layer's keys arrive."""

    def get_seq_length(self) -> int:
        return self.tree.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tree.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        raise NotImplementedError("the KV of a tree cannot be reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("the KV of a tree cannot be reordered")


def unsupported_reasons(model: PreTrainedModel) -> list[str]:
    """Every reason, as far as its config tells, why `model` cannot run over a shared KV tree; empty if it can."""
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
    other = sorted(set(layer_types(model)) - {"full_attention", "sliding_attention"})
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


_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()


def lock_of(model: PreTrainedModel) -> threading.RLock:
    """One lock for each decoder, whatever models stand around it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return _LOCKS.setdefault(decoder, threading.RLock())


@contextlib.contextmanager
def attention_switched(model: PreTrainedModel) -> Iterator[None]:
    """Within another one of the same model it costs nothing; other threads wait, since the switch is the model's."""
    with lock_of(model):
        if model.config.get_text_config(decoder=True)._attn_implementation == NAME:
            yield
            return
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


def layer_types(model: PreTrainedModel) -> list[str]:
    """One name for each layer that stores KV, as transformers itself picks the layers of its caches."""
    return get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]


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
        refuse(f"{who}'s keys and values are not the ones that the cache of tts_kernels handed out: it "
               "changes them after storing them, shares them or attends to something else")  # fmt: skip
    if not hasattr(attention_mask, "tts_kernels_window"):
        refuse(f"{who}'s mask was not made by transformers' mask functions: {describe(attention_mask)}")
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


def describe(thing: object) -> str:
    return f"{thing.dtype} of shape {tuple(thing.shape)}" if isinstance(thing, Tensor) else type(thing).__name__


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
