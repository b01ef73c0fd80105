"""The names of vLLM that tts_kernels.integrations.vllm imports, as far as it uses them: its tests run where vLLM is not
installed. That they are vLLM's own is shown by the tests that run vLLM itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Generic, TypeVar

M = TypeVar("M")


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class AttentionCGSupport(Enum):
    UNIFORM_SINGLE_TOKEN_DECODE = 1


class CUDAGraphMode(Enum):
    PIECEWISE = 1
    FULL_AND_PIECEWISE = 2

    def has_full_cudagraphs(self) -> bool:
        return self is CUDAGraphMode.FULL_AND_PIECEWISE


@dataclass(frozen=True)
class MultipleOf:
    base: int


class AttentionBackend:
    pass


class AttentionImpl(Generic[M]):
    pass


class AttentionMetadataBuilder(Generic[M]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        self.kv_cache_spec, self.layer_names, self.vllm_config, self.device = (
            kv_cache_spec, layer_names, vllm_config, device,
        )  # fmt: skip


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "flash"
    CPU_ATTN = "cpu"
    CUSTOM = None


REGISTERED: dict[AttentionBackendEnum, str] = {}


def register_backend(backend: AttentionBackendEnum, class_path: str) -> None:
    REGISTERED[backend] = class_path


def get_num_attention_heads_from_layers(vllm_config, layer_names) -> int | None:
    return None


def install(monkeypatch) -> None:
    """As the package `vllm`, until the test ends."""
    REGISTERED.clear()
    modules = {
        "vllm.v1.attention.backend": (
            AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder, AttentionType, MultipleOf,
        ),
        "vllm.v1.attention.backends.registry": (AttentionBackendEnum, register_backend),
        "vllm.v1.attention.backends.utils": (get_num_attention_heads_from_layers,),
    }  # fmt: skip
    for name, members in modules.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):  # the packages above it
            parent = ".".join(parts[:depth])
            if parent not in sys.modules or depth == 1:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)


@contextmanager
def imported(monkeypatch) -> Iterator[ModuleType]:
    """tts_kernels.integrations.vllm on these names."""
    install(monkeypatch)
    name = "tts_kernels.integrations.vllm"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)
