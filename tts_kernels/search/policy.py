"""The policy of a search: steps of candidates sampled from a transformers model over one shared KV tree."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tts_kernels.tree.checks import check_int, fail, int_list, one_or_more
from tts_kernels.tree.kv_tree import KVTree, OutOfPages
from tts_kernels.tree.pack import shared_beginnings
from tts_kernels.tree.plan import TreePlan

from .checks import check_sampling, check_stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOM = 32  # tokens for which the leaves of a step take pages at a time
PREFILL = 4096  # tokens of several prompts that go through the model at a time
CONTEXT = 8  # prompt tokens that a response's first tokens are decoded behind: some tokenizers drop a leading space


class Step(NamedTuple):
    """What was sampled under one parent.

    node    its node: a parent of further steps, held until it is released
    text    without special tokens; the texts of a path's steps, joined, are the path's text
    ids     the tokens, an end token included
    ended   nothing can follow: the model ended the text, or its context is full
    reason  "stop": a stop string was completed, and more can follow; "eos"; or "length": out of tokens
    """

    node: int
    text: str
    ids: tuple[int, ...]
    ended: bool
    reason: str


@dataclass
class Tip:
    """The end of a node: what a step under it goes on from."""

    ids: list[int]  # of the response so far, behind the last tokens of the prompt
    text: str  # these decoded
    length: int  # tokens from the root on
    ended: bool = False
    pending: int | None = None  # the last token, while its KV is not computed
    hidden: Tensor | None = None  # [d], of the last token, once it is


class Policy:
    """A causal language model that samples steps; its KV is a tree in which every prompt and trunk is stored, and
    computed, once.

    model       a transformers *ForCausalLM with its weights on one device
    tokenizer   the model's
    max_tokens  that the tree can hold. A node takes whole pages, so leave page_size for each node
    page_size   tokens per page
    backend     of the attention ops, see `tts_kernels.tree_attention`
    prompt      the prompt of a question, as text or ids. Default: the question in the tokenizer's chat template, if it
                has one, else the question as it is

    End tokens are those of the model's generation config and the tokenizer's. A policy is for one thread at a time;
    several on one model wait for one another.
    Raises TypeError and ValueError for a model that cannot run over a tree, with every reason why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        page_size: int = 16,
        backend: str | None = None,
        prompt: Callable[[str], str | Sequence[int]] | None = None,
    ):
        from tts_kernels.integrations.transformers_tree import TreeModel

        check_int("max_tokens", max_tokens, 1)
        check_int("page_size", page_size, 1)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            fail("model", "a transformers model with a language model head", type(model).__name__, TypeError)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.prompt = self._chat_prompt if prompt is None else prompt
        self.tokens_computed = 0  # that went through the model so far
        self._model = TreeModel(model, num_pages=-(-max_tokens // page_size), page_size=page_size, backend=backend)
        self._head = head
        config = self._model.config
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
            if (getattr(config, name, None) or 1) != 1:
                fail("model", "logits that are the head's alone", f"{name}={getattr(config, name)}")
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._context = getattr(config, "max_position_embeddings", None) or 2**62
        self._ends = _ids(getattr(model.generation_config, "eos_token_id", None)) | _ids(tokenizer.eos_token_id)
        self._tips: dict[int, Tip] = {}

    @property
    def kv(self) -> KVTree:
        """The KVTree. Grow and release it through this policy alone."""
        return self._model.kv

    @property
    def device(self) -> torch.device:
        return self._model.device

    def start(self, prompt: str | Sequence[int] | Tensor) -> int:
        """Computes a prompt, given as text or ids, and returns its node. Text is tokenized as the tokenizer does by
        itself, special tokens included."""
        return self._start([self._prompt_ids("prompt", prompt)])[0]

    def start_all(self, prompts: Sequence[str | Sequence[int] | Tensor]) -> list[int]:
        """As `start`, for each of the prompts. What those begin with whose first page of tokens is the same is stored,
        and computed, once."""
        if isinstance(prompts, str):
            fail("prompts", "a list of prompts", repr(prompts), TypeError)
        names = ["prompt"] if len(prompts) == 1 else [f"prompts[{i}]" for i in range(len(prompts))]
        return self._start([self._prompt_ids(*one) for one in zip(names, prompts)])

    def sample_steps(
        self,
        parents: Sequence[int],
        *,
        n: int = 1,
        stop: str | Sequence[str] | None = "\n\n",
        max_new_tokens: int = 2048,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Step]:
        """`n` steps under each of the `parents`, all at once: a step of decoding takes a token for each that goes on.

        Args:
            parents: nodes that have not ended; one that is named k times gets k * n steps.
            stop: strings that end a step, looked for after every token in the text of the step. They belong to it,
                and so does what the token that completed one has behind it. None: only the other ends.
            max_new_tokens: of each step.
            temperature, top_p, top_k: as in transformers, which applies them in this order: temperature, top_k, top_p.
                Temperature 0: the token of the highest logit. top_k 0: all.
            generator: of the draws, on the model's device. Or one for each of the parents: those that stand on end with
                the same one are drawn as in a call for them alone. Default: torch's.
            progress: called after every step of decoding with the tokens sampled in it and the steps that go on.

        Returns:
            Step: n for the first parent, n for the second, and so on.

        Raises:
            TypeError, ValueError: a wrong argument; nothing was sampled.
            OutOfPages: the tree is full. No step is left behind and the parents are as good as before.
        """
        parents = int_list("parents", parents)
        for parent in parents:
            if parent not in self._tips:
                fail("parents", "nodes of this policy that are not released", parent)
            if self._tips[parent].ended:
                fail("parents", "nodes that have not ended", parent)
        check_int("n", n, 1)
        check_sampling(max_new_tokens, temperature, top_p, top_k)
        stops = check_stop(stop)
        generators = generator
        if isinstance(generator, Sequence):
            if len(generator) != len(parents):
                fail("generator", f"{len(parents)}, one for each of the parents", len(generator))
            generators = [one for one in generator for _ in range(n)]
        draw = sampler(temperature, top_p, top_k, generators)
        with self._full(), torch.no_grad(), self._model.switched():
            self._compute_pending(dict.fromkeys(parents))
            pools = {parent: iter(self.kv.fork(parent, n * count)) for parent, count in Counter(parents).items()}
            under = [parent for parent in parents for _ in range(n)]
            leaves = [next(pools[parent]) for parent in under]
            try:
                sampled = self._decode_steps(under, leaves, stops, max_new_tokens, draw, progress)
                return [self._step(*one) for one in zip(under, leaves, *sampled)]
            except BaseException:
                self.kv.release(leaves)
                for leaf in leaves:
                    self._tips.pop(leaf, None)
                raise

    def release(self, nodes: int | Sequence[int]) -> None:
        """Gives nodes back; the pages of those that no node below needs are free at once."""
        nodes = one_or_more("nodes", nodes)
        self.kv.release(nodes)
        for node in nodes:
            del self._tips[node]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _prompt_ids(self, name: str, prompt: str | Sequence[int] | Tensor) -> list[int]:
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else int_list(name, prompt)
        if not 1 <= len(ids) < self._context:
            fail(name, f"at least 1 token and fewer than the model's context of {self._context}", len(ids))
        return ids

    def _start(self, prompts: list[list[int]]) -> list[int]:
        nodes: list[int] = []
        pieces: list[list[int]] = []
        trunks: list[int] = []
        place = [0] * len(prompts)  # of each prompt's node
        try:
            with self._full():
                for members, shared in shared_beginnings(prompts, self.kv.page_size):
                    trunk = None
                    if shared:
                        trunk = self.kv.add(None, shared)
                        trunks.append(trunk)
                        nodes.append(trunk)
                        pieces.append(prompts[members[0]][:shared])
                    for i in members:
                        place[i] = len(nodes)
                        nodes.append(self.kv.add(trunk, len(prompts[i]) - shared))
                        pieces.append(prompts[i][shared:])
            hidden = self._compute_prompts(nodes, pieces)
            tips = [
                Tip(ids[-CONTEXT:], self._decode(ids[-CONTEXT:]), len(ids), hidden=hidden[at])
                for ids, at in zip(prompts, place)
            ]
        except BaseException:
            self.kv.release(nodes)
            raise
        roots = [nodes[at] for at in place]
        self._tips.update(zip(roots, tips))
        self.kv.release(trunks)  # the prompts keep them
        return roots

    def _compute_prompts(self, nodes: Sequence[int], pieces: Sequence[list[int]]) -> list[Tensor]:
        """The last hidden state of each, in forwards of whole nodes and at most PREFILL tokens, if one has no more."""
        hidden: list[Tensor] = []
        begin = 0
        while begin < len(nodes):
            ends = list(accumulate(map(len, pieces[begin:])))
            count = max(1, bisect_right(ends, PREFILL))
            group = pieces[begin : begin + count]
            states = self._compute(
                dict(zip(nodes[begin:], map(len, group))), [token for piece in group for token in piece]
            )
            hidden += [states[end - 1].clone() for end in ends[:count]]
            begin += count
        return hidden

    def _decode_steps(
        self,
        under: list[int],
        leaves: list[int],
        stops: tuple[str, ...],
        max_new_tokens: int,
        draw: Callable[[Tensor, Sequence[int]], list[int]],
        progress: Callable[[int, int], None] | None,
    ) -> tuple[list[list[int]], list[str]]:
        """Tokens and reason for each leaf. All but the last of its tokens are stored in it."""
        tokens: list[list[int]] = [[] for _ in leaves]
        reasons = [""] * len(leaves)
        window = stop_window(stops)
        room = [self._context - self._tips[parent].length for parent in under]
        distinct = {parent: row for row, parent in enumerate(dict.fromkeys(under))}
        going = list(range(len(leaves)))
        plan = None
        if going:
            hidden = torch.stack([self._tips[parent].hidden for parent in distinct])
            logits = self._logits(hidden)[[distinct[parent] for parent in under]]
        while going:
            for i, token in zip(going, draw(logits, going)):
                tokens[i].append(token)
                if token in self._ends:
                    reasons[i] = "eos"
                elif len(tokens[i]) == room[i]:  # before the stop strings: nothing can follow
                    reasons[i] = "length"
                elif stops and stopped(self._decode(tokens[i][-window:]), stops):
                    reasons[i] = "stop"
                elif len(tokens[i]) == max_new_tokens:
                    reasons[i] = "length"
            still = [i for i in going if not reasons[i]]
            if progress is not None:
                progress(len(going), len(still))
            if not still:
                break
            rows = {leaves[i]: 1 for i in still}
            self.kv.append(list(rows))
            if plan is None or len(still) < len(going) or not plan.capacity:
                length = len(tokens[still[0]])
                most = min(max_new_tokens, max(room[i] for i in still)) - 1  # the last token is not stored
                plan = self._plan(rows, min(-length % ROOM, most - length))
            else:
                plan.advance_()
            going = still
            logits = self._logits(self._compute(rows, [tokens[i][-1] for i in going], plan=plan))
        return tokens, reasons

    def _step(self, parent: int, leaf: int, ids: list[int], reason: str) -> Step:
        before = self._tips[parent]
        text = new_text(self._decode, before.ids, before.text, ids)
        length = before.length + len(ids)
        ended = reason == "eos" or length >= self._context
        self._tips[leaf] = Tip(before.ids + ids, before.text + text, length, ended, pending=ids[-1])
        return Step(leaf, text, tuple(ids), ended, reason)

    def _compute_pending(self, nodes: Sequence[int]) -> None:
        """Stores the last token of each node, if that was not done, for what follows it."""
        waiting = [node for node in nodes if self._tips[node].pending is not None]
        if not waiting:
            return
        # A forward that was interrupted may have left the token's place behind.
        self.kv.append([node for node in waiting if self.kv.context_len(node) < self._tips[node].length])
        hidden = self._compute(dict.fromkeys(waiting, 1), [self._tips[node].pending for node in waiting])
        for node, row in zip(waiting, hidden):
            self._tips[node].pending, self._tips[node].hidden = None, row.clone()

    def _plan(self, rows: dict[int, int], reserve: int) -> TreePlan:
        try:
            return self.kv.plan(rows, reserve=reserve)
        except OutOfPages:  # nearly full: then page by page
            return self.kv.plan(rows)

    def _compute(self, rows: dict[int, int], ids: Sequence[int], plan: TreePlan | None = None) -> Tensor:
        hidden = self._model.forward(rows, torch.tensor(ids, device=self.device), plan=plan)
        self.tokens_computed += len(ids)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """[R, d] -> [R, V] fp32."""
        logits = self._head(hidden).float()
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _chat_prompt(self, question: str) -> str | list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            return question
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has them

    @contextlib.contextmanager
    def _full(self) -> Iterator[None]:
        """Says what to do where the tree is full."""
        try:
            yield
        except OutOfPages as error:
            raise OutOfPages(
                f"max_tokens: expected room for all that is sampled at once, got {self.max_tokens} ({error}): "
                "give Policy more max_tokens, or ask for fewer candidates or fewer new tokens"
            ) from error


def stop_window(stops: Sequence[str]) -> int:
    """How many of a step's last tokens are decoded to look for stop strings: each is a byte at least."""
    return max((len(stop.encode()) for stop in stops), default=0) + CONTEXT


def stopped(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def new_text(decode: Callable[[list[int]], str], before: list[int], text: str, ids: list[int]) -> str:
    """What `ids` add to the text of the tokens before them."""
    whole = decode(before + ids)
    return whole[len(text) :] if whole.startswith(text) else decode(ids)


def _ids(ids: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def sampler(
    temperature: float, top_p: float, top_k: int, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Callable[[Tensor, Sequence[int]], list[int]]:
    """From logits [R, V], and which of all rows these are, to a token for each. Where each of all rows has a generator,
    those that follow one another with the same one are drawn together."""
    if temperature == 0:
        return lambda logits, _: logits.argmax(-1).tolist()
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [] if temperature == 1 else [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []

    def draw(logits: Tensor, rows: Sequence[int]) -> list[int]:
        for warper in warpers:
            logits = warper(None, logits)
        weights = logits.softmax(-1)
        if not isinstance(generator, Sequence):
            return torch.multinomial(weights, 1, generator=generator).squeeze(-1).tolist()
        together = [(one, len(list(same))) for one, same in groupby(generator[row] for row in rows)]
        parts = weights.split([count for _, count in together])
        drawn = [torch.multinomial(part, 1, generator=one) for part, (one, _) in zip(parts, together)]
        return torch.cat(drawn).squeeze(-1).tolist()

    return draw
