"""The small reasoner: its task and splits, what the scripts make, and the shipped weights against their evaluation."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from benchmarks.reasoner import __main__ as pipeline
from benchmarks.reasoner import evaluate, models, sample, task, train_verifier
from tts_kernels import Verifier
from tts_kernels.cost import claim
from tts_kernels.cost.traces import Traces

ROOT = Path(__file__).resolve().parents[2]


# --- the task --------------------------------------------------------------------------------------------------------


def test_a_problem():
    problem = task.Problem(85, (("-", 65), ("+", 21), ("*", 7), ("+", 11)))
    assert problem.prompt == "85a-65b+21c*07d+11>"
    assert problem.chain == "a85-65=20\n\nb20+21=41\n\nc41*07=87\n\nd87+11=98\n\n#98"
    assert problem.direct == "#98"


@pytest.mark.parametrize("text, answer", [("#07", "07"), ("a85-65=20\n\n#98", "98"), ("#9", None), ("#98a", None)])
def test_answer_of(text, answer):
    assert task.answer_of(text) == answer


def test_splits_are_disjoint_and_training_holds_none_of_them():
    test, dev = task.split("test"), task.split("dev")
    assert len(test) == len(set(test)) == task.SIZES["test"] >= 500
    assert len(dev) == len(set(dev)) == task.SIZES["dev"]
    assert not set(test) & set(dev)
    # As if the next problem drawn were held out: it must not come.
    drawn = [next(batch) for batch in itertools.islice(task.training(0), 200)]
    assert len(set(drawn)) > 190
    assert not (set(test) | set(dev)) & set(drawn)


def test_training_leaves_out_what_is_held_out(monkeypatch):
    wanted = [next(batch) for batch in itertools.islice(task.training(5), 20)]
    split = task.split
    monkeypatch.setattr(task, "split", lambda name: [*split(name), wanted[3]])
    again = [next(batch) for batch in itertools.islice(task.training(5), 20)]
    assert wanted[3] not in again


def test_encode_is_the_tokenizer():
    tokenizer = models.tokenizer()
    for problem in task.split("dev")[:20]:
        text = problem.prompt + problem.chain + task.END
        assert models.encode([text])[0].tolist() == tokenizer(text)["input_ids"]
        tagged = problem.prompt + train_verifier.tagged(problem.lines)
        assert models.encode([tagged])[0].tolist() == tokenizer(tagged)["input_ids"]
        assert len(tokenizer(text)["input_ids"]) <= 203


def test_changed_chains_have_one_first_error_and_go_on_from_it():
    rng = random.Random(0)
    for problem in task.split("dev")[:200]:
        text = train_verifier.changed(problem, rng)
        shown, labels, slips = train_verifier.prm_example(problem, text)
        assert text != problem.chain
        right = train_verifier.tagged(problem.lines)
        assert labels == sorted(labels, reverse=True)
        assert not labels[-1]
        wrong = labels.index(False)
        assert slips.index(True) == wrong
        # One token is wrong by itself; of what is copied wrongly, also the result's where it is computed from that.
        assert sum(slips) == 1
        shown, right = (t.replace(models.STEP_TAG, "~") for t in (shown, right))
        assert shown[:wrong] == right[:wrong]
        assert shown[wrong] != right[wrong]
        # Behind the step with the error all is arithmetic.
        steps = text.split(task.BREAK)
        first = next(i for i, (a, b) in enumerate(zip(steps, problem.lines)) if a != b)
        for line, after in zip(steps[first + 1 : -1], steps[first + 2 :]):
            _, before, op, operand, value = task.STEP.fullmatch(line).groups()
            assert f"{task.apply(int(before), op, int(operand)):02}" == value
            assert after[1:3] == value


def test_a_prefix_is_right_up_to_its_first_slip():
    """Whatever the policy wrote: the first token that is wrong by itself is the first of the prefix that is wrong."""
    rng = random.Random(3)
    for problem in task.split("dev")[:50]:
        wrong = {k for k in range(len(problem.steps) + 1) if rng.random() < 0.4}
        _, labels, slips = train_verifier.prm_example(problem, train_verifier.slipped(problem, wrong, rng))
        assert sum(slips) == len(wrong)
        assert labels == [not any(slips[: i + 1]) for i in range(len(slips))]


def test_a_head_begins_by_looking_at_the_token_before():
    model = train_verifier.VerifierModel("prm", models.new_policy(0)).eval()
    model.model.set_attn_implementation("eager")
    ids = torch.randint(4, 34, (1, 180), generator=torch.Generator().manual_seed(0))
    first_new = model.model(ids, output_attentions=True).attentions[4][0]
    before = first_new.diagonal(-1, 1, 2)  # [heads, 179]
    assert before[:2].min() > 0.95
    assert before[2:].max() < 0.6


def test_prm_example_refuses_another_form():
    problem = task.split("dev")[0]
    assert train_verifier.prm_example(problem, problem.chain) is not None
    assert train_verifier.prm_example(problem, problem.chain.replace("=", "", 1)) is None
    assert train_verifier.prm_example(problem, "") is None


def test_auc_is_that_of_pairs(monkeypatch):
    """Against the definition: the share of (right, wrong) pairs in which the right one scores higher."""
    problems = task.split("dev")[:6]
    samples = [(p, [p.chain, train_verifier.changed(p, random.Random(i))]) for i, p in enumerate(problems)]
    model = train_verifier.VerifierModel("prm", models.new_policy(0)).eval()
    scores = {True: [], False: []}
    for problem, texts in samples:
        for text in texts:
            shown, *_ = train_verifier.prm_example(problem, text)
            ids = models.encode([problem.prompt + shown])
            with torch.inference_mode():
                margins = model(ids)[1][0]
            tags = ids[0] == models.VOCABULARY.index(models.STEP_TAG)
            scores[task.answer_of(text) == problem.answer].append(margins[tags].min().item())
    wins = [a > b for a in scores[True] for b in scores[False]]
    assert train_verifier.auc(model, samples) == pytest.approx(sum(wins) / len(wins), abs=1e-3)


# --- the scripts -----------------------------------------------------------------------------------------------------


def test_the_scripts_run_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["reasoner", "--out", str(tmp_path), "--quick"])
    monkeypatch.chdir(ROOT)
    assert pipeline.main(pipeline.arguments()) == 0
    for kind in models.KINDS:
        assert json.loads((tmp_path / kind / "training.json").read_text())["tokens"] >= 20_000
    problems = task.split("test")[:2]
    traces = Traces(s for i, p in enumerate(problems) for s in evaluate.sample("reasoner", 3, i, p, tmp_path))
    assert traces.samples_per_question == 3
    traces = Traces(s for i, p in enumerate(problems) for s in evaluate.sample("direct", 3, i, p, tmp_path))
    assert traces.samples_per_question == 3


def test_samples_are_read_as_written(tmp_path):
    problem = task.split("dev")[0]
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"start": problem.start, "steps": problem.steps, "texts": ["#01"]}) + "\n")
    assert sample.read(path) == [(problem, ["#01"])]


# --- the weights -----------------------------------------------------------------------------------------------------


def test_weights_are_small():
    files = [file for file in models.WEIGHTS.rglob("*") if file.is_file()]
    assert len([file for file in files if file.name == "model.safetensors"]) == len(models.KINDS)
    assert sum(file.stat().st_size for file in files) < 8_000_000


@pytest.mark.parametrize("kind", ["reasoner", "direct"])
def test_policies_load_with_transformers_alone(kind):
    folder = models.WEIGHTS / kind
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    problem = task.split("dev")[0]
    ids = tokenizer(problem.prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=160, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert task.answer_of(text) is not None
    assert len(text.split(task.BREAK)) == (len(problem.lines) if kind == "reasoner" else 1)


def test_the_prm_tells_right_from_wrong():
    verifier = Verifier.from_pretrained(models.WEIGHTS / "prm", "qwen2.5-math-prm", dtype=torch.float32)
    problems = task.split("dev")[:30]
    rng = random.Random(1)
    outputs = [[p.chain, train_verifier.changed(p, rng)] for p in problems]
    scores = verifier.score([p.prompt for p in problems], outputs)
    wins = sum(min(right) > min(wrong) for right, wrong in scores)
    assert wins >= 27


# --- the evaluation --------------------------------------------------------------------------------------------------

RESULTS = evaluate.HERE / "results.json"


@pytest.fixture(scope="module")
def record():
    return claim.read(RESULTS)


@pytest.mark.parametrize("kind", list(evaluate.RECIPES))
def test_the_evaluation_is_reproduced_on_the_first_problems(kind, record):
    again = evaluate.check(kind)
    before = record["systems"][kind]["check"]
    assert again.keys() == before.keys()
    slack = 2 / evaluate.CHECK_PROBLEMS
    for method, points in again.items():
        for new, old in zip(points, before[method], strict=True):
            # An interval of 0 width, where no problem was solved, leaves no room for another machine's last bits.
            assert old["low"] - slack <= new["value"] <= old["high"] + slack, (method, new, old)


def test_the_record_is_whole(record):
    assert record["problems"] >= 500
    assert record["n"] == 64
    assert {row["n"] for row in record["systems"]["reasoner"]["costs"]} >= set(evaluate.COUNTS)
    for kind in evaluate.RECIPES:
        traces = Traces.read(evaluate.HERE / "traces" / f"{kind}.jsonl")
        assert len(traces.questions) == record["problems"]
        # Of the same run: the traces' share of right samples is, up to the samples that were not kept, the record's.
        system, kept = record["systems"][kind], traces.samples_per_question
        assert traces.accuracy(1, "pass").value == pytest.approx(system["curves"]["pass"][0]["value"], abs=0.02)
        assert {row["n"] for row in system["costs"]} <= {point["n"] for point in system["curves"]["pass"]}
        assert kept >= claim.N


def test_paired_differences_are_those_of_the_problems():
    """By hand: two problems, four samples each, scores that rank a right one first in the first problem alone."""

    def sample_of(question, i, right, score, answer):
        return evaluate.Sample(question, str(i), 5, (score,), right, answer, 9)

    traces = Traces([
        *(sample_of("0", i, i < 2, 0.9 - 0.1 * i, "a" if i < 2 else f"b{i}") for i in range(4)),
        *(sample_of("1", i, i == 3, 0.9 - 0.1 * i, "a" if i == 3 else "b") for i in range(4)),
    ])  # fmt: skip
    rows = [{"right": False}, {"right": True}]
    found = evaluate.paired(traces, rows, {"dvts": [(4, rows), (8, rows[:1])]}, "last")
    means = {name: {point["n"]: point["value"] for point in points} for name, points in found.items()}
    assert means["best_of_n last - greedy"][4] == (1 - 0 + 0 - 1) / 2
    assert means["majority - greedy"][4] == (1 - 0 + 0 - 1) / 2
    assert means["best_of_n last - majority"][4] == 0
    assert means["dvts - greedy"] == {4: 0, 8: 0}
    assert means["dvts - weighted_vote"] == {4: (0 - 1 + 1 - 0) / 2}
    # Of two: problem 0 is right but for one pair of six, problem 1 in none, since the right one has the least score.
    assert means["best_of_n last - greedy"][2] == pytest.approx((5 / 6 - 0 + 0 - 1) / 2, abs=1e-4)
    assert means["best_of_n last - its best"][2] == pytest.approx((5 / 6 - 1) / 2, abs=1e-4)
    assert found["best_of_n last - greedy"][1]["low"] == -1 and found["best_of_n last - greedy"][1]["high"] == 1
