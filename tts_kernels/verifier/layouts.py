"""How text becomes tokens and positions: the forms that published verifiers share, as frozen records.

Where a family tokenises its whole text at once, so do we, and a position is the token whose characters end where the
step's tag ends. What is said of white space below is what byte-level and sentencepiece tokenizers do with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from tts_kernels.tree.checks import fail

from .recipe import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ue000"  # of Unicode's private use: stands for a text in a chat template until we know where that puts it
KEEPS = ("token", "tokens", "end")
LINE_BREAK = re.compile(r"\s*[\r\n]")


class Tokens:
    """A tokenised text, and which characters its tokens came from."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> None:
        encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        self.ids: list[int] = encoding["input_ids"]
        spans = [(i, a, b) for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < b]  # no added special tokens
        self.ending = {b: i for i, _, b in spans}  # the last token that ends there
        self.beginning = {a: i for i, a, _ in reversed(spans)}  # the first one that begins there
        self.spans = spans

    def first_behind(self, at: int) -> int:
        """Index of the first token with characters behind `at`, the number of tokens where there is none."""
        return next((i for i, _, b in self.spans if b > at), len(self.ids))


@dataclass(frozen=True)
class Tagged:
    """One text in which a tag stands behind every step, tokenised as a whole. Read: the last token of each tag.

        question + behind + lead + step + tag + link + step + tag ...   the tokenizer's special tokens added
        template(system, user question, assistant step + tag + link ...)    with chat: the template's own alone

    tag, link, lead, behind   texts as above; `behind` belongs to the prompt, `lead` to the first step
    chat, system              the tokenizer's chat template; None leaves the system message to it
    keeps                     what the tag has to be: exactly one "token", its own "tokens", or the "end" of one
    """

    tag: str
    link: str = ""
    lead: str = ""
    behind: str = ""
    chat: bool = False
    system: str | None = None
    keeps: str = "token"

    def __post_init__(self) -> None:
        check_texts(tag=self.tag)
        if self.chat and (self.lead or self.behind):
            fail("chat", "False beside lead or behind", "True")
        if self.keeps not in KEEPS:
            fail("keeps", f"one of {', '.join(KEEPS)}", repr(self.keeps))

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str]) -> Encoded:
        body, ends = "", []
        for k, step in enumerate(steps):
            piece = (self.link if k else self.lead) + step + self.tag
            # White space up to a line break is cut into tokens as one run: borders within one are there by luck.
            if k and self.tag[-1].isspace() and LINE_BREAK.match(piece):
                refuse_tag(k - 1, self.tag, self.keeps)
            body += piece
            ends.append(len(body))
        if self.chat:
            text, begin = chat_text(tokenizer, self.system, question, body)
        else:
            text, begin = question + self.behind + body, len(question + self.behind)
        if not steps:
            ids = Tokens(tokenizer, text[:begin], not self.chat).ids
            return Encoded(ids, [], len(ids))
        tokens = Tokens(tokenizer, text, not self.chat)
        positions = [self.tag_end(tokens, k, begin + end) for k, end in enumerate(ends)]
        return Encoded(tokens.ids[: positions[-1] + 1], positions, tokens.first_behind(begin))

    def tag_end(self, tokens: Tokens, step: int, end: int) -> int:
        """Index of the token at the end of a tag whose characters end at `end`."""
        last = tokens.ending.get(end)
        if last is None:
            refuse_tag(step, self.tag, self.keeps)
        if self.keeps != "end":
            first = tokens.beginning.get(end - len(self.tag))
            if first is None or (self.keeps == "token" and first != last):
                refuse_tag(step, self.tag, self.keeps)
        return last


@dataclass(frozen=True)
class Pieces:
    """Prompt and steps tokenised apart, the separator's tokens behind every step. Read: the last of those.

        [bos] ids(question + behind) ids(step) ids(separator) ids(step) ids(separator) ...

    separator, behind   texts as above
    bos                 refuse a tokenizer that has none; without, one is used where there is one
    keeps               "token": the separator is exactly one. "tokens": any number
    """

    separator: str
    behind: str = ""
    bos: bool = False
    keeps: str = "token"

    def __post_init__(self) -> None:
        check_texts(separator=self.separator)
        if self.keeps not in KEEPS[:2]:
            fail("keeps", f"one of {', '.join(KEEPS[:2])}", repr(self.keeps))

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str]) -> Encoded:
        bos = tokenizer.bos_token_id
        if bos is None and self.bos:
            fail("tokenizer", "one with a bos token", "none")
        separator = plain_ids(tokenizer, self.separator)
        if steps and not (separator if self.keeps == "tokens" else len(separator) == 1):
            refuse_tag(0, self.separator, self.keeps)
        ids = ([] if bos is None else [bos]) + plain_ids(tokenizer, question + self.behind)
        response, positions = len(ids), []
        for step in steps:
            ids += plain_ids(tokenizer, step) + separator
            positions.append(len(ids) - 1)
        return Encoded(ids, positions, response)


@dataclass(frozen=True)
class Turns:
    """A conversation: each step is a user's turn, answered by the same verdict. Read: the token in front of each
    verdict, where the model predicts it. Earlier verdicts stay in the text.

        template(user question + joint + step, assistant verdict, user step, assistant verdict, ...)
    """

    verdict: str
    joint: str

    def __post_init__(self) -> None:
        check_texts(verdict=self.verdict)

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str]) -> Encoded:
        for name, text in [("question", question), *((f"steps[{k}]", step) for k, step in enumerate(steps))]:
            if MARK in text:
                fail(name, "text without U+E000, which stands for the verdict here", "text with it")
        prompt = render(tokenizer, [("user", question + self.joint + MARK)]).partition(self.joint + MARK)[0]
        if not steps:
            ids = Tokens(tokenizer, prompt, False).ids
            return Encoded(ids, [], len(ids))
        turns = [("user", question + self.joint + steps[0]), ("assistant", MARK)]
        for step in steps[1:]:
            turns += [("user", step), ("assistant", MARK)]
        parts = render(tokenizer, turns).split(MARK)
        if len(parts) != len(steps) + 1:
            fail("tokenizer", "a chat template that shows every turn once", "another one")
        tokens = Tokens(tokenizer, self.verdict.join(parts), False)
        positions, at = [], 0
        for k, part in enumerate(parts[:-1]):
            at += len(part)
            verdict = tokens.beginning.get(at)
            if at not in tokens.ending or verdict is None or verdict != tokens.ending.get(at + len(self.verdict)):
                refuse_tag(k, self.verdict, "token")
            positions.append(tokens.ending[at])
            at += len(self.verdict)
        return Encoded(tokens.ids[: positions[-1] + 1], positions, tokens.first_behind(len(prompt)))


@dataclass(frozen=True)
class Whole:
    """One answer, read at the last token of everything.

    question + answer                                the tokenizer's special tokens added
    template(system, user question, assistant answer)    with chat: the template's own alone, its tail included
    """

    chat: bool = True
    system: str | None = None

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str]) -> Encoded:
        if len(steps) > 1:
            fail("steps", "the whole answer as one step", f"{len(steps)} steps")
        answer = steps[0] if steps else ""
        if self.chat:
            text, begin = chat_text(tokenizer, self.system, question, answer, strict=False)
        else:
            text, begin = question + answer, len(question)
        if not steps:
            ids = Tokens(tokenizer, text[:begin], not self.chat).ids
            return Encoded(ids, [], len(ids))
        tokens = Tokens(tokenizer, text, not self.chat)
        return Encoded(tokens.ids, [len(tokens.ids) - 1], tokens.first_behind(begin))


@dataclass(frozen=True)
class Judgement:
    """A generative verifier's last question: the steps are the solution and, if there is one, the verifier's critique
    of it. Read: the last token of the question, where the model predicts the verdict.

        template(user prompt with {problem} and {solution}, generation prompt) critique question

    The critique is cut behind its own last `question`; where it has none, `question` is appended.
    """

    prompt: str
    question: str

    def __post_init__(self) -> None:
        check_texts(prompt=self.prompt, question=self.question)
        for name in ("{problem}", "{solution}"):
            if self.prompt.count(name) != 1:
                fail("prompt", f"text with {name} once", repr(self.prompt))

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str]) -> Encoded:
        if len(steps) > 2:
            fail("steps", "a solution, or that and a critique", f"{len(steps)} steps")
        before, _, rest = self.prompt.partition("{problem}")
        between, _, after = rest.partition("{solution}")
        if not steps:
            shown = render(tokenizer, [("user", before + question + between + MARK)]).rpartition(MARK)[0]
            ids = Tokens(tokenizer, shown, False).ids
            return Encoded(ids, [], len(ids))
        prompt = before + question + between + steps[0] + after
        shown = render(tokenizer, [("user", prompt)], add_generation_prompt=True)
        critique, asked = steps[1] if len(steps) == 2 else "", self.question.lstrip()
        end = critique.rfind(asked)
        critique = critique + self.question if end < 0 else critique[: end + len(asked)]
        tokens = Tokens(tokenizer, shown + critique, False)
        return Encoded(tokens.ids, [len(tokens.ids) - 1], tokens.first_behind(len(shown)))


@dataclass(frozen=True)
class Reencoded:
    """The conversation with the steps joined by `separator`, tokenised as a whole; where a step ends is taken from how
    many tokens the conversation up to it has, tokenised anew. As EurusPRM publishes it:

        p[k] = number of tokens of strip(template(user question, assistant joined steps[:k])) + separator, less 2
               (no separator for k = 0 and the last)
        score of step k = sum over tokens p[0] .. p[k] + 1

    p[k] + 1 lies one token behind the separator that ends step k; two where the tokenizer merges the separator with
    what stands before it, as byte-level ones do with ".\n\n". So inner scores look at the start of the next step: no
    session can extend these, and positions may be equal. The last step ends with the turn's end token; p[0] is the last
    token of the prompt.
    """

    separator: str
    system: str | None = None

    def __post_init__(self) -> None:
        check_texts(separator=self.separator)

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str]) -> Encoded:
        text, begin = chat_text(tokenizer, self.system, question, self.separator.join(steps))
        head, tail = text[:begin], text[begin + len(self.separator.join(steps)) :]
        if not steps:
            ids = Tokens(tokenizer, head, False).ids
            return Encoded(ids, [], len(ids) - 1)
        prefixes = [(head + self.separator.join(steps[:k]) + tail).strip() for k in range(len(steps) + 1)]
        prefixes[1:-1] = [prefix + self.separator for prefix in prefixes[1:-1]]
        response, *ends = [
            len(ids) - 2 for ids in tokenizer(prefixes, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        ids = plain_ids(tokenizer, text)
        for k, end in enumerate(ends):
            if not (ends[k - 1] if k else response) <= end < len(ids) - 1:
                fail(
                    f"steps[{k}]", "text that ends behind the step before it when it is tokenised anew", repr(steps[k])
                )
        return Encoded(ids[: ends[-1] + 2], [end + 1 for end in ends], response)


def chat_text(
    tokenizer: PreTrainedTokenizerBase, system: str | None, question: str, answer: str, *, strict: bool = True
) -> tuple[str, int]:
    """The conversation as text, and where in it the answer begins. Strict: a template that changes the answer, as many
    do with white space around it, is refused."""
    turns = [("user", question)] if system is None else [("system", system), ("user", question)]
    begin = render(tokenizer, [*turns, ("assistant", MARK)]).rfind(MARK)
    text = render(tokenizer, [*turns, ("assistant", answer)])
    if begin < 0 or (strict and text[begin : begin + len(answer)] != answer):
        fail("tokenizer", "a chat template that keeps the steps as they are", "one that changes them")
    return text, begin


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], **options: bool) -> str:
    if not tokenizer.chat_template:
        fail("tokenizer", "one with a chat template", "none")
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def refuse_tag(step: int, tag: str, keeps: str) -> NoReturn:
    kept = {"token": "as one token of its own", "tokens": "as tokens of its own", "end": "at the end of a token"}[keeps]
    fail(f"steps[{step}]", f"a step whose tag {tag!r} the tokenizer keeps {kept}", "one that it splits or merges")


def check_texts(**texts: object) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            fail(name, "a str", type(text).__name__, TypeError)
        if not text:
            fail(name, "text", repr(text))
