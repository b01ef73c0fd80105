"""The cost of a query: the laws that it has to keep, its verifier, the N-th candidate, money and measurements."""

from __future__ import annotations

import dataclasses

import pytest
from cost_cases import DENSE, DEVICE, MODELS, every, pass_seconds, workloads
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_kernels.cost import PARTS, Efficiency, Lognormal, ModelShape, Price, Workload, kv_saving, query_cost
from tts_kernels.cost.account import DECODE, ScoringCall, triangle
from tts_kernels.cost.query import REGIMES, SHARINGS
from tts_kernels.cost.table import part_table

# --- laws -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(**every)
def test_parts_sum_to_the_whole(work, model, regime, efficiency):
    for sharing in SHARINGS:
        cost = query_cost(work, model, DEVICE, sharing=sharing, regime=regime, efficiency=efficiency)
        assert list(cost.parts) == list(PARTS) and len(PARTS) == 10
        for total, field in ((cost.flops, "flops"), (cost.bytes, "bytes"), (cost.seconds, "ceiling_seconds")):
            assert total == sum(getattr(part, field) for part in cost.parts.values())
        assert all(min(part.flops, part.bytes, part.seconds) >= -1e-12 for part in cost.parts.values())
        close = 1 + 1e-9
        assert cost.overlapped_seconds <= cost.seconds * close and cost.seconds <= cost.additive_seconds * close
        assert cost.figures == "model" and cost.parts["host_gap"].seconds == 0
        assert cost.decode_seconds == sum(cost.parts[name].seconds for name in DECODE)


@settings(deadline=None)
@given(**every)
def test_tree_is_at_most_paged_is_at_most_copies(work, model, regime, efficiency):
    """In time, bytes, FLOPs and memory, part by part; the two parts of a verifier's pass, which reads its weights once
    for both, together."""
    copies, paged, tree = (
        query_cost(work, model, DEVICE, sharing=sharing, regime=regime, efficiency=efficiency) for sharing in SHARINGS
    )
    close = 1 + 1e-9
    together = [(name,) for name in PARTS if name not in ("prm_prefix", "prm_suffix")] + [("prm_prefix", "prm_suffix")]
    for less, more in ((tree, paged), (paged, copies)):
        for names in together:
            for field in ("flops", "bytes", "ceiling_seconds"):
                a, b = (sum(getattr(cost.parts[name], field) for name in names) for cost in (less, more))
                assert a <= b * close, (names, field)
        assert less.seconds <= more.seconds * close and less.bytes <= more.bytes * close
        assert less.flops <= more.flops * close and less.peak_kv_bytes <= more.peak_kv_bytes
        assert less.kv_byte_seconds <= more.kv_byte_seconds * close


@settings(deadline=None)
@given(**every)
def test_one_candidate_shares_nothing(work, model, regime, efficiency):
    changes = {"n": 1, "keep": None if work.keep is None else 1}
    if isinstance(work.suffix, tuple):
        changes["suffix"] = work.suffix[: work.queries]
    alone = dataclasses.replace(work, **changes)
    costs = [query_cost(alone, model, DEVICE, sharing=s, regime=regime, efficiency=efficiency) for s in SHARINGS]
    if alone.search == "best_of_n" or alone.steps == 1:
        assert costs[0].parts == costs[1].parts == costs[2].parts
    assert len({round(cost.seconds, 12) for cost in costs}) == 1
    assert costs[2].m == 1 and costs[2].marginal_seconds == costs[2].seconds and costs[2].fit == (0, costs[2].seconds)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(0, 5000), st.lists(st.integers(1, 4000), min_size=1, max_size=12))
def test_kv_reads_save_at_most_the_bound(n, prefix, some):
    """N(2P+S)/(2P+NS): reached, with S + 1 for S as sums of t are, by equal lengths; never exceeded by others."""
    model = dataclasses.replace(DENSE, max_positions=10_000)

    def saved(work):
        paged, tree = (query_cost(work, model, DEVICE, sharing=sharing) for sharing in ("paged", "tree"))
        return paged.kv_read_bytes / tree.kv_read_bytes

    equal = some[0]
    assert saved(Workload(n, prefix, equal)) == pytest.approx(kv_saving(n, prefix, equal + 1))
    mean = sum(some) / len(some)
    assert saved(Workload(len(some), prefix, tuple(some))) <= kv_saving(len(some), prefix, mean) * (1 + 1e-9)


@settings(deadline=None)
@given(**every)
def test_saturated_is_never_dearer(work, model, regime, efficiency):
    for sharing in SHARINGS:
        isolated, saturated = (
            query_cost(work, model, DEVICE, sharing=sharing, regime=r, efficiency=efficiency) for r in REGIMES
        )
        assert saturated.seconds <= isolated.seconds * (1 + 1e-9)
        assert saturated.flops == pytest.approx(isolated.flops)
        assert saturated.parts["straggler_idle"].seconds == 0


def test_equal_lengths_have_no_stragglers():
    for suffix, idle in ((50, False), ((10, 20, 50), True)):
        cost = query_cost(Workload(3, 20, suffix), DENSE, DEVICE)
        assert (cost.parts["straggler_idle"].seconds > 0) == idle == (cost.parts["straggler_idle"].bytes > 0)
        assert cost.parts["straggler_idle"].flops == 0


def test_m_and_the_fit():
    work = Workload(16, 2000, 100)
    big = dataclasses.replace(DENSE, max_positions=10_000)
    tree = query_cost(work, big, DEVICE, sharing="tree", regime="saturated")
    paged = query_cost(work, big, DEVICE, sharing="paged", regime="saturated")
    one = query_cost(Workload(1, 2000, 100), big, DEVICE, regime="saturated")
    assert tree.m == tree.seconds / one.seconds < paged.m == paged.seconds / one.seconds < 16
    fixed, each = paged.fit  # paged: every candidate adds the same; the prompt's prefill is fixed
    assert each == pytest.approx(paged.marginal_seconds) == pytest.approx(paged.ceiling_of(9) - paged.ceiling_of(8))
    assert fixed + each * 16 == pytest.approx(paged.seconds) and fixed == pytest.approx(
        paged.parts["prefill_prefix"].seconds + _head_of_prefill(big), rel=1e-6
    )
    # tree: the reads of the prefix have moved from each candidate to the fixed part
    assert tree.fit[0] > fixed and tree.fit[1] < each


def _head_of_prefill(model):
    filled = DEVICE.ridge
    return pass_seconds(1, filled, model.head_weights, 8 * model.vocab_size, DEVICE.bf16_flops, DEVICE.bandwidth)


def test_m_is_of_the_mean_candidate():
    """C(1) is the mean over the candidates, unverified: m does not hang on which of them was drawn first."""
    work = Workload(4, 50, (10, 200, 30, 400), verifier="prm")
    alone = [query_cost(Workload(1, 50, s), DENSE, DEVICE).seconds for s in work.suffix]
    cost = query_cost(work, DENSE, DEVICE)
    assert cost.m == pytest.approx(cost.seconds / (sum(alone) / 4))


# --- the verifier ---------------------------------------------------------------------------------------------------


def test_verifier_flops():
    """One pass a sample against the distinct tokens once; K passes of growing length against each
    token once. In tokens through the layers, attention aside."""
    w, a = 2 * DENSE.active_body_weights, DENSE.prefill_flops_per_key
    n, p, s = 8, 60, 40
    paged, tree = (query_cost(Workload(n, p, s, verifier="prm"), DENSE, DEVICE, sharing=x) for x in ("paged", "tree"))
    assert prm_flops(paged) == n * (w * (p + s) + a * triangle(p + s))
    assert prm_flops(tree) == w * (p + n * s) + a * (triangle(p) + n * (p * s + triangle(s)))
    steps, each = 20, 2
    beam = Workload(n, p, steps * each, search="dvts", keep=4, steps=steps, verifier="prm")
    paged, tree = (query_cost(beam, DENSE, DEVICE, sharing=x) for x in ("paged", "tree"))
    tokens = n * (steps * p + each * steps * (steps + 1) // 2)
    attention = n * sum(triangle(p + each * k) for k in range(1, steps + 1))
    assert prm_flops(paged) == w * tokens + a * attention
    assert prm_flops(tree) < w * (p + n * steps * each) + a * attention
    # Incremental: the prompt is encoded in the first step, and later ones read the KV of the distinct tokens before.
    kappa, weights = DENSE.kv_bytes_per_token, 2 * DENSE.body_weights
    read = sum(p + 4 * each * k for k in range(1, steps))
    moved = weights * p / (p + n * each) + 2 * kappa * p + kappa * read
    assert tree.parts["prm_prefix"].bytes == pytest.approx(moved)
    waste = (n * each * steps * (steps + 1) / 2) / (n * steps * each)
    assert waste == (steps + 1) / 2  # without a prompt


def prm_flops(cost):
    return cost.parts["prm_prefix"].flops + cost.parts["prm_suffix"].flops


def test_verifier_head():
    """Stacks: at every token they encode, with fp32 logits of the vocabulary; tree: at step ends, two rows of it."""
    work = Workload(8, 60, 40, steps=5, verifier="prm")
    paged, tree = (query_cost(work, DENSE, DEVICE, sharing=x).parts["prm_head"] for x in ("paged", "tree"))
    assert paged.flops == 2 * DENSE.head_weights * 8 * 100
    assert paged.bytes == 2 * DENSE.head_weights + 8 * 100 * (2 * 32 + 4 * 100)
    assert tree.flops == 2 * 2 * 32 * 8 * 5
    orm = query_cost(dataclasses.replace(work, verifier="orm"), DENSE, DEVICE).parts["prm_head"]
    assert orm.flops == 2 * 2 * 32 * 8
    mlp = query_cost(dataclasses.replace(work, verifier_head="mlp"), DENSE, DEVICE).parts["prm_head"]
    assert mlp.flops == 2 * (32 * 32 + 2 * 32) * 8 * 5
    other = query_cost(dataclasses.replace(work, verifier_model="qwen3-0.6b"), DENSE, DEVICE)
    assert other.memory_bytes > 2 * ModelShape.preset("qwen3-0.6b").num_parameters and other.fits is False


# --- money, joules, measurements ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "price, amount, currency",
    [("2 USD", 2, "USD"), ("$2", 2, "USD"), ("$1,200.50", 1200.5, "USD"), ("2.5 EUR/h", 2.5, "EUR"), ("€3", 3, "EUR"),
     ("$2 USD", 2, "USD"), (".5 USD", 0.5, "USD"), ("$294,000", 294_000, "USD"),
     ((1.99, "GBP"), 1.99, "GBP"), ("1e3 usd / GPU-h", 1000, "USD"), (Price(4.0, "JPY"), 4, "JPY")],
)  # fmt: skip
def test_price(price, amount, currency):
    assert Price.parse(price) == Price(amount, currency)
    cost = query_cost(Workload(2, 10, 10), DENSE, DEVICE, price=price)
    assert cost.money == cost.seconds * amount / 3600
    if currency == "USD":
        assert cost.dollars == cost.money
    else:
        with pytest.raises(ValueError, match=rf"price: expected US dollars.*got {currency}"):
            cost.dollars  # noqa: B018


@pytest.mark.parametrize(
    "price",
    [2, 2.0, "2", "2.5/h", "USD", "2 dollars", (2,), "two USD", -1, "-2 USD", (-1, "USD"), (2, "usd"), "2,5 EUR",
     "1,00 EUR", "1.2.3 USD", "$2 EUR", "€2 USD", ", USD"],
)  # fmt: skip
def test_price_without_currency(price):
    with pytest.raises((ValueError, TypeError), match=r"price.*: expected"):
        query_cost(Workload(2, 10, 10), DENSE, DEVICE, price=price)


def test_without_price_and_watts():
    cost = query_cost(Workload(2, 10, 10), DENSE, DEVICE)
    assert cost.money is cost.dollars is cost.joules is None
    assert query_cost(Workload(2, 10, 10), DENSE, DEVICE, watts=700).joules == 700 * cost.seconds
    assert cost.kv_gb_seconds == cost.kv_byte_seconds / 1e9 > 0


def test_measured_parts():
    cost = query_cost(Workload(4, 10, 10, verifier="prm"), DENSE, DEVICE)
    some = cost.with_measured({"decode_linear": 1.0, "host_gap": 0.5}, {"decode_linear": 123})
    assert some.figures == "model and measured" and some.parts["decode_linear"].measured_bytes == 123
    rest = cost.seconds - cost.parts["decode_linear"].seconds
    assert some.seconds == pytest.approx(rest + 1.5) and some.ceiling_seconds == cost.seconds
    assert some.parts["decode_linear"].ceiling_seconds == cost.parts["decode_linear"].ceiling_seconds
    both = some.with_measured(dict.fromkeys(PARTS, 0.25))
    assert both.figures == "measured" and both.seconds == 2.5
    assert both.parts["decode_linear"].measured_bytes == 123
    data = both.to_dict()
    assert data["figures"] == "measured" and data["parts"]["host_gap"]["measured_seconds"] == 0.25
    with pytest.raises(ValueError, match=r"seconds: expected one of .*nearest: decode_linear.*got 'decode_line'"):
        cost.with_measured({"decode_line": 1})
    with pytest.raises(ValueError, match="at least 0"):
        cost.with_measured({"decode_linear": -1})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"workload": 3}, "workload: expected a Workload, got int"),
        ({"model": "qwen3-9b"}, "model: expected one of .* nearest: qwen3-8b"),
        ({"model": 3}, "model: expected a ModelShape or the name of a preset, got int"),
        ({"hardware": "h20"}, "hardware: expected one of .* nearest: h200"),
        ({"hardware": None}, "hardware: expected a Hardware or the name"),
        ({"sharing": "cascade"}, "sharing: expected one of copies, paged, tree, got 'cascade'"),
        ({"regime": "busy"}, "regime: expected one of isolated, saturated, got 'busy'"),
        ({"watts": -1}, "watts: expected at least 0"),
        ({"efficiency": 0.5}, "efficiency: expected an Efficiency, got float"),
        ({"workload": Workload(2, 5000, 10)}, "model: expected a context of at most 4096 tokens, the limit of dense"),
    ],
)
def test_bad_input(change, message):
    arguments = {"workload": Workload(2, 10, 10), "model": DENSE, "hardware": DEVICE, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        query_cost(**arguments)


@pytest.mark.parametrize("name", ["bandwidth", "compute", "prefill"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "x"])
def test_bad_efficiency(name, value):
    with pytest.raises((ValueError, TypeError), match=f"{name}: expected"):
        Efficiency(**{name: value})


def test_a_search_keeps_the_kv_of_its_verifier():
    """Tree: what the last step saw, beside the policy's KV: prompt, 4 kept paths of 3 steps, 8 new steps. Others encode
    again, and best-of-n scores once its KV can go."""
    beam = Workload(8, 60, 40, search="dvts", keep=4, steps=4, verifier="prm")
    copies, paged, tree = (query_cost(beam, DENSE, DEVICE, sharing=sharing) for sharing in SHARINGS)
    assert copies.verifier_kv_bytes == paged.verifier_kv_bytes == 0
    assert tree.verifier_kv_bytes == DENSE.kv_bytes_per_token * (60 + 4 * 30 + 8 * 10)
    assert tree.memory_bytes == 2 * 2 * DENSE.num_parameters + tree.peak_kv_bytes + tree.verifier_kv_bytes
    one_step = query_cost(Workload(8, 60, 40, search="dvts", keep=4, verifier="prm"), DENSE, DEVICE)
    assert one_step.verifier_kv_bytes == DENSE.kv_bytes_per_token * (60 + 8 * 40)
    for changes in ({"verifier": "none"}, {"search": "best_of_n", "keep": None}):
        assert query_cost(dataclasses.replace(beam, **changes), DENSE, DEVICE).verifier_kv_bytes == 0


def test_lengths_that_vary():
    cost = query_cost(Workload(64, 200, Lognormal(12_000, 0.6, 32_000)), "r1-distill-qwen-7b", "h200")
    assert cost.parts["straggler_idle"].seconds > 0 and 1 < cost.m < 64


@settings(deadline=None)
@given(workloads(), st.sampled_from(list(SHARINGS)), st.sampled_from(list(MODELS.values())))
def test_in_fp32(work, sharing, model):
    """Every byte but those of logits is twice as many; FLOPs and tokens are the same."""
    half, full = (query_cost(work, model, DEVICE, sharing=sharing, element_bytes=b) for b in (2, 4))
    assert full.flops == half.flops and full.kv_read_bytes == pytest.approx(2 * half.kv_read_bytes)
    assert full.peak_kv_bytes == 2 * half.peak_kv_bytes and full.memory_bytes == 2 * half.memory_bytes
    for name in ("prefill_prefix", "decode_linear", "prm_prefix", "prm_suffix"):
        assert full.parts[name].bytes == pytest.approx(2 * half.parts[name].bytes)
    assert full.ceiling_of(1) >= half.ceiling_of(1) and full.ceiling_of(work.n) == full.seconds


def test_measured_columns_stand_beside_ceilings():
    costs = {s: query_cost(Workload(4, 10, 10), DENSE, DEVICE, sharing=s) for s in ("paged", "tree")}
    costs["tree"] = costs["tree"].with_measured({"decode_linear": 0.123, "host_gap": 0.4})
    header, _, *rows = part_table(costs).splitlines()
    assert [cell.strip() for cell in header.split("|")[2:6]] == ["paged, s", "tree, s", "measured, s", "TFLOP"]
    cells = {row.split("|")[1].strip(): row.split("|")[4].strip() for row in rows}
    assert cells["decode_linear"] == "0.123" and cells["prm_head"] == "-" and cells["sum"] == "0.523"


@pytest.mark.parametrize("sharing", SHARINGS)
def test_calls_of_a_verifier_may_be_given(sharing):
    """Those that the workload implies cost what it costs; in two calls the weights are read twice."""
    work = Workload(4, 10, 6, verifier="prm", steps=2)
    whole = ScoringCall([(10, 6)] * 4, [10], 0, 8)
    implied, given = (query_cost(work, DENSE, DEVICE, sharing=sharing, scoring=s) for s in (None, [whole]))
    assert implied.parts == given.parts
    halves = [ScoringCall([(10, 6)] * 2, [10], 0, 4)] * 2
    twice = query_cost(work, DENSE, DEVICE, sharing=sharing, scoring=halves)
    more = sum(twice.parts[name].bytes - given.parts[name].bytes for name in ("prm_prefix", "prm_suffix"))
    again = 0 if sharing != "tree" else 2 * DENSE.kv_bytes_per_token * 10  # the prefix, which is fresh in both
    assert more == pytest.approx(2 * DENSE.body_weights + again)
    assert query_cost(work, DENSE, DEVICE, sharing=sharing, scoring=[]).parts["prm_prefix"].flops == 0
    # C(n) of fewer candidates has the implied calls, so that of all has them too: no difference of unlike costs.
    for cost in (given, twice):
        assert (cost.m, cost.marginal_seconds, cost.fit) == (implied.m, implied.marginal_seconds, implied.fit)
    assert twice.seconds > implied.seconds and implied.m == implied.seconds / implied.ceiling_of(1)
