"""`tts-kernels profile`: what it prints, writes, refuses, and keeps when it is interrupted. Tiny seeded models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import verifier_checkpoints

from tts_kernels import cli
from tts_kernels.cost import PARTS
from tts_kernels.profile import command, report
from tts_kernels.profile.ways import WAYS

SIZES = "vocab_size=400,hidden_size=64,intermediate_size=96,num_hidden_layers=2,num_attention_heads=4"
TINY = ["profile", "--n", "3", "--max-new-tokens", "4", "--sizes", SIZES, "--threads", "1", "--hardware", "h100"]


@pytest.fixture
def short(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is 3 + 4? " * 10)
    return [*TINY, "--prompt", str(prompt)], tmp_path / "figures.json"


def run(capsys, arguments, status=0):
    assert cli.main(arguments) == status
    return capsys.readouterr()


def test_tables(short, capsys):
    out = run(capsys, short[0]).out
    for word in ("policy: Qwen2ForCausalLM", "recipe math-shepherd", "candidates of up to 4 tokens", "NVIDIA H100",
                 "copies: ceiling, s", "measured, s", "ratio |", "tree, MB", "tree, GFLOP", "equal counted ones",
                 "tokens equal: yes, choice equal: yes", "paged over tree: whole query", "N(2P+S)/(2P+NS)",
                 "share its time in the ratio of their ceilings", "It has no byte counts"):  # fmt: skip
        assert word in out, word
    for name in (*PARTS, "sum"):
        rows = [line for line in out.splitlines() if line.startswith(f"| {name} ")]
        assert len(rows) == (1 if name == "host_gap" else 2), name
    assert "energy" not in out


def test_json(short, capsys):
    run(capsys, [*short[0], "--json", str(short[1]), "--seed", "3"])
    figures = json.loads(short[1].read_text())
    assert figures["schema"] == command.SCHEMA and figures["complete"] is True
    assert (figures["n"], figures["seed"], figures["max_new_tokens"]) == (3, 3, 4)
    assert figures["tokens_equal"] and figures["choice_equal"] and figures["score_difference"] < report.SAME_SCORE
    for name in ("date", "machine", "device", "hardware", "dtype", "model", "verifier", "recipe", "prompt_tokens"):
        assert figures[name], name
    assert list(figures["ways"]) == list(WAYS)
    for way, one in figures["ways"].items():
        cost = one["cost"]
        assert cost["sharing"] == way and cost["figures"] == "measured" and cost["element_bytes"] == 4
        assert one["unequal"] == one["not_alike"] == {} and one["joules"] is None
        assert one["new_tokens"] == [4, 4, 4] and one["verifier_forwards"] == {"copies": 1, "paged": 3, "tree": 1}[way]
        assert list(cost["parts"]) == list(PARTS)
        for part in cost["parts"].values():
            assert part["counted_flops"] == pytest.approx(part["flops"])
            assert part["measured_bytes"] == pytest.approx(part["bytes"])
        measured = sum(part["measured_seconds"] for part in cost["parts"].values())
        assert measured == pytest.approx(one["wall_seconds"], rel=0.02) == pytest.approx(cost["seconds"], rel=0.02)


def test_some_ways(short, capsys):
    out = run(capsys, [*short[0], "--ways", "tree"]).out
    assert "tree: ceiling, s" in out and "copies" not in out.split("ceiling   what")[0] and "tokens equal" not in out
    out = run(capsys, [*short[0], "--ways", "tree, copies", "--n", "1"]).out
    assert "copies over tree" in out and "paged" not in out and "1.00x of the KV reads" in out


def interrupt(monkeypatch, at):
    """Ctrl-C in the run of this way."""
    inner = command.profile

    def run(query, way, hardware):
        if way == at:
            raise KeyboardInterrupt
        return inner(query, way, hardware)

    monkeypatch.setattr(command, "profile", run)


def test_an_interruption_keeps_what_is_finished(short, capsys, monkeypatch):
    interrupt(monkeypatch, "copies")
    captured = run(capsys, [*short[0], "--json", str(short[1])], status=130)
    figures = json.loads(short[1].read_text())
    assert figures["complete"] is False and list(figures["ways"]) == ["paged", "tree"]
    assert "paged over tree" in captured.out and "interrupted; finished: paged, tree" in captured.err


def test_an_interruption_of_the_first(short, capsys, monkeypatch):
    interrupt(monkeypatch, "tree")
    captured = run(capsys, [*short[0], "--json", str(short[1])], status=130)
    assert not short[1].exists() and "finished: nothing" in captured.err and "| part" not in captured.out


def test_no_figure_is_printed_where_answers_differ(short, capsys, monkeypatch):
    inner = command.differences
    monkeypatch.setattr(command, "differences", lambda done: {**inner(done), "tokens_equal": False})
    captured = run(capsys, [*short[0], "--ways", "paged,tree"], status=1)
    assert "FAILED: the tokens of the ways differ" in captured.err and "| part" not in captured.out
    captured = run(capsys, [*short[0], "--ways", "paged,tree", "--dtype", "bfloat16"])
    assert "note: the tokens of the ways differ" in captured.err and "tokens equal: NO" in captured.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ways", "tree,beam"], "--ways: expected some of copies, paged, tree, got 'beam'"),
        (["--ways", "tree,tree"], "--ways: expected each once, got tree,tree"),
        (["--sizes", "layers=2"], "--sizes: expected name=number of vocab_size, "),
        (["--sizes", "hidden_size=0"], "got 'hidden_size=0'"),
        (["--max-new-tokens", "1"], "--max-new-tokens: expected at least 2"),
        (["--hardware", "h300"], "nearest: h"),
        (["--prompt", "missing.txt"], "missing.txt"),
        (["--json", "missing/figures.json"], "--json: expected a file in a directory that exists"),
        (["--recipe", "trl"], "--recipe: expected none without --verifier, got trl"),
        (["--verifier", "."], "--recipe: expected one beside --verifier, got none"),
        (["--verifier", ".", "--recipe", "eurus-prm"], "--recipe: expected a recipe with a head"),
        (["--verifier", "missing", "--recipe", "trl"], "--verifier: expected the folder of a local model, got missing"),
        (["--model", "missing"], "--model: expected the folder of a local model, got missing"),
        (["--backend", "abacus"], "abacus"),
        (["--device", "abacus"], "abacus"),
        pytest.param(
            ["--device", "cuda"],
            "--device: expected a device of this machine, which has no CUDA, got cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_error_names_what_is_wrong(short, capsys, arguments, message):
    captured = run(capsys, [*short[0], *arguments], status=1)
    assert message in captured.err and "| part" not in captured.out


def test_wrong_command_line(capsys):
    for arguments in (["--n", "0"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(["profile", *arguments])
        assert exit.value.code == 2


def test_an_empty_prompt_and_an_unknown_architecture(short, capsys, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "prompt: expected" in run(capsys, [*TINY, "--prompt", str(empty)], status=1).err
    from transformers import GPT2Config, GPT2LMHeadModel

    from tts_kernels import seeded

    path = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)).save_pretrained(path)
    seeded.tokenizer(400).save_pretrained(path)
    message = "--model: config: model_type: expected one of llama"
    assert message in run(capsys, [*short[0], "--model", str(path)], status=1).err


@pytest.mark.parametrize("recipe", ["rlhflow", "qwen2.5-math-prm"])
def test_local_models(short, capsys, tmp_path, recipe):
    """A chat model with an end token, and a verifier that is a language model or has a head of its own."""
    policy = verifier_checkpoints.rlhflow(tmp_path / "policy")
    write = {"rlhflow": verifier_checkpoints.rlhflow, "qwen2.5-math-prm": verifier_checkpoints.qwen_prm}[recipe]
    verifier = write(tmp_path / "verifier")
    local = ["--model", str(policy), "--verifier", str(verifier), "--recipe", recipe, "--json", str(short[1])]
    arguments = [argument for argument in short[0] if argument not in ("--sizes", SIZES)]
    out = run(capsys, [*arguments, *local]).out
    assert "equal counted ones exactly, in all parts" in out and "tokens equal: yes" in out
    figures = json.loads(short[1].read_text())
    assert (figures["model"]["path"], figures["verifier"]["path"]) == (str(policy), str(verifier))
    assert "--sizes: expected none where both" in run(capsys, [*short[0], *local], status=1).err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        cli.main(["profile", "--help"])
    out = capsys.readouterr().out
    assert "examples:" in out and "--ways" in out and "nsys" in out


def test_without_transformers(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError('no transformers', name='transformers')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tts_kernels import cli; sys.exit(cli.main(['profile']))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install 'tts-kernels[transformers]'" in done.stderr
