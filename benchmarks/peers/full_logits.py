"""Logits of the whole vocabulary for every token, as an LM head gives them; then what is asked for."""

import torch.nn.functional as F

from ..machine import memory_shortage

NAME = "full logits"


def logit_bytes(case):
    return case.tokens * case.vocabulary * case.itemsize


def reason_against(case):
    if not case.vocabulary:
        return "no vocabulary"
    return memory_shortage(6 * logit_bytes(case), case.device)


def prepare(inputs):
    def two_tokens():
        logits = F.linear(inputs.hidden, inputs.lm_head)
        chosen = logits[inputs.positions[:, None], inputs.ids]  # [M, 2]
        return chosen.float().softmax(-1)[:, inputs.head.positive]

    def logprobs():
        logits = F.linear(inputs.hidden, inputs.lm_head)
        return logits.log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]

    return logprobs if inputs.case.kind == "logprobs" else two_tokens


def bytes_read(case):
    passes = 4 if case.kind == "logprobs" else 1  # written; read, and log-probabilities written and read
    return case.tokens * case.dim * case.itemsize + case.weight_bytes + passes * logit_bytes(case)
