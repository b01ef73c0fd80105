"""Recipes of published verifiers: RECIPES, by name.

Where published code looks for a step tag by its id, wherever that stands, ours reads the tags that end steps. Where a
candidate's text is cut into steps, ours drops white space around steps and empty steps.
"""

from __future__ import annotations

from tts_kernels.tree.checks import fail

from .layouts import Judgement, Pieces, Reencoded, Tagged, Turns, Whole
from .recipe import HeadSpec, Recipe

STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
LM_HEAD = ("lm_head.weight",)
QWEN_SCORE = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")  # behind the final norm
QWEN_STEPS = HeadSpec("mlp", QWEN_SCORE, 2, 1, "softmax", act="relu")
TOKEN_CLASSES = HeadSpec("linear", ("score.weight", "score.bias"), 2, 1, "softmax")
LOG_RATIO = HeadSpec("implicit", LM_HEAD, 0, 0, "identity", beta=0.001)
VERIFICATION_PROMPT = """You are given a math problem and a proposed step-by-step solution:

[Math Problem]

{problem}

[Solution]

{solution}

Review and critique each step in the proposed solution to determine whether each step is correct. \
If the solution is incomplete, only verify the provided steps."""


def rows(*candidates: str, positive: int = 0) -> HeadSpec:
    """Softmax over the logits of a few tokens."""
    return HeadSpec("vocab_rows", LM_HEAD, len(candidates), positive, "softmax", candidates=candidates)


FAMILIES = (
    # Softmax at every <extra_0>, class 1. Product of steps: Zhang et al., The Lessons of Developing Process Reward
    # Models, 2025. The same code serves Qwen2.5-Math-7B-PRM800K.
    Recipe(
        "qwen2.5-math-prm",
        "model cards of Qwen/Qwen2.5-Math-PRM-7B and -72B",
        Tagged("<extra_0>", chat=True, system=STEP_BY_STEP),
        QWEN_STEPS,
        aggregate="prod",
    ),
    # One raw value at the last token of the conversation: the line break behind <|im_end|>.
    Recipe(
        "qwen2.5-math-rm",
        "README of github.com/QwenLM/Qwen2.5-Math, for Qwen/Qwen2.5-Math-RM-72B",
        Whole(system=STEP_BY_STEP),
        HeadSpec("mlp", QWEN_SCORE, 1, 0, "identity", act="relu"),
        aggregate="last",
        stepwise=False,
        split_on=None,
    ),
    # io_utils.prepare_input: each line is a step, tokenised alone, then one token for the line break. The value head's
    # dropout does nothing in inference.
    Recipe(
        "skywork-o1-prm",
        "github.com/SkyworkAI/skywork-o1-prm-inference, for Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B and -7B",
        Pieces("\n", behind="\n", bos=True),
        HeadSpec("linear", ("v_head.summary.weight", "v_head.summary.bias"), 1, 0, "sigmoid"),
        aggregate="last",
        split_on="\n",
    ),
    # Minimum of steps: Wang et al., Math-Shepherd, 2023. search-and-learn puts a system prompt in front and blank lines
    # between steps; openr's prm/infer_fns.py has the form of the card.
    Recipe(
        "math-shepherd",
        "model card of peiyi9979/math-shepherd-mistral-7b-prm",
        Tagged(" ки", link="\n", lead=" "),
        rows("+", "-"),
        aggregate="min",
    ),
    # Read in front of each "+": position -3 of a conversation that ends with "+" and the turn's end. Mean of steps: the
    # same file.
    Recipe(
        "rlhflow",
        "math-rm/prm_evaluate.py of github.com/RLHFlow/RLHF-Reward-Modeling, for RLHFlow/Llama3.1-8B-PRM-Deepseek-Data "
        "and -Mistral-Data",
        Turns("+", joint=" "),
        rows("+", "-"),
        aggregate="mean",
    ),
    # LoRA weights for Qwen2.5-Math-7B-Instruct. The text's form: reason/evaluation of the same repository.
    Recipe(
        "math-psa",
        "prm/infer_fns.py of github.com/openreasoner/openr, for openreasoner/Math-psa",
        Tagged(" \n\n\n\n\n", link=" ", lead=" "),
        rows(" +", " -"),
        aggregate="last",
    ),
    # Class 1 of (-, +). The text's form is the model card's, seen in code that quotes it; the aggregate is our choice
    # of those that the code offers.
    Recipe(
        "versaprm",
        "evaluation/prm_models/prm_llama.py of github.com/mtzig/MultiDomainPRM, for UW-Madison-Lee-Lab/VersaPRM",
        Tagged(" \n\n\n\n", behind=" \n\n"),
        rows("-", "+", positive=1),
        aggregate="min",
    ),
    # Nothing stands between a tag and the next step. Minimum of steps: evaluation/evaluate_math_reward_model.py.
    Recipe(
        "er-prm",
        "README of github.com/hanningzhang/ER-PRM, for its llama3.1-math-prm",
        Tagged(" ки", lead=" ", keeps="tokens"),
        rows(" +", " -"),
        aggregate="min",
    ),
    # The cards' loop over prefixes, as one text: prompt and steps joined by blank lines. The separator of these models:
    # recipes/training of search-and-learn. The cards give class 1 as a label, not as a probability.
    Recipe(
        "trl",
        "model cards of HuggingFaceH4/Qwen2.5-Math-1.5B-Instruct-PRM-0.2 and -7B-Instruct-PRM-0.2",
        Tagged("\n\n", behind="\n\n", keeps="end"),
        TOKEN_CLASSES,
        aggregate="last",
    ),
    # As models are trained there, with PRMConfig's default separator: bos, then prompt, steps and separators tokenised
    # apart, nothing behind the prompt.
    Recipe(
        "trl-trainer",
        "PRMTrainer.tokenize_row of github.com/huggingface/trl",
        Pieces("\n", keeps="tokens"),
        TOKEN_CLASSES,
        aggregate="last",
    ),
    # As Qwen2.5-Math-PRM; the system message is the chat template's own. Issue 20 of Gen-Verse/ReasonFlux reports a
    # checkpoint that loads as a language model: such a one has no tensor score.0.weight and is refused.
    Recipe(
        "reasonflux-prm",
        "ReasonFlux_PRM/README.md of github.com/Gen-Verse/ReasonFlux, for Gen-Verse/ReasonFlux-PRM-7B",
        Tagged("<extra_0>", chat=True),
        QWEN_STEPS,
        aggregate="mean",
    ),
    # Problem and answer with nothing between, cut at 2048 tokens.
    Recipe(
        "reasonflux-prm-1.5b",
        "ReasonFlux_PRM/README.md and utils/rm_utils.py of github.com/Gen-Verse/ReasonFlux, for "
        "Gen-Verse/ReasonFlux-PRM-1.5B",
        Whole(chat=False),
        HeadSpec("linear", ("weight", "bias"), 1, 0, "sigmoid", file="reward_head.pt"),
        aggregate="last",
        context=2048,
        stepwise=False,
        split_on=None,
    ),
    # Log-ratio to Qwen2.5-Math-7B-Instruct. Sums begin at the last token of the prompt, and scores of steps before the
    # last look at the start of the next one: see Reencoded.
    Recipe(
        "eurus-prm",
        "model cards of PRIME-RL/EurusPRM-Stage1 and -Stage2",
        Reencoded("\n\n"),
        LOG_RATIO,
        aggregate="last",
        stepwise=False,
    ),
    # Our change of it: sums begin at the answer's first token, and a step ends with its own blank line, the last one
    # too. So a score looks at nothing behind its step, and a session can go on.
    Recipe(
        "eurus-prm-stepwise",
        "eurus-prm, changed",
        Tagged("\n\n", chat=True, keeps="end"),
        LOG_RATIO,
        aggregate="last",
    ),
    # Outcome reward models with one label and no bias, such as Skywork-Reward: the raw value at the last token.
    Recipe(
        "sequence-classifier",
        "*ForSequenceClassification of transformers",
        Whole(),
        HeadSpec("linear", ("score.weight",), 1, 0, "identity"),
        aggregate="last",
        stepwise=False,
        split_on=None,
    ),
    # P(" Yes") against P(" No") behind the question that ends the critique. That these are the tokens which decide was
    # seen in code that quotes prm/thinkprm.py. A candidate's text is: solution <think> critique.
    Recipe(
        "thinkprm",
        "utils/helper.py and prm/ of github.com/mukhal/ThinkPRM, for launch/ThinkPRM-1.5B, -7B and -14B",
        Judgement(VERIFICATION_PROMPT, "\nIs the solution correct?"),
        rows(" Yes", " No"),
        aggregate="last",
        stepwise=False,
        split_on="<think>",
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in FAMILIES}


def find_recipe(recipe: Recipe | str) -> Recipe:
    """The recipe of that name; a Recipe as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        fail("recipe", "a Recipe or a name", type(recipe).__name__, TypeError)
    if recipe not in RECIPES:
        fail("recipe", f"a Recipe or one of {', '.join(RECIPES)}", repr(recipe))
    return RECIPES[recipe]
