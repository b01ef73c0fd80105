"""Stock code on the interfaces of Verifier and Policy: equal scores and equal searches, every kind of head, and figures
that count what it really runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from verifier_cases import TOKENIZER, make

from tts_kernels import ScoreHead, search, seeded
from tts_kernels.stock import StockPolicy, StockVerifier, head_logits
from tts_kernels.verifier import Verifier

SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
TEXT = "Two pumps fill a tank. The first alone needs 6 hours, the second 4."


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models():
    tokenizer = seeded.tokenizer(SIZES["vocab_size"], TEXT)
    policy = seeded.causal_lm(0, step_tokens=6, **SIZES)
    return policy, tokenizer, Verifier(seeded.causal_lm(1, **SIZES), tokenizer, "math-shepherd")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "identity"])
def test_scores(kind, batch_size):
    verifier = make(kind)
    stock = StockVerifier(verifier, batch_size=batch_size)
    outputs = [["abc|de", "", "abc|df|g"], ["a"]]
    got, wanted = (v.score(["good", "god"], outputs) for v in (stock, verifier))
    assert [[len(c) for c in of_question] for of_question in got] == [[2, 0, 3], [1]]
    for one, other in zip(got, wanted):
        for a, b in zip(one, other):
            assert a == pytest.approx(b, abs=1e-5)
    lengths = [len(verifier.recipe.encode(TOKENIZER, q, s).ids) for q, s in
               [("good", ["abc", "de"]), ("good", []), ("good", ["abc", "df", "g"]), ("god", ["a"])]]  # fmt: skip
    assert stock.tokens == (sum(lengths) if batch_size == 1 else 3 * max(lengths[:3]) + lengths[3])


def test_logits_of_every_kind_of_head():
    gen = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    hidden = rand(2, 3, 8)
    norm = (rand(8), 1e-6)
    for head in (
        ScoreHead.linear(rand(2, 8), rand(2), norm=norm),
        ScoreHead.mlp(rand(8, 8), rand(8), rand(2, 8), rand(2), act="relu"),
        ScoreHead.mlp(rand(8, 8), None, rand(2, 8), None, act="gelu", norm=norm),
    ):
        from tts_kernels import step_scores

        scores = step_scores(hidden.view(6, 8), torch.arange(6), head, offsets=torch.tensor([0, 6]))
        got = head_logits(head, hidden).softmax(-1)[..., 1].view(-1)
        torch.testing.assert_close(got, scores.prob, atol=1e-6, rtol=1e-5)


def test_the_same_searches(models):
    policy, tokenizer, verifier = models
    options = {"seed": 3, "max_new_tokens": 20, "temperature": 1.0, "progress": False}
    for drive in (
        lambda p, v: search.beam_search(p, v, TEXT, width=2, expand=3, depth=3, **options),
        lambda p, v: search.dvts(p, v, TEXT, width=2, expand=2, depth=3, **options),
        lambda p, v: search.best_of_n(p, v, TEXT, n=4, **options),
    ):
        ours = drive(search.Policy(policy, tokenizer, max_tokens=4096, prompt=str), verifier)
        stock = drive(StockPolicy(policy, tokenizer, prompt=str), StockVerifier(verifier))
        assert [c.text for c in stock.candidates] == [c.text for c in ours.candidates]
        assert [c.reason for c in stock.candidates] == [c.reason for c in ours.candidates]
        assert [c.tokens for c in stock.candidates] == [c.tokens for c in ours.candidates]
        assert stock.choice == ours.choice and stock.cost.new_tokens == ours.cost.new_tokens
        for one, other in zip(stock.candidates, ours.candidates):
            assert one.step_scores == pytest.approx(other.step_scores, abs=1e-5)
        assert stock.cost.verifier_tokens > 1.5 * ours.cost.verifier_tokens
    steps = [step for c in ours.candidates for step in c.steps]
    assert len(steps) > 4  # the seeded policy does end steps


def test_the_same_searches_where_the_context_is_full(models):
    _, tokenizer, verifier = models
    prompts = [TEXT, TEXT[:30]]
    context = len(tokenizer(TEXT)["input_ids"]) + 9
    policy = seeded.causal_lm(0, step_tokens=6, **SIZES, max_position_embeddings=context)
    ours, stock = (
        search.beam_search(*sides, prompts, width=2, expand=3, depth=3, seed=3, max_new_tokens=30, progress=False)
        for sides in (
            (search.Policy(policy, tokenizer, max_tokens=4096, prompt=str), verifier),
            (StockPolicy(policy, tokenizer, prompt=str), StockVerifier(verifier)),
        )
    )
    for one, other in zip(ours, stock, strict=True):
        assert [(c.text, c.reason, c.tokens) for c in one.candidates] == [
            (c.text, c.reason, c.tokens) for c in other.candidates
        ]
        assert one.choice == other.choice
    assert {(c.reason, c.tokens) for c in ours[0].candidates} == {("length", 9)}
    assert max(c.tokens for c in ours[1].candidates) > 9


def test_seeded_tokenizer():
    tokenizer = seeded.tokenizer(300, TEXT)
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT and 0 not in ids and len(tokenizer) == 300
    assert tokenizer("a\n\nb ки\n")["input_ids"][-2:] == [tokenizer.convert_tokens_to_ids(" ки"), 2]
