"""What stacks do today, with transformers alone: the other side of the demo and of the benchmarks.

`StockVerifier` and `StockPolicy` have the interfaces of `Verifier` and `search.Policy`, so that one search runs on
either:

- candidates are scored `batch_size` at a time, padded to the longest, through the whole model and its LM head: logits
  [batch_size, tokens, vocabulary], of which a few columns at a few positions are kept; with every further step all
  steps before it are encoded again. A batch size of 8 is search-and-learn's, 1 that of compute-optimal-tts and openr;
- candidates are sampled by `model.generate`, which prefills the whole text of each of them for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, count
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .scoring import ScoreHead, StepScores, aggregate
from .search.policy import CONTEXT, Step, new_text, sampler, stop_window, stopped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .verifier import Encoded, Verifier


class StockVerifier:
    """Scores as `verifier` does, with its model, tokenizer and head, in padded batches.

    verifier    a Verifier that is not implicit. Where its head is rows of an LM head and its model has one, full logits
                are made; other heads run on the hidden states of all tokens
    batch_size  candidates at a time
    """

    def __init__(self, verifier: Verifier, *, batch_size: int = 8):
        self.recipe, self.tokenizer, self.head = verifier.recipe, verifier.tokenizer, verifier.head
        self.batch_size, self.device = batch_size, verifier.device
        model = verifier.models[0]
        if self.recipe.head.kind == "vocab_rows" and model.get_output_embeddings() is not None:
            ids = [self.tokenizer(t, add_special_tokens=False)["input_ids"][-1] for t in self.recipe.head.candidates]
            columns = torch.tensor(ids, device=self.device)
            self._logits = lambda **inputs: model(**inputs).logits[:, :, columns]
        else:
            decoder = model.get_decoder()
            self._logits = lambda **inputs: head_logits(self.head, decoder(**inputs).last_hidden_state)
        self.tokens = 0  # that went through the model so far, padding included

    def score(self, questions: Sequence[str], outputs: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        """As `Verifier.score`."""
        sequences = [
            self.recipe.encode(self.tokenizer, question, self.recipe.split(output))
            for question, candidates in zip(questions, outputs)
            for output in candidates
        ]
        scores = iter(self.score_sequences(sequences))
        return [[next(scores) for _ in candidates] for candidates in outputs]

    def score_batch(self, questions: Sequence[str], outputs: Sequence[Sequence[str]]) -> SimpleNamespace:
        """As `Verifier.score_batch`."""
        before = self.tokens
        scores = _aggregated([steps for of_question in self.score(questions, outputs) for steps in of_question])
        return SimpleNamespace(**vars(scores), tokens=self.tokens - before)

    def score_sequences(self, sequences: Sequence[Encoded]) -> list[list[float]]:
        scores: list[list[float]] = []
        for begin in range(0, len(sequences), self.batch_size):
            batch = sequences[begin : begin + self.batch_size]
            width = max(len(s.ids) for s in batch)
            ids, mask = torch.zeros(2, len(batch), width, dtype=torch.int64)
            for i, sequence in enumerate(batch):
                ids[i, : len(sequence.ids)] = torch.tensor(sequence.ids)
                mask[i, : len(sequence.ids)] = 1
            with torch.no_grad():
                logits = self._logits(
                    input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
                )
            scores += self._probabilities(logits.float(), batch)
            self.tokens += ids.numel()
        return scores

    def _probabilities(self, logits: Tensor, batch: Sequence[Encoded]) -> list[list[float]]:
        if self.head.activation == "softmax":
            probs = logits.softmax(-1)[..., self.head.positive]
        else:
            probs = logits[..., self.head.positive]
            probs = probs.sigmoid() if self.head.activation == "sigmoid" else probs
        probs = probs.cpu()
        return [probs[i, s.positions].tolist() for i, s in enumerate(batch)]

    def session(self, question: str | Sequence[str], **_: object) -> StockSession:
        return StockSession(self, [question] if isinstance(question, str) else question)


class StockSession:
    """As `VerifierSession`: every call encodes the paths to its new steps whole."""

    def __init__(self, verifier: StockVerifier, questions: Sequence[str]):
        self.verifier, self.roots = verifier, tuple(range(len(questions)))
        self.root = self.roots[0]
        self._begin = verifier.tokens
        self._handles = count(len(questions))
        # question, steps and their scores
        self._paths: dict[int, tuple[str, list[str], list[float]]] = {i: (q, [], []) for i, q in enumerate(questions)}

    @property
    def tokens_encoded(self) -> int:
        return self.verifier.tokens - self._begin

    def extend(self, parents: Sequence[int], steps: Sequence[str]) -> SimpleNamespace:
        above = [self._paths[parent] for parent in parents]
        paths = [(question, [*before, step]) for (question, before, _), step in zip(above, steps)]
        encode = self.verifier.recipe.encode
        scores = self.verifier.score_sequences([encode(self.verifier.tokenizer, *path) for path in paths])
        nodes = tuple(next(self._handles) for _ in paths)
        self._paths.update((node, (*path, of_steps)) for node, path, of_steps in zip(nodes, paths, scores))
        return SimpleNamespace(**vars(self.scores(nodes)), nodes=nodes)

    def scores(self, nodes: Sequence[int]) -> StepScores:
        return _aggregated([self._paths[node][2] for node in nodes])

    def release(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            del self._paths[node]

    def close(self) -> None:
        self._paths.clear()


class StockPolicy:
    """As `search.Policy`, on `model.generate`. The draws are the policy's own, row by row, so that the same logits give
    the same tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, prompt: Callable):
        self.model, self.tokenizer, self.prompt, self.device = model, tokenizer, prompt, model.device
        self.tokens_computed = 0
        ends = model.generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62
        self._handles = count()
        self._paths: dict[int, tuple[list[int], list[int], str]] = {}  # ids, those that text is decoded from, and it

    def start_all(self, prompts: Sequence[str | Sequence[int]]) -> list[int]:
        read = [self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        return [self._add(ids, ids[-CONTEXT:], self._decode(ids[-CONTEXT:])) for ids in read]

    def sample_steps(
        self, parents: Sequence[int], *, stop: Sequence[str] | None, max_new_tokens: int, temperature: float,
        top_p: float, top_k: int, generator: Sequence[torch.Generator], progress: Callable[[int, int], None],
    ) -> list[Step]:  # fmt: skip
        from transformers import LogitsProcessorList, StoppingCriteriaList

        paths = [self._paths[parent][0] for parent in parents]
        width = max(map(len, paths))
        ids, mask = torch.zeros(2, len(paths), width, dtype=torch.int64)
        for i, path in enumerate(paths):
            ids[i, width - len(path) :] = torch.tensor(path)
            mask[i, width - len(path) :] = 1
        room = [self._context - len(path) for path in paths]
        ended = Ended(self._decode, tuple(stop or ()), self._ends, width, room, progress)
        draw = sampler(temperature, top_p, top_k, generator)
        out = self.model.generate(
            ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=min(max_new_tokens, max(room)),
            do_sample=False,
            logits_processor=LogitsProcessorList([Draw(draw, ended)]), stopping_criteria=StoppingCriteriaList([ended]),
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        self.tokens_computed += len(paths) * (out.shape[1] - 1)
        return [
            self._step(parent, new[: length or None].tolist(), reason or "length")
            for parent, new, length, reason in zip(parents, out[:, width:], ended.lengths, ended.reasons)
        ]

    def release(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            del self._paths[node]

    def _add(self, ids: list[int], tail: list[int], text: str) -> int:
        node = next(self._handles)
        self._paths[node] = (ids, tail, text)
        return node

    def _step(self, parent: int, new: list[int], reason: str) -> Step:
        ids, tail, before = self._paths[parent]
        text = new_text(self._decode, tail, before, new)
        ended = reason == "eos" or len(ids) + len(new) == self._context
        return Step(self._add(ids + new, tail + new, before + text), text, tuple(new), ended, reason)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Ended:
    """A stopping criterion of transformers by the rules of `Policy`; keeps when and why each row ended."""

    def __init__(
        self, decode: Callable, stops: tuple[str, ...], ends: set[int], width: int, room: list[int], progress: Callable
    ):
        self.decode, self.stops, self.ends, self.width, self.progress = decode, stops, ends, width, progress
        self.room = room  # tokens until each row's context is full
        self.reasons, self.lengths = [""] * len(room), [0] * len(room)

    @property
    def going(self) -> list[int]:
        return [i for i, reason in enumerate(self.reasons) if not reason]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        going = self.going
        for i in going:
            new = input_ids[i, self.width :].tolist()
            at_stop = self.stops and stopped(self.decode(new[-stop_window(self.stops) :]), self.stops)
            full = len(new) == self.room[i]
            self.reasons[i] = "eos" if new[-1] in self.ends else "length" if full else "stop" if at_stop else ""
            self.lengths[i] = len(new) if self.reasons[i] else 0
        self.progress(len(going), len(self.going))
        return torch.tensor([bool(reason) for reason in self.reasons], device=input_ids.device)


class Draw:
    """A logits processor that leaves only the token drawn for each row that goes on."""

    def __init__(self, draw: Callable[[Tensor, Sequence[int]], list[int]], ended: Ended):
        self.draw, self.ended = draw, ended

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        going = self.ended.going
        tokens = self.draw(scores[going].float(), going)
        scores = torch.full_like(scores, -torch.inf)
        scores[going, tokens] = 0.0
        return scores


def head_logits(head: ScoreHead, hidden: Tensor) -> Tensor:
    """[..., d] -> [..., C], plain torch in the dtype of the hidden states."""
    x = hidden
    if head.norm_weight is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], head.norm_weight.to(x.dtype), head.norm_eps)
    if head.w1 is not None:
        act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[head.act]
        x = act(_linear(x, head.w1, head.b1))
    return _linear(x, head.w2, head.b2)


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))


def _aggregated(scores: Sequence[Sequence[float]]) -> StepScores:
    offsets = torch.tensor(list(accumulate(map(len, scores), initial=0)))
    return aggregate(torch.tensor([s for of_one in scores for s in of_one]), offsets=offsets, activation="identity")
