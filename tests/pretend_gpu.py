"""A GPU that is not there: tensors that say they are on cuda:0 and hold a CPU tensor, so that what mixes devices up, or
hands numbers to the host while a graph is captured, is found without one. Kernels do not run: ops of tts_kernels take
the CPU tensors, and so does everything of torch.

    with PretendGpu() as gpu:            # torch.cuda says that there is a device
        x = torch.randn(3, device="cuda")
    gpu.waits                            # operations that made the host wait for the device
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TO_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}


class OnGpu(torch.Tensor):
    """Says that it is on cuda:0; `inner` has the numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, requires_grad=inner.requires_grad, device=CUDA,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"OnGpu({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:  # torch would take a CUDA kernel, by the device
            args, kwargs = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                out = function(*args, **kwargs)
            PretendGpu.now.launched(lambda: function(*args, **kwargs), out, args)
            return OnGpu(out)
        if function is torch.Tensor.data_ptr:
            return args[0].inner.data_ptr()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def unwrapped(x: object) -> object:
    return x.inner if isinstance(x, OnGpu) else x


def dispatch(function, args: tuple, kwargs: dict, gpu: PretendGpu | None = None):
    gpu = gpu or PretendGpu.now
    name = function.overloadpacket.__name__
    flat = tree_leaves((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    ours = {id(x.inner): x for x in tensors if isinstance(x, OnGpu)}
    wanted = kwargs.get("device")
    on_gpu = bool(ours) if wanted is None else torch.device(wanted).type == "cuda"
    moves = name in ("_to_copy", "copy_")
    if ours and not moves:
        for x in tensors:
            if not isinstance(x, OnGpu) and x.dim():
                raise RuntimeError(f"{name}: expected all tensors on {CUDA}, got one on {x.device}")
    waits = ours and (
        name in TO_HOST
        or (name == "index" and any(isinstance(x, OnGpu) and x.dtype in (torch.bool, torch.uint8) for x in tensors[1:]))
    )
    if moves and (ours or on_gpu):
        sides = {isinstance(x, OnGpu) for x in tensors} | ({on_gpu} if wanted is not None else set())
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        waits = len(sides) == 2 and not non_blocking
    if waits:
        gpu.wait(name)
    kwargs = {k: (CPU if k == "device" and v is not None else v) for k, v in kwargs.items()}
    kwargs.pop("pin_memory", None)
    args, kwargs = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
    out = function(*args, **kwargs)
    if not on_gpu or name == "_local_scalar_dense":
        return out
    gpu.launched(lambda: function(*args, **kwargs), out, args)
    return tree_map(lambda x: x if not isinstance(x, torch.Tensor) else ours[id(x)] if id(x) in ours else OnGpu(x), out)


class Functions(TorchFunctionMode):
    """Functions of which C++ makes too much before it dispatches."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            PretendGpu.now.wait("tolist")
            return args[0].inner.tolist()
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "cuda":
            PretendGpu.now.wait(function.__name__)
            return OnGpu(function(*args, **kwargs | {"device": CPU}))
        if function is torch.Tensor.copy_:
            return dispatch(torch.ops.aten.copy_.default, args, kwargs)
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            kind = {torch.Tensor.cpu: ("cpu",), torch.Tensor.cuda: ("cuda",)}.get(function, ())
            return moved(*args, *kind, **kwargs)
        if function is torch.Tensor.contiguous and isinstance(args[0], OnGpu):
            return args[0] if args[0].is_contiguous() else torch.clone(args[0], memory_format=torch.contiguous_format)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], OnGpu):
            return indexed(function, *args)
        return function(*args, **kwargs)


def indexed(function, x: OnGpu, index: object, *value: object) -> OnGpu | None:
    for each in index if isinstance(index, tuple) else (index,):
        if isinstance(each, list) or (isinstance(each, torch.Tensor) and not isinstance(each, OnGpu) and each.dim()):
            PretendGpu.now.wait("index by host numbers")
        if isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8):
            PretendGpu.now.wait("index by a mask")
    for each in value:
        if isinstance(each, torch.Tensor) and not isinstance(each, OnGpu):
            PretendGpu.now.wait("host numbers")
    arguments = x.inner, tree_map(unwrapped, index), *map(unwrapped, value)
    out = function(*arguments)
    PretendGpu.now.launched(lambda: function(*arguments), out, arguments)
    return None if value else OnGpu(out)


def moved(x: torch.Tensor, *args, non_blocking: bool = False, copy: bool = False, **kwargs) -> torch.Tensor:
    """`x.to(...)`"""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for given in args:
        if isinstance(given, torch.Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, (str, torch.device)):
            device = given
    on_gpu = (x.device if device is None else torch.device(device)).type == "cuda"
    arguments = {"dtype": dtype or x.dtype, "copy": copy or on_gpu != isinstance(x, OnGpu)}
    inner = unwrapped(x).to(**arguments)
    if on_gpu and inner is not unwrapped(x):
        PretendGpu.now.launched(lambda: unwrapped(x).to(**arguments), inner, ())
    if on_gpu != isinstance(x, OnGpu) and not non_blocking:
        PretendGpu.now.wait("to")
    if not on_gpu:
        return inner
    return x if inner is unwrapped(x) else OnGpu(inner)


class PretendGpu(TorchDispatchMode):
    """capability, name, memory: what torch.cuda says of the device."""

    now: PretendGpu | None = None

    def __init__(self, name: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0)) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.graph: Graph | None = None  # that is being captured
        self.broken = False  # its capture was: nothing that ends it succeeds
        self.pools: list[tuple[int, int]] = []  # that the allocator takes memory from for captures
        self.stream = Stream()
        self.graphs: list[Graph] = []
        self.properties = SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], total_memory=80 << 30, L2_cache_size=50 << 20,
            multi_processor_count=132, shared_memory_per_block_optin=227 << 10, gcnArchName=name,
        )  # fmt: skip
        self._patches = contextlib.ExitStack()

    def launched(self, again: Callable, out: object, arguments: object) -> None:
        """While a graph is captured: what a replay does again, and where its results go."""
        if self.graph is None:
            return
        storages = {x.untyped_storage().data_ptr() for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
        fresh = [
            isinstance(x, torch.Tensor) and x.numel() > 0 and x.untyped_storage().data_ptr() not in storages
            for x in tree_leaves(out)
        ]
        self.graph.calls.append((again, tree_leaves(out), fresh))

    @property
    def capturing(self) -> bool:
        return self.graph is not None

    def wait(self, what: str) -> None:
        self.waits.append(what)
        if self.capturing:
            self.broken = True
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {}, self)

    def __enter__(self) -> PretendGpu:
        gpu, stack = self, self._patches

        def patch(name: str, value: object) -> None:
            stack.enter_context(mock.patch(f"torch.cuda.{name}", value, create=True))

        patch("_lazy_init", lambda: None)
        patch("is_available", lambda: True)
        patch("device_count", lambda: 1)
        patch("current_device", lambda: 0)
        patch("get_device_properties", lambda device=None: gpu.properties)
        patch("get_device_capability", lambda device=None: (gpu.properties.major, gpu.properties.minor))
        patch("get_device_name", lambda device=None: gpu.properties.name)
        patch("mem_get_info", lambda device=None: (75 << 30, 80 << 30))
        patch("memory_reserved", lambda device=None: 0)
        patch("memory_allocated", lambda device=None: 0)
        patch("empty_cache", self._empty_cache)
        patch("synchronize", lambda device=None: gpu.wait("synchronize"))
        patch("is_current_stream_capturing", lambda: gpu.capturing)
        patch("_sleep", lambda cycles: None)
        patch("device", lambda device: contextlib.nullcontext())
        patch("Event", Event)
        patch("Stream", Stream)
        patch("stream", lambda stream: contextlib.nullcontext())
        patch("current_stream", lambda device=None: gpu.stream)
        patch("set_stream", lambda stream: setattr(gpu, "stream", stream))
        patch("graph_pool_handle", lambda: (0, len(gpu.graphs) + 1))
        stack.enter_context(mock.patch("torch._C._cuda_endAllocateToPool", self._end_pool, create=True))
        stack.enter_context(mock.patch("torch._C._cuda_releasePool", create=True))
        patch("CUDAGraph", lambda keep_graph=False: Graph())
        patch("graph", self._capture)
        torch._C._ensureCUDADeviceGuardSet()  # for code in C++ that asks for one, of a torch without CUDA
        stack.enter_context(mock.patch("torch.Generator", Generator))
        PretendGpu.now = self
        stack.enter_context(Functions())
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        PretendGpu.now = None
        self._patches.close()

    @contextlib.contextmanager
    def _capture(self, graph: Graph, pool: tuple[int, int] = (1, 0), stream: object = None) -> Iterator[None]:
        """As torch.cuda.graph, until 2.12 also where the capture was broken: the stream stays, and the pool's part."""
        before, self.broken = self.stream, False
        torch.cuda.empty_cache()
        self.graph, self.stream = graph, stream or Stream()
        self.graphs.append(graph)
        self.pools.append(pool)
        try:
            yield
        finally:
            self.graph = None
            if self.broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self._end_pool(0, pool)
            self.stream = before

    def _end_pool(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def _empty_cache(self) -> None:
        if self.pools:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


class Graph:
    """A replay makes the same calls with the same tensors, and their results go to where they went when captured: what
    Python computed then stays as it was."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable, list, list[bool]]] = []
        self.replays = 0

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        self.replays += 1
        with torch._C._DisableTorchDispatch():
            for again, outs, fresh in self.calls:
                for old, new, is_fresh in zip(outs, tree_leaves(again()), fresh):
                    if is_fresh:
                        old.copy_(new)


class Generator(torch.Generator):
    """Of a CPU, for any device."""

    def __new__(cls, device: object = None) -> Generator:
        return super().__new__(cls, "cpu")


class Stream:
    cuda_stream = 0

    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    count = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0

    def record(self, stream: object = None) -> None:
        Event.count += 1
        self.time = Event.count

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return float(other.time - self.time)
