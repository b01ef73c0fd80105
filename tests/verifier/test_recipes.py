"""What is pinned about tokens and positions of each recipe: literal expectations, tags where they end no step, and that
more steps only append tokens. Scores: test_published.py."""

import dataclasses
from itertools import pairwise

import pytest

pytest.importorskip("transformers")

import verifier_published as published
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tts_kernels.verifier.layouts import Pieces, Tagged, Turns
from tts_kernels.verifier.recipe import Encoded
from tts_kernels.verifier.recipes import RECIPES, find_recipe

FAMILIES = sorted(RECIPES)
STEPWISE = [name for name in FAMILIES if RECIPES[name].stepwise]


def shown(tokenizer, encoded: Encoded) -> list[str]:
    """The text in front of each read position, that token included, piece by piece."""
    ends = [0, *(p + 1 for p in encoded.positions)]
    return [tokenizer.decode(encoded.ids[a:b]) for a, b in pairwise(ends)]


LITERAL = {
    "qwen2.5-math-prm": ["{chatml}Q<|im_end|>\n<|im_start|>assistant\na.<extra_0>", "b<extra_0>"],
    "reasonflux-prm": ["{chatml}Q<|im_end|>\n<|im_start|>assistant\na.<extra_0>", "b<extra_0>"],
    "skywork-o1-prm": ["<|im_start|>Q\na.\n", "b\n"],
    "math-shepherd": ["<s> Q a. ки", "\nb ки"],
    "rlhflow": [
        "{llama3}Q a.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "+<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nb<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
    "math-psa": ["Q a. \n\n\n\n\n", " b \n\n\n\n\n"],
    "versaprm": ["<|begin_of_text|>Q \n\na. \n\n\n\n", "b \n\n\n\n"],
    "er-prm": ["<|begin_of_text|>Q a. ки", "b ки"],
    "trl": ["Q\n\na.\n\n", "b\n\n"],
    "trl-trainer": ["Qa.\n", "b\n"],
    "eurus-prm-stepwise": ["{chatml}Q<|im_end|>\n<|im_start|>assistant\na.\n\n", "b\n\n"],
    # Behind the first step, "b" is one token of the second and its end the next: the separator is one token with ".".
    "eurus-prm": ["{chatml}Q<|im_end|>\n<|im_start|>assistant\na.\n\nb<|im_end|>", ""],
}
OUTCOME = {
    "qwen2.5-math-rm": "{chatml}Q<|im_end|>\n<|im_start|>assistant\na.<|im_end|>\n",
    "reasonflux-prm-1.5b": "Qa.",
    "sequence-classifier": "{llama3}Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na.<|eot_id|>",
    "thinkprm": "<｜begin▁of▁sentence｜><｜User｜>You are given a math problem and a proposed step-by-step "
    "solution:\n\n[Math Problem]\n\nQ\n\n[Solution]\n\na.\n\nReview and critique each step in the proposed solution to "
    "determine whether each step is correct. If the solution is incomplete, only verify the provided steps."
    "<｜Assistant｜><think>\n\nIs the solution correct?",
}
FRAMES = {
    "chatml": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
}


def framed(text):
    for name, frame in FRAMES.items():
        text = text.replace("{" + name + "}", frame)
    return text


@pytest.mark.parametrize("family", sorted(LITERAL))
def test_texts_in_front_of_positions(family, tokenizer):
    encoded = RECIPES[family].encode(tokenizer(family), "Q", ["a.", "b"])
    if family == "eurus-prm":
        # p[1] = len(ids("... a . <|im_end|> \n\n")) - 2 is the index behind "."; read one further, in a text where
        # ".\n\n" is one token: behind "b". The last step ends there as well.
        assert encoded.positions == [len(encoded.ids) - 1] * 2
    assert shown(tokenizer(family), encoded) == [framed(text) for text in LITERAL[family]]


@pytest.mark.parametrize("family", sorted(OUTCOME))
def test_text_of_outcome_models(family, tokenizer):
    encoded = RECIPES[family].encode(tokenizer(family), "Q", ["a."])
    assert shown(tokenizer(family), encoded) == [framed(OUTCOME[family])]


def test_every_family_has_literal_texts():
    assert sorted([*LITERAL, *OUTCOME]) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_response_begins_behind_the_prompt(family, tokenizer):
    recipe, tokenizer = RECIPES[family], tokenizer(family)
    prompt, encoded = recipe.encode(tokenizer, "Q", []), recipe.encode(tokenizer, "Q", ["a."])
    if family == "thinkprm":  # where the solution belongs to the prompt
        encoded = recipe.encode(tokenizer, "Q", ["a.", "Fine."])
        assert tokenizer.decode(encoded.ids[encoded.response :]) == "Fine.\nIs the solution correct?"
    elif family == "eurus-prm":  # published sums begin at the prompt's last token
        assert encoded.response == prompt.response == len(prompt.ids) - 1
    else:
        assert encoded.response == prompt.response == len(prompt.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_steps(family, tokenizer):
    encoded = RECIPES[family].encode(tokenizer(family), "Q", [])
    assert encoded.positions == [] and encoded.ids
    assert RECIPES[family].encode(tokenizer(family), "Q", ["a."]).ids[: len(encoded.ids)] == encoded.ids


@pytest.mark.parametrize("family", sorted(LITERAL))
def test_five_hundred_steps(family, tokenizer):
    recipe, tokenizer = RECIPES[family], tokenizer(family)
    steps = [f"{k}." if k % 3 else f"so {k}" for k in range(500)]
    encoded = recipe.encode(tokenizer, "Q", steps)
    assert len(encoded.positions) == 500 and encoded.positions[-1] == len(encoded.ids) - 1
    assert encoded.positions == sorted(encoded.positions)
    if recipe.stepwise:
        alone = [recipe.encode(tokenizer, "Q", steps[:k]).positions[-1] for k in (1, 77, 499)]
        assert alone == [encoded.positions[k - 1] for k in (1, 77, 499)]
        for text, step in zip(shown(tokenizer, encoded), steps):
            assert step in text


TAGS = {
    "qwen2.5-math-prm": "<extra_0>", "reasonflux-prm": "<extra_0>", "skywork-o1-prm": "\n", "math-shepherd": " ки",
    "rlhflow": "+", "math-psa": " \n\n\n\n\n", "versaprm": " \n\n\n\n", "er-prm": " ки", "trl": "\n\n",
    "trl-trainer": "\n", "eurus-prm-stepwise": "\n\n",
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(TAGS))
def test_tag_inside_of_question_and_step_ends_no_step(family, tokenizer):
    recipe, tokenizer, tag = RECIPES[family], tokenizer(family), TAGS[family]
    question, steps = f"say{tag}this", ["one", f"a{tag}b", "two"]
    encoded = recipe.encode(tokenizer, question, steps)
    assert len(encoded.positions) == 3
    pieces = shown(tokenizer, encoded)
    assert f"say{tag}this" in pieces[0] and "one" in pieces[0]
    assert f"a{tag}b" in pieces[1] and "two" in pieces[2]
    read = [encoded.ids[p] for p in encoded.positions]
    assert len(set(read)) == 1  # the same token each time, the tag
    assert [i for i, token in enumerate(encoded.ids) if token == read[0]] != encoded.positions  # a search would err


def test_tags_are_counted_by_the_published_code(checkpoint):
    """What test_tag_inside_of_question_and_step_ends_no_step is for: a search by id finds one step more."""
    scores = published.score("qwen2.5-math-prm", checkpoint("qwen2.5-math-prm"), ["say <extra_0>"], [["a\n\nb"]])
    assert len(scores[0][0]) == 3


# --- prefixes --------------------------------------------------------------------------------------------------------

WORDS = ["a", "Step 1:", " ", ".", "!", "?", "\n", "+", "-", "12", "é", "好", " the", "ки", "\\boxed{4}", "$", "<"]
PIECES = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
TEXTS = PIECES | st.text(max_size=8)


def property_test(check):
    """The same examples for each family."""
    return settings(max_examples=60, deadline=None, derandomize=True)(given(PIECES, st.lists(TEXTS, max_size=5))(check))


@pytest.mark.parametrize("family", STEPWISE)
def test_more_steps_only_append_tokens(family, tokenizer):
    recipe, tokenizer, taken, refused = RECIPES[family], tokenizer(family), [], []

    @property_test
    @example("Q", ["a.", "b.", "c"])
    @example("Q", ["a.", "\nb", "c"])
    @example("Q", ["a. ", "b", ""])
    @example("Q", ["0", "", ""])
    @example("Q", ["a", " \nb"])
    def check(question, steps):
        try:
            encoded = recipe.encode(tokenizer, question, steps)
        except ValueError as error:
            refused.append(str(error))
            return
        taken.append(question)
        assert len(encoded.positions) == len(steps)
        for k in range(1, len(steps)):
            shorter = recipe.encode(tokenizer, question, steps[:k])
            assert shorter.positions == encoded.positions[:k]
            assert shorter.ids == encoded.ids[: encoded.positions[k - 1] + 1]
            # What a session goes by: the tokens of a step depend on nothing in front of the step before it.
            pair = recipe.encode(tokenizer, "", steps[k - 1 : k + 1])
            tail = len(pair.ids) - 1 - pair.positions[0]
            assert pair.ids[pair.positions[0] + 1 :] == encoded.ids[: encoded.positions[k] + 1][-tail:]

    check()
    assert len(taken) > 20
    assert all(error.startswith("steps[") for error in refused)


# --- splitting, records, bad input -----------------------------------------------------------------------------------


def test_split():
    split = RECIPES["qwen2.5-math-prm"].split
    assert split("a\n\nb\n\n\n\n c \n\n") == ["a", "b", "c"]
    assert split("a\nb") == ["a\nb"] and split("") == split(" \n\n ") == []
    assert RECIPES["skywork-o1-prm"].split("a\nb\n\nc") == ["a", "b", "c"]
    assert RECIPES["qwen2.5-math-rm"].split("a\n\nb") == ["a\n\nb"]
    assert RECIPES["thinkprm"].split("a\n\nb<think>c") == ["a\n\nb", "c"]


def test_the_step_that_a_tokenizer_does_not_keep_apart_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"^steps\[1\]: expected a step whose tag ' ки' .* got one that it splits"):
        RECIPES["math-shepherd"].encode(tokenizer("math-shepherd"), "Q", ["a", "b ", "c"])
    for step in ("\nb", " \nb", ""):  # a run of white space with line breaks may be one token
        with pytest.raises(ValueError, match=r"^steps\[1\]: .*'\\n\\n' the tokenizer keeps at the end of a token"):
            RECIPES["trl"].encode(tokenizer("trl"), "Q", ["a", "b", step])


def test_eurus_prm_without_a_last_step(tokenizer):
    """Tokenised anew, an empty step ends in front of the one before it."""
    with pytest.raises(ValueError, match=r"^steps\[1\]: expected text that ends behind the step before it"):
        RECIPES["eurus-prm"].encode(tokenizer("eurus-prm"), "Q", ["a.", ""])


def test_judgement_is_asked_for_once(tokenizer):
    recipe, tokenizer = RECIPES["thinkprm"], tokenizer("thinkprm")
    answered = "No.\nIs the solution correct? Yes\nIs the solution correct? No"
    for critique in (answered, answered.removesuffix(" No"), answered.removesuffix("\nIs the solution correct? No")):
        ids = recipe.encode(tokenizer, "Q", ["a.", critique]).ids
        assert tokenizer.decode(ids).endswith(
            "<think>\nNo.\nIs the solution correct? Yes\nIs the solution correct?"
        ) == (critique != "No.\nIs the solution correct? Yes")
        assert tokenizer.decode(ids).endswith("Is the solution correct?")


def test_a_tokenizer_that_splits_the_step_tag(tokenizer):
    """Another family's tokenizer: <extra_0> is text to it, the line breaks are several tokens."""
    with pytest.raises(ValueError, match=r"^steps\[0\]: .*'<extra_0>' the tokenizer keeps as one token of its own"):
        RECIPES["qwen2.5-math-prm"].encode(tokenizer("skywork-o1-prm"), "Q", ["a"])
    with pytest.raises(ValueError, match=r"^steps\[0\]: .*tokenizer keeps as one token"):
        RECIPES["math-psa"].encode(tokenizer("math-shepherd"), "Q", ["a"])
    two = dataclasses.replace(RECIPES["skywork-o1-prm"], layout=Pieces("\n.\n", bos=True))
    with pytest.raises(ValueError, match=r"^steps\[0\]: .*'\\n.\\n'"):
        two.encode(tokenizer("skywork-o1-prm"), "Q", ["a"])
    words = dataclasses.replace(RECIPES["rlhflow"], layout=Turns("good step", joint=" "))
    with pytest.raises(ValueError, match=r"^steps\[0\]: .*'good step'"):
        words.encode(tokenizer("rlhflow"), "Q", ["a"])


def test_a_template_that_changes_steps(tokenizer):
    with pytest.raises(ValueError, match=r"^tokenizer: expected a chat template that keeps the steps as they are"):
        RECIPES["eurus-prm-stepwise"].encode(tokenizer("sequence-classifier"), "Q", ["a"])


def test_bad_arguments_of_encode(tokenizer):
    recipe, tokenizer = RECIPES["qwen2.5-math-prm"], tokenizer("qwen2.5-math-prm")
    for error, start, arguments in [
        (TypeError, "question: expected a str, got int", (tokenizer, 3, [])),
        (TypeError, "steps: expected a list of str, got str", (tokenizer, "Q", "a")),
        (TypeError, r"steps\[1\]: expected a str, got int", (tokenizer, "Q", ["a", 1])),
        (TypeError, "tokenizer: expected a fast tokenizer", (object(), "Q", ["a"])),
    ]:
        with pytest.raises(error, match=f"^{start}"):
            recipe.encode(*arguments)
    with pytest.raises(ValueError, match=r"^steps: expected the whole answer as one step, got 2 steps"):
        RECIPES["qwen2.5-math-rm"].encode(tokenizer, "Q", ["a", "b"])
    with pytest.raises(ValueError, match=r"^steps: expected a solution, or that and a critique, got 3 steps"):
        RECIPES["thinkprm"].encode(tokenizer, "Q", ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"^steps\[0\]: expected text without U\+E000"):
        RECIPES["rlhflow"].encode(tokenizer, "Q", ["a\ue000"])
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with a bos token, got none"):
        RECIPES["skywork-o1-prm"].encode(tokenizer, "Q", ["a"])


def test_a_tokenizer_without_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with a chat template, got none"):
        RECIPES["qwen2.5-math-prm"].encode(tokenizer("math-shepherd"), "Q", ["a"])


def test_find_recipe():
    assert find_recipe("rlhflow") is find_recipe(RECIPES["rlhflow"]) is RECIPES["rlhflow"]
    with pytest.raises(ValueError, match=r"^recipe: expected a Recipe or one of qwen2.5-math-prm, .*, got 'rlhfow'$"):
        find_recipe("rlhfow")
    with pytest.raises(TypeError, match=r"^recipe: "):
        find_recipe(3)


def test_records_are_checked():
    recipe, head = RECIPES["qwen2.5-math-prm"], RECIPES["qwen2.5-math-prm"].head
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"
    for start, bad in [
        ("aggregate", lambda: dataclasses.replace(recipe, aggregate="median")),
        ("context", lambda: dataclasses.replace(recipe, context=0)),
        ("kind", lambda: dataclasses.replace(head, kind="cubic")),
        ("tensors", lambda: dataclasses.replace(head, tensors=("a", "b"))),
        ("positive", lambda: dataclasses.replace(head, positive=2)),
        ("activation", lambda: dataclasses.replace(head, activation="tanh")),
        ("act", lambda: dataclasses.replace(head, act="")),
        ("candidates", lambda: dataclasses.replace(head, candidates=("+", "-"))),
        ("beta", lambda: dataclasses.replace(RECIPES["eurus-prm"].head, beta=0.0)),
        ("keeps", lambda: Tagged("x", keeps="all")),
        ("tag", lambda: Tagged("")),
        ("chat", lambda: Tagged("x", chat=True, lead=" ")),
    ]:
        with pytest.raises(ValueError, match=f"^{start}: expected "):
            bad()
    with pytest.raises(TypeError, match=r"^layout: expected an object with encode"):
        dataclasses.replace(recipe, layout="<extra_0>")
    with pytest.raises(TypeError, match=r"^tensors: expected a tuple of str"):
        dataclasses.replace(head, tensors=["a"])
