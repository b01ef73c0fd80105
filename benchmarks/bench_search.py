"""Whole searches with seeded models: several questions in one call, beside one call after the other. What is sampled
and chosen is seen to be the same before a time is kept."""

from dataclasses import dataclass

import pytest

pytest.importorskip("transformers")

from tts_kernels import Verifier, seeded
from tts_kernels.search import Policy, beam_search, best_of_n

from .bench_verification import SIZES, SMALL
from .measure import OURS, interleave

ONE_BY_ONE = "one question after the other"
TEXT = "A tank of water is filled by two pumps in some hours and emptied by a third pump how long does it take to"


@dataclass(frozen=True)
class Shape:
    """prompt, step: tokens; the first `shared` tokens of every prompt are the same, as examples in it are."""

    sizes: dict
    vocabulary: int
    questions: int
    prompt: int
    shared: int
    step: int
    answer: int
    rounds: int


SHAPES = {
    "full": Shape(SIZES, 8192, 16, 256, 192, 32, 96, 2),
    "quick": Shape(SIZES, 8192, 4, 96, 48, 16, 32, 2),
    "tiny": Shape(SMALL, 600, 3, 24, 16, 6, 8, 2),
}
SEARCHES = {
    "best of 4": lambda shape: (best_of_n, {"n": 4, "max_new_tokens": shape.answer}),
    "beam search 2 x 2, 4 steps deep": lambda shape: (
        beam_search, {"width": 2, "expand": 2, "depth": 4, "max_new_tokens": shape.step},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def shape(request):
    return SHAPES[request.config.getoption("grid")]


@pytest.fixture(scope="module")
def models(shape):
    tokenizer = seeded.tokenizer(shape.vocabulary, TEXT)
    sizes = {"vocab_size": shape.vocabulary, **shape.sizes}
    # Texts of several steps, the last of which is cut off. Sums of other sizes round otherwise, so a tie to the last
    # bits could part two runs: then nothing is timed.
    policy = Policy(seeded.causal_lm(0, step_tokens=shape.step, **sizes), tokenizer, max_tokens=65536, prompt=str)
    return policy, Verifier(seeded.causal_lm(1, **sizes), tokenizer, "math-shepherd")


@pytest.mark.parametrize("name", SEARCHES)
def test_search(benchmark, grid, shape, models, name):
    search, settings = SEARCHES[name](shape)
    words = TEXT.split()  # a token each, with the space before it
    common = [words[i % len(words)] for i in range(shape.shared)]
    questions = [
        " ".join(common + [words[(i * i + q) % len(words)] for i in range(shape.prompt - shape.shared)])
        for q in range(shape.questions)
    ]
    kept = {}

    def run(way: str, asked: list[str]) -> None:
        whole = {OURS: lambda: search(*models, asked, progress=False, **settings)}
        alone = {ONE_BY_ONE: lambda: [search(*models, one, progress=False, **settings) for one in asked]}
        kept[way] = (whole | alone)[way]()

    def agree() -> None:
        ours, alone = ([([c.text for c in r.candidates], r.choice) for r in kept[way]] for way in (OURS, ONE_BY_ONE))
        assert ours == alone

    for way in (OURS, ONE_BY_ONE):
        run(way, questions[:2])
    agree()
    benchmark.group = "search"
    methods = {way: lambda way=way: run(way, questions) for way in (OURS, ONE_BY_ONE)}
    interleave(benchmark, methods, lambda: None, grid, rounds=shape.rounds)
    stats, benchmark.stats = benchmark.stats, None  # a failure keeps no time
    agree()
    benchmark.stats = stats
    tokens = {name: getattr(kept[OURS].cost, name) for name in ("prompt_tokens", "policy_tokens", "verifier_tokens")}
    benchmark.extra_info |= {"what": f"{name}, {shape.questions} questions of {shape.prompt} tokens", "tokens": tokens}
    for peer in benchmark.extra_info["peers"].values():
        peer["times_ours"] = peer["median"] / benchmark.stats["median"]
