"""Sessions against the scores of each path worked out alone: random trees with forks, releases, re-expansions and
evictions, in few and in many forwards, for every kind of score."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

import verifier_cases as cases
from transformers_models import MODELS
from verifier_cases import HEADS, make, scores_alone, texts

from tts_kernels import OutOfPages

# fp32 models of two layers; implicit rewards are differences of sums of log-probabilities.
CLOSE = {"abs": 2e-5, "rel": 2e-4}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def path_scores(scores, i: int) -> list[float]:
    begin, end = scores.offsets[i : i + 2].tolist()
    return scores.prob[begin:end].tolist()


def check_aggregates(scores) -> None:
    for i in range(len(scores.nodes)):
        prob = torch.tensor(path_scores(scores, i), dtype=torch.float64)
        assert scores.count[i] == len(prob)
        if len(prob):
            wanted = [prob[-1], prob.min(), prob.prod(), prob.mean(), prob.max()]
            got = [scores.last[i], scores.min[i], scores.prod[i], scores.mean[i], scores.max[i]]
            assert [float(g) for g in got] == pytest.approx([float(w) for w in wanted], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("chunk_tokens", [4096, 13])
@pytest.mark.parametrize("when_full, max_tokens", [("refuse", 4096), ("recompute", 176)])
@pytest.mark.parametrize("kind", HEADS)
def test_random_trees(kind, when_full, max_tokens, chunk_tokens):
    rng = random.Random(f"{kind} {chunk_tokens}")
    verifier = make(kind, page_size=4, chunk_tokens=chunk_tokens)
    question = texts(rng, 1, 20)
    with verifier.session(question, max_tokens=max_tokens, when_full=when_full) as session:
        steps = {session.root: []}
        seen: dict[int, list[float]] = {}
        total = 1 + len(question)  # tokens of all nodes there ever were
        for _ in range(16):
            open_nodes = [node for node in steps if len(steps[node]) < 5]
            parents = [rng.choice(open_nodes) for _ in range(rng.randint(0, 4))]
            new = [texts(rng, 0, 24) for _ in parents]
            scores = session.extend(parents, new)
            check_aggregates(scores)
            for i, (parent, step, node) in enumerate(zip(parents, new, scores.nodes)):
                total += 0 if node in steps else len(step) + 1
                steps[node] = [*steps[parent], step]
                got = path_scores(scores, i)
                assert got == pytest.approx(scores_alone(verifier, question, steps[node]), **CLOSE)
                assert got[:-1] == seen.get(parent, [])  # locked: kept bit by bit
                seen[node] = got
            if rng.random() < 0.3 and len(steps) > 1:
                node = rng.choice([n for n in steps if n != session.root])
                session.release([node] * session._nodes[node].holds)
                del steps[node], seen[node]
        if when_full == "refuse":
            assert session.tokens_encoded == total
        else:
            assert session.tokens_encoded > total
        assert session.tokens_held <= max_tokens
        session.release([n for n in steps if n != session.root for _ in range(session._nodes[n].holds)])
        assert list(session._nodes) == [session.root]
        for model in session.models:
            assert model.kv.num_pages - model.kv.free_pages == -(-(1 + len(question)) // 4)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_family(model):
    """Windows of 6 to 9 tokens end inside of steps, in the step before and in the question."""
    rng = random.Random(model)
    for page_size, chunk_tokens in [(1, 7), (5, 4096)]:
        verifier = make(model=model, page_size=page_size, chunk_tokens=chunk_tokens)
        question = texts(rng, 5, 20)
        with verifier.session(question, max_tokens=200, when_full="recompute") as session:
            nodes, paths = [session.root], [[]]
            for _ in range(3):
                nodes, paths = nodes * 2, paths * 2
                paths = [[*path, texts(rng, 0, 9)] for path in paths]
                scores = session.extend(nodes, [path[-1] for path in paths])
                nodes = list(scores.nodes)
                wanted = [scores_alone(verifier, question, path) for path in paths]
                for i, of_path in enumerate(wanted):
                    assert path_scores(scores, i) == pytest.approx(of_path, **CLOSE)
        for got, of_path in zip(verifier.score([question], [paths])[0], wanted):
            assert got == pytest.approx(of_path, **CLOSE)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision(dtype, error):
    """The same model in transformers rounds otherwise; against fp32 both are off by as much."""
    verifier = make("sigmoid", dtype=dtype, page_size=4)
    assert verifier._kept_trees()[0].kv.dtype == dtype
    paths = [["abc", "de"], ["abc", "dg", "hijk"]]
    session, got = verifier.session("good"), []
    for path in paths:
        node = session.root
        for step in path:
            (node,) = session.extend([node], [step]).nodes
        got.append(path_scores(session.scores([node]), 0))
    for one, other, path in zip(got, verifier.score(["good"], [paths])[0], paths):
        wanted = pytest.approx(scores_alone(verifier, "good", path), abs=error)
        assert one == wanted and other == wanted


def test_five_hundred_steps():
    verifier = make("sigmoid", recipe={"context": 4000})
    verifier.models[0].config.max_position_embeddings = 4000
    steps = [chr(ord("a") + i % 26) for i in range(500)]
    session = verifier.session("good", max_tokens=16 * 501)
    node = session.root
    for step in steps:
        (node,) = session.extend([node], [step]).nodes
    scores = session.scores([node])
    assert scores.count.tolist() == [500] and session.tokens_encoded == 5 + 2 * 500
    assert path_scores(scores, 0) == pytest.approx(scores_alone(verifier, "good", steps), **CLOSE)


@pytest.mark.parametrize("made_in, used_in", [(torch.inference_mode, torch.enable_grad),
                                              (torch.enable_grad, torch.inference_mode),
                                              (torch.no_grad, torch.enable_grad)])  # fmt: skip
def test_grad_modes(made_in, used_in):
    verifier = make()
    with made_in():
        session = verifier.session("good")
        (a,) = session.extend([session.root], ["abc"]).nodes
        one_shot = verifier.score(["good"], [["abc|d"]])
    with used_in():
        scores = session.extend([a], ["d"])
        assert verifier.score(["good"], [["abc|d"]]) == one_shot
    assert path_scores(scores, 0) == pytest.approx(one_shot[0][0], abs=1e-6)
    assert not scores.prob.requires_grad


def test_one_shot_and_steps_agree():
    verifier = make(page_size=4)
    outputs = ["abc|def|a", "abc|deg", "abc|def|b|c", "", "h"]
    one_shot = verifier.score(["good"], [outputs])[0]
    session = verifier.session("good")
    for output, wanted in zip(outputs, one_shot):
        node = session.root
        for step in verifier.recipe.split(output):
            scores = session.extend([node], [step])
            (node,) = scores.nodes
        got = path_scores(session.scores([node]), 0)
        assert got == pytest.approx(wanted, abs=1e-6)
    assert session.tokens_encoded == 5 + len("abc|def|a|") + len("deg|") + len("b|c|") + len("h|")


def test_asking_again_costs_nothing(monkeypatch):
    session = make().session("good")
    first = session.extend([session.root, session.root, session.root], ["abc", "abd", "abc"])
    assert first.nodes[0] == first.nodes[2] != first.nodes[1]
    assert session.tokens_encoded == 5 + 4 + 4
    monkeypatch.setattr(session.models[0].decoder, "forward", lambda **_: pytest.fail("the model ran"))
    again = session.extend([session.root], ["abd"])
    assert again.nodes == first.nodes[1:2]
    assert torch.equal(again.margin, first.margin[1:2])
    assert torch.equal(session.scores(first.nodes).margin, first.margin)
    assert session.steps(first.nodes[1]) == ["abd"]
    assert session.tokens_encoded == 13


def test_holds():
    """A node is held once for each time that `extend` gave it out, and by its children."""
    session = make().session("good")
    (a,) = session.extend([session.root], ["a"]).nodes
    assert session.extend([session.root], ["a"]).nodes == (a,)
    (b,) = session.extend([a], ["b"]).nodes
    session.release(a)
    assert session.steps(a) == ["a"]
    with pytest.raises(ValueError, match=r"nodes\[0\]: expected node 1 at most 1 times, as the caller holds it, got 2"):
        session.release([a, a])
    session.release([a])
    assert session.steps(b) == ["a", "b"]  # a lives by b
    for call in (
        lambda: session.scores([a]),
        lambda: session.steps(a),
        lambda: session.extend([a], ["c"]),
        lambda: session.release(a),
    ):
        with pytest.raises(ValueError, match="expected a node of this session that is not released, got 1"):
            call()
    assert session.extend([session.root], ["a"]).nodes == (a,)  # b goes on below it, so it is the same
    session.release([a, b])
    for node in (a, b):
        with pytest.raises(ValueError, match=r"nodes\[0\]: expected a node of this session that is not released"):
            session.scores([node])
    with pytest.raises(ValueError, match="expected node 0 at most 0 times, as the caller holds it, got 1"):
        session.release(session.root)
    (again,) = session.extend([session.root], ["a"]).nodes
    assert again not in (a, b)


def test_refuse_changes_nothing():
    session = make(page_size=4).session("good", max_tokens=16)  # 2 pages of 4 are the question's
    (a,) = session.extend([session.root], ["abcdefg"]).nodes
    encoded = session.tokens_encoded
    with pytest.raises(
        OutOfPages, match="max_tokens: at least 1 pages of 4 tokens are needed, 0 of 4 are free; release nodes, or open"
    ):
        session.extend([a, session.root], ["", "abcd"])
    assert session.tokens_encoded == encoded and len(session._nodes) == 2
    assert not session._nodes[a].children
    session.release(a)
    assert session.extend([session.root], ["abcd"]).count.tolist() == [1]


def test_recompute_serves_more_than_fits_at_once():
    verifier = make(page_size=4)
    session = verifier.session("good", max_tokens=24, when_full="recompute")
    firsts = session.extend([session.root] * 5, ["aaaa", "bbbb", "cccc", "dddd", "eeee"])  # 2 pages each, 4 are free
    seconds = session.extend(firsts.nodes, ["a", "b", "c", "d", "e"])
    for i, (first, second) in enumerate(zip(["aaaa", "bbbb", "cccc", "dddd", "eeee"], "abcde")):
        assert path_scores(seconds, i) == pytest.approx(scores_alone(verifier, "good", [first, second]), abs=2e-5)
        assert path_scores(seconds, i)[0] == path_scores(firsts, i)[0]
    with pytest.raises(OutOfPages, match="or give it a larger max_tokens"):
        session.extend([session.root], ["a" * 30])
    assert len(session._nodes) == 11


def test_recompute_lets_go_of_what_is_wanted_last():
    """Six paths of three steps, a page each, taken further in turn, and 9 pages below the question."""
    verifier = make(page_size=4)
    session = verifier.session("abc", max_tokens=4 * 10, when_full="recompute")
    nodes = [session.root] * 6
    tokens = [session.tokens_encoded]
    for _ in range(3):
        nodes = session.extend(nodes, [f"a{c}b" for c in "abcdef"]).nodes
        tokens.append(session.tokens_encoded)
    first, second, third = ((b - a) // 4 for a, b in pairwise(tokens))  # pages, with those of old steps
    # Of the last 18 pages 9 have no room; were what was not used for longest let go of, these would be 6, 8 and 18.
    assert (first, second, third) == (6, 6, 10)
    for node in nodes:
        got = path_scores(session.scores([node]), 0)
        assert got == pytest.approx(scores_alone(verifier, "abc", session.steps(node)), **CLOSE)


def test_recompute_lets_go_of_what_the_call_has_no_use_for_first():
    session = make(page_size=4).session("abc", max_tokens=4 * 5, when_full="recompute")
    a, b, c = session.extend([session.root] * 3, ["aaa", "bbb", "ccc"]).nodes
    session.extend([a], ["ddd"])  # now no page is free
    session.extend([b], ["eee"])  # c was used before a and what is below it
    held = [node for node in session._nodes if session._nodes[node].kv]
    assert c not in held and {a, b} < set(held) and session.tokens_encoded == 4 * 6


def test_close_lets_go_of_everything():
    session = make("implicit").session("good")
    (a,) = session.extend([session.root], ["abc"]).nodes
    wanted = session.scores([a]).prob.tolist()
    assert session.tokens_held == 5 + 4
    session.close()
    assert session.tokens_held == 0 and session.scores([a]).prob.tolist() == wanted
    assert all(record.states is None for record in session._nodes.values())
    again = session.extend([session.root], ["abc"])  # it is there already
    assert again.nodes == (a,) and again.prob.tolist() == wanted
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.extend([session.root, a], ["abc", "d"])
    session.release([a, a])
    assert list(session._nodes) == [session.root]


def test_what_was_released_leaves_nothing_behind():
    """Steps that come and go: the session is as large as the nodes that live."""
    session = make().session("good", max_tokens=48)

    def size():
        return {name: len(held) for name, held in vars(session).items() if hasattr(held, "__len__")}

    before = size()
    for i in range(200):
        session.release(session.extend([session.root], [chr(ord("a") + i % 26)]).nodes)
    assert size() == before


def test_a_step_that_is_extended_often_is_tokenized_once(monkeypatch):
    verifier = make()
    session = verifier.session("good")
    (a,) = session.extend([session.root], ["abc"]).nodes
    seen = []
    encode = cases.Characters.encode
    monkeypatch.setattr(cases.Characters, "encode", lambda s, t, q, steps: seen.append(steps) or encode(s, t, q, steps))
    session.extend([a] * 3, ["b", "c", "d"])
    session.extend([a], ["e"])
    assert seen == [["abc"], ["abc", "b"], ["abc", "c"], ["abc", "d"], ["abc", "e"]]


@pytest.mark.parametrize("kind", ["softmax", "implicit"])
def test_a_tokenizer_that_joins_question_and_step(kind):
    """Then the paths do not share the question's tokens, and are right."""
    verifier = make(kind, layout=cases.JoinedToTheQuestion(), page_size=4)
    session = verifier.session("good")
    a = session.extend([session.root, session.root], ["abc", "abd"])
    b = session.extend(a.nodes[:1], ["cc"])
    assert path_scores(a, 1) == pytest.approx(scores_alone(verifier, "good", ["abd"]), **CLOSE)
    assert path_scores(b, 0) == pytest.approx(scores_alone(verifier, "good", ["abc", "cc"]), **CLOSE)
    assert path_scores(b, 0) == pytest.approx(verifier.score(["good"], [["abc|cc"]])[0][0], **CLOSE)


def test_a_model_that_fails_leaves_the_session_as_it_was(monkeypatch):
    verifier = make(page_size=4)
    session = verifier.session("good")
    (a,) = session.extend([session.root], ["abc"]).nodes
    pages = session.models[0].kv.free_pages
    with monkeypatch.context() as patch:
        patch.setattr(session.models[0].decoder, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.extend([a, session.root], ["x".replace("x", "h"), "b"])
    assert session.models[0].kv.free_pages == pages and len(session._nodes) == 2
    scores = session.extend([a], ["h"])
    assert path_scores(scores, 0) == pytest.approx(scores_alone(verifier, "good", ["abc", "h"]), abs=2e-5)


@pytest.mark.parametrize("kind", ["softmax", "implicit"])
def test_a_path_that_outgrows_the_context_drops_its_first_steps(kind):
    verifier = make(kind, recipe={"context": 16}, too_long="drop_oldest_steps")
    session = verifier.session(["bad", "good"])
    first = session.extend([session.roots[1]], ["abc"])  # 9 tokens
    second = session.extend(first.nodes, ["defg"])  # 14
    with pytest.warns(UserWarning, match=r"steps\[0\]: 1 first steps left out of a path"):
        third = session.extend(second.nodes, ["hi"])  # 17, or 13 without "abc"
    fourth = session.extend(third.nodes, ["j"])  # 15: goes on from there
    with pytest.warns(UserWarning, match=r"steps\[0\]: 3 first steps left out of a path"):
        fifth = session.extend(fourth.nodes, ["abcdef"])
    got = path_scores(fifth, 0)
    shown = [["abc"], ["abc", "defg"], ["defg", "hi"], ["defg", "hi", "j"], ["j", "abcdef"]]
    if kind == "softmax":
        wanted = [scores_alone(verifier, "good", steps)[-1] for steps in shown]
    else:  # each step adds its own tokens' part
        wanted, total = [], 0.0
        for steps in shown:
            scores = scores_alone(verifier, "good", steps)
            total += scores[-1] - (scores[-2] if len(scores) > 1 else 0.0)
            wanted.append(total)
    assert got == pytest.approx(wanted, **CLOSE)
    assert got[:4] == path_scores(fourth, 0)
    assert session.steps(fifth.nodes[0]) == ["abc", "defg", "hi", "j", "abcdef"]


@pytest.mark.parametrize("chunk_tokens", [4096, 13])
@pytest.mark.parametrize("when_full, max_tokens", [("refuse", 4096), ("recompute", 160)])
@pytest.mark.parametrize("kind", HEADS)
def test_several_questions(kind, when_full, max_tokens, chunk_tokens):
    """Each path has the scores that it has alone; what the questions begin with goes through the model once."""
    rng = random.Random(f"{kind} {chunk_tokens}")
    verifier = make(kind, page_size=4, chunk_tokens=chunk_tokens)
    questions = ["good day" + texts(rng, 1, 20) for _ in range(4)] + ["good days"]
    questions.append(questions[1])
    with verifier.session(questions, max_tokens=max_tokens, when_full=when_full) as session:
        assert session.questions == tuple(questions) and session.root == session.roots[0]
        assert session.roots[5] == session.roots[1] and len(set(session.roots)) == 5
        tokens = [verifier.encode("question", q, ())[0].ids for q in questions[:5]]
        shared = next(i for i, column in enumerate(zip(*tokens)) if len(set(column)) > 1)
        shared = min(shared, min(map(len, tokens)) - 1)
        assert shared >= 8
        total = sum(map(len, tokens)) - 4 * shared
        assert session.tokens_encoded == total or when_full == "recompute"
        steps = {root: [q] for root, q in zip(session.roots, questions)}
        for _ in range(12):
            open_nodes = [node for node in steps if len(steps[node]) < 5]
            parents = [rng.choice(open_nodes) for _ in range(rng.randint(0, 6))]
            new = [texts(rng, 0, 24) for _ in parents]
            scores = session.extend(parents, new)
            for i, (parent, step, node) in enumerate(zip(parents, new, scores.nodes)):
                total += 0 if node in steps else len(step) + 1
                steps[node] = [*steps[parent], step]
                question, *path = steps[node]
                assert session.steps(node) == path
                assert path_scores(scores, i) == pytest.approx(scores_alone(verifier, question, path), **CLOSE)
        assert session.tokens_encoded == total if when_full == "refuse" else session.tokens_encoded > total
        assert session.tokens_held <= max_tokens
        session.release([n for n in steps if n not in session.roots for _ in range(session._nodes[n].holds)])
        assert set(session._nodes) - set(session.roots) == {min(session._nodes)}  # what the questions share
        with pytest.raises(ValueError, match=r"expected node \d+ at most 0 times"):
            session.release(session.roots[2])
        with pytest.raises(ValueError, match="expected a node of this session"):
            session.extend([min(session._nodes)], ["abc"])


def test_questions_that_share_less_than_a_page_or_all_of_one():
    verifier = make(page_size=4)
    begin = verifier.encode("question", "", ())[0].ids
    for questions, shared in [(["good", "bad"], 0), (["good day", "good dog"], len(begin) + 6),
                              (["goodbye", "good", "good"], len(begin) + 3)]:  # fmt: skip
        with verifier.session(questions) as session:
            wanted = sum(len(begin) + len(q) for q in set(questions)) - shared
            assert session.tokens_encoded == session.tokens_held == wanted
            scores = session.extend(session.roots, ["ab"] * len(questions))
            for i, question in enumerate(questions):
                assert path_scores(scores, i) == pytest.approx(scores_alone(verifier, question, ["ab"]), **CLOSE)


def test_empty_calls_and_the_root():
    session = make().session("good")
    nothing = session.extend([], [])
    assert nothing.nodes == () and nothing.margin.shape == (0,) and nothing.offsets.tolist() == [0]
    root = session.scores([session.root])
    assert root.count.tolist() == [0] and root.min.isnan().all()


def test_bad_input():
    verifier = make(recipe={"context": 12})
    session = verifier.session("good")
    for call, error, message in [
        (lambda: session.extend([7], ["a"]), ValueError, r"parents\[0\]: expected a node of this session"),
        (lambda: session.extend([0], []), ValueError, "steps: expected 1 steps, as many as parents, got 0"),
        (lambda: session.extend([0, 0], "ab"), TypeError, "steps: expected a list of texts, got 'str'"),
        (lambda: session.extend([True], ["a"]), TypeError, r"parents\[0\]: expected an int, got True"),
        (lambda: session.extend([0], [3]), TypeError, r"steps\[0\]: expected a text, got int"),
        (
            lambda: session.extend([0, 0], ["a", "abcdefgh"]),
            ValueError,
            r"steps\[1\]: expected at most 12 tokens",
        ),
        (lambda: session.release([0]), ValueError, r"nodes\[0\]: expected node 0 at most 0 times"),
        (lambda: session.release(0.0), TypeError, "nodes: expected a list of ints, got 0.0"),
        (lambda: session.scores([1]), ValueError, r"nodes\[0\]: expected a node of this session"),
        (lambda: verifier.session(3), TypeError, "question: expected a text, or a list of texts, got int"),
        (
            lambda: verifier.session([]),
            ValueError,
            "question: expected a text, or at least one in a list, got an empty",
        ),
        (lambda: verifier.session(["a", 3]), TypeError, r"question\[1\]: expected a text, got int"),
        (lambda: verifier.session(["a", "abcdefgh abcdefgh"]), ValueError, r"question\[1\]: expected at most 12 tok"),
        (lambda: verifier.session("abcdefgh abcdefgh"), ValueError, "question: expected at most 12 tokens"),
        (lambda: verifier.session("a", when_full="panic"), ValueError, "when_full: expected one of refuse, recompute"),
        (lambda: verifier.session("a", max_tokens=0), ValueError, "max_tokens: expected at least 1"),
        (
            lambda: make(recipe={"stepwise": False}).session("a"),
            ValueError,
            "recipe: expected one that scores steps",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert len(session._nodes) == 1 and session.tokens_encoded == 5
    session.close()
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.extend([0], ["a"])
