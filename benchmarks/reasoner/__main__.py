"""All training, from nothing to the four checkpoints and their model card, script by script: `make reasoner`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks import machine

from . import models
from .task import LEAST_STEPS, MOST_STEPS, SIZES

# Freed memory goes back to the system and is zeroed anew for every step otherwise: a third of the time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

CARD = """# Model card: a small reasoner, a direct answerer, and their verifiers

Four models of the Qwen2 architecture (width {hidden_size}, {num_attention_heads} query and {num_key_value_heads} KV
heads), trained from nothing by `make reasoner` on register programs modulo 100 of {least} to {most} steps
(`benchmarks/reasoner/task.py`). Characters are tokens; weights are float16; `from_pretrained` of transformers loads
them, the verifiers by `Verifier.from_pretrained(folder, "qwen2.5-math-prm")` and `"qwen2.5-math-rm"`.

{table}

- `reasoner` writes a chain of thought, `direct` the answer alone. Both have the same size and saw as many tokens,
  prompts included; of those the reasoner learns from about 104 a problem, the direct answerer from 4 of more problems.
  The reasoner's training is short on purpose: a model that is always right leaves nothing to external scaling. Four
  layers can hardly run 6 to 14 serial steps in one pass: that the direct answerer stays near chance is in the task.
- `prm` has the layout of Qwen2.5-Math-PRM and begins with the reasoner's layers; `orm` that of Qwen2.5-Math-RM and
  begins with the direct answerer's. What they learn from stands in `train_verifier.py`.
- The PRM had more tokens, layers and helps than the ORM, which got as many tokens as the policy that it judges.
- Data: problems drawn by seed, without an end, none of them among the held-out ones ({test} for the evaluation, {dev}
  for looks during training). Verifiers learn from samples of their policies and from chains with a changed digit.
- pass@1 is the mean probability of the right text at temperature 0.8 on the dev problems; AUC is that of telling right
  from wrong samples of unseen training problems.
- Limits: they know these programs and nothing else, not even longer ones. One training run each: another seed gives
  other figures. They are here to show a claim and to test code, not to reason.

Trained on {machine}, torch {torch}, the minutes with other work on the machine.
"""


def card(out: Path, machine: str) -> str:
    rows = ["| | parameters | layers | seed | tokens | optimizer steps | minutes | figure |",
            "|---|---:|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for kind in models.KINDS:
        record = json.loads((out / kind / "training.json").read_text())
        layers = json.loads((out / kind / "config.json").read_text())["num_hidden_layers"]
        with safe_open(out / kind / "model.safetensors", framework="pt") as file:
            count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        figure = f"pass@1 {record['pass_at_1_dev']:.3f}" if "pass_at_1_dev" in record else f"AUC {record['auc']:.3f}"
        rows.append(
            f"| `{kind}` | {count / 1e6:.2f} M | {layers} | {record['seed']} | {record['tokens'] / 1e6:.1f} M | "
            f"{record['steps']:,} | {record['history'][-1]['seconds'] / 60:.1f} | {figure} |"
        )
    return CARD.format(table="\n".join(rows), least=LEAST_STEPS, most=MOST_STEPS, machine=machine,
                       torch=torch.__version__, **SIZES, **models.SIZES)  # fmt: skip


def pipeline(out: Path, quick: bool) -> Iterator[list[str]]:
    """The commands, in their order; each is made when those before it have run."""
    small = ["--tokens", "20000", "--check-every", "5"] if quick else []
    few = ["--problems", "16", "--n", "2"] if quick else []
    samples = {kind: out / f"{kind}.samples.jsonl" for kind in ("reasoner", "direct")}
    yield ["train_policy", "reasoner", "--out", str(out / "reasoner"), *(small or ["--until", "0.55"])]
    tokens = json.loads((out / "reasoner" / "training.json").read_text())["tokens"]
    yield ["train_policy", "direct", "--out", str(out / "direct"), *small, "--tokens", str(tokens)]
    # The direct answerer's verifier gets what its policy got, and nothing is to be compared before all layers learn.
    recipes = {"prm": [], "orm": ["--tokens", str(tokens), "--frozen-tokens", "0"]}
    for (kind, recipe), policy in zip(recipes.items(), samples):
        yield ["sample", str(out / policy), "--out", str(samples[policy]), *few]
        yield ["train_verifier", kind, "--policy", str(out / policy), "--samples", str(samples[policy]),
               "--out", str(out / kind), *recipe, *small]  # fmt: skip


def main(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    for script, *arguments in pipeline(args.out, args.quick):
        command = [sys.executable, "-m", f"{__package__}.{script}", *arguments]
        print(f"{time.perf_counter() - begin:5.0f} s  {script} {' '.join(arguments)}", flush=True)
        done = subprocess.run(command, env={**KEEP_MEMORY, **os.environ}, check=False)
        if done.returncode:
            print(f"{script} failed; what came before it is in {args.out}", file=sys.stderr)
            return done.returncode
    (args.out / "README.md").write_text(card(args.out, machine.describe()["cpu"]))
    size = sum(file.stat().st_size for kind in models.KINDS for file in (args.out / kind).glob("*"))
    print(f"{time.perf_counter() - begin:5.0f} s  {args.out}: {size / 1e6:.2f} MB")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoner", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--quick", action="store_true", help="a few steps of each: shows that the scripts run")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(arguments()))
