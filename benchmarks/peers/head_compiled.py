"""The same head under torch.compile."""

import torch

from . import head_eager

NAME = "compiled head"
COMPILED = True


def reason_against(case):
    on_cpu = "torch.compile is measured on GPUs alone" if case.device == "cpu" else ""
    return head_eager.reason_against(case) or on_cpu


def prepare(inputs):
    return head_eager.prepare(inputs, inputs.once(NAME, compiled))


def compiled():
    torch._dynamo.reset()  # a shape for each case: not more and more versions of one function
    return torch.compile(head_eager.scores, dynamic=False)


bytes_read = head_eager.bytes_read
