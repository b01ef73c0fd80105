"""Trains a verifier of a policy's answers, from the policy's weights: the PRM, in the layout of Qwen2.5-Math-PRM, or
the ORM, an outcome reward model in that of Qwen2.5-Math-RM.

PRM. Read at every token: whether all up to it is right; the tokens of the first wrong step weigh more, since behind
it all labels are equal. Labels at the ends of steps alone did not train, and those of whole prefixes slowly: a second
head, which is not kept, learns along whether each token by itself is wrong, given what stands before it. At first the
policy's layers are frozen and only what lies above them learns to compare what the policy would have written with
what is there; then all learn, and a language model loss on right text keeps and sharpens the arithmetic. The texts
are the policy's samples and chains with one changed digit or with several, every later step computed from there, as a
policy's slips go.

ORM. Read at the last token of problem and answer: whether it is right. Half of the answers are right, the others are
wrong ones that the policy sampled for the same problems. The language model's loss is taken along here too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from . import models, sample, task

LAYERS = {"prm": 6, "orm": 5}
LM_WEIGHT = 0.3
FIRST_ERROR_WEIGHT = 4.0
SLIP_WEIGHT = 5.0
LOOK_BACK, LOOK_BACK_NORM = 6, 6.5  # frequencies of a head of the first new layer, and their size
SLIPS = 0.3  # of the steps of every other synthetic chain are wrong

# A response, and for each of its tokens whether all up to it is right and whether it is wrong by itself.
Example = tuple[str, list[bool], list[bool]]


class VerifierModel(nn.Module):
    """Qwen2 without its LM head, and the two layers that Qwen2.5-Math-PRM and -RM publish as score.0 and score.2."""

    def __init__(self, kind: str, policy: transformers.Qwen2ForCausalLM):
        super().__init__()
        self.kind = kind
        width = policy.config.hidden_size
        self.model = transformers.Qwen2Model(models.config(num_hidden_layers=LAYERS[kind]))
        missing = self.model.load_state_dict(policy.model.state_dict(), strict=False)
        assert not missing.unexpected_keys
        if kind == "prm":
            look_back(self.model.layers[policy.config.num_hidden_layers].self_attn, self.model.config)
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2 if kind == "prm" else 1))
        self.slip = nn.Linear(width, 1)  # whether the token itself is wrong: learned along, not saved

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden [B, L, d], margins [B, L])"""
        hidden = self.model(ids, use_cache=False).last_hidden_state
        logits = self.score(hidden)
        return hidden, logits[..., 1] - logits[..., 0] if self.kind == "prm" else logits[..., 0]

    def save(self, folder: Path) -> None:
        """In the layout of the published checkpoints."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        tensors |= {f"score.{name}": x for name, x in self.score.state_dict().items()}
        tensors = {name: x.cpu().half().contiguous() for name, x in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        made = self.model.config
        made.architectures = ["Qwen2ForProcessRewardModel" if self.kind == "prm" else "Qwen2ForRewardModel"]
        made.dtype = torch.float16
        made.save_pretrained(folder)
        models.tokenizer().save_pretrained(folder)


@torch.no_grad()
def look_back(attention: nn.Module, config: transformers.Qwen2Config) -> None:
    """Lets the query heads of the first KV head begin by looking at the token before, whatever it is: there stands what
    the policy would have written. Under a rotation by frequency f, a query (a, 0) and a key (a cos f, a sin f) meet at
    a distance of 1."""
    dim = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    fast = config.rope_parameters["rope_theta"] ** (-torch.arange(LOOK_BACK) * 2 / dim)
    attention.q_proj.weight[: group * dim] = 0
    attention.k_proj.weight[:dim] = 0
    for head in range(group):
        attention.q_proj.bias[head * dim : head * dim + LOOK_BACK] = LOOK_BACK_NORM
    attention.k_proj.bias[:LOOK_BACK] = LOOK_BACK_NORM * fast.cos()
    attention.k_proj.bias[dim // 2 : dim // 2 + LOOK_BACK] = LOOK_BACK_NORM * fast.sin()
    for linear in (attention.v_proj, attention.o_proj):
        nn.init.normal_(linear.weight, std=config.hidden_size**-0.5)


def prm_example(problem: task.Problem, text: str) -> Example | None:
    """A text of the policy with the step tag behind every step, as the recipe makes it; None where it has another form
    than a right one, which shows without a verifier."""
    steps = text.split(task.BREAK)
    if [len(step) for step in steps] != [len(line) for line in problem.lines]:
        return None
    shown = tagged(steps)
    right = differences(shown, tagged(problem.lines))
    return shown, [not wrong for wrong in itertools.accumulate(right, bool.__or__)], differences(
        shown, tagged(follow(problem, steps))
    )  # fmt: skip


def tagged(steps: list[str]) -> str:
    return "".join(step + models.STEP_TAG for step in steps)


def differences(shown: str, wanted: str) -> list[bool]:
    """For each token of texts of equal form, whether it differs."""
    shown, wanted = (text.replace(models.STEP_TAG, "~") for text in (shown, wanted))
    return [a != b for a, b in zip(shown, wanted, strict=True)]


def follow(problem: task.Problem, steps: list[str]) -> list[str]:
    """What each step should be, given those before it as they are, and its result given its own operands."""
    value, lines = f"{problem.start:02}", []
    for register, (op, operand), step in zip(task.REGISTERS, problem.steps, steps):
        match = task.STEP.fullmatch(step)
        before, used, by = match.group(2, 3, 4) if match else (value, op, f"{operand:02}")
        lines.append(f"{register}{value}{op}{operand:02}={task.apply(int(before), used, int(by)):02}")
        value = match.group(5) if match else lines[-1][-2:]
    return [*lines, "#" + value]


def slipped(problem: task.Problem, wrong: set[int], rng: random.Random) -> str:
    """A chain in which the steps `wrong` have a changed digit, of the result or of what is copied, and everything else
    is computed from what stands there. The answer is step number len(problem.steps)."""
    value, made = problem.start, []
    for k, (register, (op, operand)) in enumerate(zip(task.REGISTERS, problem.steps)):
        before, copied, place = f"{value:02}", f"{operand:02}", rng.random()
        if k in wrong and place < 0.1:
            before = other_digit(before, rng)
        elif k in wrong and place < 0.2:
            copied = other_digit(copied, rng)
        after = f"{task.apply(int(before), op, int(copied)):02}"
        if k in wrong and place >= 0.2:
            after = other_digit(after, rng)
        made.append(f"{register}{before}{op}{copied}={after}")
        value = int(after)
    answer = f"{value:02}"
    return task.BREAK.join([*made, "#" + (other_digit(answer, rng) if len(problem.steps) in wrong else answer)])


def changed(problem: task.Problem, rng: random.Random) -> str:
    """The right chain with one slip."""
    return slipped(problem, {rng.randrange(len(problem.steps) + 1)}, rng)


def other_digit(number: str, rng: random.Random) -> str:
    """Another number of two digits, one of them changed: often by one, as in a lost carry."""
    place, digit = rng.randrange(2), 0
    while digit == 0:
        digit = rng.choice((1, 9)) if rng.random() < 0.5 else rng.randrange(10)
    new = str((int(number[place]) + digit) % 10)
    return number[:place] + new + number[place + 1 :]


def prm_stream(samples: list, seed: int, held_out: set[task.Problem]) -> Iterator[tuple[task.Problem, Example]]:
    """Samples of the policy, chains with one slip and chains with some or none, by turns, without an end."""
    rng = random.Random(seed)

    def synthetic() -> task.Problem:
        return next(problem for problem in iter(lambda: task.draw(rng), None) if problem not in held_out)

    while True:
        problem, texts = rng.choice(samples)
        example = prm_example(problem, rng.choice(texts))
        if example is not None:
            yield problem, example
        problem = synthetic()
        yield problem, prm_example(problem, changed(problem, rng))
        problem = synthetic()
        wrong = {k for k in range(len(problem.steps) + 1) if rng.random() < SLIPS}
        yield problem, prm_example(problem, slipped(problem, wrong if rng.random() < 0.8 else set(), rng))


def orm_stream(samples: list, seed: int) -> Iterator[tuple[task.Problem, Example]]:
    """A wrong sample of the policy and the right answer to the same problem, by turns: that a problem was seen before
    says nothing about an answer."""
    rng = random.Random(seed)
    while True:
        problem, texts = rng.choice(samples)
        text = rng.choice(texts)
        if len(text) != len(problem.direct):  # of another form, as a policy writes that is hardly trained
            text = "#" + other_digit(problem.answer, rng)
        if text != problem.direct:
            yield problem, (text, [False], [True])
            yield problem, (problem.direct, [True], [False])


def batches(stream: Iterator[tuple[task.Problem, Example]], batch_tokens: int) -> Iterator[list]:
    """Examples of equal length, as many as `batch_tokens` hold."""
    waiting: dict[int, list] = defaultdict(list)
    for problem, (text, labels, slips) in stream:
        group = waiting[len(problem.steps)]
        group.append((problem, text, labels, slips))
        if len(group) * (len(problem.prompt) + len(text.replace(models.STEP_TAG, "~"))) >= batch_tokens:
            yield group
            waiting[len(problem.steps)] = []


def losses(model: VerifierModel, group: list) -> dict[str, Tensor]:
    """Of the labels, of single tokens (PRM), of the language model on right text; and the share of labels predicted."""
    device = model.score[0].weight.device
    prompt = len(group[0][0].prompt)
    ids = models.encode([problem.prompt + text for problem, text, *_ in group]).to(device)
    labels, slips = (torch.tensor([one[i] for one in group], device=device) for i in (2, 3))  # [B, response] or [B, 1]
    hidden, margins = model(ids)
    margin, keep, found = margins[:, prompt:], labels, {}
    if model.kind == "orm":
        margin, keep = margins[:, -1:], labels.expand(-1, ids.shape[1] - prompt)
        weight = torch.ones_like(margin)
    else:
        wrong = ~labels
        weight = 1.0 + (FIRST_ERROR_WEIGHT - 1.0) * (wrong & (wrong.cumsum(1) <= 10))  # a step's tokens
        single = model.slip(hidden[:, prompt:]).squeeze(-1)
        found["slips"] = binary_cross_entropy_with_logits(single, slips.float(), 1.0 + (SLIP_WEIGHT - 1.0) * slips)
    found["labels"] = (binary_cross_entropy_with_logits(margin, labels.float(), weight, reduction="sum")
                       / weight.sum())  # fmt: skip
    # Only what is right by itself is worth imitating.
    logits = hidden[:, prompt - 1 : -1] @ model.model.embed_tokens.weight.T
    keep = (~slips if model.kind == "prm" else keep).flatten()
    lm = cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten(), reduction="none")
    found["lm"] = (lm * keep).sum() / keep.sum().clamp(min=1)
    found["right"] = ((margin > 0) == labels).float().mean()
    return found


@torch.inference_mode()
def auc(model: VerifierModel, samples: list) -> float:
    """Of telling right answers from wrong ones among samples of unseen problems, by the least margin of the steps."""
    scores, right = [], []
    groups = defaultdict(list)
    for problem, texts in samples:
        for text in texts:
            if model.kind == "prm":
                example = prm_example(problem, text)
            else:
                example = (text, [], []) if len(text) == len(problem.direct) else None
            if example is not None:
                groups[len(problem.steps)].append((problem, *example))
    for group in groups.values():
        prompt = len(group[0][0].prompt)
        ids = models.encode([problem.prompt + text for problem, text, *_ in group]).to(model.score[0].weight.device)
        for i in range(0, len(ids), 256):
            margins = model(ids[i : i + 256])[1]
            if model.kind == "prm":
                tags = ids[0] == models.VOCABULARY.index(models.STEP_TAG)
                tags[:prompt] = False
                scores += margins[:, tags].amin(1).tolist()
            else:
                scores += margins[:, -1].tolist()
        right += [task.answer_of(text.replace(models.STEP_TAG, "")) == problem.answer for problem, text, *_ in group]
    order = torch.tensor(scores).argsort().argsort().double() + 1
    positive = torch.tensor(right, dtype=torch.bool)
    wins = order[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return (wins / (positive.sum() * (~positive).sum()).clamp(min=1)).item()


def train(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = models.load_policy(args.policy)
    torch.manual_seed(args.seed)
    model = VerifierModel(args.kind, policy).to(device).train()
    held_out = {*task.split("test"), *task.split("dev")}
    samples = sample.read(args.samples)
    unseen, samples = samples[: len(samples) // 10], samples[len(samples) // 10 :]
    held_out |= {problem for problem, _ in unseen}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    stream = prm_stream(samples, args.seed, held_out) if args.kind == "prm" else orm_stream(samples, args.seed)
    tokens, history, begin = 0, [], time.perf_counter()
    for step, group in enumerate(batches(stream, args.batch_tokens)):
        frozen = tokens < args.frozen_tokens
        for parameter in (model.model.embed_tokens, *model.model.layers[: len(policy.model.layers)]):
            parameter.requires_grad_(not frozen)
        rate = args.frozen_learning_rate if frozen else args.learning_rate
        done = 0.0 if frozen else (tokens - args.frozen_tokens) / max(args.tokens - args.frozen_tokens, 1)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate * min((step + 1) / 50, 1.0) * (1.0 - done)
        found = losses(model, group)
        optimizer.zero_grad()
        (found["labels"] + found.get("slips", 0.0) + LM_WEIGHT * (not frozen) * found["lm"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += len(group) * (len(group[0][0].prompt) + len(group[0][1].replace(models.STEP_TAG, "~")))
        if step % args.check_every == args.check_every - 1 or tokens >= args.tokens:
            row = {"tokens": tokens, **{name: x.item() for name, x in found.items()}, "auc": auc(model, unseen),
                   "seconds": time.perf_counter() - begin}  # fmt: skip
            history.append(row)
            print(", ".join(f"{name} {value:,.4g}" for name, value in row.items()), flush=True)
        if tokens >= args.tokens:
            break
    model.save(args.out)
    record = {"kind": args.kind, "seed": args.seed, "tokens": tokens, "steps": step + 1, "auc": history[-1]["auc"],
              "batch_tokens": args.batch_tokens, "learning_rate": args.learning_rate,
              "samples": sum(len(texts) for _, texts in samples), "history": history}  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoner.train_verifier", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("kind", choices=LAYERS)
    add("--policy", type=Path, required=True, help="folder of the checkpoint whose answers are judged")
    add("--samples", type=Path, required=True, help="its samples, from benchmarks.reasoner.sample")
    add("--out", type=Path, required=True, help="folder for the checkpoint")
    add("--seed", type=int, default=2, help="default %(default)s")
    add("--tokens", type=int, default=8_000_000, help="of training (default %(default)s)")
    add("--frozen-tokens", type=int, default=1_500_000, help="of them with frozen policy layers (default %(default)s)")
    add("--batch-tokens", type=int, default=4_000, help="default %(default)s")
    add("--learning-rate", type=float, default=7e-4, help="default %(default)s")
    add("--frozen-learning-rate", type=float, default=2e-3, help="default %(default)s")
    add("--check-every", type=int, default=50, help="steps between looks at unseen samples (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    train(arguments())
