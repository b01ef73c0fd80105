"""A call whose tensors are described by the same metadata as those of an earlier one: what is not asked again, and what
is. Whoever watches or transforms torch's ops sees every call."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import attention_cases as cases
import attention_paths as paths
import pytest
import torch
from attention_cases import BF16, FP16, Case
from forests import star

from tts_kernels import dispatch
from tts_kernels.attention import api, append_kv, checks, merge_states, tree_attention

CUDA = [param for param in paths.available() if param.values[0].backend == "cuda"]
CASE = Case(heads=(4, 2), head_dim=32, page_size=4, dtypes=(FP16, FP16))


@pytest.fixture(params=CUDA or [pytest.param(None, marks=pytest.mark.skip(reason=str(paths.Path("cuda").missing())))])
def cuda(request, monkeypatch):
    request.param.select(monkeypatch)
    return request.param


class Call:
    """Of tree_attention, with what is needed to make another one of it."""

    def __init__(self, path: paths.Path) -> None:
        self.path = path
        inputs = cases.make_inputs(CASE, star(3, prefix=13, suffix=[5], page_size=4), path)
        self.plan = inputs.forest.plan(device=path.device)
        self.q, (self.k_cache, self.v_cache) = inputs.q.to(path.device), inputs.caches(path.device)

    def __call__(self, **changed):
        given = {name: changed.pop(name, getattr(self, name)) for name in ("q", "k_cache", "v_cache", "plan")}
        return tree_attention(*given.values(), **({"backend": self.path.backend} | changed))

    @property
    def work(self):
        (work,) = self.plan.works.values()
        return work


@pytest.fixture
def call(cuda):
    return Call(cuda)


def appended(device: str) -> tuple:
    k, v, q = torch.randn(3, 3, 2, 8, device=device).to(BF16)
    k_cache, v_cache = torch.zeros(2, 2, 4, 2, 8, dtype=BF16, device=device)
    slots = torch.tensor([3, -1, 6], device=device)
    return (k, v, k_cache, v_cache, slots), {
        "cos_sin_cache": torch.randn(16, 8, device=device),
        "positions": torch.tensor([1, 2, 3], dtype=torch.int32, device=device),
        "q": q,
    }


@pytest.fixture
def nothing_asked(monkeypatch):
    """Fails where checks of metadata run, a backend gives reasons, a config is looked up or the dispatcher is asked."""

    def armed(path: paths.Path) -> None:
        def asked(*arguments, **options):
            raise AssertionError("asked again")

        module = api.BACKENDS.load(path.backend)
        for owner, names in (
            (checks, ("check_tensor", "check_caches", "check_states", "check_slots", "check_rope", "check_out")),
            (dispatch.Backends, ("unsupported_reasons", "choose", "pick")),
            (module, ("unsupported_reasons", "config_of", "prepare")),
            (api, ("_tree_attention", "_append_kv", "_merge_states", "work_of")),
        ):
            for name in names:
                monkeypatch.setattr(owner, name, asked, raising=False)
        for op in ("tree_attention", "append_kv", "merge_states"):
            monkeypatch.setattr(getattr(torch.ops.tts_kernels, op), "default", asked)

    return armed


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "window": 4}, {"backend": None}], ids=str)
def test_a_second_call_of_tree_attention_asks_nothing(call, nothing_asked, options, monkeypatch):
    if call.path.emulated:
        monkeypatch.setitem(api.BACKENDS.preference, "cpu", ("cuda",))
        monkeypatch.setattr(api, "work_of", work_of_a_device)
    wanted = call(**options)
    call(**options, return_lse=True)
    nothing_asked(call.path)
    call.k_cache, call.v_cache = call.k_cache.clone(), call.v_cache.clone()  # another layer's
    assert torch.equal(call(**options), wanted)
    out, lse = call(**options, return_lse=True)
    assert torch.equal(out, wanted) and lse.isfinite().all()
    call.plan.advance_()
    call(**options)


def work_of_a_device(plan, q, k_cache, v_cache, backend, made=api.work_of):
    """On a CPU backend=None never takes a work list by itself."""
    return made(plan, q, k_cache, v_cache, backend or api.BACKENDS.choose("tree_attention", q, k_cache, v_cache))


def test_a_second_call_of_append_kv_asks_nothing(path, nothing_asked):
    tensors, rope = appended(path.device)
    for options in ({}, rope):
        append_kv(*tensors, **options, backend=path.backend)
    wanted = [cache.clone() for cache in tensors[2:4]], append_kv(*tensors, **rope, backend=path.backend)
    nothing_asked(path)
    for cache in tensors[2:4]:
        cache.zero_()
    got = append_kv(*tensors, **rope, backend=path.backend)
    assert torch.equal(got, wanted[1])
    assert all(map(torch.equal, tensors[2:4], wanted[0]))
    assert append_kv(*tensors, backend=path.backend) is None


def test_one_is_not_true_in_a_second_call_either(path):
    tensors, rope = appended(path.device)
    for _ in range(2):
        append_kv(*tensors, **rope, is_neox=True, backend=path.backend)
        with pytest.raises(TypeError, match="is_neox: expected a bool"):
            append_kv(*tensors, **rope, is_neox=1, backend=path.backend)


def test_a_second_call_of_merge_states_asks_nothing(path, nothing_asked):
    out, lse = torch.randn(2, 3, 2, 8, device=path.device), torch.randn(2, 3, 2, device=path.device)
    wanted = merge_states(out, lse, backend=path.backend)
    nothing_asked(path)
    assert all(map(torch.equal, merge_states(out, lse, backend=path.backend), wanted))


def misaligned(x: torch.Tensor) -> torch.Tensor:
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return memory.view(x.shape).copy_(x)


CHANGES = {
    "shape": (lambda call: {"q": call.q[:2]}, ValueError, "q: expected the 3 rows of plan, got 2 rows"),
    "resized": (lambda call: {"q": call.q.resize_(2, 4, 32)}, ValueError, "q: expected the 3 rows"),
    "heads": (lambda call: {"q": call.q[:, :3]}, ValueError, "q: expected Hq to be a positive multiple"),
    "dtype": (lambda call: {"v_cache": call.v_cache.to(BF16)}, TypeError, "v_cache: expected dtype torch.float16"),
    "strides": (
        lambda call: {"q": call.q.transpose(1, 2).contiguous().transpose(1, 2)},
        ValueError,
        "q: .*unit stride",
    ),
    "device": (lambda call: {"k_cache": call.k_cache.to("meta")}, ValueError, "k_cache: expected a tensor on"),
    "gradient": (
        lambda call: {"q": call.q.requires_grad_()},
        ValueError,
        "q: expected a tensor that needs no gradient",
    ),
    "alignment": (lambda call: {"v_cache": misaligned(call.v_cache)}, RuntimeError, "the rows of v_cache do not lie"),
    "no tensor": (lambda call: {"q": call.q.tolist()}, TypeError, "q: expected a tensor"),
    "no plan": (lambda call: {"plan": None}, TypeError, "plan: expected a TreePlan"),
    "out": (lambda call: {"out": call.q[:2].clone()}, ValueError, "out: expected shape"),
    "out of one row": (lambda call: {"out": call.q[:1].expand(3, 4, 32)}, ValueError, "out: .*memory of its own"),
    "backend": (lambda call: {"backend": "gpu"}, ValueError, "backend: expected None or one of"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_metadata_is_checked(call, change):
    changed, error, message = CHANGES[change]
    for _ in range(2):
        call()
        call(out=torch.empty_like(call.q))
    assert len(call.work.calls) == 2
    with pytest.raises(error, match=message):
        call(**changed(call))
    assert len(call.work.calls) == 2


def test_values_are_checked_in_every_call(call):
    for _ in range(2):
        call()
        call(out=torch.empty_like(call.q))
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        call(out=call.q)
    for wrong in ({"scale": float("nan")}, {"softcap": -1.0}, {"window": -2}, {"k_scale": torch.ones(3)}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
            call(**wrong)
    call.plan.pages[0] = 10_000
    with pytest.raises(ValueError, match="page ids in"):
        call(check=True)


def test_a_list_that_is_replaced_takes_what_was_kept_with_it(call):
    wanted = call()
    work = call.work
    assert work.calls
    (key,) = call.plan.works
    call.plan.works[key] = other = dataclasses.replace(work, table=work.table.clone())
    assert not other.calls
    work.table.fill_(-1)  # nobody reads it
    for _ in range(2):
        assert torch.equal(call(), wanted)
    assert other.calls
    call.plan.works.clear()
    assert torch.equal(call(), wanted)
    assert call.work is not other


def test_geometries_share_a_plan(call):
    """Each keeps its calls with its own list."""
    q, wanted = call.q, call()
    other = torch.cat([q, q[:, :2]], 1)
    wanted_of_other = call(q=other, backend="reference")
    for _ in range(3):
        assert torch.equal(call(), wanted)
        torch.testing.assert_close(call(q=other), wanted_of_other, atol=5e-3, rtol=5e-3)
    assert [len(work.calls) for work in call.plan.works.values()] == [1, 1]


def test_gradients_are_refused_while_grad_mode_is_on_alone(call):
    call.q.requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            call()
        with pytest.raises(ValueError, match="needs no gradient"):
            call()


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.ops.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    ops: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.ops.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("watcher", [Seen, Functions])
def test_modes_see_every_call(call, watcher):
    states = torch.randn(2, 3, 2, 8, device=call.path.device), torch.randn(2, 3, 2, device=call.path.device)
    tensors, rope = appended(call.path.device)
    for _ in range(2):
        call(), append_kv(*tensors, **rope, backend="cuda"), merge_states(*states, backend="cuda")
    with watcher() as seen:
        call(), append_kv(*tensors, **rope, backend="cuda"), merge_states(*states, backend="cuda")
    for op in ("tree_attention", "append_kv", "merge_states"):
        assert f"tts_kernels.{op}.default" in seen.ops


def test_subclasses_and_profilers_see_every_call(call):
    wanted = call()
    Subclass.ops.clear()
    call(q=call.q.as_subclass(Subclass))
    assert "tts_kernels.tree_attention.default" in Subclass.ops
    with torch.profiler.profile() as profile:
        assert torch.equal(call(), wanted)
    assert "tts_kernels::tree_attention" in [event.key for event in profile.key_averages()]


def test_transforms_and_fake_tensors_do_not_reach_the_kernel(call):
    call()
    with pytest.raises(RuntimeError, match="tts_kernels::tree_attention"):
        torch.func.vmap(lambda q: call(q=q))(call.q[None])
    out, lse = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2)
    for _ in range(2):
        merge_states(out, lse)
        assert merge_states(out.to("meta"), lse.to("meta"))[0].is_meta
    with torch._subclasses.FakeTensorMode() as mode:
        merged, _ = merge_states(mode.from_tensor(out), mode.from_tensor(lse))
    assert isinstance(merged, torch._subclasses.FakeTensor)


def test_a_negated_view_holds_what_it_says():
    """Its memory holds the opposite: the dispatcher makes a copy for ops that do not know of it."""
    out, lse = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2)
    merge_states(-out, lse)
    for _ in range(2):
        assert torch.equal(merge_states(torch._neg_view(out), lse)[0], merge_states(-out, lse)[0])


def test_what_is_kept_is_bounded():
    kept = dispatch.Checked()
    for i in range(3 * kept.MOST):
        kept.keep((i,), i)
        assert len(kept) <= kept.MOST and kept[(i,)] == i
