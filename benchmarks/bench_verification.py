"""Whole verification with a seeded process reward model, text in and scores out, beside the two stock ways: padded
batches with full logits (search-and-learn's), one sequence at a time (compute-optimal-tts's).

One shot: all candidates at once; and the most memory that a fresh process takes for them above the weights. Step-wise:
every step of every candidate as a search would see it come, which stock code encodes with all that stands before it.
"""

import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

pytest.importorskip("transformers")

from tts_kernels import Verifier, seeded
from tts_kernels.stock import StockVerifier

from .measure import OURS, interleave

RECIPE = "math-shepherd"  # two rows of the LM head, behind every step
BATCH = 8
# 45.6 M parameters in the layers. The LM head is what stock code runs over all tokens: a small one is kind to it.
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
         "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "tie_word_embeddings": True}  # fmt: skip
SAME = 1e-4  # in fp32
ROUNDS = 2


@dataclass(frozen=True)
class Shape:
    """prompt, mean: tokens. The candidates' lengths are lognormal, with a coefficient of variation of 0.7."""

    sizes: dict
    vocabulary: int
    prompt: int
    candidates: int
    mean: int
    beams: int
    steps: int
    memory_vocabulary: int
    step_tokens: int = 40

    @property
    def name(self) -> str:
        return f"P={self.prompt} N={self.candidates} mean {self.mean}"


SHAPES = {
    "full": Shape(SIZES, 8192, 256, 64, 400, 16, 20, 152_064),
    "quick": Shape(SIZES, 8192, 256, 16, 400, 8, 8, 152_064),
    "tiny": Shape(SMALL, 600, 20, 3, 30, 2, 3, 600, step_tokens=8),
}


@pytest.fixture(scope="module")
def shape(request):
    return SHAPES[request.config.getoption("grid")]


@pytest.fixture(scope="module")
def verifier(shape):
    return make_verifier(shape, shape.vocabulary)


def make_verifier(shape: Shape, vocabulary: int) -> Verifier:
    return Verifier(seeded.causal_lm(0, vocab_size=vocabulary, **shape.sizes), seeded.tokenizer(vocabulary), RECIPE)


def texts(shape: Shape) -> tuple[str, list[list[str]]]:
    """The question, and the steps of each candidate."""
    rng = random.Random(0)
    words = [word for word in seeded.tokenizer(600).get_vocab() if word.strip().isascii() and len(word) > 2]
    sigma = math.sqrt(math.log(1 + 0.7**2))

    def text(tokens: int) -> str:
        return "".join(rng.choice(words) for _ in range(tokens)).strip()

    lengths = [
        max(1, round(rng.lognormvariate(math.log(shape.mean) - sigma**2 / 2, sigma))) for _ in range(shape.candidates)
    ]
    cut = shape.step_tokens
    return text(shape.prompt), [[text(min(cut, n - i)) for i in range(0, n, cut)] for n in lengths]


def difference(one: list, other: list) -> float:
    assert [len(steps) for steps in one] == [len(steps) for steps in other]
    return max(abs(a - b) for steps, more in zip(one, other) for a, b in zip(steps, more))


def compare(benchmark, what: str, methods: dict, inputs: tuple, small: tuple, grid, **info) -> None:
    """Times the methods, which take seconds to minutes for `inputs`, in few rounds. They are seen to agree on a `small`
    part before, and on all of it before a time is kept."""
    agree({name: method(*small) for name, method in methods.items()})
    results = {}

    def kept(name: str) -> Callable[[], None]:
        return lambda: results.__setitem__(name, methods[name](*inputs))

    benchmark.group = "verification"
    interleave(benchmark, {name: kept(name) for name in methods}, lambda: None, grid, rounds=ROUNDS)
    stats, benchmark.stats = benchmark.stats, None  # a failure keeps no time
    errors = agree(results)
    benchmark.stats = stats
    benchmark.extra_info |= {"what": what, "score_difference": errors, **info}
    for peer in benchmark.extra_info["peers"].values():
        peer["times_ours"] = peer["median"] / benchmark.stats["median"]


def agree(results: dict) -> dict:
    errors = {name: difference(results[OURS], result) for name, result in results.items() if name != OURS}
    if not all(error <= SAME for error in errors.values()):
        pytest.fail(f"scores differ, not timed: {errors}")
    return errors


def test_one_shot(benchmark, grid, shape, verifier):
    question, candidates = texts(shape)
    judges = {
        OURS: verifier,
        "padded by 8": StockVerifier(verifier, batch_size=BATCH),
        "one by one": StockVerifier(verifier, batch_size=1),
    }
    methods = {name: lambda some, judge=judge: judge.score([question], [some])[0] for name, judge in judges.items()}
    tokens = verifier.score_batch([question], [candidates]).tokens
    what = f"one shot, {shape.name}, {tokens} tokens"
    compare(benchmark, what, methods, (candidates,), (candidates[:2],), grid, tokens=tokens)


def test_stepwise(benchmark, grid, shape, verifier):
    question, _ = texts(shape)
    rng, words = random.Random(1), question.split()
    steps = [
        [" ".join(rng.choice(words) for _ in range(shape.step_tokens - 2)) for _ in range(shape.steps)]
        for _ in range(shape.beams)
    ]
    tokens = {}

    def run(judge, steps) -> list[list[float]]:
        session = judge.session(question)
        nodes, scores = [session.root] * len(steps), []
        for level in zip(*steps):
            made = session.extend(nodes, level)
            nodes = made.nodes
            scores.append(made.last.tolist())
        tokens[judge] = session.tokens_encoded
        session.close()
        return scores

    stock = StockVerifier(verifier, batch_size=BATCH)
    judges = {OURS: verifier, "re-encoded, padded by 8": stock}
    methods = {name: lambda some, judge=judge: run(judge, some) for name, judge in judges.items()}
    what = f"step-wise, P={shape.prompt} N={shape.beams}, {shape.steps} steps of {shape.step_tokens}"
    compare(benchmark, what, methods, (steps,), ([of_one[:2] for of_one in steps[:2]],), grid)
    benchmark.extra_info["tokens"] = {name: tokens[judge] for name, judge in judges.items()}


def test_peak_memory(benchmark, grid, shape):
    """Each way in a fresh process. Timed is ours, in this process, for the record's sake."""
    mib = {name: peak_mib(shape, code) for name, code in WAYS.items()}
    verifier = make_verifier(shape, shape.memory_vocabulary)
    question, candidates = texts(shape)
    benchmark.group = "verification"
    memory = ", ".join(f"{name} {value:.0f} MiB" for name, value in mib.items())
    benchmark.extra_info |= {"what": f"memory, V={shape.memory_vocabulary}: {memory}", "peak_mib": mib}
    benchmark.pedantic(verifier.score, ([question], [candidates]), rounds=1)


WAYS = {OURS: "verifier", "padded by 8": f"StockVerifier(verifier, batch_size={BATCH})"}


def peak_mib(shape: Shape, judge: str) -> float:
    name = next(name for name, known in SHAPES.items() if known is shape)
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(name=name, judge=judge)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


PEAK = """
import re
from benchmarks.bench_verification import SHAPES, StockVerifier, make_verifier, texts

def status(field):
    return int(re.search(field + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

shape = SHAPES[{name!r}]
verifier = make_verifier(shape, shape.memory_vocabulary)
judge = {judge}
question, candidates = texts(shape)
judge.score([question[:20]], [[["a"]]])  # what is loaded and started once
open("/proc/self/clear_refs", "w").write("5")  # the peak becomes what there is now
before = status("VmRSS")
judge.score([question], [candidates])
print(status("VmHWM") - before)
"""
