"""Policy against stock `generate`, and its own promises: what is stored, computed, given back and refused.

The models are tiny and seeded; page_size 4 and, in `room`, ROOM 3 make leaves take pages and plans be rebuilt often.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import search_models as models
from search_models import PROMPT, generator
from transformers_models import MODELS, build

from tts_kernels.search import policy as module
from tts_kernels.tree.kv_tree import OutOfPages


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models: more threads cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture
def room(monkeypatch):
    monkeypatch.setattr(module, "ROOM", 3)


def stock(policy, model_name, new_tokens, **settings) -> list[list[int]]:
    prompt = policy.tokenizer(PROMPT, return_tensors="pt").input_ids
    model = build(model_name)
    torch.manual_seed(5)
    out = model.generate(prompt, max_new_tokens=new_tokens, **settings)
    return out[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("room")
def test_greedy_equals_stock(name):
    policy = models.policy(name, page_size=4)
    root = policy.start(PROMPT)
    expected = stock(policy, name, 23, do_sample=False)[0]
    whole = policy.sample_steps([root], n=2, stop=None, max_new_tokens=23, temperature=0)
    assert [list(step.ids) for step in whole] == [expected] * 2

    ids, node = [], root
    while len(ids) < 23:  # step by step, on from tokens that are stored late
        (step,) = policy.sample_steps(
            [node], stop=["\n", "e", "a"], max_new_tokens=min(5, 23 - len(ids)), temperature=0
        )
        ids, node = ids + list(step.ids), step.node
    assert ids == expected


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 7}, {"temperature": 1.3, "top_k": 30, "top_p": 0.8}]
)
def test_samples_equal_stock(settings):
    """Draws of N rows at a time from the same seed."""
    policy = models.policy()
    root = policy.start(PROMPT)
    expected = stock(policy, "qwen2", 17, do_sample=True, num_return_sequences=6, **{"top_k": 0, **settings})
    torch.manual_seed(5)
    steps = policy.sample_steps([root], n=6, stop=None, max_new_tokens=17, **settings)
    assert [list(step.ids) for step in steps] == expected
    assert len({step.ids for step in steps}) == 6
    assert {step.reason for step in steps} == {"length"} and not any(step.ended for step in steps)
    again = policy.sample_steps([root], n=6, stop=None, max_new_tokens=17, generator=generator(5), **settings)
    assert [list(step.ids) for step in again] == expected


@pytest.mark.usefixtures("room")
def test_stop_strings():
    policy = models.policy(page_size=4, ends=True)
    root = policy.start(PROMPT)
    stops = ["\n\n", "\n", "ab", "b", "3x"]
    steps = policy.sample_steps([root], n=64, stop=stops, max_new_tokens=30, temperature=1.5, generator=generator(0))
    assert {step.reason for step in steps} == {"stop", "eos", "length"}
    for step in steps:
        so_far = [policy.tokenizer.decode(step.ids[:k], skip_special_tokens=True) for k in range(1, len(step.ids) + 1)]
        found = [any(stop in text for stop in stops) for text in so_far]
        assert found.index(True) == len(found) - 1 if step.reason == "stop" else not any(found)
        assert (step.ids[-1] in models.ENDS) == (step.reason == "eos") == step.ended
        assert len(step.ids) == 30 if step.reason == "length" else len(step.ids) <= 30
        assert step.text == so_far[-1]


@pytest.mark.parametrize(
    "tokens, stop, text",
    [
        (["a", "Ã", "©"], "é", "aé"),  # one character of two tokens
        (["a", "Ã", "©"], ["x", "aé"], "aé"),
        (["a", "Ċ", "Ċ"], "\n\n", "a\n\n"),
        (["zĊ", "Ċz"], "\n\n", "z\n\nz"),  # what the last token has behind it stays
        (["a", "xĊĊy"], "\n\n", "ax\n\ny"),
        (["a", "b", *"stop"], "stop", "abstop"),
        ([*"sto", *"stop"], "stop", "stostop"),
    ],
)
def test_stop_strings_across_tokens(tokens, stop, text, monkeypatch):
    policy = models.policy(tokenizer=models.bytes_())
    script = iter(policy.tokenizer.convert_tokens_to_ids([*tokens, *"never"]))
    monkeypatch.setattr(module, "sampler", lambda *args: lambda logits, rows: [next(script)])
    (step,) = policy.sample_steps([policy.start([7, 8])], stop=stop)
    assert (step.text, len(step.ids), step.reason) == (text, len(tokens), "stop")


@pytest.mark.usefixtures("room")
def test_several_parents_at_once():
    """Each goes on from its own tokens, in the order in which they are named."""
    policy = models.policy(page_size=4)
    roots = [policy.start(prompt) for prompt in (PROMPT, "Another one", "?")]
    steps = policy.sample_steps(roots, stop=None, max_new_tokens=6, temperature=0)
    nodes = [steps[2].node, roots[1], steps[0].node, steps[2].node]
    alone = [policy.sample_steps([node], stop=None, max_new_tokens=7, temperature=0)[0].ids for node in nodes]
    together = policy.sample_steps(nodes, n=2, stop=None, max_new_tokens=7, temperature=0)
    assert [step.ids for step in together] == [ids for ids in alone for _ in range(2)]
    assert len(set(alone)) == 3 and alone[1][:6] == steps[1].ids


@pytest.mark.parametrize("tokenizer", [models.characters, models.words])
def test_texts_of_a_path_join(tokenizer):
    policy = models.policy(tokenizer=tokenizer())
    prompt = [5, 9, 30, 41, 7]
    node, ids, text = policy.start(prompt), [], ""
    for _ in range(6):
        (step,) = policy.sample_steps([node], stop=None, max_new_tokens=3, generator=generator(len(ids)))
        node, ids, text = step.node, ids + list(step.ids), text + step.text
    decode = lambda ids: policy.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    assert decode(prompt) + text == decode(prompt + ids)


def test_what_is_computed_and_stored():
    policy = models.policy(page_size=4)
    pages = policy.kv.free_pages
    root = policy.start(PROMPT)
    prompt = len(policy.tokenizer(PROMPT).input_ids)
    assert policy.tokens_computed == prompt
    assert pages - policy.kv.free_pages == -(-prompt // 4)
    first = policy.sample_steps([root], n=4, stop=None, max_new_tokens=10)
    assert policy.tokens_computed == prompt + 4 * 9  # the last tokens wait
    a, b = first[1].node, first[2].node
    second = policy.sample_steps([a, b, a], n=2, stop=None, max_new_tokens=5)
    assert policy.tokens_computed == prompt + 4 * 9 + 2 + 6 * 4
    assert [policy.kv.context_len(step.node) for step in second] == [prompt + 10 + 4] * 6
    policy.sample_steps([a], stop=None, max_new_tokens=1)
    assert policy.tokens_computed == prompt + 4 * 9 + 2 + 6 * 4  # nothing new to be stored
    assert policy.sample_steps([]) == []


def test_released_nodes_free_their_pages():
    policy = models.policy(page_size=4)
    pages = policy.kv.free_pages
    root = policy.start(PROMPT)
    after_prompt = policy.kv.free_pages
    first = policy.sample_steps([root], n=3, stop=None, max_new_tokens=7)
    policy.release([root, first[0].node, first[1].node])
    second = policy.sample_steps([first[2].node], n=2, stop=None, max_new_tokens=7)
    policy.release(first[2].node)  # its pages and the prompt's are below second
    assert policy.kv.free_pages < after_prompt
    policy.release([step.node for step in second])
    assert policy.kv.free_pages == pages
    for wrong in (root, second[0].node, 99):
        with pytest.raises(ValueError, match=r"^nodes: expected a node of this tree that is not released"):
            policy.release(wrong)
        with pytest.raises(ValueError, match=r"^parents: expected nodes of this policy that are not released, got"):
            policy.sample_steps([wrong])


def test_plans_are_advanced(monkeypatch):
    policy = models.policy()
    root = policy.start(PROMPT)
    plans = []
    make = policy.kv.plan
    monkeypatch.setattr(policy.kv, "plan", lambda rows, **kwargs: plans.append(len(rows)) or make(rows, **kwargs))
    policy.sample_steps([root], n=5, stop=None, max_new_tokens=2 * module.ROOM)
    assert plans == [5, 5]
    plans.clear()
    steps = policy.sample_steps([root], n=40, stop="a", max_new_tokens=module.ROOM, generator=generator(1))
    ends = {len(step.ids) for step in steps}  # steps of decoding after which leaves were dropped
    assert len(plans) <= len(ends) + 1 and plans == sorted(plans, reverse=True)


def test_a_full_tree():
    policy = models.policy(page_size=4, max_tokens=100)
    root = policy.start(PROMPT)
    (step,) = policy.sample_steps([root], stop=None, max_new_tokens=6, temperature=0)
    free = policy.kv.free_pages
    match = r"^max_tokens: expected room for all that is sampled at once, got 100 \(\d+ more pages are needed, "
    for n, new in ((1, 200), (4, 30), (30, 2)):
        with pytest.raises(OutOfPages, match=match):
            policy.sample_steps([step.node], n=n, stop=None, max_new_tokens=new)
        assert policy.kv.free_pages == free
    with pytest.raises(OutOfPages, match=match):
        policy.start(PROMPT * 3)
    assert policy.kv.free_pages == free
    more = policy.sample_steps([step.node], stop=None, max_new_tokens=17, temperature=0)
    assert [*step.ids, *more[0].ids] == stock(policy, "qwen2", 23, do_sample=False)[0]
    # what is left is used to the last page, though no room for ROOM tokens is left
    policy.sample_steps([step.node], stop=None, max_new_tokens=4 * policy.kv.free_pages + 1)
    assert policy.kv.free_pages == 0


def test_pages_are_not_asked_for_before_they_are_needed(monkeypatch):
    """The pages left hold the step, though not what it might have become."""
    policy = models.policy(page_size=4, max_tokens=24)
    script = iter([20] * 11 + [2])  # then two line breaks
    monkeypatch.setattr(module, "sampler", lambda *args: lambda logits, rows: [next(script)])
    (step,) = policy.sample_steps([policy.start([7] * 12)], max_new_tokens=2048)
    assert len(step.ids) == 12 and step.reason == "stop" and policy.kv.free_pages == 0


def test_an_error_in_the_model_leaves_the_parents_usable(monkeypatch):
    policy = models.policy(page_size=4)
    root = policy.start(PROMPT)
    (step,) = policy.sample_steps([root], stop=None, max_new_tokens=4, temperature=0)
    forward, calls = policy._model.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 4):
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy._model, "forward", failing)
    for _ in range(2):  # at the waiting token, then within the decoding
        with pytest.raises(KeyboardInterrupt):
            policy.sample_steps([step.node], stop=None, max_new_tokens=19, temperature=0)
    (more,) = policy.sample_steps([step.node], stop=None, max_new_tokens=19, temperature=0)
    assert [*step.ids, *more.ids] == stock(policy, "qwen2", 23, do_sample=False)[0]


def test_the_context_is_full():
    policy = models.policy(max_position_embeddings=64)
    root = policy.start(PROMPT)
    room = 64 - len(policy.tokenizer(PROMPT).input_ids)
    (short,) = policy.sample_steps([root], stop=None, max_new_tokens=room - 3)
    assert not short.ended
    steps = policy.sample_steps([root, short.node], stop=None)
    assert [(len(step.ids), step.ended, step.reason) for step in steps] == [(room, True, "length"), (3, True, "length")]
    with pytest.raises(ValueError, match=rf"^parents: expected nodes that have not ended, got {steps[0].node}$"):
        policy.sample_steps([steps[0].node])
    with pytest.raises(
        ValueError, match=r"^prompt: expected at least 1 token and fewer than the model's context of 64"
    ):
        policy.start([5] * 64)


def test_the_context_is_full_at_a_stop_string(monkeypatch):
    policy = models.policy(max_position_embeddings=64)
    monkeypatch.setattr(module, "sampler", lambda *args: lambda logits, rows: [2] * len(rows))  # two line breaks
    nodes = [policy.start([5] * length) for length in (62, 63)]
    steps = policy.sample_steps(nodes)
    assert [(step.ended, step.reason) for step in steps] == [(False, "stop"), (True, "length")]


PROMPTS = [PROMPT + more for more in (" And pears?", " And plums, and what is left?", "", " And pears too?")]


@pytest.mark.parametrize("prefill", [4096, 20])
def test_what_prompts_begin_with_is_computed_and_stored_once(prefill, monkeypatch):
    monkeypatch.setattr(module, "PREFILL", prefill)
    policy, alone = models.policy(page_size=4), models.policy(page_size=4)
    roots, wanted = policy.start_all(PROMPTS), [alone.start(prompt) for prompt in PROMPTS]
    ids = [policy.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    shared = min(map(len, ids)) - 1  # each goes on behind it
    assert policy.tokens_computed == sum(map(len, ids)) - 3 * shared
    taken = policy.kv.num_pages - policy.kv.free_pages
    assert taken == -(-shared // 4) + sum(-(-(len(of_one) - shared) // 4) for of_one in ids)
    for root, one in zip(roots, wanted):
        torch.testing.assert_close(policy._tips[root].hidden, alone._tips[one].hidden, atol=1e-5, rtol=1e-5)
    settings = {"stop": None, "max_new_tokens": 12, "temperature": 0}
    (first, *others), *_ = steps = [p.sample_steps(r, **settings) for p, r in ((policy, roots), (alone, wanted))]
    assert [step.ids for step in steps[0]] == [step.ids for step in steps[1]]
    policy.release([*roots, first.node, *(step.node for step in others)])
    assert policy.kv.free_pages == policy.kv.num_pages


def test_prompts_that_do_not_fit_leave_nothing(monkeypatch):
    policy = models.policy(page_size=4, max_tokens=100)
    with pytest.raises(OutOfPages, match="max_tokens: expected room for all"):
        policy.start_all(PROMPTS)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: expected at least 1 token"):
        policy.start_all([PROMPT, ""])
    for broken in (ZeroDivisionError, KeyboardInterrupt):

        def failing(*_, broken=broken, **__):
            raise broken

        monkeypatch.setattr(policy._model, "forward", failing)
        with pytest.raises(broken):
            policy.start_all(PROMPTS[1:3])
    assert policy.kv.free_pages == policy.kv.num_pages and not policy._tips


def test_parents_of_one_generator_are_drawn_as_if_alone():
    policy = models.policy(ends=True)
    roots = policy.start_all(PROMPTS)
    parents = [roots[0], roots[0], roots[2], roots[1]]
    together = [models.generator(5), models.generator(5), models.generator(9)]
    got = policy.sample_steps(
        parents, n=2, max_new_tokens=15, generator=[together[i] for i in (0, 0, 1, 2)], temperature=1.5
    )
    wanted = []
    for asked, seed in (([roots[0]] * 2, 5), ([roots[2]], 5), ([roots[1]], 9)):
        wanted += policy.sample_steps(asked, n=2, max_new_tokens=15, generator=models.generator(seed), temperature=1.5)
    assert [step.ids for step in got] == [step.ids for step in wanted] and len({step.ids for step in got}) > 5
    assert len({len(step.ids) for step in got}) > 1  # rows leave one by one
    with pytest.raises(ValueError, match=r"^generator: expected 4, one for each of the parents, got 3$"):
        policy.sample_steps(parents, generator=together)


def test_prompts():
    policy = models.policy()
    assert policy.prompt("Q") == "Q"
    policy.tokenizer.chat_template = "{% for m in messages %}<tag>{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    assert policy.tokenizer.decode(policy.prompt("Why?")) == "<tag>user: Why?\n\n"
    ids = policy.tokenizer(PROMPT).input_ids
    greedy = [
        policy.sample_steps([policy.start(prompt)], stop=None, max_new_tokens=5, temperature=0)[0].ids
        for prompt in (PROMPT, ids, torch.tensor(ids), tuple(ids))
    ]
    assert len(set(greedy)) == 1
    other = models.policy(prompt=lambda question: [1, *ids])
    assert other.prompt("Q") == [1, *ids]


def test_final_softcap():
    """Gemma 2 caps its logits: that changes the draws, not the order."""
    policy = models.policy("gemma2-softcap-window")
    assert policy._softcap == 30.0
    root = policy.start(PROMPT)
    logits = policy._logits(policy._tips[root].hidden[None])
    ids = torch.tensor([policy.tokenizer(PROMPT).input_ids])
    expected = build("gemma2-softcap-window")(ids).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


BAD = [
    ({"parents": 3}, TypeError, "parents: expected a list of ints, got 3"),
    ({"parents": ["a"]}, TypeError, "parents[0]: expected an int, got 'a'"),
    ({"n": 0}, ValueError, "n: expected at least 1, got 0"),
    ({"n": 1.5}, TypeError, "n: expected an int, got 1.5"),
    ({"stop": ""}, ValueError, "stop: expected strings that are not empty, or None, got ''"),
    ({"stop": []}, ValueError, "stop: expected strings that are not empty, or None, got []"),
    ({"stop": ["a", ""]}, ValueError, "stop: expected strings that are not empty, or None, got ['a', '']"),
    ({"stop": 7}, TypeError, "stop: expected a string, a list of strings or None, got 7"),
    ({"stop": [7]}, TypeError, "stop: expected a string, a list of strings or None, got [7]"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected at least 1, got 0"),
    ({"temperature": -1}, ValueError, "temperature: expected at least 0 and finite, got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected at least 0 and finite, got nan"),
    ({"temperature": "hot"}, TypeError, "temperature: expected a number, got 'hot'"),
    ({"top_p": 0}, ValueError, "top_p: expected 0 < top_p <= 1, got 0"),
    ({"top_p": 1.1}, ValueError, "top_p: expected 0 < top_p <= 1, got 1.1"),
    ({"top_k": -1}, ValueError, "top_k: expected at least 0, got -1"),
]


@pytest.fixture(scope="module")
def started():
    policy = models.policy()
    return policy, policy.start(PROMPT)


@pytest.mark.parametrize("arguments, error, text", BAD, ids=[text for _, _, text in BAD])
def test_bad_input(started, arguments, error, text):
    policy, root = started
    free = policy.kv.free_pages
    with pytest.raises(error) as raised:
        policy.sample_steps(**{"parents": [root], **arguments})
    assert str(raised.value) == text
    assert policy.kv.free_pages == free


def test_bad_models(started):
    policy, _ = started
    model = build("qwen2")
    for wrong in (model.model, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"^model: expected a transformers model with a language model head, got "):
            module.Policy(wrong, policy.tokenizer, max_tokens=64)
    with pytest.raises(ValueError, match=r"^max_tokens: expected at least 1, got 0$"):
        module.Policy(model, policy.tokenizer, max_tokens=0)
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"^model: expected logits that are the head's alone, got logit_scale=0.5$"):
        module.Policy(model, policy.tokenizer, max_tokens=64)
    for wrong in ("", []):
        with pytest.raises(ValueError, match=r"^prompt: expected at least 1 token"):
            policy.start(wrong)
    with pytest.raises(TypeError, match=r"^prompt: expected a list of ints, got 3"):
        policy.start(3)
    with pytest.raises(TypeError, match=r"^prompts: expected a list of prompts, got 'ab'$"):
        policy.start_all("ab")
