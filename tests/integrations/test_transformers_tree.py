"""TreeModel: hidden states over a tree equal those of each path run alone, for every model family that generate takes.

A tree of a root, two children and a grandchild, grown over several forwards, with tokens of one node in two of them.
"""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers_models import MODELS, VOCAB, build  # noqa: E402

from tts_kernels.integrations.transformers_tree import TreeModel  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def alone(decoder, *parts: torch.Tensor) -> torch.Tensor:
    """Hidden states of the last part, of a path run as one sequence by transformers itself."""
    with torch.no_grad():
        return decoder(torch.cat(parts)[None]).last_hidden_state[0, -len(parts[-1]) :]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_equal_those_of_each_path(name, backend):
    model = build(name)
    tree = TreeModel(model, num_pages=40, page_size=4, backend=backend)
    prompt, left, right, more = tokens(13, 0), tokens(9, 1), tokens(6, 2), tokens(5, 3)
    root = tree.kv.add(None, 10)
    first = tree.forward({root: 10}, prompt[:10])
    tree.kv.append(root, 3)
    second = tree.forward({root: 3}, prompt[10:])
    a, b = tree.kv.fork(root, 2)
    tree.kv.append([a, b], [9, 6])
    below = tree.forward({b: 6, a: 9}, torch.cat([right, left]))
    c = tree.kv.add(a, 5)
    last = tree.forward({c: 5}, more)

    decoder = model.get_decoder()
    close = {"atol": 2e-5, "rtol": 2e-4}
    torch.testing.assert_close(torch.cat([first, second]), alone(decoder, prompt), **close)
    torch.testing.assert_close(below[:6], alone(decoder, prompt, right), **close)
    torch.testing.assert_close(below[6:], alone(decoder, prompt, left), **close)
    torch.testing.assert_close(last, alone(decoder, prompt, left, more), **close)


def test_parents_and_children_in_one_forward():
    model = build("qwen3")
    tree = TreeModel(model, num_pages=40, page_size=4)
    prompt, left, more = tokens(7, 0), tokens(5, 1), tokens(3, 2)
    root = tree.kv.add(None, 7)
    a = tree.kv.add(root, 5)
    b = tree.kv.add(a, 3)
    got = tree.forward({b: 3, root: 7, a: 5}, torch.cat([more, prompt, left]))
    wanted = torch.cat(
        [alone(model.model, prompt, left, more), alone(model.model, prompt), alone(model.model, prompt, left)]
    )
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-4)


def test_an_advanced_plan_decodes():
    model = build("llama")
    tree = TreeModel(model, num_pages=40, page_size=4)
    prompt, ids = tokens(6, 0), tokens(10, 1)
    root = tree.kv.add(None, 6)
    tree.forward({root: 6}, prompt)
    leaves = tree.kv.fork(root, 2)
    tree.kv.append(leaves)
    rows = dict.fromkeys(leaves, 1)
    plan = tree.kv.plan(rows, reserve=4)
    got = [tree.forward(rows, ids[:2], plan=plan)]
    for step in range(1, 5):
        tree.kv.append(leaves)
        got.append(tree.forward(rows, ids[2 * step : 2 * step + 2], plan=plan.advance_()))
        assert torch.equal(plan.slots(), tree.kv.slots(rows))
    for leaf in range(2):
        wanted = alone(model.model, prompt, ids[leaf::2])
        torch.testing.assert_close(torch.stack([states[leaf] for states in got]), wanted, atol=2e-5, rtol=2e-4)


def test_nothing_to_run_and_the_model_is_left_as_it_was():
    model = build("qwen3")
    before = model.config._attn_implementation
    tree = TreeModel(model, num_pages=4)
    assert tree.forward({}, tokens(0, 0)).shape == (0, 64)
    tree.forward({tree.kv.add(None, 3): 3}, tokens(3, 0))
    assert model.config._attn_implementation == before
    assert tree.num_layers == 2 and tree.device == torch.device("cpu")


def test_a_forward_that_failed_does_not_spoil_the_next(monkeypatch):
    model = build("qwen3")
    tree = TreeModel(model, num_pages=8)
    root = tree.kv.add(None, 3)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tree.forward({root: 3}, tokens(3, 0))
    got = tree.forward({root: 3}, tokens(3, 0))
    torch.testing.assert_close(got, alone(model.model, tokens(3, 0)), atol=2e-5, rtol=2e-4)


def test_bad_input():
    model = build("qwen3")
    with pytest.raises(TypeError, match=r"model: expected a transformers model, got int"):
        TreeModel(3, num_pages=4)
    with pytest.raises(ValueError, match="num_pages"):
        TreeModel(model, num_pages=0)
    tree = TreeModel(model, num_pages=4)
    root = tree.kv.add(None, 3)
    with pytest.raises(TypeError, match="input_ids: expected an integer tensor"):
        tree.forward({root: 3}, [1, 2, 3])
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(3,\), the rows of all nodes, got \(2,\)"):
        tree.forward({root: 3}, tokens(2, 0))
    with pytest.raises(ValueError, match="rows"):
        tree.forward({root: 4}, tokens(4, 0))
    with pytest.raises(ValueError, match="plan: expected one of 3 rows"):
        tree.forward({root: 3}, tokens(3, 0), plan=tree.kv.plan({root: 2}))


def small(model_class: str, config_class: str) -> torch.nn.Module:
    config = getattr(transformers, config_class)(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return getattr(transformers, model_class)(config).eval()


def test_recurrent_models_are_refused():
    with pytest.raises(ValueError, match=r"it carries a recurrent state, .*; it has layers of type linear_attention"):
        TreeModel(small("MambaModel", "MambaConfig"), num_pages=4)


def test_bidirectional_models_are_refused_when_they_run():
    tree = TreeModel(small("BertModel", "BertConfig"), num_pages=4)
    root = tree.kv.add(None, 3)
    with pytest.raises(ValueError, match="neither causal"):
        tree.forward({root: 3}, tokens(3, 0))
