"""VerifierSession: step-wise scoring of the candidates of a question, or of several, every token encoded once."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tts_kernels.scoring import StepScores, aggregate, step_scores
from tts_kernels.tree.checks import check_int, fail, int_list, one_or_more
from tts_kernels.tree.kv_tree import OutOfPages
from tts_kernels.tree.pack import shared_beginnings
from tts_kernels.tree.plan import int_tensor

from .checks import check_texts
from .forward import forwards, gather
from .implicit import row_logprobs
from .session_node import Node, below_first

if TYPE_CHECKING:
    from .recipe import Encoded
    from .verifier import Verifier

WHEN_FULL = ("refuse", "recompute")


@dataclass(frozen=True)
class SessionScores(StepScores):
    """The StepScores of paths from the question to some nodes: each is a candidate, its steps are all of its path's.

    nodes    the nodes, as they were asked for or made
    offsets  [N + 1] int64: path i has the steps offsets[i]:offsets[i + 1] of `margin` and `prob`
    """

    nodes: tuple[int, ...]
    offsets: Tensor


class VerifierSession:
    """Scores steps as a search writes them. Made by `Verifier.session(question)`.

    question    the text that every path begins with; it is encoded at once. Or several: then `extend` takes parents of
                any of them, all through the model together, and what those begin with whose first page of tokens is
                the same is there once
    max_tokens  KV slots, for all questions; default those of the verifier
    when_full   what happens when they are used up: "refuse" raises OutOfPages and changes nothing; "recompute" lets go
                of the keys and values of the paths that were not used for longest, keeps their scores, and encodes them
                again should they be extended

    A node is a handle, an int that is never used again. Forking is free: extend one parent by several steps. A node
    lives while it is held, by whoever got it from `extend` (once for each time) until `release`, and by its children.
    A handle whose last hold was given back is refused everywhere, though its children go on below it. Asking for a step
    that its parent has already gives the same node, held once more, and no token goes through the model.

    roots       the node of each question, the same for equal ones; they are held until the end
    root        the first of them
    """

    def __init__(
        self, verifier: Verifier, question: str | Sequence[str], *, max_tokens: int | None = None,
        when_full: str = "refuse",
    ):  # fmt: skip
        recipe = verifier.recipe
        if not recipe.stepwise:
            fail("recipe", "one that scores steps as they come", f"{recipe.name}, which scores whole answers")
        if not isinstance(question, (str, Sequence)):
            fail("question", "a text, or a list of texts", type(question).__name__, TypeError)
        questions = (question,) if isinstance(question, str) else tuple(question)
        check_texts("question", questions)
        if not questions:
            fail("question", "a text, or at least one in a list", "an empty list")
        if when_full not in WHEN_FULL:
            fail("when_full", f"one of {', '.join(WHEN_FULL)}", repr(when_full))
        self.verifier, self.questions, self.when_full = verifier, questions, when_full
        self.max_tokens = verifier.max_tokens if max_tokens is None else check_int("max_tokens", max_tokens, 1)
        self.models = verifier.tree_models(self.max_tokens)
        self.tokens_encoded = 0  # that went through the model, those encoded again included
        self._nodes: dict[int, Node] = {}
        self._next = 0
        self._clock = 0
        self._context = verifier.context
        encoded: dict[str, list[int]] = {}
        for i, q in enumerate(self.questions):
            if q not in encoded:
                encoded[q] = verifier.encode("question" if q is question else f"question[{i}]", q, ())[0].ids
        texts, made = list(encoded), {}
        for members, shared in shared_beginnings(list(encoded.values()), verifier.page_size):
            under = None
            if shared:
                # Nobody has its handle, and the roots that stand on it stay.
                under = self._add(Node(-1, "", encoded[texts[members[0]]][:shared], shared, None, 0))
            for q in (texts[i] for i in members):
                made[q] = self._add(Node(-1, q, encoded[q][shared:], len(encoded[q]), under, 0, holds=1))
        self.roots = tuple(made[q] for q in self.questions)
        self.root = self.roots[0]
        for root in made.values():
            if not self._nodes[root].ids:
                self._nodes[root].kv = [model.kv.add(None, 0) for model in self.models]
        self._encode([root for root in made.values() if self._nodes[root].ids])

    # --- what there is -----------------------------------------------------------------------------------------------

    def __enter__(self) -> VerifierSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of all KV. Scores of nodes can still be asked for, and steps that are there already; new ones raise
        RuntimeError."""
        for record in self._nodes.values():
            self._drop_kv(record)
            record.states = None
        self.models = []

    @property
    def tokens_held(self) -> int:
        """Tokens whose keys and values are there."""
        return sum(len(node.ids) for node in self._nodes.values() if node.kv)

    def steps(self, node: int) -> list[str]:
        """The steps from the question to the node."""
        return [self._nodes[n].step for n in self._path(self._check("node", node))]

    def scores(self, nodes: Sequence[int]) -> SessionScores:
        """The scores of the paths to these nodes, from what is kept: nothing goes through the model."""
        nodes = int_list("nodes", nodes)
        paths = [self._path(self._check(f"nodes[{i}]", node)) for i, node in enumerate(nodes)]
        margins = torch.tensor([self._nodes[n].margin for path in paths for n in path], dtype=torch.float32)
        device = self.verifier.device
        offsets = int_tensor(list(accumulate(map(len, paths), initial=0)), torch.int64).to(device)
        head = self.verifier.head
        scores = aggregate(
            margins.to(device),
            offsets=offsets,
            activation="identity" if self.verifier.recipe.implicit or head.activation == "identity" else "sigmoid",
            backend=self.verifier.backend,
        )
        values = {f.name: getattr(scores, f.name) for f in fields(StepScores)}
        return SessionScores(**values, nodes=tuple(nodes), offsets=offsets)

    # --- growing and letting go --------------------------------------------------------------------------------------

    def extend(self, parents: Sequence[int], steps: Sequence[str]) -> SessionScores:
        """Puts steps[i] under parents[i], for any number of them, and scores the paths that end there.

        Only what is new goes through the model. A parent may be named several times; a step that it has already, here
        or from an earlier call, is not encoded again.

        Where the verifier has too_long="drop_oldest_steps", a path that outgrows the model's context goes on without
        its first steps, as few as it takes, and a warning says so; the scores that its steps have are kept.

        Raises TypeError and ValueError for wrong arguments, among them a path beyond the model's context where that is
        an error; OutOfPages where there is no room; RuntimeError for a new step of a closed session. Nothing is changed
        then.
        """
        check_texts("steps", steps)
        parents = int_list("parents", parents)
        for i, parent in enumerate(parents):
            self._check(f"parents[{i}]", parent)
        if len(steps) != len(parents):
            fail("steps", f"{len(parents)} steps, as many as parents", len(steps))
        fresh: dict[tuple[int, str], Node] = {}
        for i, (parent, step) in enumerate(zip(parents, steps)):
            if step not in self._nodes[parent].children and (parent, step) not in fresh:
                fresh[parent, step] = self._make(f"steps[{i}]", parent, step)
        self._clock += 1
        made = [self._add(node) for node in fresh.values()]
        try:
            self._encode(made)
        except BaseException:
            for node in made:
                self._forget(node)
            raise
        nodes = [self._nodes[parent].children[step] for parent, step in zip(parents, steps)]
        for node in nodes:
            self._nodes[node].holds += 1
        return self.scores(nodes)

    def release(self, nodes: int | Sequence[int]) -> None:
        """Gives a hold of each of the nodes back. What neither the caller nor a child holds is forgotten."""
        nodes = one_or_more("nodes", nodes)
        times = Counter(nodes)
        for i, node in enumerate(nodes):
            holds = self._nodes[self._check(f"nodes[{i}]", node)].holds - (self._nodes[node].parent < 0)
            if times[node] > holds:
                fail(f"nodes[{i}]", f"node {node} at most {holds} times, as the caller holds it", times[node])
        for node in nodes:
            self._nodes[node].holds -= 1
            while not (record := self._nodes[node]).holds and not record.children:
                self._forget(node)
                node = record.parent

    # --- inside ------------------------------------------------------------------------------------------------------

    def _check(self, name: str, node: int) -> int:
        node = check_int(name, node)
        if node not in self._nodes or not self._nodes[node].holds:
            fail(name, "a node of this session that is not released", node)
        return node

    def _forget(self, node: int) -> None:
        record = self._nodes.pop(node)
        self._drop_kv(record)
        del self._nodes[record.parent].children[record.step]

    def _drop_kv(self, record: Node) -> None:
        for model, handle in zip(self.models, record.kv or ()):
            model.kv.release(handle)
        record.kv = None

    def _add(self, node: Node) -> int:
        handle = self._next
        self._next += 1
        self._nodes[handle] = node
        if node.parent >= 0:
            self._nodes[node.parent].children[node.step] = handle
        return handle

    def _path(self, node: int) -> list[int]:
        """The nodes from the root's child to this one."""
        path = []
        while self._nodes[node].parent >= 0:
            path.append(node)
            node = self._nodes[node].parent
        return path[::-1]

    def _question(self, node: int) -> str:
        while self._nodes[node].parent >= 0:
            node = self._nodes[node].parent
        return self._nodes[node].step

    def _make(self, name: str, parent: int, step: str) -> Node:
        """The node of a new step, without KV and score yet."""
        above, under, response = self._nodes[parent], parent, 0

        def encode(question: str, steps: list[str]) -> Encoded:
            try:
                return self.verifier.recipe.encode(self.verifier.tokenizer, question, steps)
            except ValueError as error:
                behind = repr(above.step) if above.parent >= 0 else "the question"
                raise ValueError(f"{name}, behind {behind}: {error}") from error

        if above.parent < 0:
            sequence, before = encode(above.step, [step]), [t for n in self._above(parent) for t in self._nodes[n].ids]
            ids = sequence.ids
            if ids[: len(before)] != before:  # the tokenizer joins the question's end with the step: not shared then
                before, under = [], None
            response = max(0, sequence.response - len(before))
        else:
            # How the step is cut into tokens does not depend on what stands before the last one.
            if above.stub is None:
                above.stub = encode("", [above.step]).ids
            before = above.stub
            ids = encode("", [above.step, step]).ids
            if ids[: len(before)] != before:
                fail(name, "a step whose tokens begin behind those of the step before", repr(step))
        piece = ids[len(before) :]
        length = len(piece) + (0 if under is None else above.length)
        if self._context is not None and length > self._context:
            # Refused, or a path of its own that begins with a later step. Steps that have scores keep them.
            sequence, left_out = self.verifier.encode(name, self._question(parent), [*self.steps(parent), step])
            warnings.warn(f"{name}: {left_out} first steps left out of a path beyond the context", stacklevel=3)
            piece, under, length = sequence.ids, None, len(sequence.ids)
            response = sequence.positions[-2] + 1 if len(sequence.positions) > 1 else sequence.response
        return Node(parent, step, piece, length, under, response)

    def _encode(self, fresh: list[int]) -> None:
        """Gives these nodes KV and scores, in as few runs as there is room for."""
        if not fresh:
            return
        if not self.models:
            raise RuntimeError("the session is closed")
        paths = [self._above(node) for node in fresh]
        need = {node: i for i, path in enumerate(paths) for node in path}  # the last of `fresh` that stands on it
        for node in need:
            self._nodes[node].used = self._clock
        self._make_room(self._pages(need), self._victims(need, need))  # what this call has no use for goes first
        done = 0
        while done < len(fresh):
            group: dict[int, None] = {}  # nodes without KV, parents before children
            victims = self._victims({node for node, last in need.items() if last >= done}, need)
            pages = 0
            for path in paths[done:]:
                chain = [node for node in path if node not in group and self._nodes[node].kv is None]
                more = self._pages(chain)
                if not self._make_room(pages + more, victims) and (
                    group or not self._make_room(more, self._victims(path, need))
                ):
                    break
                group.update(dict.fromkeys(chain))
                pages += more
                done += 1
            if done < len(fresh) and (self.when_full == "refuse" or not group):
                kv = self.models[0].kv
                advice = "" if self.when_full == "recompute" else "or open the session with when_full='recompute', "
                raise OutOfPages(
                    f"max_tokens: at least {pages + more} pages of {kv.page_size} tokens are needed, {kv.free_pages} "
                    f"of {kv.num_pages} are free; release nodes, {advice}or give it a larger max_tokens"
                )
            self._run(list(group))

    def _pages(self, nodes: Iterable[int]) -> int:
        """That those of the nodes take which have no KV."""
        lengths = (len(self._nodes[node].ids) for node in nodes if self._nodes[node].kv is None)
        return sum(-(-length // self.verifier.page_size) for length in lengths)

    def _above(self, node: int) -> list[int]:
        """The nodes whose KV a node's stands on, the topmost first, and itself."""
        chain: list[int] = []
        at: int | None = node
        while at is not None:
            chain.append(at)
            at = self._nodes[at].under
        return chain[::-1]

    def _victims(self, kept: Collection[int], need: Mapping[int, int]) -> Iterator[int]:
        """What KV can be let go of that is not `kept`: of what was not used for longest, then of what this call needs
        last. The next one will probably ask in the same order, and then what came last is not wanted for longest."""

        def order(node: int) -> tuple[int, int, int]:
            return (1, -need[node], node) if node in need else (0, self._nodes[node].used, node)

        return below_first(self._nodes, kept, order)

    def _make_room(self, pages: int, victims: Iterator[int]) -> bool:
        """Whether so many pages are free, after letting go of the KV of `victims` where that is allowed."""
        kv = self.models[0].kv
        while self.when_full == "recompute" and kv.free_pages < pages and (node := next(victims, None)) is not None:
            self._drop_kv(self._nodes[node])
        return kv.free_pages >= pages

    def _run(self, group: list[int]) -> None:
        """Nodes without KV through the models, and scores for those that have none yet."""
        records = [self._nodes[node] for node in group]
        lengths = [len(record.ids) for record in records]
        ids = int_tensor([token for record in records for token in record.ids], torch.int64).to(self.verifier.device)
        first = list(accumulate(lengths, initial=0))
        last_rows = torch.tensor([end - 1 for end in first[1:]])
        fresh = [i for i, record in enumerate(records) if record.margin is None and record.parent >= 0]
        handles: list[list[int]] = []
        states: list[Tensor] = []  # the last of each record, by model
        logprobs: list[Tensor] = []
        try:
            for m, model in enumerate(self.models):
                handles.append([])
                passed: list[Tensor] = []
                pieces = self._pieces(group, m, handles[-1], ids.split(lengths))
                stream = gather(forwards(model, pieces, self.verifier.chunk_tokens), last_rows, passed)
                if self.verifier.recipe.implicit and fresh:
                    logprobs.append(self._logprobs(m, records, ids, first, fresh, stream))
                for _ in stream:
                    pass
                states.append(torch.cat(passed))
        except BaseException:
            for model, added in zip(self.models, handles):
                model.kv.release(added)
            raise
        self.tokens_encoded += sum(lengths)
        for i, record in enumerate(records):
            record.kv = [added[i] for added in handles]
            if self.verifier.recipe.implicit:
                record.states = [of_model[i] for of_model in states]
        if fresh:
            scored = [records[i] for i in fresh]
            if logprobs:
                self._reward(scored, logprobs)
            else:
                for record, margin in zip(scored, self._head(states[0][fresh]).tolist()):
                    record.margin = margin

    def _pieces(
        self, group: list[int], m: int, added: list[int], ids: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """What `forwards` takes; puts the handles into `added`."""
        handle = {}
        for node, tokens in zip(group, ids):
            record, kv = self._nodes[node], self.models[m].kv
            under = record.under
            above = None if under is None else handle[under] if under in handle else self._nodes[under].kv[m]
            handle[node] = kv.add(above, 0)
            added.append(handle[node])
            yield handle[node], tokens

    def _head(self, states: Tensor) -> Tensor:
        offsets = torch.tensor([0, len(states)], device=states.device)
        rows = torch.arange(len(states), device=states.device)
        return step_scores(states, rows, self.verifier.head, offsets=offsets, backend=self.verifier.backend).margin

    def _logprobs(
        self, m: int, records: list[Node], ids: Tensor, first: list[int], fresh: list[int], stream: Iterable
    ) -> Tensor:
        """By model m, the log-probabilities of the answer's tokens in the fresh records, one behind the other."""
        rows = [torch.arange(first[i] + records[i].response, first[i + 1]) for i in fresh]
        before = [r - 1 for r in rows]
        known = {}
        for r, i in zip(before, fresh):
            if records[i].response == 0:
                r[0], known[-1 - i] = -1 - i, self._nodes[records[i].under].states[m]
        return row_logprobs(
            self.verifier.head.weights[m], ids, torch.cat(rows), torch.cat(before), stream, self.verifier.backend, known
        )  # fmt: skip

    def _reward(self, fresh: list[Node], logprobs: list[Tensor]) -> None:
        """Their margins, from those of their parents: fp64, rounded only where they are shown."""
        ratios = self.verifier.head.ratio(logprobs).split([len(record.ids) - record.response for record in fresh])
        sums = torch.stack([ratio.sum() for ratio in ratios])
        for record, total in zip(fresh, sums.tolist()):
            record.margin = (self._nodes[record.parent].margin or 0.0) + total
