"""A verifier's last step: the head on the rows where steps end, log-probabilities of given tokens, the choice. Beside
what eager torch does for each; log-probabilities also by the most memory that a fresh process takes for them."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tts_kernels.measure.inputs import DTYPES
from tts_kernels.scoring import ScoreHead, select, step_scores, token_logprobs

from .measure import OURS, interleave

# tokens and hidden size of a head's input; rows and hidden size of log-probabilities; groups of 64 candidates
SIZES = {
    "full": {"head": (16384, 3584), "tokens": (512, 1536), "groups": 256},
    "quick": {"head": (4096, 3584), "tokens": (256, 896), "groups": 256},
    "tiny": {"head": (200, 64), "tokens": (8, 32), "groups": 3},
}
STEP_TOKENS, STEPS = 40, 10  # tokens of a step, steps of a candidate
VOCABULARY = 152_064
MAX_MIB = 64  # that token_logprobs may take beside its inputs
TOLERANCE = {OURS: {"fp32": 1e-4, "bf16": 1e-4}, "torch": {"fp32": 1e-4, "bf16": 0.1}}  # we sum in fp32 in either dtype


@pytest.fixture
def sizes(request):
    return SIZES[request.config.getoption("grid")]


def randn(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(DTYPES[dtype])


def check(methods, exact, dtype, rows=slice(None)):
    """Nothing is timed before every method has been seen to be right."""
    errors = {name: (method()[rows].double() - exact).abs().max().item() for name, method in methods.items()}
    allowed = {name: TOLERANCE[OURS if name == OURS else "torch"][dtype] for name in methods}
    if wrong := {name: error for name, error in errors.items() if not error <= allowed[name]}:
        pytest.fail(f"wrong result, not timed: error {wrong}, allowed {allowed}")
    return errors


def record(benchmark, what, methods, prepare, grid, **info):
    benchmark.group = "scoring"
    benchmark.extra_info |= {"what": what, **info}
    interleave(benchmark, methods, prepare, grid)
    for peer in benchmark.extra_info["peers"].values():
        peer["times_ours"] = peer["median"] / benchmark.stats["median"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_step_scores(benchmark, grid, evict_caches, sizes, kind, dtype):
    """Heads of published verifiers: two layers as wide as the hidden states and two columns; one column."""
    num_tokens, dim = sizes["head"]
    hidden, positions = randn(num_tokens, dim, dtype=dtype), torch.arange(STEP_TOKENS - 1, num_tokens, STEP_TOKENS)
    offsets = torch.tensor([*range(0, len(positions), STEPS), len(positions)])
    if kind == "mlp":
        w1, w2 = randn(dim, dim, dtype=dtype, scale=dim**-0.5), randn(2, dim, dtype=dtype, scale=2 * dim**-0.5)
        head = ScoreHead.mlp(w1, None, w2, None)

        def layers(x, convert=lambda w: w):
            return F.linear(F.relu(F.linear(x, convert(w1))), convert(w2)).softmax(-1)[:, 1]
    else:
        w = randn(1, dim, dtype=dtype, scale=2 * dim**-0.5)
        head = ScoreHead.linear(w)

        def layers(x, convert=lambda w: w):
            return F.linear(x, convert(w)).sigmoid()[:, 0]

    methods = {
        OURS: lambda: step_scores(hidden, positions, head, offsets=offsets).prob,
        "torch, all tokens": lambda: layers(hidden)[positions],
        "torch, steps alone": lambda: layers(hidden[positions]),
    }
    errors = check(methods, layers(hidden[positions].double(), torch.Tensor.double), dtype)
    what = f"step_scores {kind} {dtype}, {len(positions)} steps of {num_tokens} tokens"
    record(benchmark, what, methods, evict_caches, grid, errors=errors)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_token_logprobs(benchmark, grid, evict_caches, sizes, dtype):
    num_rows, dim = sizes["tokens"]
    hidden, weight, targets = log_prob_inputs(num_rows, dim, dtype)
    methods = {
        OURS: lambda: token_logprobs(hidden, weight, targets),
        "log_softmax": lambda: eager_logprobs(hidden, weight, targets),
    }
    some = slice(None, None, max(1, num_rows // 8))
    logits = torch.cat([hidden[some].double() @ w.double().T for w in weight.split(8192)], 1)
    errors = check(methods, eager_gather(logits, targets[some]), dtype, some)
    mib = peak_mib(num_rows, dim, dtype)
    if not mib[OURS] < MAX_MIB:
        pytest.fail(f"token_logprobs took {mib[OURS]:.0f} MiB, expected less than {MAX_MIB}")
    what = f"token_logprobs {dtype} T={num_rows} d={dim}, {mib[OURS]:.0f} MiB, log_softmax {mib['log_softmax']:.0f}"
    record(benchmark, what, methods, evict_caches, grid, errors=errors, peak_mib=mib)


def log_prob_inputs(num_rows, dim, dtype):
    targets = torch.randint(VOCABULARY, (num_rows,), generator=torch.Generator().manual_seed(0))
    return randn(num_rows, dim, dtype=dtype), randn(VOCABULARY, dim, dtype=dtype, scale=3 * dim**-0.5), targets


def eager_gather(logits, targets):
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def eager_logprobs(hidden, weight, targets):
    return eager_gather(F.linear(hidden, weight).float(), targets)


def peak_mib(num_rows, dim, dtype):
    """What each method's first call for these inputs adds to the resident memory of a fresh process, at its peak."""
    code = PEAK.format(inputs=f"{num_rows}, {dim}, {dtype!r}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip((OURS, "log_softmax"), map(float, done.stdout.split())))


PEAK = """
import re
from benchmarks.bench_scoring import eager_logprobs, log_prob_inputs, token_logprobs

def status(field):
    return int(re.search(field + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

inputs = log_prob_inputs({inputs})
for function in token_logprobs, eager_logprobs:
    function(*log_prob_inputs(1, 8, "fp32"))  # what is loaded and started once
    open("/proc/self/clear_refs", "w").write("5")  # the peak becomes what there is now
    before = status("VmRSS")
    function(*inputs)
    print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("method", ["best", "weighted_vote"])
def test_select(benchmark, grid, sizes, method):
    """Of 64 candidates in each group, with 8 answers; beside torch's max, and a vote in Python from lists."""
    num_groups, each = sizes["groups"], 64
    scores = torch.rand(num_groups * each, generator=torch.Generator().manual_seed(0))
    answers = torch.randint(8, scores.shape, generator=torch.Generator().manual_seed(1))
    bounds = torch.arange(num_groups + 1) * each
    first = bounds[:-1]

    def by_max():
        return scores.view(num_groups, each).max(1).indices + first

    def by_lists():
        values, given, chosen = scores.tolist(), answers.tolist(), []
        for begin, end in itertools.pairwise(bounds.tolist()):
            totals, best = {}, {}
            for i in range(begin, end):
                totals[given[i]] = totals.get(given[i], 0.0) + values[i]
                if given[i] not in best or values[i] > values[best[given[i]]]:
                    best[given[i]] = i
            chosen.append(best[max(totals, key=totals.get)])
        return torch.tensor(chosen)

    name, peer = ("max", by_max) if method == "best" else ("lists", by_lists)
    options = {"group_offsets": bounds, "method": method, "answers": answers}
    methods = {OURS: lambda: select(scores, **options).indices[:, 0], name: peer}
    if not torch.equal(methods[OURS](), peer()):
        pytest.fail("another choice than the peer's, not timed")
    record(benchmark, f"select {method}, {num_groups} groups of {each}", methods, lambda: None, grid)
