"""What is the `cpu` backend's own: code paths, blocks, threads, and bits. Its functions are called directly, on shapes
around the edges of its blocks: a vector of rows (4, 8 or 16), a tile of two, 512 rows at a time; 128 products in a
chain; 12, 16 and 96 columns at a time, 384 in a partial softmax state."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from attention_paths import cpu_paths
from dense import assert_close

cpu = pytest.importorskip("tts_kernels.scoring.cpu")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF, NAN = math.inf, math.nan


@pytest.fixture(params=cpu_paths())
def path(request, monkeypatch):
    request.param.select(monkeypatch)
    return request.param


def random(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def framed(x):
    """The same matrix as a view whose rows lie apart, with nan around them."""
    frame = torch.full((x.shape[0] + 2, x.shape[1] + 5), NAN, dtype=x.dtype)
    frame[1:-1, 2:-3] = x
    return frame[1:-1, 2:-3]


def head_logits(hidden, positions, w1, b1, act, w2, b2, norm_weight, norm_eps, dtype):
    x, w1, b1, w2, b2, norm_weight = (
        None if t is None else t.to(dtype) for t in (hidden[positions], w1, b1, w2, b2, norm_weight)
    )
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps) * norm_weight
    if w1 is not None:
        x = torch.nn.functional.linear(x, w1, b1)
        x = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[act](x)
    return torch.nn.functional.linear(x, w2, b2)


def logprobs(hidden, weight, targets, bias, dtype):
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


# rows, dim, width (0: no hidden layer), columns, dtypes of hidden and weights
HEADS = [
    (1, 1, 0, 1, F32, F32),
    (5, 37, 13, 2, F32, BF16),
    (17, 128, 97, 3, F16, F32),
    (33, 131, 200, 2, BF16, BF16),
    (64, 64, 0, 101, BF16, F16),
    (530, 19, 8, 2, F32, F32),
]


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "bias-norm"])
@pytest.mark.parametrize(("rows", "dim", "width", "columns", "of_hidden", "of_weights"), HEADS)
def test_logits(path, rows, dim, width, columns, of_hidden, of_weights, bare):
    hidden = framed(random(rows + 3, dim, dtype=of_hidden))
    positions = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(1))[:rows]
    w1 = framed(random(width, dim, dtype=of_weights, seed=2)) if width else None
    w2 = framed(random(columns, width or dim, dtype=of_weights, seed=3))
    b1 = random(width, dtype=of_weights, seed=4) if width and not bare else None
    b2 = None if bare else random(columns, dtype=of_weights, seed=5)
    norm = None if bare else random(dim, dtype=of_weights, seed=6)
    act = "" if not width else "relu" if bare else "gelu"
    arguments = (hidden, positions, w1, b1, act, w2, b2, norm, 1e-6)
    plain, exact = (head_logits(*arguments, dtype) for dtype in (F32, torch.float64))
    assert_close("logits", cpu.logits(*arguments), plain, exact, terms=dim + width)


# rows, dim, vocabulary, dtypes of hidden and weight
VOCABULARIES = [
    (1, 1, 1, F32, F32),
    (5, 37, 13, F32, F16),
    (17, 128, 97, F16, F32),
    (40, 300, 1000, BF16, BF16),
    (530, 12, 385, F32, F32),
]


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("rows", "dim", "vocab", "of_hidden", "of_weight"), VOCABULARIES)
def test_token_logprobs(path, rows, dim, vocab, of_hidden, of_weight, with_bias):
    hidden = framed(random(rows, dim, dtype=of_hidden))
    weight = framed(random(vocab, dim, dtype=of_weight, seed=1))
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2))
    bias = random(vocab, dtype=of_weight, seed=3) if with_bias else None
    plain, exact = (logprobs(hidden, weight, targets, bias, dtype) for dtype in (F32, torch.float64))
    got = cpu.token_logprobs(hidden, weight, targets, bias)
    assert_close("logprobs", got, plain, exact, terms=dim + vocab)


def test_gelu_is_exact_over_its_whole_range(path):
    """A head of one weight, 1, is its activation."""
    one = torch.ones(1, 1)
    x = torch.cat([torch.linspace(-12, 12, 20_001), torch.logspace(-30, 0, 500), -torch.logspace(-30, 0, 500)])
    got = cpu.logits(x[:, None], torch.arange(len(x)), one, None, "gelu", one, None, None, 0.0)[:, 0]
    plain, exact = (torch.nn.functional.gelu(x.to(dtype)) for dtype in (F32, torch.float64))
    near, wide = x.abs() < 0.1, x.abs() >= 0.1
    for some in (near & (x.abs() < 1e-4), near, wide):
        assert_close("gelu", got[some], plain[some], exact[some], terms=1)
    special = torch.tensor([INF, NAN, 0.0, 1e30, -1e30])
    got = cpu.logits(special[:, None], torch.arange(5), one, None, "gelu", one, None, None, 0.0)[:, 0]
    torch.testing.assert_close(got, torch.tensor([INF, NAN, 0.0, 1e30, 0.0]), rtol=0, atol=0, equal_nan=True)


def test_relu_keeps_nan(path):
    one, x = torch.ones(1, 1), torch.tensor([-INF, -1.0, 0.0, 2.0, INF, NAN])
    got = cpu.logits(x[:, None], torch.arange(6), one, None, "relu", one, None, None, 0.0)[:, 0]
    torch.testing.assert_close(got, torch.relu(x), rtol=0, atol=0, equal_nan=True)


def calls(rows):
    """Functions of some rows' indices, for a batch of `rows` rows: an MLP with a norm, and log-probabilities."""
    hidden, w1, w2 = random(rows, 150), random(110, 150, seed=1), random(2, 110, seed=2, dtype=BF16)
    weight, bias, norm = random(500, 150, seed=3, dtype=F16), random(500, seed=4), random(150, seed=5)
    targets = torch.randint(500, (rows,), generator=torch.Generator().manual_seed(6))

    def score(some):
        return cpu.logits(hidden, some, w1, None, "gelu", w2, None, norm, 1e-6)

    def likelihood(some):
        return cpu.token_logprobs(hidden[some], weight, targets[some], bias)

    return score, likelihood


@pytest.mark.parametrize("which", [0, 1], ids=["logits", "token_logprobs"])
def test_a_row_keeps_its_bits_whatever_is_beside_it(path, which):
    """Alone, in a narrow tile, in a wide one, in another lane, and past the first block of rows."""
    call = calls(520)[which]
    everything = call(torch.arange(520))
    for some in ([0], [519], [3, 517, 40], list(range(100, 117)), list(range(519, 480, -1))):
        some = torch.tensor(some)
        assert torch.equal(call(some), everything[some]), some


@pytest.mark.parametrize("which", [0, 1], ids=["logits", "token_logprobs"])
def test_threads_change_no_bit(path, which):
    call, some = calls(70)[which], torch.arange(70)
    torch.set_num_threads(1)
    alone = call(some)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(call(some), alone), threads


def test_a_row_of_nan_stays_alone(path):
    hidden, weight, targets = random(20, 40), random(300, 40, seed=1), torch.arange(20)
    clean = cpu.token_logprobs(hidden, weight, targets, None)
    hidden[7] = NAN
    got = cpu.token_logprobs(hidden, weight, targets, None)
    assert got[7].isnan()
    clean[7] = got[7] = 0
    assert torch.equal(got, clean)


def test_masked_and_extreme_vocabularies(path):
    """-inf switches columns off, also whole states of them at the start; logits far from 0 neither over- nor underflow;
    rows without a column, or with a target that is none, have no log-probability."""
    vocab = 900
    hidden, targets = torch.tensor([[1.0], [300.0], [-300.0]]), torch.tensor([899, 5, 897])
    weight = random(vocab, 1)
    bias = torch.zeros(vocab)
    bias[:896] = -INF
    got = cpu.token_logprobs(hidden, weight, targets, bias)
    exact = logprobs(hidden, weight, targets, bias, torch.float64)
    assert got[1] == -INF == exact[1]
    torch.testing.assert_close(got, exact.float(), rtol=1e-6, atol=1e-6)
    assert cpu.token_logprobs(hidden, weight, targets, torch.full((vocab,), -INF)).isnan().all()
    assert cpu.token_logprobs(hidden, weight, torch.tensor([-1, vocab, -100]), None).isnan().all()


def test_reduce(path):
    """Against float64; the second candidate is empty, the last one's product underflows and its log does not."""
    offsets = torch.tensor([0, 5, 5, 6, 506, 5306])
    logits = random(5306, 3) * 5
    for activation in ("softmax", "sigmoid", "identity"):
        margin, prob, stats, count = cpu.reduce(logits, offsets, activation, 1)
        x = logits.double()
        exact = {"softmax": x[:, 1] - x[:, [0, 2]].logsumexp(-1)}.get(activation, x[:, 1])
        exact_prob = exact if activation == "identity" else torch.sigmoid(exact)
        log = exact.log() if activation == "identity" else torch.nn.functional.logsigmoid(exact)
        torch.testing.assert_close(margin, exact.float(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(prob, exact_prob.float(), rtol=4e-6, atol=0)
        assert count.tolist() == [5, 0, 1, 500, 4800]
        assert stats[:, 1].isnan().all()
        for i in (0, 2, 3, 4):
            own, own_log = exact_prob[offsets[i] : offsets[i + 1]], log[offsets[i] : offsets[i + 1]]
            each = [own[-1], own.min(), own.prod(), own.mean(), own.max(), own_log.sum()]
            expected = torch.stack(each).float()
            torch.testing.assert_close(stats[:, i], expected, rtol=2e-5, atol=1e-6, equal_nan=True)
    stats = cpu.reduce(logits, offsets, "sigmoid", 1)[2]
    assert stats[2, 4] == 0
    assert stats[5, 4].isfinite()


def test_reduce_at_the_ends():
    """Margins beyond what a probability shows, infinite ones, and nan, which is in every aggregate but `last`."""
    margins = torch.tensor([[-200.0], [200.0], [INF], [-INF], [NAN], [1.0]])
    margin, prob, stats, _ = cpu.reduce(margins, torch.tensor([0, 2, 4, 6]), "sigmoid", 0)
    assert torch.equal(margin[:4], margins[:4, 0])
    assert torch.equal(prob[:4], torch.tensor([torch.sigmoid(torch.tensor(-200.0)), 1.0, 1.0, 0.0]))
    assert stats[5, :2].tolist() == [-200.0, -INF]
    assert stats[0, 2] == prob[5]
    assert stats[1:, 2].isnan().all()


def selected_slowly(scores, groups, answers, method, k):
    """Of one group at a time, in Python, from the rule; fp32 sums in the order of the candidates."""
    rows = []
    for begin, end in pairwise(groups):
        of_answer = {}
        for i in range(begin, end):
            key = i if method == "top_k" else answers[i]
            if not math.isnan(scores[i]) and (method == "top_k" or key != -1):
                of_answer.setdefault(key, []).append(i)
        ranked = []
        for members in of_answer.values():
            best = min(members, key=lambda i: (-scores[i], i))
            total = scores[best]
            if method == "weighted_vote":
                total = sum(scores[i] for i in members)
            elif method == "majority":
                total = float(len(members))
            ranked.append((-total, members[0], best))
        ranked = [(best, -total) for total, _, best in sorted(ranked)][:k]
        rows.append(ranked + [(-1, NAN)] * (k - len(ranked)))
    return rows


@pytest.mark.parametrize("method", ["top_k", "weighted_vote", "majority"])
def test_select(method):
    """Scores are few multiples of 1/4, so that ties abound and sums are exact; some are nan, some answers are none;
    groups of 0 to 12 candidates."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(13, (200,), generator=generator).tolist()
    groups = torch.tensor([0, *sizes]).cumsum(0)
    count = int(groups[-1])
    scores = torch.randint(-3, 4, (count,), generator=generator) / 4
    scores[torch.rand(count, generator=generator) < 0.2] = NAN
    answers = torch.randint(-1, 4, (count,), generator=generator)
    for k in (1, 3):
        indices, selected = cpu.select(scores, groups, answers, method, k)
        expected = selected_slowly(scores.tolist(), groups.tolist(), answers.tolist(), method, k)
        assert indices.tolist() == [[i for i, _ in row] for row in expected]
        assert torch.equal(
            selected.nan_to_num(99), torch.tensor([[s for _, s in row] for row in expected]).nan_to_num(99)
        )
    if method == "top_k":
        assert torch.equal(
            cpu.select(scores, groups, None, "best", 1)[0], cpu.select(scores, groups, None, method, 1)[0]
        )


def test_infinite_scores_are_ranked_and_have_no_sum():
    scores, groups = torch.tensor([-INF, INF, -INF, 1.0]), torch.tensor([0, 4])
    assert cpu.select(scores, groups, None, "top_k", 4)[0].tolist() == [[1, 3, 0, 2]]
    indices, totals = cpu.select(scores, groups, torch.tensor([0, 0, 1, 2]), "weighted_vote", 3)
    assert indices.tolist() == [[3, 2, -1]]
    assert totals[0, :2].tolist() == [1.0, -INF]


def test_python_threads_do_not_share_scratch():
    """The GIL is released: calls of several Python threads run at once."""
    score, likelihood = calls(90)
    some = [torch.arange(n) for n in (1, 20, 90, 33, 64, 5)]
    expected = [(score(s), likelihood(s)) for s in some]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            got = list(pool.map(lambda s: (score(s), likelihood(s)), some))
            assert all(torch.equal(a, b) for pair, other in zip(got, expected) for a, b in zip(pair, other))


def test_no_rows_and_no_candidates(path):
    weight = random(7, 4)
    assert cpu.token_logprobs(random(0, 4), weight, torch.zeros(0, dtype=torch.long), None).shape == (0,)
    empty = cpu.logits(random(3, 4), torch.zeros(0, dtype=torch.long), None, None, "", weight, None, None, 0.0)
    assert empty.shape == (0, 7)
    margin, prob, stats, count = cpu.reduce(empty, torch.tensor([0, 0]), "softmax", 0)
    assert (margin.shape, prob.shape, count.tolist()) == ((0,), (0,), [0])
    assert stats.isnan().all()
    assert cpu.select(stats[0], torch.tensor([0, 1, 1]), None, "best", 2)[0].tolist() == [[-1, -1], [-1, -1]]
