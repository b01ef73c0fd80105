"""`tts-kernels cost` and `tts-kernels economics`: what they print, write and refuse; and the comparison itself."""

from __future__ import annotations

import json
import math
import re

import pytest

from tts_kernels import ceilings, cli
from tts_kernels.cost import command, economics_command
from tts_kernels.cost.economics import compare
from tts_kernels.cost.traces import Traces, synthetic


@pytest.fixture
def traces(tmp_path):
    file = tmp_path / "traces.jsonl"
    synthetic(12, 8).write(file)
    return str(file)


def run(capsys, *arguments, status=0, stdout=False):
    assert cli.main(list(arguments)) == status
    captured = capsys.readouterr()
    return captured.err if status and not stdout else captured.out


def test_all_scenarios(capsys, tmp_path):
    file = tmp_path / "figures.json"
    out = run(capsys, "cost", "--scenario", "all", "--hardware", "h200", "--json", str(file))
    for word in (
        "isolated:",
        "saturated:",
        "model: NVIDIA H200",
        "989 TFLOP/s dense",
        "| V0 ",
        "V1",
        "V2",
        "no fit (",
        "m(N)",
    ):
        assert word in out or word.strip("| ") in out
    for name in ("A leaf-bon-longcot", "C2 trunk-fork-longcot-whole", "D2 longctx-bon-long", "F mixed-tenant"):
        assert sum(line.startswith(f"| {name} ") for line in out.splitlines()) == 2, "once in each regime"
    control = next(line for line in out.splitlines() if line.startswith("| A leaf"))
    assert "1.03x" in control and "1.02x" in control and "1.01x" in control
    assert "measured" not in out
    figures = json.loads(file.read_text())
    assert len(figures) == 2 * 8 * 3 and {f["figures"] for f in figures} == {"model"}
    assert all(f["seconds"] == pytest.approx(sum(p["ceiling_seconds"] for p in f["parts"].values())) for f in figures)


def test_one_scenario(capsys):
    arguments = ("--price", "2 USD", "--watts", "700", "--regime", "isolated", "--hardware", "b200")
    out = run(capsys, "cost", "--scenario", "longctx-bon", *arguments)
    for word in ("prefill_prefix", "straggler_idle", "sum", "USD a query", "joules", "KV GB s", "no fit", "copies, s"):
        assert word in out
    out = run(
        capsys,
        "cost",
        "--scenario",
        "A",
        "--sharing",
        "tree",
        "--n",
        "4",
        "--efficiency",
        "1,1,1",
        "--model",
        "qwen3-4b",
    )
    out_of_f = run(capsys, "cost", "--scenario", "F", "--regime", "isolated")
    assert "prompt 512, 2048, 8192, trunk 0" in out_of_f and "8 candidates each. Cascades" in out_of_f
    assert "copies, s" not in out and "qwen3-4b" in out and "100% of the bandwidth" in out


def test_a_workload_of_ones_own(capsys, tmp_path):
    own = ("--n", "8", "--prompt", "4096", "--suffix", "512")
    out = run(capsys, "cost", *own, "--model", "qwen3-8b", "--regime", "saturated")
    assert (
        "your own workload, qwen3-8b: N = 8, prompt 4096" in out
        and "decode_attn_prefix" in out
        and "isolated:" not in out
    )
    out = run(capsys, "cost", *own, "--model", "qwen3-8b", "--cv", "0.5", "--cap", "900", "--verifier", "prm",
              "--verifier-model", "qwen3-0.6b", "--trunk", "100", "--steps", "4")  # fmt: skip
    assert "prm_suffix" in out
    scored = (*own, "--model", "qwen3-8b", "--verifier", "prm", "--sharing", "paged", "--regime", "isolated")
    tables = [run(capsys, "cost", *scored, "--verifier-head", head) for head in ("vocab", "mlp", "linear")]
    assert len({line for table in tables for line in table.splitlines() if "| prm_head" in line}) == 3
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100,
        "intermediate_size": 128, "max_position_embeddings": 8192,
    }))  # fmt: skip
    out = run(capsys, "cost", *own, "--model", str(tmp_path / "config.json"))
    assert tmp_path.name in out
    out = run(capsys, "cost", "--n", "8", "--prompt", "10", "--suffix", "40", "--model", "qwen3-8b", "--search", "beam",
              "--keep", "2", "--steps", "4", "--verifier", "prm")  # fmt: skip
    assert "prm_prefix" in out


def test_on_this_machine(capsys, monkeypatch):
    found = ceilings.Ceilings(2e10, {"bfloat16": 3e11})
    monkeypatch.setattr(ceilings, "measured", lambda device, dtype: found)
    out = run(
        capsys, "cost", "--n", "2", "--prompt", "9", "--suffix", "9", "--model", "qwen3-0.6b", "--hardware", "measured"
    )
    assert (
        "measured here" in out
        and "20 GB/s" in out
        and "300 GFLOP/s" in out
        and "100% of the bandwidth" in out
        and "model:" in out
    )


def test_traces(capsys, traces, tmp_path):
    file = tmp_path / "figures.json"
    out = run(capsys, "cost", "--traces", traces, "--model", "qwen3-8b", "--price", "2 USD", "--value", "0.01 USD",
              "--json", str(file))  # fmt: skip
    assert (
        "accuracies (of the traces): " in out
        and "12 questions" in out
        and "costs (model): NVIDIA" in out
        and "is worth most" in out
    )
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:] == ["1", "2", "4", "8"]
    assert len(json.loads(file.read_text())) == 8
    out = run(capsys, "cost", "--traces", traces, "--model", "qwen3-8b", "--price", "2 EUR", "--method", "majority")
    assert "accuracy, majority" in out and "EUR" in out and "drawn" not in out
    synthetic(2, 16).write(tmp_path / "more.jsonl")
    out = run(capsys, "cost", "--traces", str(tmp_path / "more.jsonl"), "--model", "qwen3-8b", "--price", "2 USD")
    drawn = [line.split("|")[1].strip() for line in out.splitlines() if line.count("drawn") == 1]
    assert drawn == ["8"], "12,870 choices of 8 are too many for weighted votes, 1,820 of 4 are not"


def test_traces_interrupted(capsys, traces, monkeypatch):
    """What was finished is printed and written."""
    accuracy = Traces.accuracy

    def interrupt(self, n, *arguments, **options):
        if n == 4:
            raise KeyboardInterrupt
        return accuracy(self, n, *arguments, **options)

    monkeypatch.setattr(Traces, "accuracy", interrupt)
    out = run(capsys, "cost", "--traces", traces, "--model", "qwen3-8b", "--price", "2 USD", status=130, stdout=True)
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:] == ["1", "2"]


def stop_at(monkeypatch, module, call):
    """Ctrl-C in this call of `costs_of`, counted from 1."""
    inner, calls = module.costs_of, []

    def costs_of(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return inner(*arguments, **options)

    monkeypatch.setattr(module, "costs_of", costs_of)


@pytest.mark.parametrize("call, tables, scenarios", [(1, 0, 0), (3, 1, 2), (9, 1, 8), (10, 2, 9)])
def test_scenarios_interrupted(capsys, monkeypatch, tmp_path, call, tables, scenarios):
    """Of 8 scenarios in 2 regimes: no traceback, and what was finished is printed and written."""
    stop_at(monkeypatch, command, call)
    file = tmp_path / "figures.json"
    assert cli.main(["cost", "--scenario", "all", "--json", str(file)]) == 130
    captured = capsys.readouterr()
    assert captured.out.count("| scenario") == tables and "interrupted" in captured.err
    rows = [line for line in captured.out.splitlines() if re.match(r"\| [A-F]2? ", line)]
    assert len(rows) == scenarios
    assert len(json.loads(file.read_text())) == 3 * scenarios


def test_one_workload_interrupted(capsys, monkeypatch, tmp_path):
    stop_at(monkeypatch, command, 2)
    file = tmp_path / "figures.json"
    assert cli.main(["cost", "--scenario", "B", "--json", str(file)]) == 130
    captured = capsys.readouterr()
    assert captured.out.count("| part") == 1 and "interrupted: saturated is missing" in captured.err
    assert len(json.loads(file.read_text())) == 3


def test_economics_interrupted(capsys, monkeypatch):
    stop_at(monkeypatch, economics_command, 1)
    assert cli.main(["economics", *EQUAL, "--external-accuracy", "0.8"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "tts-kernels: interrupted\n" and not captured.out


def test_interrupted_before_a_command_begins(capsys, monkeypatch):
    def interrupt(parser):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "add_arguments", interrupt)
    assert cli.main(["cost"]) == 130 and "interrupted" in capsys.readouterr().err


OWN = ("--prompt", "3", "--suffix", "5", "--model", "qwen3-8b")
EQUAL = ("--train-cost", "14 USD", "--queries", "20000", "--price", "2 USD", "--internal-accuracy", "0.75")


def test_economics(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    out = run(capsys, "economics", *EQUAL, "--external-accuracy", "0.76", "--json", str(file), "--plot", str(plot))
    assert "internal: A leaf-bon-longcot, one candidate of 12,000 tokens, r1-distill-qwen-7b" in out
    assert "7.81e-04" in out and "at least as high" in out and "training x 2" in out and "cheapest is: internal" in out
    found = json.loads(file.read_text())
    assert 10_000 < found["break_even"]["paged"] < found["break_even"]["tree"] < 25_000
    text = plot.read_text()
    assert text.startswith("<?xml") and plot.stat().st_size > 10_000


def test_economics_of_traces(capsys, traces):
    arguments = (*EQUAL[:-1], "0.5", "--traces", traces, "--model", "qwen3-8b")
    out = run(capsys, "economics", *arguments)
    assert re.search(r"best_of_n, N = [1-8], 95% interval 0[.]\d+ to [01][.]\d+; accuracy 0[.]\d{1,4}, ", out)
    assert "never" in out, "short samples are cheaper than a long chain of thought"
    error = run(capsys, "economics", *EQUAL[:-1], "0.99", "--traces", traces, "--model", "qwen3-8b", status=1)
    assert "expected at least the internal side's 0.99" in error and "equal accuracy" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cost", "--scenario", "Z"), "scenario: expected one of A, B"),
        (("cost", "--hardware", "h201"), "hardware: expected one of .*nearest: h200"),
        (("cost", "--model", "qwen2.5-7"), "model: expected one of .*nearest: qwen2.5-7b"),
        (("cost", "--price", "2"), "price: expected an amount with its currency, such as '2 USD', got '2'"),
        (("cost", "--n", "4", "--prompt", "3", "--model", "qwen3-8b"), "--suffix: expected a value"),
        (("cost", "--n", "4", "--prompt", "3", "--suffix", "5"), "--model: expected a value"),
        (("cost", "--scenario", "A", "--prompt", "3"), "--scenario: expected none beside --prompt"),
        (("cost", "--n", "4", *OWN, "--cap", "9"), "--cap: expected none without --cv.*got 9"),
        (("cost", "--scenario", "A", "--method", "pass"), "--method: expected none without --traces, got pass"),
        (("cost", "--value", "2 USD"), "--value: expected none without --traces"),
        (("cost", "--traces", "x.jsonl", "--scenario", "A"), "--scenario: expected none beside --traces, got A"),
        (("cost", "--traces", "x.jsonl", "--n", "4"), "--n: expected none beside --traces, got 4"),
        (("cost", "--scenario", "A", "--verifier-head", "mlp"), "--verifier-head: expected none without a workload"),
        (("cost", "--price", "2,5 EUR"), "price: expected an amount with its currency"),
        (("cost", "--n", "-4", *OWN), "n: expected at least 1, got -4"),
        (("cost", "--n", "4", *OWN, "--prompt", "50000"), "40960 tokens, the limit"),
        (("cost", "--scenario", "A", "--verifier", "none"), "--verifier: expected none without a workload"),
        (("cost", "--scenario", "A", "--n", "0"), "n: expected at least 1, got 0"),
        (("cost", "--sharing", "tree"), "--sharing: expected all where several"),
        (("cost", "--efficiency", "0.5"), "--efficiency: expected three numbers such as 0.8,0.6,0.5, got 0.5"),
        (("cost", "--efficiency", "1,2,1"), "compute: expected at most 1, got 2"),
        (("cost", "--efficiency", "1,x,1"), "--efficiency: expected three numbers"),
        (("cost", "--json", "no/such/folder/x.json"), "output: expected a file in a directory that exists"),
        (("cost", "--traces", "x.jsonl", "--price", "2 USD"), "No such file"),
        (("economics", *EQUAL), "external_accuracy: expected an accuracy in .*equal accuracy only, got none"),
        (("economics", *EQUAL, "--external-accuracy", "0.7"), "expected at least the internal side's 0.75"),
        (("economics", *EQUAL, "--external-accuracy", "1.7"), "external_accuracy: expected at most 1"),
        (("economics", *EQUAL[:4], "--external-accuracy", "0.7"), "--price: expected"),
        (("economics", "--train-cost", "14", *EQUAL[2:]), "--train-cost: expected an amount with its currency"),
        (("economics", "--train-cost", "14 EUR", *EQUAL[2:]), "--train-cost: expected an amount in USD.*got EUR"),
        (("economics", *EQUAL, "--external-accuracy", "0.8", "--regime", "both"), "--regime: expected one of"),
    ],
)  # fmt: skip
def test_errors(capsys, arguments, message):
    error = run(capsys, *arguments, status=1)
    assert error.startswith(f"tts-kernels {arguments[0]}: ") and re.search(message, error), error


@pytest.mark.parametrize("command", ["cost", "economics"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and f"tts-kernels {command} --" in out.partition("examples:")[2]


def test_comparison():
    found = compare(
        14, 0.001, {"paged": 0.002, "tree": 0.0005}, internal_accuracy=0.8, external_accuracy=0.8, currency="USD"
    )
    assert found.volume("paged") == 14_000 and found.volume("tree") == math.inf
    assert found.volume("paged", train=2) == 28_000 and found.volume("tree", external=4) == 14_000
    assert found.total("internal", 14_000) == found.total("paged", 14_000) == 28
    table = found.sensitivity()
    assert "14,000" in table and "never" in table and "28,000" in table
