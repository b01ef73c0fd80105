"""Which backend runs an op, and how ops are registered: what the `api` modules of the op families share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from tts_kernels import configs
from tts_kernels.tree.checks import fail

FAMILIES: list[Backends] = []
TENSORS = (Tensor, torch.nn.Parameter)  # not their subclasses, which may be anything


def unsupported_reasons(op: str, backend: str, *tensors: Tensor) -> list[str]:
    """Every reason why `backend` cannot run `op` on these tensors; empty if it can.

    Args:
        op: "tree_attention", "decode_attention", "append_kv", "merge_states"; "step_scores", "aggregate",
            "select", "verify" or "token_logprobs".
        backend: "reference", "cpu", "triton" or "cuda".
        tensors: the op's leading tensor arguments, in order: q, k_cache, v_cache; or k, v, k_cache, v_cache, slots; or
            out, lse; or hidden, positions, offsets; or margin, offsets; or scores; or hidden, weight, targets. With
            none, only what the build and the machine rule out.

    Raises:
        ValueError: no such op or backend.
    """
    families = {known: family for family in FAMILIES for known in family.ops}
    if op not in families:
        fail("op", f"one of {', '.join(families)}", repr(op))
    return families[op].unsupported_reasons(op, backend, *tensors)


class Checked(dict):
    """Calls that have passed every check but those of values, by their `metadata`, and what was found out for them."""

    MOST = 1024  # a few for each batch size

    def keep(self, call: tuple, found: object) -> None:
        if len(self) >= self.MOST:
            self.clear()
        self[call] = found


@dataclass(frozen=True)
class Backends:
    """The backends of one family of ops. Each is a module with `unsupported_reasons(op, *tensors) -> list[str]`,
    imported on first use.

    family      "attention", "scoring": for messages
    package     in which the modules are
    modules     name of each backend and of its module
    preference  by device type, the names in the order in which the default tries them
    ops         every public op, and the op that backends know it as
    measured    (op, *tensors): the name that was measured fastest for such a call on that device, or None
    checked     by which backend such a call was run
    """

    family: str
    package: str
    modules: dict[str, str]
    preference: dict[str, tuple[str, ...]]
    ops: dict[str, str]
    measured: Callable[..., str | None] | None = None
    loaded: dict[str, ModuleType | str] = field(default_factory=dict)
    checked: Checked = field(default_factory=Checked)

    def __post_init__(self) -> None:
        FAMILIES.append(self)

    def check(self, backend: str | None) -> str:
        """The name as registered ops take it: "" stands for "pick by device"."""
        if backend is None:
            return ""
        if not isinstance(backend, str) or backend not in self.modules:
            fail("backend", f"None or one of {', '.join(self.modules)}", repr(backend))
        return backend

    def load(self, backend: str) -> ModuleType | str:
        """The backend's module, or the reason why there is none."""
        if backend not in self.loaded:
            try:
                self.loaded[backend] = importlib.import_module(self.modules[backend], self.package)
            except ImportError as error:
                self.loaded[backend] = f"the {backend} backend is not built: {error}"
        return self.loaded[backend]

    def unsupported_reasons(self, op: str, backend: str, *tensors: Tensor) -> list[str]:
        self.check(backend)
        module = self.load(backend)
        return [module] if isinstance(module, str) else module.unsupported_reasons(self.ops[op], *tensors)

    def pick(self, op: str, backend: str, *tensors: Tensor) -> ModuleType:
        """The module that runs the call: the one asked for, or else the first that can on this device."""
        if backend:
            reasons = self.unsupported_reasons(op, backend, *tensors)
            if reasons:
                raise RuntimeError(f"backend {backend!r} cannot run {op}: " + "; ".join(reasons))
            return self.load(backend)
        return self.load(self.choose(op, *tensors))

    def choose(self, op: str, *tensors: Tensor) -> str:
        """The name of the first that can run the call on this device."""
        for name in self.order(op, *tensors):
            if not self.unsupported_reasons(op, name, *tensors):
                return name
        raise RuntimeError(f"no backend can run {op} on {tensors[0].device}")

    def order(self, op: str, *tensors: Tensor) -> tuple[str, ...]:
        """The names as the default tries them: what was measured fastest for such a call, then by preference."""
        names = self.preferred(tensors[0].device)
        first = self.measured(self.ops[op], *tensors) if self.measured else None
        return (first, *(name for name in names if name != first)) if first else names

    def preferred(self, device: torch.device) -> tuple[str, ...]:
        return self.preference.get(device.type, ("reference",))

    def keep(self, call: tuple | None, op: str, backend: str, *tensors: Tensor) -> None:
        """For `checked`, after a call that went well."""
        if call and tensors[0].device.type in self.preference:
            self.checked.keep(call, backend or self.choose(op, *tensors))


def choice(
    family: Backends, op: str, row: dict | None, backend: str | None, *tensors: Tensor
) -> tuple[str, str, dict[str, list[str]]]:
    """(name, why, refused): what would run the call, what made it that, and the reasons of those before it. `row`: what
    was measured for such a call on that device."""
    if family.check(backend):
        family.pick(op, backend, *tensors)  # raises if it cannot
        return backend, "asked for", {}
    names, refused = family.order(op, *tensors), {}
    for name in names:
        reasons = family.unsupported_reasons(op, name, *tensors)
        if not reasons and row and name == row["backend"]:
            return name, f"measured fastest here ({configs.source(row)})", refused
        if not reasons:
            return name, f"the first of {', '.join(names)} that can run here", refused
        refused[name] = reasons
    raise RuntimeError(f"no backend can run {op} on {tensors[0].device}")


def metadata(tensors: tuple[Tensor | None, ...], *others: Hashable) -> tuple | None:
    """All that checks and the choice of a backend look at, the values in tensors apart. None where the call is not
    `plain`, or a tensor is another type's or a view that says the opposite of its memory."""
    if not plain():
        return None
    try:
        hash(others)
    except TypeError:  # an argument of a type that is never taken: the checks say so
        return None
    told: list = [others, torch.is_grad_enabled()]
    for x in tensors:
        if x is None:
            told.append(None)
        elif type(x) in TENSORS and not x.is_neg():
            told.append((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, x.requires_grad))
        else:
            return None
    return tuple(told)


def plain() -> bool:
    """Whether torch's dispatcher would do nothing with an op but call its implementation: nobody compiles, traces,
    transforms, watches or profiles."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
    )


_library = torch.library.Library("tts_kernels", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """torch.ops.tts_kernels.<name>: `implementation` for every device, `fake` where torch traces shapes alone. Returns
    what calls it, without the dispatcher where that does nothing else."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tts_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.tts_kernels, name).default

    def call(*arguments):
        return (implementation if plain() and stored(arguments) else op)(*arguments)

    return call


def stored(arguments: tuple) -> bool:
    """Whether the memory of all tensors among them holds what they say."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    return not [x for x in tensors if type(x) not in TENSORS or x.is_meta or x.is_neg()]
