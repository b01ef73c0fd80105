"""A transformers decoder that computes hidden states over a KV tree: the model of `Verifier` and of the search drivers.

    model = TreeModel(transformers.AutoModel.from_pretrained(path), num_pages=4096)
    root = model.kv.add(None, len(prompt))
    hidden = model.forward({root: len(prompt)}, prompt)  # [len(prompt), d]
    steps = model.kv.fork(root, 8)
    model.kv.append(steps, [len(t) for t in tokens])
    hidden = model.forward(dict(zip(steps, map(len, tokens))), torch.cat(tokens))

Any number of nodes, new tokens of each, anywhere in the tree, go through the model as one sequence without padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..tree.checks import fail
from ..tree.kv_tree import KVTree
from ..tree.plan import TreePlan
from .transformers_attention import TreeCall, TreeLayer, attention_switched, layer_types, refuse, unsupported_reasons


class TreeModel:
    """A decoder whose keys and values lie in `kv`, a KVTree that its user grows, forks and releases.

    model      a transformers decoder: a backbone (Qwen2Model, ...) or a model around one (Qwen2ForCausalLM, ...), whose
               head is not used. Its weights are on one device
    num_pages  of the tree, in each layer
    page_size  tokens per page
    backend    of the attention ops, see `tts_kernels.tree_attention`

    Raises TypeError for what is no transformers model, ValueError with every reason why a model cannot run over a tree.
    The model's attention implementation is switched during a forward and put back after it. Several of them on one
    model may run in several threads, where they wait for one another; one is for one thread at a time.
    """

    def __init__(self, model: PreTrainedModel, *, num_pages: int, page_size: int = 16, backend: str | None = None):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        reasons = unsupported_reasons(self.decoder)
        if reasons:
            refuse(f"{type(model).__name__}: " + "; ".join(reasons))
        self.config = config = model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        types = layer_types(model)
        self.kv = KVTree(
            len(types),
            num_pages,
            page_size,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=model.dtype,
            device=model.device,
        )
        self._forward = _Forward(self.kv)
        self._cache = Cache(layers=[TreeLayer(self._forward, index, backend) for index in range(len(types))])

    @property
    def device(self) -> torch.device:
        return self.kv.device

    @property
    def num_layers(self) -> int:
        return self.kv.num_layers

    def switched(self) -> AbstractContextManager[None]:
        """For a loop of forwards: the model's attention implementation is switched once, and put back at the end."""
        return attention_switched(self.decoder)

    def forward(self, rows: Mapping[int, int], input_ids: Tensor, *, plan: TreePlan | None = None) -> Tensor:
        """Hidden states [R, d] after the final norm of the last rows[node] tokens of each node, in the order of `rows`.

        rows       as in `KVTree.plan`: the nodes hold these tokens already (`add` or `append` comes first)
        input_ids  integers [R], the ids of those tokens; their positions are those of the tree
        plan       that of these rows, where it is kept and advanced from call to call: the forward then asks the host
                   for nothing, so it can be captured into a CUDA graph. Default: `kv.plan(rows)`

        Keys and values of the tokens are written to the pages. An error that comes out of the model leaves them unset.
        Raises TypeError and ValueError for wrong arguments.
        """
        total = sum(rows.values())
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
            fail("input_ids", f"an integer tensor [{total}]", type(input_ids).__name__, TypeError)
        if tuple(input_ids.shape) != (total,):
            fail("input_ids", f"shape ({total},), the rows of all nodes", tuple(input_ids.shape))
        if total == 0:
            return torch.empty(0, self.config.hidden_size, dtype=self.kv.dtype, device=self.device)
        if plan is None:
            plan, slots = self.kv.plan(rows), self.kv.slots(rows)
        elif plan.num_rows != total:
            fail("plan", f"one of {total} rows, as many as `rows` has", plan.num_rows)
        else:
            slots = plan.slots()
        with self.switched(), torch.no_grad():
            self._forward.begin(plan, slots)
            out = self.decoder(
                input_ids=input_ids.to(self.device)[None],
                position_ids=plan.positions()[None],
                past_key_values=self._cache,
                use_cache=True,
            )
            self._forward.check_all_layers_stored()
        return out.last_hidden_state[0]


class _Forward(TreeCall):
    """Its plan and slots are handed in before each forward."""

    def __init__(self, kv: KVTree):
        super().__init__(kv.num_layers)
        self.kv = kv

    def begin(self, plan: TreePlan, slots: Tensor) -> None:
        self.plan, self.slots, self.next_layer = plan, slots, 0
