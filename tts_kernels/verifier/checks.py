"""What verifiers and their sessions accept."""

from __future__ import annotations

from collections.abc import Sequence

from tts_kernels.tree.checks import fail


def check_texts(name: str, texts: Sequence[str]) -> None:
    check_list(name, texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            fail(f"{name}[{i}]", "a text", type(text).__name__, TypeError)


def check_list(name: str, texts: Sequence) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        fail(name, "a list of texts", repr(type(texts).__name__), TypeError)
