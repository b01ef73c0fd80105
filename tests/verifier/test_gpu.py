"""Verifiers, sessions and searches with everything on a GPU, against the same on the CPU: tensors on the right device,
kernels chosen by themselves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from verifier_cases import HEADS, make, scores_alone

from tts_kernels import Verifier, search, seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
CLOSE = {"abs": 2e-3, "rel": 2e-3}  # other matrix products, two layers
OUTPUTS = ["abc|def|a", "abc|deg", "", "abc|def|a|hhhh", "k"]
SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize("chunk_tokens", [4096, 7])
@pytest.mark.parametrize("kind", HEADS)
def test_one_shot(kind, chunk_tokens):
    cpu, gpu = make(kind, page_size=4), make(kind, page_size=4, device=DEVICE, chunk_tokens=chunk_tokens)
    scores = gpu.score_batch(["good", "god"], [OUTPUTS, OUTPUTS[:2]])
    assert scores.prob.device.type == scores.offsets.device.type == scores.dropped.device.type == DEVICE
    wanted = cpu.score_batch(["good", "god"], [OUTPUTS, OUTPUTS[:2]])
    assert scores.count.tolist() == wanted.count.tolist() and scores.tokens == wanted.tokens
    for name in ("margin", "prob", "min", "last"):
        got, expected = getattr(scores, name).tolist(), getattr(wanted, name).tolist()
        assert got == pytest.approx(expected, nan_ok=True, **CLOSE)


@pytest.mark.parametrize("max_tokens, when_full", [(4096, "refuse"), (40, "recompute")])
@pytest.mark.parametrize("kind", HEADS)
def test_sessions(kind, max_tokens, when_full):
    cpu, gpu = make(kind, page_size=4), make(kind, page_size=4, device=DEVICE)
    session = gpu.session("good", max_tokens=max_tokens, when_full=when_full)
    first = session.extend([session.root] * 3, ["abc", "abd", "hh"])
    second = session.extend([first.nodes[0], first.nodes[2], first.nodes[0]], ["k", "l", "mno"])
    assert second.margin.device.type == DEVICE
    for i, steps in enumerate([["abc", "k"], ["hh", "l"], ["abc", "mno"]]):
        begin, end = second.offsets[i : i + 2].tolist()
        assert second.prob[begin:end].tolist() == pytest.approx(scores_alone(cpu, "good", steps), **CLOSE)


def test_half_precision():
    verifier = make("softmax", dtype=torch.bfloat16, device=DEVICE)
    wanted = make("softmax").score(["good"], [OUTPUTS])[0]
    for got, expected in zip(verifier.score(["good"], [OUTPUTS])[0], wanted):
        assert got == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_searches(temperature):
    """Greedy: the same candidates as on the CPU. Sampled, where devices draw other numbers: the scores of one shot."""
    tokenizer, results = seeded.tokenizer(SIZES["vocab_size"]), {}
    for device in ("cpu", DEVICE):
        policy = search.Policy(seeded.causal_lm(0, step_tokens=6, **SIZES).to(device), tokenizer, max_tokens=4096)
        verifier = Verifier(seeded.causal_lm(1, **SIZES).to(device), tokenizer, "math-shepherd")
        results[device] = search.beam_search(
            policy, verifier, "Two pumps fill a tank", width=2, expand=2, depth=3, max_new_tokens=12,
            temperature=temperature, filter_duplicates=False,
        )  # fmt: skip
        result = results[device]
        one_shot = verifier.score([result.question], [[list(c.steps) for c in result.candidates]])[0]
        for candidate, scores in zip(result.candidates, one_shot):
            assert candidate.step_scores == pytest.approx(scores, **CLOSE)
    if temperature == 0:
        cpu, gpu = results.values()
        assert [c.text for c in gpu.candidates] == [c.text for c in cpu.candidates]
