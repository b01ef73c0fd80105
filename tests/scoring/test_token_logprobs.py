"""token_logprobs against float64 log-softmax, the batch's influence, and how much memory it takes."""

import math
import os
import subprocess
import sys

import pytest
import scoring_cases as cases
import torch
from dense import assert_close
from scoring_cases import BF16, FP16, FP32

from tts_kernels.scoring import token_logprobs, unsupported_reasons


def make(num_rows, dim, vocabulary, dtypes=(FP32, FP32), bias=True, seed=0):
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, dim + 8, generator=gen).to(dtypes[0])[:, :dim]  # rows apart
    weight = (torch.randn(vocabulary, dim, generator=gen) * 3 / math.sqrt(dim)).to(dtypes[1])
    targets = torch.randint(0, vocabulary, (num_rows,), generator=gen)
    if num_rows > 1:
        targets[0], targets[-1] = 0, vocabulary - 1
    return hidden, weight, targets, torch.randn(vocabulary, generator=gen).to(dtypes[1]) if bias else None


@pytest.fixture(params=cases.available(without="cuda"), ids=str)
def path(request, monkeypatch):
    """Those that have the op."""
    request.param.select(monkeypatch)
    return request.param


def run(path, hidden, weight, targets, bias):
    hidden, weight, targets, bias = (None if x is None else x.to(path.device) for x in (hidden, weight, targets, bias))
    return token_logprobs(hidden, weight, targets, bias=bias, backend=path.backend).cpu()


def dense(hidden, weight, targets, bias, dtype):
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def check(path, hidden, weight, targets, bias):
    got = run(path, hidden, weight, targets, bias)
    assert got.dtype == torch.float32 and got.shape == targets.shape
    exact, plain = (dense(hidden, weight, targets, bias, dtype) for dtype in (torch.float64, torch.float32))
    assert_close("logprob", got, plain, exact, terms=hidden.shape[1] + weight.shape[0])


# Rows and tokens around the blocks: 64 and 128 tokens and 2048 of a Triton program, 16,384 of the reference.
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 129, 2049, 17000])
def test_vocabularies(path, vocabulary):
    if path.interpreted and vocabulary > 3000:
        pytest.skip("slow under the interpreter")
    check(path, *make(5, 24, vocabulary))


@pytest.mark.parametrize("num_rows", [0, 1, 2, 65, 257])
def test_numbers_of_rows(path, num_rows):
    inputs = make(num_rows, 16, 90)
    if num_rows:
        check(path, *inputs)
    else:
        assert run(path, *inputs).shape == (0,)


@pytest.mark.parametrize("dtypes", [(FP16, FP16), (BF16, BF16), (FP32, BF16), (BF16, FP32), (FP16, BF16)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_dtypes(path, dtypes, bias):
    check(path, *make(4, 70, 150, dtypes, bias))


def test_literal(path):
    """Logits 0, 0, log 2: probabilities 1/4, 1/4, 1/2. And one token alone is certain."""
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [0.0], [math.log(2)]])
    got = run(path, hidden, weight, torch.tensor([0, 2]), None)
    torch.testing.assert_close(got, torch.tensor([0.25, 0.5]).log())
    assert run(path, hidden, weight[:1], torch.tensor([0, 0]), None).tolist() == [0, 0]


def test_logits_of_any_size(path):
    """No overflow at 1e30, no loss where the largest logit is far below 0, tokens that a bias rules out."""
    hidden, weight = torch.ones(2, 1), torch.zeros(300, 1)
    for level in (1e30, -1e30):
        got = run(path, hidden, weight, torch.tensor([0, 299]), torch.full((300,), level))
        torch.testing.assert_close(got - got[0], torch.zeros(2))
        assert got.isfinite().all()
    bias = torch.full((300,), -math.inf)
    bias[[7, 299]] = -200.0
    got = run(path, hidden, weight, torch.tensor([299, 8]), bias)
    assert got[0].item() == pytest.approx(-math.log(2), rel=1e-6) and got[1].item() == -math.inf


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_logit_that_is_no_number(path, bad):
    """Of +inf or nan, in the first or the last block of the vocabulary: nan for every target, as torch's log_softmax,
    and only in that row."""
    for place in (0, 2299):
        weight = torch.zeros(2300, 2)
        weight[place, 1] = bad  # times 0 it is nan: both rows have one such logit, of their own
        hidden, bias = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), None
        assert run(path, hidden, weight, torch.tensor([5, 5]), bias).isnan().all()
        bias = torch.zeros(2300)
        bias[place] = bad
        got = run(path, hidden[:1], torch.zeros(2300, 2), torch.tensor([5]), bias)
        assert got.isnan().all(), got
        hidden = torch.tensor([[0.0, 1.0], [bad, 1.0]])
        got = run(path, hidden, torch.ones(2300, 2), torch.tensor([place, place]), None)
        assert got.isnan().tolist() == [False, True]


@pytest.mark.usefixtures("products_by_row")
# Then a few tokens, and a sum that fills no vector: where BLAS libraries have kernels of their own.
@pytest.mark.parametrize(
    "dtype, dim, vocabulary", [(FP32, 48, 3000), (FP16, 48, 3000), (FP32, 37, 5)], ids=["fp32", "fp16", "few"]
)
def test_the_batch_changes_no_bit(path, dtype, dim, vocabulary):
    """A row alone, and at any place in batches of many sizes."""
    sizes = (2, 130) if path.interpreted else (2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 255, 256, 257, 300)
    vocabulary = min(vocabulary, 150) if path.interpreted else vocabulary
    hidden, weight, targets, bias = make(max(sizes), dim, vocabulary, (dtype, dtype))
    hidden = hidden.contiguous()
    wanted = torch.cat([run(path, hidden[i : i + 1], weight, targets[i : i + 1], bias) for i in range(3)])
    for size in sizes:
        for place in {0, size // 2, size - 1}:
            order = torch.arange(size)
            order[place] = 0
            order[0] = place
            got = run(path, hidden[order], weight, targets[order], bias)
            assert cases.same_bits(got[place], wanted[0]), (size, place)


MEMORY = """
import resource, torch
from tts_kernels.scoring import token_logprobs
hidden, weight = torch.ones(1024, 64).to({dtype}), torch.zeros(152064, 64).to({dtype})
targets = torch.zeros(1024).long()
torch.ones(512, 64) @ torch.ones(64, 512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
token_logprobs(hidden, weight, targets, backend="{backend}")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_logits_are_never_stored(backend, dtype):
    """1024 rows of 152,064 logits would be 594 MiB; the peak of a fresh process grows by at most 64 (and what the
    allocator and the BLAS keep for themselves: 16)."""
    if reasons := unsupported_reasons("token_logprobs", backend):
        pytest.skip("; ".join(reasons))
    code = MEMORY.format(backend=backend, dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 80
