"""Closed forms that others published, and the few that follow from them. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real

from tts_kernels.errors import check_int, fail

from .checks import check_number
from .hardware import Hardware, as_hardware
from .shapes import ModelShape, as_model

KINETICS_INTENSITY = 562.5  # FLOP per byte of 2-byte KV: 4.5 PFLOP/s over 8 TB/s, which is B200 in fp8


def kv_saving(n: int, prefix: float, suffix: float) -> float:
    """At most so many times fewer KV reads in a generation of n samples that share a prefix of P tokens and have S
    tokens each: N (2P + S) / (2P + N S), towards 1 + 2P/S for large N.

    The sum over decode steps t = 1 .. S of N (P + t) reads against P + N t, with t's mean taken as S/2: the IO model of
    Hydragen (arXiv 2402.05099) over a whole generation.
    """
    n = check_int("n", n, 1)
    prefix, suffix = check_number("prefix", prefix, least=0), check_number("suffix", suffix, least=0)
    if prefix == suffix == 0:
        fail("suffix", "a prefix or a suffix of at least one token", "none")
    return n * (2 * prefix + suffix) / (2 * prefix + n * suffix)


def kinetics(
    model: ModelShape | str, n: int, prompt: float, generated: float, *, parameters: float | None = None
) -> tuple[float, float]:
    """(compute TFLOPs, memory TeFLOPs) of n samples of `generated` tokens each, exactly as Kinetics has them
    (arXiv 2506.05333; `dense_cost` of cost_model/utils.py in Infini-AI-Lab/Kinetics). Their sum is the paper's eFLOPs.

    What it takes for granted: the prompt's KV is read once for all n (ideal sharing); weights are never read; prefill,
    KV writes and a verifier cost nothing; a byte of 2-byte KV counts as 562.5 FLOPs, the ratio of a B200 in fp8 (in
    bf16 it is 281), so beside bf16 products attention weighs twice what it does.

    parameters: theirs in place of the model's. Their code has 0.752e9 and 2.03e9 for Qwen3-0.6B and -1.7B, which counts
    the tied embedding twice, but 4.02e9 for Qwen3-4B, which does not.
    """
    model, n = as_model(model), check_int("n", n, 1)
    prompt = check_number("prompt", prompt, least=0)
    generated = check_number("generated", generated, least=0)
    weights = model.num_parameters if parameters is None else check_number("parameters", parameters, least=1)
    if model.latent:
        fail("model", "one with keys and values per head, which the published formula is for", model.name)
    width = model.head_dim * model.num_layers
    attention = 2 * (2 * prompt + generated) * generated * model.num_heads * width
    compute = (2 * weights * generated + attention) * n
    memory = 2 * (2 * prompt + generated * n) * generated * model.num_kv_heads * width * KINETICS_INTENSITY
    return compute * 1e-12, memory * 1e-12


def prefix_speedup_limit(model: ModelShape | str, hardware: Hardware | str, n: int) -> float:
    """At most so many times faster is attention over a shared prefix when n samples read it once: min(n, ridge / g),
    at least 1, with g the FLOP per byte without sharing (the roofline of Williams et al. 2009 applied to Hydragen's
    batched prefix). DeepSeek-R1's latent attention has g = 242 and gains next to nothing."""
    model, hardware, n = as_model(model), as_hardware(hardware), check_int("n", n, 1)
    return max(1.0, min(n, hardware.ridge / model.attention_intensity))


def train_flops(parameters: float, tokens: float) -> float:
    """6 N D (Kaplan et al., arXiv 2001.08361)."""
    return 6 * check_number("parameters", parameters, least=0) * check_number("tokens", tokens, least=0)


def break_even(train_cost: float, external: float, internal: float, speedup: float = 1.0) -> float:
    """Queries from which on it is cheaper to have trained: C_T / (c_ext / speedup - c_int), inf where the external side
    is not the dearer one per query. All costs in one currency. (The lifetime cost C_T + Q c of Sardana et al.,
    arXiv 2401.00448, solved for Q.)

    It compares costs at equal accuracy and cannot know whether accuracies are equal; `economics.compare` asks for them.
    """
    train_cost = check_number("train_cost", train_cost, least=0)
    external, internal = check_number("external", external, least=0), check_number("internal", internal, least=0)
    if check_number("speedup", speedup) <= 0:
        fail("speedup", "more than 0", speedup)
    saved = external / speedup - internal
    return train_cost / saved if saved > 0 else math.inf


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of which are correct, have a correct one among them: 1 - C(n-c, k) / C(n, k)
    (Chen et al., arXiv 2107.03374; Brown et al., arXiv 2407.21787)."""
    n, c, k = check_int("n", n, 1), check_int("c", c, 0), check_int("k", k, 1)
    if c > n:
        fail("c", f"at most n = {n}", c)
    if k > n:
        fail("k", f"at most n = {n}", k)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def best_of_k(scores: Sequence[float], correct: Sequence[float], k: int) -> float:
    """The expected correctness of the best-scored of k samples, exactly, over all choices of k among the n scored ones:
    sum over i of y_(i) C(n-i, k-1) / C(n, k), i = 1 .. n from the best score down (order statistics of sampling without
    replacement, as `pass_at_k`).

    correct: bools, or numbers in [0, 1]. Equal scores: the lower index is chosen, as in `tts.select`; nan: a sample
    without a score, chosen never, and where all k are such, nothing is.
    """
    scores, correct = list(scores), list(correct)
    n, k = len(scores), check_int("k", k, 1)
    if len(correct) != n:
        fail("correct", f"{n} entries, as many as scores", len(correct))
    if k > n:
        fail("k", f"at most {n}, the number of scores", k)
    for i, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, Real):
            fail(f"scores[{i}]", "a number", repr(score), TypeError)
    for i, value in enumerate(correct):
        correct[i] = check_number(f"correct[{i}]", int(value) if isinstance(value, bool) else value, least=0, most=1)
    ranked = sorted((-score, i) for i, score in enumerate(scores) if score == score)
    # Fractions: the counts of choices of many samples are beyond floats, their ratios are not.
    total = sum(Fraction(correct[i]) * math.comb(n - rank, k - 1) for rank, (_, i) in enumerate(ranked, 1))
    return float(total / math.comb(n, k))


def imperfect_verifier_limit(p: float, tpr: float, fpr: float) -> float:
    """The accuracy that resampling until a verifier accepts tends to: p TPR / (p TPR + (1-p) FPR) (Stroebl et al.,
    arXiv 2411.17501). p: the chance that a sample is correct; tpr, fpr: that a correct one, a wrong one is accepted."""
    p, tpr, fpr = (
        check_number(name, value, least=0, most=1) for name, value in zip(("p", "tpr", "fpr"), (p, tpr, fpr))
    )
    accepted = p * tpr + (1 - p) * fpr
    if accepted == 0:
        fail("tpr", "a verifier that accepts some samples", f"p = {p:g}, tpr = {tpr:g}, fpr = {fpr:g}")
    return p * tpr / accepted
