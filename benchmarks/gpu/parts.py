"""Of one call of a whole model: the seconds of its parts, by replacing functions by ones that call them inside of a
range of a clock, as tts_kernels/profile does. On a GPU ranges end in events, so nothing waits: the host issues the call
while the device is held up, and what lies between two events is the device's time alone."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tts_kernels import scoring
from tts_kernels.integrations import transformers_attention
from tts_kernels.profile.clock import Clock
from tts_kernels.profile.meter import implementation, replaced, replaced_item

LINEAR, ATTENTION, APPEND, HEAD, SAMPLING, REST, HOST = (
    "linear layers", "attention", "KV append", "head", "sampling", "rest", "host gap",
)  # fmt: skip
PARTS = (LINEAR, ATTENTION, APPEND, HEAD, SAMPLING, REST, HOST)
HELD_CYCLES = 500_000_000  # about a quarter of a second, in which the host issues what it can


class EventClock:
    """As tts_kernels.profile.clock.Clock, by events on the current stream: seconds by name of range, each without the
    ranges inside of it."""

    def __init__(self, event: Callable | None = None) -> None:
        self._event = event or torch.cuda.Event
        self._marks: list[tuple[object, str]] = []  # an event, and the innermost range that was open before it
        self._open: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        event = self._event(enable_timing=True)
        event.record()
        self._marks.append((event, self._open[-1] if self._open else ""))

    @property
    def seconds(self) -> dict[str, float]:
        """Waits for the device."""
        found: dict[str, float] = {}
        self._marks[-1][0].synchronize()
        for (begin, _), (end, name) in pairwise(self._marks):
            if name:
                found[name] = found.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        return found


def sample(logits: torch.Tensor) -> torch.Tensor:
    """The next tokens of all rows."""
    return logits.argmax(-1)


def parts_of(call: Callable[[], object], model: PreTrainedModel, device: torch.device, whole: float) -> dict:
    """Seconds of the call by part, which sum to `whole`, those of a call without a clock: what the device had nothing
    to do in is the host gap. Events take time of their own; where they make the parts longer than the whole, all are
    scaled to it."""
    on_gpu = device.type == "cuda"
    clock = EventClock() if on_gpu else Clock(device)
    with attached(clock, model):
        if on_gpu:
            torch.cuda._sleep(HELD_CYCLES)
        with clock(REST):
            call()
    return summing_to(whole, clock.seconds)


def summing_to(whole: float, seconds: dict[str, float]) -> dict[str, float]:
    measured = sum(seconds.values())
    scale = min(whole / measured, 1.0)
    parts = {name: seconds[name] * scale for name in PARTS if name in seconds}
    return parts | {HOST: max(whole - measured, 0.0)}


@contextlib.contextmanager
def attached(clock: Callable, model: PreTrainedModel) -> Iterator[None]:
    head = model.get_output_embeddings()

    def timed(part: str, inner: Callable) -> Callable:
        @functools.wraps(inner)
        def run(*args, **kwargs):
            with clock(part):
                return inner(*args, **kwargs)

        return run

    def linear(inner: Callable) -> Callable:
        def forward(module, *args):
            with clock(HEAD if module is head else LINEAR):
                return inner(module, *args)

        return forward

    with contextlib.ExitStack() as stack:
        for name in {transformers_attention.NAME, implementation(model)}:
            stack.enter_context(replaced_item(ALL_ATTENTION_FUNCTIONS, name, functools.partial(timed, ATTENTION)))
        stack.enter_context(replaced(torch.nn.Linear, "forward", linear))
        for owner, name, part in (
            (transformers_attention, "append_kv", APPEND),
            (DynamicLayer, "update", APPEND),
            (scoring, "step_scores", HEAD),
            (sys.modules[__name__], "sample", SAMPLING),
        ):
            stack.enter_context(replaced(owner, name, functools.partial(timed, part)))
        yield
