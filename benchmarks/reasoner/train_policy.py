"""Trains a policy: the reasoner, which writes a chain of thought, or the direct answerer, which writes an answer alone.

The reasoner is stopped early on purpose, when a little more than one sample in two is right: a model that is always
right leaves nothing to external scaling. The direct answerer has the same size and gets as many tokens of training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from . import models, task

TEMPERATURE = 0.8  # of the sampling in the evaluation
KINDS: dict[str, Callable[[task.Problem], str]] = {"reasoner": lambda p: p.chain, "direct": lambda p: p.direct}


def train(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.new_policy(args.seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    response = KINDS[args.kind]
    tokens, history, begin = 0, [], time.perf_counter()
    for step, problems in enumerate(task.training(args.seed)):
        for parameters in optimizer.param_groups:  # up in 100 steps, then down to nothing
            parameters["lr"] = args.learning_rate * min((step + 1) / 100, 1.0) * (1.0 - tokens / args.tokens)
        ids, prompt = batch(problems, args.batch_tokens, response)
        loss = response_loss(model, ids.to(device), prompt)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += ids.numel()
        done = tokens >= args.tokens
        if step % args.check_every == args.check_every - 1 or done:
            right = probability_right(model, response)
            seconds = time.perf_counter() - begin
            history.append({"tokens": tokens, "loss": loss.item(), "pass_at_1": right, "seconds": seconds})
            print(f"{tokens / 1e6:6.2f} M tokens, loss {loss.item():.4f}, pass@1 on dev {right:.3f}, {seconds:.0f} s",
                  flush=True)  # fmt: skip
            if done or (args.until and right >= args.until):
                break
    args.out.mkdir(parents=True, exist_ok=True)
    models.save_policy(model.cpu(), args.out)
    record = {"kind": args.kind, "seed": args.seed, "tokens": tokens, "steps": step + 1, "pass_at_1_dev": right,
              "batch_tokens": args.batch_tokens, "learning_rate": args.learning_rate, "history": history}  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def batch(problems, batch_tokens: int, response: Callable[[task.Problem], str]) -> tuple[Tensor, int]:
    """(ids [batch, length], length of the prompts): as many problems, of one length, as `batch_tokens` hold."""
    first = next(problems)
    length = models.encode([first.prompt + response(first) + task.END]).shape[1]
    chosen = [first, *itertools.islice(problems, max(batch_tokens // length, 1) - 1)]
    return models.encode([p.prompt + response(p) + task.END for p in chosen]), len(first.prompt)


def response_loss(model: transformers.Qwen2ForCausalLM, ids: Tensor, prompt: int) -> Tensor:
    """Mean cross-entropy of the tokens behind the prompt; prompts are noise that nothing can predict."""
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, prompt:].flatten())


@torch.inference_mode()
def probability_right(model: transformers.Qwen2ForCausalLM, response: Callable[[task.Problem], str]) -> float:
    """The mean probability that a sample is the right text, over the dev problems: pass@1 without sampling, but for
    the rare answers that are right by luck."""
    by_length: dict[int, list[task.Problem]] = {}
    for problem in task.split("dev"):
        by_length.setdefault(len(problem.steps), []).append(problem)
    total = 0.0
    for problems in by_length.values():
        ids = models.encode([p.prompt + response(p) + task.END for p in problems]).to(model.device)
        prompt = len(problems[0].prompt)
        logits = model(ids, use_cache=False).logits[:, prompt - 1 : -1] / TEMPERATURE
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])
        total += log_probs.sum((1, 2)).exp().sum().item()
    return total / sum(map(len, by_length.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoner.train_policy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("kind", choices=KINDS)
    add("--out", type=Path, required=True, help="folder for the checkpoint")
    add("--seed", type=int, default=1, help="of the weights and of the training problems (default %(default)s)")
    add("--tokens", type=int, default=6_500_000, help="of training at most (default %(default)s)")
    add("--until", type=float, help="stop when pass@1 on the dev problems reaches this")
    add("--batch-tokens", type=int, default=6_000, help="default %(default)s")
    add("--learning-rate", type=float, default=1.5e-3, help="default %(default)s")
    add("--check-every", type=int, default=25, help="steps between looks at the dev problems (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    train(arguments())
