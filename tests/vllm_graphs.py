"""Full CUDA graphs for vLLM's runner on a CPU, which has none. What is captured is a call of the model; a replay is
that call with what Python held then: the same tensors, and the attention metadata of the capture. Who is captured,
warmed up, padded and replayed is vLLM's own doing."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context


class Graphs:
    """In the place of a runner's model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.held: dict = {}
        self.replayed: list[int] = []  # rows of each replay

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return self.model(**inputs)
        batch = context.batch_descriptor
        if batch not in self.held:
            self.held[batch] = context, inputs
            return self.model(**inputs)
        self.replayed.append(batch.num_tokens)
        context, inputs = self.held[batch]
        with override_forward_context(context):
            return self.model(**inputs)


def capture(runner: Any, sizes: list[int]) -> Graphs:
    """Asks for full graphs of everything; vLLM takes what the backend supports."""
    config = runner.compilation_config
    config.cudagraph_mode, config.cudagraph_num_of_warmups = CUDAGraphMode.FULL, 1
    config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = sizes, max(sizes)
    backends = [{group.backend for group in groups} for groups in runner.attn_groups]
    runner._check_and_update_cudagraph_mode(backends, runner.kv_cache_config.kv_cache_groups)
    assert config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY, config.cudagraph_mode
    runner.model = graphs = Graphs(runner.model)
    for mode, batches in runner.cudagraph_dispatcher.get_capture_descs():
        runner._capture_cudagraphs(batches, mode)
    assert sorted(batch.num_tokens for batch in graphs.held) == sizes
    return graphs
