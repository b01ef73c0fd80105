"""Whether the native module runs here: what it was built for, the device, the driver."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tts_kernels import nvidia
from tts_kernels.attention import api, cuda
from tts_kernels.attention.work import refuse_capture


class Native:
    """A module that was built for a GPU, as far as it is asked."""

    cuda_archs = "80 90a 100a"
    cuda_tree_attention = None

    def __init__(self, *versions: int) -> None:
        self.versions, self.asked = versions, 0

    def cuda_is_emulated(self) -> bool:
        return False

    def cuda_versions(self) -> tuple[int, ...]:
        self.asked += 1
        return self.versions


@pytest.fixture
def device(monkeypatch):
    """Pretends that there is one, of the capability that the test sets."""
    device = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device.capability)
    return device


@pytest.mark.parametrize(
    "capability, versions, reason",
    [
        ((9, 0), (13000, 13000), None),
        ((9, 0), (13010, 13000), None),
        ((9, 0), (13000, 13020), None),  # code for sm_90a: any driver of the major version
        ((9, 0), (13000, 12080), None),
        ((9, 0), (12080, 13000), "needs a driver for 13.0, and the driver is for 12.8"),
        ((9, 0), (12080, 13020), "needs a driver for 13.0, and the driver is for 12.8"),
        ((9, 0), (0, 13000), "needs a driver for 13.0, and the driver is for 0.0"),
        ((8, 9), (13000, 13020), None),  # code for sm_80
        ((12, 0), (13020, 13020), None),  # PTX alone
        ((12, 0), (13000, 13020), "needs a driver for 13.2, and the driver is for 13.0"),
        ((7, 5), (13000, 13000), "built for sm_80, sm_90a, sm_100a, and the device is of sm_75"),
    ],
)
def test_device_and_driver(device, capability, versions, reason):
    device.capability = capability
    reasons = nvidia.reasons_of(Native(*versions), "cuda_tree_attention")
    assert reasons == [] if reason is None else len(reasons) == 1 and reason in reasons[0]


def test_asked_once(device):
    native = Native(13000, 13000)
    for _ in range(3):
        assert nvidia.reasons_of(native, "cuda_tree_attention") == []
    assert native.asked == 1


@pytest.mark.parametrize("driver, chosen", [(13000, "cuda"), (12080, "triton")])
def test_an_older_driver_leaves_the_call_to_triton(device, monkeypatch, driver, chosen):
    triton = SimpleNamespace(unsupported_reasons=lambda op, *tensors: [])
    monkeypatch.setitem(api.BACKENDS.loaded, "triton", triton)
    monkeypatch.setattr(cuda, "native", Native(driver, 13000))
    on_device = SimpleNamespace(device=torch.device("cuda", 0))
    assert api.BACKENDS.choose("append_kv", on_device) == chosen


def test_capture_is_asked_of_the_device_of_the_tensors(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(of):
        entered.append(of.index)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: entered[-1] if entered else 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: entered == [1])
    assert nvidia.captures(torch.device("cuda", 1))
    assert not nvidia.captures(torch.device("cuda", 0))
    assert not nvidia.captures(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="used once"):
        refuse_capture(SimpleNamespace(device=torch.device("cuda", 1)))
