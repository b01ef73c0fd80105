"""A profiled query: modelled bytes and FLOPs are those counted, and a second that passes somewhere shows in its part.

Models of two layers. Time stands still but for the function that a test makes slow: then every figure is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tts_kernels import Verifier, attention, seeded, stock
from tts_kernels.cost import PARTS, Hardware
from tts_kernels.integrations import transformers_attention
from tts_kernels.profile import report
from tts_kernels.profile.ways import WAYS, Query, check_sum, differences, profile, unshared
from tts_kernels.profile.work import Work, common_prefix
from tts_kernels.scoring import ScoreHead
from tts_kernels.search import policy as policy_module
from tts_kernels.tree.kv_tree import KVTree
from tts_kernels.verifier import verifier as verifier_module

SIZES = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TEXT = "What is 3 + 4, and what is 5 + 6?\nThink first. " * 3
DEVICE = Hardware("toy", bf16_flops=1e11, bandwidth=1e10)
N, NEW = 9, 12  # more than a batch of stock code


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models: more threads cost more than they bring."""
    torch.set_num_threads(1)


@functools.cache
def models(dtype=torch.float32):
    tokenizer = seeded.tokenizer(SIZES["vocab_size"], TEXT)
    policy, judge = seeded.causal_lm(0, step_tokens=5, dtype=dtype, **SIZES), seeded.causal_lm(1, dtype=dtype, **SIZES)
    return policy, tokenizer, judge


def query(n=N, new=NEW, *, dtype=torch.float32, ends=None, **settings) -> Query:
    policy, tokenizer, judge = models(dtype)
    policy.generation_config.eos_token_id = ends
    verifier = Verifier(judge, tokenizer, "math-shepherd", **settings)
    return Query.make(policy, tokenizer, verifier, TEXT, n, new, page_size=4)


class Now:
    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def run(asked: Query, ways=tuple(WAYS)) -> dict:
    return {way: profile(asked, way, DEVICE) for way in ways}


@pytest.fixture(scope="module")
def profiles():
    torch.set_num_threads(1)
    return run(query())


def check_exact(profiles: dict, asked: Query) -> None:
    for way, one in profiles.items():
        assert not report.not_alike(one, asked.verifier), way
        assert not report.unequal(one), way
    assert report.failures(profiles, asked.verifier, differences(list(profiles.values()))) == []


def test_counts_are_those_of_the_model(profiles):
    check_exact(profiles, query())
    for one in profiles.values():
        assert {len(ids) for ids in one.ids} == {NEW} and len(one.ids) == N
        assert one.cost.figures == "measured"
        for name, part in one.cost.parts.items():
            assert (part.measured_bytes > 0) == (one.flops[name] > 0) == (name not in ("host_gap", "straggler_idle"))


def test_parts_sum_to_the_wall_time(profiles):
    for one in profiles.values():
        total = sum(part.measured_seconds for part in one.cost.parts.values())
        assert total == pytest.approx(one.wall_seconds, rel=0.02) and one.cost.seconds == pytest.approx(total)
        assert all(one.cost.parts[name].measured_seconds > 0 for name in PARTS if name != "straggler_idle")
        assert one.joules is None
    check_sum({"a": 0.5, "b": 0.51}, 1.0)
    with pytest.raises(RuntimeError, match=r"parts: expected a sum within 2% of the wall time 1 s, got 1\.03"):
        check_sum({"a": 0.5, "b": 0.53}, 1.0)
    with pytest.raises(RuntimeError, match="parts: expected a sum"):
        check_sum({"a": 0.5}, 1.0)


def test_what_the_ways_share(profiles):
    """Paged reads the prompt for each candidate and stores it once; stock copies prefill it for each as well."""
    copies, paged, tree = ({k: p.measured_bytes for k, p in profiles[way].cost.parts.items()} for way in WAYS)
    assert copies["decode_attn_prefix"] == paged["decode_attn_prefix"] == N * tree["decode_attn_prefix"]
    assert copies["decode_attn_suffix"] == paged["decode_attn_suffix"] == tree["decode_attn_suffix"]
    assert copies["prefill_prefix"] > paged["prefill_prefix"] == tree["prefill_prefix"]
    assert copies["prm_prefix"] > tree["prm_prefix"] and paged["prm_head"] > 50 * tree["prm_head"]
    assert [profiles[way].verifier_forwards for way in WAYS] == [2, N, 1]


def test_candidates_that_end_early():
    """Ours and paged: whoever ends leaves, and the rest of its share is straggler idle. Stock: its row goes on."""
    asked = query(ends=list(range(60, 90)))
    ended = run(asked)
    lengths = [len(ids) for ids in ended["tree"].ids]
    assert 2 <= min(lengths) < max(lengths)
    check_exact(ended, asked)
    straggler = {way: one.cost.parts["straggler_idle"] for way, one in ended.items()}
    assert straggler["tree"].measured_bytes > 0 and straggler["tree"].measured_seconds > 0
    assert straggler["copies"].measured_bytes == straggler["copies"].measured_seconds == 0


def test_a_candidate_that_ends_at_once_is_said_not_to_compare():
    asked = query(ends=list(range(200)))
    one = run(asked, ["tree"])
    assert min(len(ids) for ids in one["tree"].ids) == 1
    assert "its first token" in report.not_alike(one["tree"], asked.verifier)["decode_linear"]
    assert report.failures(one, asked.verifier, differences(list(one.values()))) == []


def test_one_candidate_is_all_ways_the_same():
    alone = run(query(n=1))
    check_exact(alone, query(n=1))
    counted = [[part.measured_bytes for part in one.cost.parts.values()] for one in alone.values()]
    assert counted[0] == counted[1] == counted[2]
    assert alone["tree"].cost.parts["prm_prefix"].measured_seconds == 0


def test_bfloat16():
    """Tokens may differ there; counts are the model's in each way all the same."""
    for way, one in run(query(dtype=torch.bfloat16)).items():
        assert not report.unequal(one), way
        assert one.cost.element_bytes == 2


def test_other_heads_and_several_forwards(profiles):
    asked = query(chunk_tokens=64)
    chunked = run(asked, ["tree"])
    assert chunked["tree"].verifier_forwards > 1
    assert set(report.unequal(chunked["tree"])) <= {"prm_prefix", "prm_suffix"}
    assert "forwards of the verifier" in report.not_alike(chunked["tree"], asked.verifier)["prm_prefix"]
    assert report.failures(chunked, asked.verifier, differences(list(chunked.values()))) == []
    for head, recipe in (
        (ScoreHead.mlp(torch.randn(64, 64), None, torch.randn(2, 64), None), "qwen2.5-math-prm"),
        (ScoreHead.linear(torch.randn(1, 64)), "skywork-o1-prm"),
    ):
        policy, tokenizer, judge = models()
        policy.generation_config.eos_token_id = None
        spec = verifier_module.find_recipe("math-shepherd")
        spec = dataclasses.replace(spec, head=verifier_module.find_recipe(recipe).head)
        asked = Query.make(policy, tokenizer, Verifier(judge, tokenizer, spec, head=head), TEXT, 3, 4)
        check_exact(run(asked), asked)


def test_what_differs_is_a_failure(profiles):
    tree = profiles["tree"]
    parts = dict(tree.cost.parts)
    parts["prm_suffix"] = dataclasses.replace(parts["prm_suffix"], measured_bytes=parts["prm_suffix"].bytes + 1)
    more = dataclasses.replace(tree, cost=dataclasses.replace(tree.cost, parts=parts))
    other = dataclasses.replace(profiles["paged"], ids=((0,),) * N)
    wrong = report.failures({"tree": more}, query().verifier, differences([more, other]))
    assert len(wrong) == 2 and wrong[0].startswith("tree: prm_suffix: ") and "tokens" in wrong[1]
    flops = dataclasses.replace(tree, flops={**tree.flops, "prm_head": 1.0})
    assert "1 counted" in report.unequal(flops)["prm_head"]


# --- where seconds go ------------------------------------------------------------------------------------------------


def slow(monkeypatch, now, owner, name, seconds=1.0):
    """Calls of the function take so long; nothing else takes any time."""
    inner, calls = getattr(owner, name), []

    @functools.wraps(inner)
    def run(*args, **kwargs):
        now.time += seconds
        calls.append(name)
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, run)
    return calls


PLACES = {  # (owner, name) of what is slow, and the part in which it shows, way by way
    "attention": (lambda q: (transformers_attention, "tree_attention"), ["paged", "tree"],
                  {"prefill_prefix", "decode_attn_prefix", "decode_attn_suffix", "prm_prefix", "prm_suffix"}),
    "append": (lambda q: (transformers_attention, "append_kv"), ["paged"], {"prefill_prefix", "decode_linear"}),
    "mlp": (lambda q: (q.model.model.layers[1].mlp, "forward"), list(WAYS), {"prefill_prefix", "decode_linear"}),
    "head": (lambda q: (q.model.lm_head, "forward"), list(WAYS), {"head_sampling"}),
    "draw": (lambda q: (torch, "multinomial"), list(WAYS), {"head_sampling"}),
    "verifier": (lambda q: (q.verifier.models[0].model.layers[0].mlp, "forward"), list(WAYS),
                 {"prm_prefix", "prm_suffix"}),
    "verifier's logits": (lambda q: (q.verifier.models[0].lm_head, "forward"), ["copies", "paged"], {"prm_head"}),
    "probabilities": (lambda q: (stock.StockVerifier, "_probabilities"), ["copies", "paged"], {"prm_head"}),
    "scores": (lambda q: (verifier_module, "step_scores"), ["tree"], {"prm_head"}),
    "plans": (lambda q: (KVTree, "slots"), ["paged"], {"host_gap"}),
    "text": (lambda q: (policy_module, "new_text"), ["paged", "tree"], {"host_gap"}),
    "cache": (lambda q: (transformers.cache_utils.DynamicLayer, "update"), ["copies"],
              {"prefill_prefix", "decode_attn_prefix", "decode_attn_suffix"}),
}  # fmt: skip


@pytest.mark.parametrize("place, way", [(place, way) for place, (_, ways, _) in PLACES.items() for way in ways])
def test_what_is_slow_shows_in_its_part(monkeypatch, place, way):
    find, _, parts = PLACES[place]
    now, asked = Now(), query(3, 4)
    calls = slow(monkeypatch, now, *find(asked))
    asked.run(*asked.players(way), 2, 3)  # as the warm-up does
    warm = 2 * len(calls)
    one = profile(asked, way, DEVICE, now)
    seconds = {name: part.measured_seconds for name, part in one.cost.parts.items() if part.measured_seconds}
    if way == "paged":
        parts = parts - {"prm_prefix", "prm_suffix"} if place == "attention" else parts
    assert set(seconds) == parts
    assert sum(seconds.values()) == pytest.approx(one.wall_seconds) == pytest.approx(len(calls) - warm)
    if place == "attention":
        layers = SIZES["num_hidden_layers"]
        assert seconds["prefill_prefix"] == layers
        assert seconds["decode_attn_prefix"] + seconds["decode_attn_suffix"] == pytest.approx(layers * 3)


def test_one_launch_is_split_by_ceilings(monkeypatch, profiles):
    """Of decode attention and of a verifier's forward: measured over ceiling is the same for both halves."""
    now, asked = Now(), query(3, 2)  # one decode step
    slow(monkeypatch, now, transformers_attention, "tree_attention")
    parts = profile(asked, "tree", DEVICE, now).cost.parts
    for one, other in (("decode_attn_prefix", "decode_attn_suffix"), ("prm_prefix", "prm_suffix")):
        ratios = [parts[name].measured_seconds / parts[name].ceiling_seconds for name in (one, other)]
        assert ratios[0] == pytest.approx(ratios[1])


def test_straggler_idle_is_what_small_steps_cost_beyond_their_rows(monkeypatch):
    now, asked = Now(), query(ends=list(range(60, 90)))
    slow(monkeypatch, now, asked.model.model.layers[0].mlp, "forward")
    one = profile(asked, "tree", DEVICE, now)
    alive = [sum(len(ids) > step for ids in one.ids) for step in range(1, max(map(len, one.ids)))]
    assert alive[0] == N
    seconds = {name: part.measured_seconds for name, part in one.cost.parts.items()}
    assert seconds["decode_linear"] == pytest.approx(sum(rows / N for rows in alive))
    assert seconds["straggler_idle"] == pytest.approx(sum(1 - rows / N for rows in alive))


def test_nothing_is_left_behind(monkeypatch):
    asked = query(2, 3)

    def state():
        objects = (asked.model.model, asked.model.lm_head, asked.policy, asked.verifier.models[0].model)
        functions = (policy_module.sampler, stock.Draw.__call__, stock.head_logits, verifier_module.step_scores,
                     Verifier._steps, transformers.cache_utils.DynamicLayer.update)  # fmt: skip
        return [set(vars(o)) for o in objects], functions, dict(ALL_ATTENTION_FUNCTIONS._local_mapping)

    before = state()
    run(asked)
    assert state() == before

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(verifier_module, "pack", interrupt)
    before, free = state(), asked.policy.kv.free_pages
    with pytest.raises(KeyboardInterrupt):
        run(asked, ["tree"])
    assert state() == before and asked.policy.kv.free_pages == free


# --- counts and plans ------------------------------------------------------------------------------------------------


def test_an_unshared_plan_reads_for_each_row_and_computes_the_same():
    torch.manual_seed(0)
    tree = KVTree(1, 40, 4, 2, 16, dtype=torch.float32, device="cpu")
    root = tree.add(None, 10)
    trunk, other = tree.add(root, 6), tree.add(root, 0)
    leaves = [*tree.fork(trunk, 2), other]
    tree.append(leaves, [3, 1, 5])
    for cache in (tree.k_cache[0], tree.v_cache[0]):
        cache.normal_()
    shared = tree.plan(dict.fromkeys(reversed(leaves), 1), reserve=6)
    plan = unshared(shared)
    assert plan.capacity == shared.capacity and plan.num_rows == 3 and plan.num_growing == 3
    for _ in range(3):
        q = torch.randn(3, 4, 16)
        wanted, got = (attention.tree_attention(q, tree.k_cache[0], tree.v_cache[0], p) for p in (shared, plan))
        assert torch.equal(wanted, got)
        assert torch.equal(shared.positions(), plan.positions())
        ours, theirs = Work.of_plan(shared), Work.of_plan(plan)
        assert ours.pairs == theirs.pairs == theirs.tokens_read > ours.tokens_read
        for each in (shared, plan):
            each.advance_()


@pytest.mark.parametrize("border", [0, 1, 5, 8, 30])
def test_work_is_what_its_rows_see(border):
    work = Work([(3, 4, 2), (9, 1, 5)], [(0, 7, 2), (0, 10, 1)])
    rows = [x for first, count, times in work.rows for x in range(first, first + count) for _ in range(times)]
    keys = [x for first, count, times in work.reads for x in range(first, first + count) for _ in range(times)]
    assert (work.num_rows, work.tokens_read, work.pairs) == (len(rows), len(keys), sum(x + 1 for x in rows))
    below = work.below(border)
    assert below.num_rows == sum(x < border for x in rows) and below.tokens_read == sum(x < border for x in keys)
    assert below.pairs == sum(x + 1 for x in rows if x < border)


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0 and common_prefix([[5, 6]]) == 2


def test_an_attention_that_cannot_be_timed(monkeypatch):
    asked = query(2, 3)
    monkeypatch.setattr(asked.model.config, "_attn_implementation_internal", "eager")
    with pytest.raises(ValueError, match="model: expected an attention implementation that can be timed, such as sdpa"):
        run(asked, ["copies"])


def test_end_tokens_of_a_checkpoint_may_be_a_list():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    model = SimpleNamespace(device="cpu", config=config, generation_config=SimpleNamespace(eos_token_id=[3, 4]))
    tokenizer = SimpleNamespace(eos_token_id=5)
    assert stock.StockPolicy(model, tokenizer, prompt=str)._ends == {3, 4, 5}
