"""The command line: what it prints, what it writes, how it ends. The demo runs with a short prompt here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tts_kernels
from tts_kernels import cli

transformers = pytest.importorskip("transformers")

import verifier_checkpoints  # noqa: E402

from tts_kernels import demo, demo_verify, seeded  # noqa: E402

FIGURES = {
    "tokens_equal", "tokens_equal_fraction", "kv_saving_bound", "speedup", "prompt_tokens", "new_tokens", "samples",
    "stock_seconds", "stock_prefill_seconds", "stock_decode_seconds", "stock_kv_bytes", "stock_kv_bytes_per_step",
    "tts_seconds", "tts_prefill_seconds", "tts_decode_seconds", "tts_kv_bytes", "tts_kv_bytes_per_step",
    "least_kv_bytes_per_step", "model", "machine", "verifier", "recipe", "steps", "score_difference", "best",
    "stock_score_seconds", "tts_score_seconds", "stock_score_tokens", "tts_score_tokens", "beam",
    "beam_candidates_equal", "beam_choice_equal", "beam_score_difference", "stock_beam_policy_seconds",
    "tts_beam_policy_seconds", "stock_beam_verifier_seconds", "tts_beam_verifier_seconds", "stock_beam_seconds",
    "tts_beam_seconds", "stock_beam_policy_tokens", "tts_beam_policy_tokens", "stock_beam_verifier_tokens",
    "tts_beam_verifier_tokens",
}  # fmt: skip


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Arguments of a demo that takes a moment, and where it writes its figures."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    monkeypatch.setattr(demo, "SEEDED_MODEL", {**demo.SEEDED_MODEL, **small})
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Two pumps fill a tank. The first alone needs 6 hours.\n" * 4)
    file = tmp_path / "figures.json"
    arguments = [
        "demo",
        "--n",
        "3",
        "--max-new-tokens",
        "5",
        "--threads",
        "1",
        "--width",
        "2",
        "--expand",
        "2",
        "--depth",
        "2",
    ]
    return [*arguments, "--prompt", str(prompt), "--json", str(file)], file


def test_demo(short, capsys):
    arguments, file = short
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tokens equal: yes" in printed and "whole generation" in printed and "at most" in printed
    assert "candidates equal: yes, choice equal: yes" in printed and "chosen: " in printed
    figures = json.loads(file.read_text())
    assert figures.keys() >= FIGURES
    assert figures["tokens_equal"] is True and figures["tokens_equal_fraction"] == 1
    prompt_tokens, token = figures["prompt_tokens"], 2 * 2 * 2 * 32 * 4  # K and V, layers, heads, head_dim, bytes
    assert figures["stock_kv_bytes"] == token * 3 * (prompt_tokens + 4)
    assert figures["tts_kv_bytes"] == token * 16 * (-(-prompt_tokens // 16) + 3)
    assert figures["least_kv_bytes_per_step"] == figures["tts_kv_bytes_per_step"] == token * (prompt_tokens + 3 * 2.5)
    assert figures["score_difference"] < 1e-5 and figures["beam_score_difference"] < 1e-5
    assert figures["beam_candidates_equal"] is figures["beam_choice_equal"] is True
    assert figures["steps"] >= 3 and len(figures["best"]) == 3
    assert figures["tts_score_tokens"] < prompt_tokens + 3 * 14  # tags, and text that is cut into other pieces
    assert figures["stock_score_tokens"] > 3 * prompt_tokens
    assert figures["stock_beam_policy_tokens"] > 3 * figures["tts_beam_policy_tokens"] > 3 * prompt_tokens
    assert figures["stock_beam_verifier_tokens"] > 3 * figures["tts_beam_verifier_tokens"] > 3 * prompt_tokens
    assert figures["model"]["num_key_value_heads"] == 2 and figures["machine"]["torch"] == torch.__version__
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []  # nothing temporary is left


def test_demo_fails_if_tokens_differ(short, monkeypatch, capsys):
    def off_by_one(model, input_ids, **kwargs):
        out = right(model, input_ids, **kwargs)
        out.sequences[0, -1] ^= 1
        return out

    right = demo.generate
    monkeypatch.setattr(demo, "generate", off_by_one)
    arguments, file = short
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert "tokens equal: NO" in captured.out and "tokens differ" in captured.err
    assert json.loads(file.read_text())["tokens_equal"] is False
    assert cli.main([*arguments, "--dtype", "bfloat16"]) == 0  # there they may


def test_demo_fails_if_scores_differ(short, monkeypatch, capsys):
    right = demo_verify.Verifier.score_batch

    def shifted(self, *arguments):
        scores = right(self, *arguments)
        return dataclasses.replace(scores, prob=scores.prob + 0.01)

    monkeypatch.setattr(demo_verify.Verifier, "score_batch", shifted)
    assert cli.main(short[0]) == 1
    assert "FAILED: the scores differ" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["math-shepherd", "qwen2.5-math-prm"])
def test_demo_with_local_models(short, tmp_path, capsys, recipe):
    """With a verifier that is a language model, and with one that has a head of its own."""
    policy = verifier_checkpoints.math_shepherd(tmp_path / "policy")
    verifier = {"math-shepherd": verifier_checkpoints.math_shepherd, "qwen2.5-math-prm": verifier_checkpoints.qwen_prm}
    verifier = verifier[recipe](tmp_path / "verifier")
    arguments, file = short
    local = [*arguments, "--model", str(policy), "--verifier", str(verifier)]
    assert cli.main([*local, "--recipe", recipe]) == 0
    figures = json.loads(file.read_text())
    assert figures["model"]["path"] == str(policy) and figures["verifier"]["path"] == str(verifier)
    assert figures["recipe"] == recipe and figures["steps"] > 0
    assert cli.main(local) == 1
    assert "--recipe: expected one beside --verifier" in capsys.readouterr().err
    assert cli.main([*arguments, "--model", str(tmp_path / "nothing")]) == 1
    assert "tts-kernels demo:" in capsys.readouterr().err


def test_prompt_of_the_demo():
    """It is packaged, and about 1,000 tokens long."""
    text = demo.PROMPT.read_text(encoding="utf-8")
    ids = seeded.tokenizer(4096, text)(text)["input_ids"]
    assert 900 < len(ids) < 1300 and 0 not in ids  # none unknown


def test_json_is_never_half_written(tmp_path):
    file = tmp_path / "figures.json"
    demo.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        demo.write_json(file, {"b": 2, "c": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--n", "0"], "at least 1"),
        (["--dtype", "int8"], "int8"),
        (["--bogus"], "--bogus"),
    ],
)
def test_wrong_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["demo", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value", [("--prompt", "missing.txt"), ("--json", "missing/figures.json"), ("--backend", "abacus")]
)
def test_error_names_what_is_wrong(short, capsys, option, value):
    assert cli.main([*short[0], option, value]) == 1
    assert value.split("/")[0] in capsys.readouterr().err


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("reference", "cpu", "triton", "cuda", "no: ", "torch", "tts-kernels"):
        assert word in printed


def test_doctor_says_why_the_native_module_is_missing(monkeypatch, capsys):
    from tts_kernels.attention import api

    monkeypatch.setitem(api.BACKENDS.loaded, "cpu", "the cpu backend is not built: no compiler")
    assert cli.main(["doctor"]) == 0
    assert "no: the cpu backend is not built: no compiler" in capsys.readouterr().out


@pytest.mark.parametrize(
    "native, told",
    [
        (SimpleNamespace(no_cuda="no nvcc was found"), "none: no nvcc was found"),
        (SimpleNamespace(cuda_archs="80 90a"), "built for sm_80, sm_90a"),
        (None, "none: the native module is not built"),
    ],
)
def test_doctor_says_what_the_cuda_kernels_were_built_for(native, told, monkeypatch, capsys):
    from tts_kernels.attention import cuda

    monkeypatch.setattr(cuda, "native", native)
    assert cli.main(["doctor"]) == 0
    assert f"cuda kernels  {told}\n" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"tts-kernels {tts_kernels.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0 and f"usage: tts-kernels {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), ([], 2), (["fly"], 2)])
def test_as_a_module(arguments, status):
    command = [sys.executable, "-m", "tts_kernels.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status and "demo" in done.stdout + done.stderr
