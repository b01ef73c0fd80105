"""A verifier in which every character is a token, tiny seeded models, and its scores worked out path by path by
transformers alone: what the tests of `Verifier` and of sessions are held to."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import torch
from transformers_models import build

from tts_kernels.scoring import ScoreHead
from tts_kernels.verifier import Encoded, HeadSpec, ImplicitHead, Recipe, Verifier

BOS, TAG = 1, 2  # token ids; characters are 3 and up
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGH|"
TOKENIZER = SimpleNamespace(is_fast=True)  # the layout needs none


class Characters:
    """bos, the question, then each step and a tag, which is read."""

    def encode(self, tokenizer, question, steps):
        ids = [BOS, *(3 + LETTERS.index(c) for c in question)]
        response, positions = len(ids), []
        for step in steps:
            ids += [*(3 + LETTERS.index(c) for c in step), TAG]
            positions.append(len(ids) - 1)
        return Encoded(ids, positions, response)


class JoinedToTheQuestion(Characters):
    """A tokenizer that makes one token of the question's last character and the first step's first."""

    def encode(self, tokenizer, question, steps):
        ids, positions, response = super().encode(tokenizer, question, steps)
        if steps and question:
            return Encoded([*ids[: response - 1], 90, *ids[response + 1 :]], [p - 1 for p in positions], response - 1)
        return Encoded(ids, positions, response)


HEADS = {
    "softmax": HeadSpec("linear", ("w", "b"), 2, 1, "softmax"),
    "sigmoid": HeadSpec("linear", ("w", "b"), 1, 0, "sigmoid"),
    "identity": HeadSpec("linear", ("w", "b"), 1, 0, "identity"),
    "implicit": HeadSpec("implicit", ("lm_head.weight",), 0, 0, "identity", beta=0.5),
}


def make(
    kind: str = "softmax", *, layout=None, model: str = "qwen2", recipe: dict | None = None, dtype=torch.float32,
    device="cpu", **settings,
) -> Verifier:  # fmt: skip
    made = Recipe(
        f"characters-{kind}",
        "the tests",
        layout or Characters(),
        HEADS[kind],
        "min",
        **{"split_on": "|", **(recipe or {})},
    )
    model = build(model).to(device, dtype)
    gen = torch.Generator().manual_seed(3)
    reference = None
    if kind == "implicit":
        reference = build("qwen2")
        for parameter in reference.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=gen)
        reference.to(device)
        head = ImplicitHead(model.lm_head.weight.data, reference.lm_head.weight.data, 0.5)
    else:
        columns = HEADS[kind].columns
        w, b = 0.2 * torch.randn(columns, 64, generator=gen), torch.randn(columns, generator=gen)
        head = ScoreHead.linear(w.to(device), b.to(device), activation=kind)
    return Verifier(model, TOKENIZER, made, head=head, reference=reference, **settings)


def scores_alone(verifier: Verifier, question: str, steps: list[str]) -> list[float]:
    """The steps' scores of one candidate, from transformers' own forward over its tokens, in float64 after it."""
    sequence = verifier.recipe.encode(TOKENIZER, question, steps)
    ids = torch.tensor([sequence.ids])
    head, models = verifier.head, verifier.models
    with torch.no_grad():
        if verifier.recipe.implicit:
            logp = [torch.log_softmax(model(ids).logits[0].double(), -1) for model in models]
            reward, rewards = 0.0, {}
            for t in range(sequence.response, len(sequence.ids)):
                reward += head.beta * float(logp[0][t - 1, ids[0, t]] - logp[1][t - 1, ids[0, t]])
                rewards[t] = reward
            return [rewards[p] for p in sequence.positions]
        states = models[0].get_decoder()(ids).last_hidden_state[0].double()
    scores = []
    for p in sequence.positions:
        logits = (head.w2.double() @ states[p] + head.b2.double()).tolist()
        margin = logits[1] - logits[0] if len(logits) == 2 else logits[0]
        scores.append(margin if head.activation == "identity" else 1 / (1 + math.exp(-margin)))
    return scores


def texts(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choice(LETTERS[:-1]) for _ in range(rng.randint(least, most)))
