"""Every wrong argument: the type of the exception, the argument's name in the message, and nothing written."""

import attention_cases as cases
import pytest
import torch
from attention_cases import BF16, FP8, Case
from forests import POISON_PAGE, star

from tts_kernels.attention import append_kv, decode_attention, merge_states, tree_attention, unsupported_reasons

CASE = Case(heads=(4, 2), head_dim=32, page_size=4)
FOREST = star(3, prefix=13, suffix=[5], page_size=4)


def call_tree_attention(**changes):
    inputs = cases.make_inputs(CASE, FOREST)
    k_cache, v_cache = inputs.caches()
    given = {
        "q": inputs.q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "plan": FOREST.plan(),
        "out": torch.full_like(inputs.q, 7.0),
    }
    given.update({name: change(given[name]) if callable(change) else change for name, change in changes.items()})
    watched = given["out"] if isinstance(given["out"], torch.Tensor) else torch.empty(0)
    before = watched.clone()
    try:
        tree_attention(**given)
    finally:
        torch.testing.assert_close(watched, before, rtol=0, atol=0, equal_nan=True)


def strided_last(x):
    return torch.stack([x, x], -1)[..., 0]


def wrong_page(page):
    def change(plan):
        plan.pages[2] = page
        plan.max_page = int(plan.pages.max())
        return plan

    return change


def needs_grad(x):
    return x.clone().requires_grad_()


TREE_ATTENTION = [
    # argument named, exception, change, part of the message that says what came
    ("q", TypeError, {"q": None}, "NoneType"),
    ("q", TypeError, {"q": lambda x: x.double()}, "float64"),
    ("q", TypeError, {"q": lambda x: x.to(FP8)}, "float8"),
    ("q", ValueError, {"q": lambda x: x[0]}, r"\(4, 32\)"),
    ("q", ValueError, {"q": lambda x: x[:-1]}, "2 rows"),
    ("q", ValueError, {"q": lambda x: x[:, :3]}, r"\(3, 3, 32\)"),
    ("q", ValueError, {"q": lambda x: x[:, :0]}, r"\(3, 0, 32\)"),
    ("q", ValueError, {"q": lambda x: x[..., :31]}, r"\(3, 4, 31\)"),
    ("q", ValueError, {"q": strided_last}, "strides"),
    ("q", ValueError, {"q": needs_grad}, "requires_grad"),
    ("k_cache", TypeError, {"k_cache": 3}, "int"),
    ("k_cache", TypeError, {"k_cache": lambda x: x.to(BF16)}, "bfloat16"),
    ("k_cache", ValueError, {"k_cache": lambda x: x[0]}, "shape"),
    ("k_cache", ValueError, {"k_cache": strided_last}, "strides"),
    ("k_cache", ValueError, {"k_cache": lambda x: x.to("meta")}, "meta"),
    ("k_cache", ValueError, {"k_cache": needs_grad}, "requires_grad"),
    ("k_cache", ValueError, {"k_cache": lambda x: x[:, :0], "v_cache": lambda x: x[:, :0]}, r"0, 2, 32\)"),
    ("v_cache", TypeError, {"v_cache": lambda x: x.to(FP8)}, "float8"),
    ("v_cache", ValueError, {"v_cache": lambda x: x[1:]}, r"\(12, 4, 2, 32\)"),
    ("v_cache", ValueError, {"v_cache": strided_last}, "strides"),
    ("v_cache", ValueError, {"v_cache": lambda x: x.to("meta")}, "meta"),
    ("plan", TypeError, {"plan": None}, "NoneType"),
    ("plan", ValueError, {"plan": lambda p: star(3, prefix=13, suffix=[5], page_size=8).plan()}, "8"),
    ("plan", ValueError, {"plan": lambda p: star(3, prefix=13, suffix=[5], page_size=4).plan(device="meta")}, "meta"),
    ("plan", ValueError, {"plan": wrong_page(POISON_PAGE)}, "2147480000"),
    ("plan", ValueError, {"plan": wrong_page(-3), "check": True}, "-3"),
    ("plan", ValueError, {"k_cache": lambda x: x[:2], "v_cache": lambda x: x[:2]}, "as page . of node"),
    ("scale", TypeError, {"scale": "1"}, "str"),
    ("scale", TypeError, {"scale": torch.tensor(1.0)}, "Tensor"),
    ("scale", ValueError, {"scale": float("nan")}, "nan"),
    ("scale", ValueError, {"scale": float("inf")}, "inf"),
    ("softcap", TypeError, {"softcap": None}, "NoneType"),
    ("softcap", ValueError, {"softcap": -1.0}, "-1.0"),
    ("softcap", ValueError, {"softcap": float("nan")}, "nan"),
    ("window", TypeError, {"window": 3.0}, "float"),
    ("window", TypeError, {"window": True}, "bool"),
    ("window", ValueError, {"window": -2}, "-2"),
    ("sinks", TypeError, {"sinks": 0.5}, "float"),
    ("sinks", TypeError, {"sinks": torch.zeros(4, dtype=torch.float64)}, "float64"),
    ("sinks", ValueError, {"sinks": torch.zeros(2)}, r"\(2,\)"),
    ("sinks", ValueError, {"sinks": torch.zeros(4, device="meta")}, "meta"),
    ("sinks", ValueError, {"sinks": torch.zeros(4, requires_grad=True)}, "requires_grad"),
    ("sinks", ValueError, {"sinks": torch.tensor([0, float("nan"), 0, 0])}, "nan at head 1"),
    ("k_scale", TypeError, {"k_scale": "1"}, "str"),
    ("k_scale", TypeError, {"k_scale": torch.ones(2, dtype=torch.int32)}, "int32"),
    ("k_scale", ValueError, {"k_scale": float("nan")}, "nan"),
    ("k_scale", ValueError, {"k_scale": torch.tensor(float("nan"))}, "nan"),
    ("k_scale", ValueError, {"k_scale": torch.ones(3)}, r"\(3,\)"),
    ("v_scale", ValueError, {"v_scale": float("inf")}, "inf"),
    ("v_scale", ValueError, {"v_scale": torch.tensor([1.0, float("nan")])}, "nan at head 1"),
    ("v_scale", ValueError, {"v_scale": torch.ones(1, 2)}, r"\(1, 2\)"),
    ("v_scale", ValueError, {"v_scale": torch.ones(2, device="meta")}, "meta"),
    ("out", TypeError, {"out": 3}, "int"),
    ("out", TypeError, {"out": lambda x: x.to(BF16)}, "bfloat16"),
    ("out", ValueError, {"out": lambda x: x[:2]}, r"\(2, 4, 32\)"),
    ("out", ValueError, {"out": strided_last}, "strides"),
    ("out", ValueError, {"out": lambda x: x[:1].expand(3, 4, 32)}, "expanded"),
    ("out", ValueError, {"out": lambda x: x.to("meta")}, "meta"),
    ("backend", ValueError, {"backend": "tirton"}, "'tirton'"),
    ("backend", ValueError, {"backend": ["cpu"]}, r"\['cpu'\]"),
]  # fmt: skip


def ids(table):
    return [f"{name}-{came}" for name, _, _, came in table]


@pytest.mark.parametrize("argument, error, changes, came", TREE_ATTENTION, ids=ids(TREE_ATTENTION))
def test_tree_attention(argument, error, changes, came):
    with pytest.raises(error, match=f"^{argument}: expected .*, got .*{came}"):
        call_tree_attention(**changes)


def test_gradients_are_refused_only_where_they_would_be_taken():
    with torch.no_grad(), pytest.raises(AssertionError):  # written, that is
        call_tree_attention(q=needs_grad)


def test_an_output_that_is_the_query():
    inputs = cases.make_inputs(CASE, FOREST)
    before = inputs.q.clone()
    with pytest.raises(ValueError, match=r"^out: expected .*, got the memory of q"):
        tree_attention(inputs.q, *inputs.caches(), FOREST.plan(), out=inputs.q)
    assert torch.equal(inputs.q, before)


def test_pages_in_reserve_may_lie_anywhere():
    forest = star(3, prefix=13, suffix=[5], page_size=4).place(cases.random.Random(0), reserve=1)
    forest.pages = [[*pages[:-1], POISON_PAGE] for pages in forest.pages]
    inputs = cases.make_inputs(CASE, forest)
    plan = forest.plan()
    tree_attention(inputs.q, *inputs.caches(), plan, check=True)
    plan.advance_(3)
    tree_attention(inputs.q, *inputs.caches(), plan, check=True)
    plan.advance_(1)
    with pytest.raises(ValueError, match=r"^plan: expected page ids in \[0, \d+\), got 2147480000 as page 2 of node 1"):
        tree_attention(inputs.q, *inputs.caches(), plan)


DECODE = [
    ("block_table", TypeError, {"block_table": None}, "NoneType"),
    ("block_table", ValueError, {"block_table": torch.zeros(3, dtype=torch.int32)}, r"\(3,\)"),
    ("block_table", ValueError, {"block_table": torch.zeros(2, 4, dtype=torch.int32)}, r"\(2, 4\)"),
    ("block_table", ValueError, {"block_table": torch.zeros(3, 4, dtype=torch.int32, device="meta")}, "meta"),
    ("q", ValueError, {"q": torch.zeros(3, 4)}, r"\(3, 4\)"),
    ("k_cache", ValueError, {"k_cache": torch.zeros(9, 4, 2)}, r"\(9, 4, 2\)"),
]


@pytest.mark.parametrize("argument, error, changes, came", DECODE, ids=ids(DECODE))
def test_decode_attention(argument, error, changes, came):
    caches = torch.zeros(2, 9, 4, 2, 32)
    given = {"q": torch.zeros(3, 4, 32), "k_cache": caches[0], "v_cache": caches[1]}
    given |= {"block_table": torch.zeros(3, 4, dtype=torch.int32), "seq_lens": torch.ones(3, dtype=torch.int32)}
    with pytest.raises(error, match=f"^{argument}: expected .*, got .*{came}"):
        decode_attention(**given | changes)


APPEND = [
    ("k", TypeError, {"k": None}, "NoneType"),
    ("k", TypeError, {"k": lambda x: x.double(), "v": lambda x: x.double()}, "float64"),
    ("k", ValueError, {"k": lambda x: x[:, :1]}, r"\(3, 1, 32\)"),
    ("k", ValueError, {"k": lambda x: x[..., 1:]}, r"\(3, 2, 31\)"),
    ("k", ValueError, {"k": strided_last}, "strides"),
    ("k", ValueError, {"k": needs_grad}, "requires_grad"),
    ("v", TypeError, {"v": lambda x: x.to(BF16)}, "bfloat16"),
    ("v", ValueError, {"v": lambda x: x[1:]}, r"\(2, 2, 32\)"),
    ("v", ValueError, {"v": strided_last}, "strides"),
    ("v", ValueError, {"v": lambda x: x.to("meta")}, "meta"),
    ("k_cache", TypeError, {"k_cache": lambda x: x.to(BF16)}, "bfloat16"),
    ("v_cache", ValueError, {"v_cache": lambda x: x[1:]}, r"\(1, 4, 2, 32\)"),
    ("k_cache", ValueError, {"k_cache": lambda x: x[:, :1].expand(2, 4, 2, 32)}, "expanded"),
    ("v_cache", ValueError, {"v_cache": lambda x: x[:1].expand(2, 4, 2, 32)}, "expanded"),
    ("slots", TypeError, {"slots": [1, 2, 3]}, "list"),
    ("slots", TypeError, {"slots": lambda x: x.int()}, "int32"),
    ("slots", ValueError, {"slots": lambda x: x[:2]}, r"\(2,\)"),
    ("slots", ValueError, {"slots": lambda x: x.to("meta")}, "meta"),
    ("slots", ValueError, {"slots": torch.tensor([0, -2, 1]), "check": True}, "-2 for row 1"),
    ("slots", ValueError, {"slots": torch.tensor([0, 1, 8]), "check": True}, "8 for row 2"),
    ("backend", ValueError, {"backend": "gpu"}, "'gpu'"),
    ("backend", ValueError, {"backend": ["cpu"]}, r"\['cpu'\]"),
]


@pytest.mark.parametrize("argument, error, changes, came", APPEND, ids=ids(APPEND))
def test_append_kv(argument, error, changes, came):
    caches = torch.full((2, 2, 4, 2, 32), 7.0)
    given = {"k": torch.ones(3, 2, 32), "v": torch.ones(3, 2, 32), "k_cache": caches[0], "v_cache": caches[1]}
    given |= {"slots": torch.tensor([0, -1, 5])}
    given |= {name: change(given[name]) if callable(change) else change for name, change in changes.items()}
    with pytest.raises(error, match=f"^{argument}: expected .*, got .*{came}"):
        append_kv(**given)
    assert (caches == 7).all()


MERGE = [
    ("out", TypeError, {"out": None}, "NoneType"),
    ("out", TypeError, {"out": lambda x: x.double()}, "float64"),
    ("out", ValueError, {"out": lambda x: x[0]}, r"\(3, 4, 8\)"),
    ("out", ValueError, {"out": lambda x: x[:0], "lse": lambda x: x[:0]}, r"\(0, 3, 4, 8\)"),
    ("out", ValueError, {"out": needs_grad}, "requires_grad"),
    ("lse", TypeError, {"lse": lambda x: x.to(BF16)}, "bfloat16"),
    ("lse", ValueError, {"lse": lambda x: x[:, :2]}, r"\(2, 2, 4\)"),
    ("lse", ValueError, {"lse": lambda x: x.to("meta")}, "meta"),
    ("backend", ValueError, {"backend": ""}, "''"),
    ("backend", ValueError, {"backend": {}}, "{}"),
]


@pytest.mark.parametrize("argument, error, changes, came", MERGE, ids=ids(MERGE))
def test_merge_states(argument, error, changes, came):
    given = {"out": torch.zeros(2, 3, 4, 8), "lse": torch.zeros(2, 3, 4)}
    given |= {name: change(given[name]) if callable(change) else change for name, change in changes.items()}
    with pytest.raises(error, match=f"^{argument}: expected .*, got .*{came}"):
        merge_states(**given)


def test_unsupported_reasons_of_nothing_known():
    with pytest.raises(ValueError, match=r"^op: expected one of .*, got 'attention'"):
        unsupported_reasons("attention", "cpu")
    with pytest.raises(ValueError, match=r"^backend: expected .*, got 'tpu'"):
        unsupported_reasons("tree_attention", "tpu")
