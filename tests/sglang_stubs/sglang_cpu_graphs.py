"""A plugin of SGLang for the tests: SGLang's own runner of decode graphs on a CPU, for the batch sizes that
TTS_KERNELS_CPU_GRAPHS names, with a graph that is not of CUDA and keeps to its rules.

What is captured is the list of the model's operations, each with the tensors that it was given. A replay does the same
operations on the same tensors: it sees new numbers in them, and nothing that Python computed since. An operation that
would make the host wait for a device is an error while a graph is captured.
"""

from __future__ import annotations

import contextlib
import json
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What hands numbers to the host, or has as many results as the numbers say.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name}: a captured graph would wait for the device")
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, tree_leaves(out)))
        return out

    def replay(self):
        for function, args, kwargs, outs in self.calls:
            for old, new in zip(outs, tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and storage(old) != storage(new):
                    old.copy_(new)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def sizes():
    return [int(size) for size in os.environ["TTS_KERNELS_CPU_GRAPHS"].split(",")]


def capture(*, model_runner):
    from sglang.srt.model_executor.model_runner_components.cuda_graph_setup import GraphCapture
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as runners
    from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend

    class Graphs(BaseCudaGraphBackend):
        def __init__(self):
            self.graphs = {}

        def capture_session(self, stream):
            return contextlib.nullcontext()

        def capture_one(self, shape_key, forward_fn, capture_inputs=None, post_warmup_hook=None):
            for _ in range(2):
                forward_fn()
            with Graph() as graph:
                out = forward_fn()
            self.graphs[shape_key] = graph, out

        def can_run(self, forward_batch, shape_key):
            return shape_key in self.graphs

        def replay_session(self):
            return contextlib.nullcontext()

        def replay(self, shape_key, static_forward_batch, **kwargs):
            graph, out = self.graphs[shape_key]
            graph.replay()
            with open(os.environ["TTS_KERNELS_PROBE"], "a") as file:
                requests, size = static_forward_batch.batch_size, shape_key.size
                file.write(json.dumps({"replay": True, "requests": requests, "size": size}) + "\n")
            return out

        def cleanup(self):
            self.graphs.clear()

    class Runner(runners.DecodeCudaGraphRunner):
        """Without what asks for a stream or an event."""

        def _capture(self):
            self.buffers.seq_lens.fill_(self.seq_len_fill_value)
            self.buffers.seq_lens_cpu.fill_(self.seq_len_fill_value)
            self.buffers.reset_index_buffers()
            self._capture_one_stream()

        def _record_in_graph_metadata_prep_done(self):
            pass

        def _publish_read_done(self, in_graph):
            pass

    runners.get_batch_sizes_to_capture = lambda *arguments, **options: (sizes(), [])
    runners.resolve_decode_backend = lambda runner: Graphs()
    return GraphCapture(runner=Runner(model_runner), memory_phase="decode", memory_usage_gb=0, capture_time=0)


def register():
    if "TTS_KERNELS_CPU_GRAPHS" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup.capture_decode_graph"
    HookRegistry.register(target, capture, HookType.REPLACE)
