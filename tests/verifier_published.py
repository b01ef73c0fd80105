"""How each family's published code scores, written anew and plainly: whole texts through the whole model in padded
batches, full logits, then the tags looked for by their ids. Nothing of tts_kernels is used here.

Each function takes a checkpoint's folder, questions, and for each question the texts of its candidates, and returns
[question][candidate][step].
"""

from __future__ import annotations

import torch
import verifier_checkpoints as checkpoints
from torch.nn.functional import softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

SYSTEM = {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."}


def score(family, path, questions, outputs):
    flat = [(question, output) for question, texts in zip(questions, outputs) for output in texts]
    with torch.no_grad():
        scores = iter(FAMILIES[family](path, flat))
    return [[next(scores) for _ in texts] for texts in outputs]


def padded(sequences):
    """ids and mask [B, L], padded on the right."""
    ids = pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=0)
    return ids, pad_sequence([torch.ones(len(s), dtype=torch.long) for s in sequences], batch_first=True)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def qwen_prm(path, pairs, system=(SYSTEM,)):
    model, tokenizer = checkpoints.Qwen2ForProcessRewardModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = []
    for question, output in pairs:
        answer = "<extra_0>".join(output.split("\n\n")) + "<extra_0>"
        texts.append(tokenizer.apply_chat_template([*system, user(question), assistant(answer)], tokenize=False))
    ids, mask = padded([tokenizer.encode(text) for text in texts])
    probabilities = softmax(model(ids, mask), dim=-1)
    separator = tokenizer.encode("<extra_0>")[0]
    return [probabilities[i][ids[i] == separator][:, 1].tolist() for i in range(len(pairs))]


def reasonflux(path, pairs):
    return qwen_prm(path, pairs, system=())


def qwen_rm(path, pairs):
    model, tokenizer = checkpoints.Qwen2ForRewardModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    sequences = []
    for question, output in pairs:
        text = tokenizer.apply_chat_template([SYSTEM, user(question), assistant(output)], tokenize=False)
        sequences.append(tokenizer.encode(text, add_special_tokens=False))
    rewards = model(*padded(sequences))[:, :, 0]
    return [[rewards[i, len(s) - 1].item()] for i, s in enumerate(sequences)]


def skywork(path, pairs):
    model, tokenizer = checkpoints.Qwen2ForPrmModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    newline = tokenizer.encode("\n")[-1]
    sequences, flags = [], []
    for problem, response in pairs:
        sequence = tokenizer.encode(tokenizer.bos_token + problem + "\n")
        flag = [0] * len(sequence)
        for line in response.split("\n"):
            ids = (tokenizer.encode(line) if line else []) + [newline]
            sequence, flag = sequence + ids, flag + [0] * (len(ids) - 1) + [1]
        sequences.append(sequence)
        flags.append(torch.tensor(flag))
    values = torch.sigmoid(model(*padded(sequences)))
    return [values[i, : len(flag)][flag == 1].tolist() for i, flag in enumerate(flags)]


def tagged_lm(path, texts, good, bad, tag, special=True):
    """Softmax of two tokens' logits wherever the tag's id stands."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    sequences = [tokenizer.encode(text, add_special_tokens=special) for text in texts]
    ids, mask = padded(sequences)
    logits = model(ids, attention_mask=mask).logits
    pair = torch.stack([logits[:, :, tokenizer.encode(good)[-1]], logits[:, :, tokenizer.encode(bad)[-1]]], dim=-1)
    probabilities, tag_id = softmax(pair, dim=-1)[:, :, 0], tokenizer.encode(tag)[-1]
    return [probabilities[i, : len(s)][ids[i, : len(s)] == tag_id].tolist() for i, s in enumerate(sequences)]


def math_shepherd(path, pairs):
    texts = [f"{q} " + output.replace("\n\n", " ки\n") + " ки" for q, output in pairs]
    return tagged_lm(path, texts, "+", "-", "ки")


def er_prm(path, pairs):
    texts = [(f"{q} " + output.replace("\n\n", " ки\n") + " ки").replace("ки\n", "ки") for q, output in pairs]
    return tagged_lm(path, texts, " +", " -", " ки")


def math_psa(path, pairs):
    texts = [f"{q} " + output.replace("\n\n", " \n\n\n\n\n ") + " \n\n\n\n\n " for q, output in pairs]
    return tagged_lm(path, texts, " +", " -", " \n\n\n\n\n")


def versaprm(path, pairs):
    """By the column 1 of [-, +]."""
    texts = [q + " \n\n" + " \n\n\n\n".join(output.split("\n\n")) + " \n\n\n\n" for q, output in pairs]
    return [[1 - p for p in of_one] for of_one in tagged_lm(path, texts, "-", "+", " \n\n\n\n")]


def rlhflow(path, pairs):
    """A forward for every step, read two tokens in front of the last."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    plus, minus = tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]
    scores = []
    for question, output in pairs:
        turns, of_one = [], []
        for k, step in enumerate(output.split("\n\n")):
            turns += [user(f"{question} {step}" if k == 0 else step), assistant("+")]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
            of_one.append(softmax(model(ids).logits[0, -3, [plus, minus]], dim=-1)[0].item())
        scores.append(of_one)
    return scores


def trl(path, pairs):
    """A token classifier's last token, for every prefix of the steps."""
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    scores = []
    for question, output in pairs:
        steps = output.split("\n\n")
        texts = ["\n\n".join([question, *steps[: k + 1]]) + "\n\n" for k in range(len(steps))]
        ids, mask = padded([tokenizer.encode(text) for text in texts])
        probabilities = softmax(model(ids, attention_mask=mask).logits, dim=-1)[:, :, 1]
        scores.append(probabilities[torch.arange(len(steps)), mask.sum(1) - 1].tolist())
    return scores


def trl_trainer(path, pairs):
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    separator = tokenizer.encode("\n", add_special_tokens=False)
    sequences, labels = [], []
    for question, output in pairs:
        sequence = tokenizer.encode(question, add_special_tokens=False)
        if tokenizer.bos_token_id is not None:
            sequence = [tokenizer.bos_token_id, *sequence]
        label = [-100] * len(sequence)
        for step in output.split("\n\n"):
            ids = tokenizer.encode(step, add_special_tokens=False) + separator
            sequence, label = sequence + ids, label + [-100] * (len(ids) - 1) + [1]
        sequences.append(sequence)
        labels.append(torch.tensor(label))
    ids, mask = padded(sequences)
    probabilities = softmax(model(ids, attention_mask=mask).logits, dim=-1)[:, :, 1]
    return [probabilities[i, : len(label)][label != -100].tolist() for i, label in enumerate(labels)]


def reasonflux_small(path, pairs):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    head.load_state_dict(torch.load(path / "reward_head.pt"))
    ids, mask = padded([tokenizer(question + output)["input_ids"] for question, output in pairs])
    hidden = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    last = hidden[torch.arange(len(pairs)), mask.sum(1) - 1]
    return [[value] for value in torch.sigmoid(head(last)).squeeze(-1).tolist()]


def token_logprobs(model, ids):
    """[1, L - 1]: of each token but the first."""
    return model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)


def eurus(path, pairs):
    models = [AutoModelForCausalLM.from_pretrained(p) for p in (path, path.parent / "reference")]
    tokenizer, scores = AutoTokenizer.from_pretrained(path), []
    for question, output in pairs:
        steps, ends = output.split("\n\n"), []

        def conversation(answer, question=question, **options):
            return tokenizer.apply_chat_template([user(question), assistant(answer)], **options)

        ids = conversation("\n\n".join(steps), return_tensors="pt", return_dict=False)
        for k in range(len(steps) + 1):
            text = conversation("\n\n".join(steps[:k]), tokenize=False).strip()
            text += "\n\n" if 0 < k < len(steps) else ""
            ends.append(len(tokenizer.encode(text, add_special_tokens=False)) - 2)
        model, reference = (token_logprobs(m, ids) for m in models)
        mask = torch.tensor([[0] * ends[0] + [1] * (ids.shape[1] - ends[0])])[:, 1:]
        rewards = (0.001 * (model - reference) * mask).cumsum(-1)
        scores.append(rewards.gather(-1, torch.tensor([ends[1:]]))[0].tolist())
    return scores


def eurus_stepwise(path, pairs):
    """Our change of it, one prefix at a time."""
    models = [AutoModelForCausalLM.from_pretrained(p) for p in (path, path.parent / "reference")]
    tokenizer, scores = AutoTokenizer.from_pretrained(path), []
    for question, output in pairs:
        prompt = tokenizer.apply_chat_template([user(question)], tokenize=False, add_generation_prompt=True)
        begin, answer, of_one = len(tokenizer.encode(prompt)), "", []
        for step in output.split("\n\n"):
            answer += step + "\n\n"
            ids = torch.tensor([tokenizer.encode(prompt + answer)])
            model, reference = (token_logprobs(m, ids)[0, begin - 1 :].double() for m in models)
            of_one.append(0.001 * (model.sum() - reference.sum()).item())
        scores.append(of_one)
    return scores


def sequence_classifier(path, pairs):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = [tokenizer.apply_chat_template([user(q), assistant(output)], tokenize=False) for q, output in pairs]
    texts = [text.removeprefix(tokenizer.bos_token) for text in texts]  # which the tokenizer adds again
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.tolist()


def thinkprm(path, pairs):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    sequences = []
    for problem, output in pairs:
        solution, _, critique = (part.strip() for part in output.partition("<think>"))
        prompt = (
            f"You are given a math problem and a proposed step-by-step solution:\n\n[Math Problem]\n\n{problem}\n\n"
            f"[Solution]\n\n{solution}\n\nReview and critique each step in the proposed solution to determine whether "
            "each step is correct. If the solution is incomplete, only verify the provided steps."
        )
        text = tokenizer.apply_chat_template([user(prompt)], tokenize=False, add_generation_prompt=True) + critique
        for verdict in (" Yes", " No"):
            text = text.removesuffix(verdict)
        if not text.endswith("Is the solution correct?"):
            text += "\nIs the solution correct?"
        sequences.append(tokenizer.encode(text, add_special_tokens=False))
    ids, mask = padded(sequences)
    last = model(ids, attention_mask=mask).logits[torch.arange(len(pairs)), mask.sum(1) - 1].exp()
    yes, no = (last[:, tokenizer.encode(word, add_special_tokens=False)[-1]] for word in (" Yes", " No"))
    return [[p] for p in (yes / (yes + no)).tolist()]


FAMILIES = {
    "qwen2.5-math-prm": qwen_prm,
    "qwen2.5-math-rm": qwen_rm,
    "skywork-o1-prm": skywork,
    "math-shepherd": math_shepherd,
    "rlhflow": rlhflow,
    "math-psa": math_psa,
    "versaprm": versaprm,
    "er-prm": er_prm,
    "trl": trl,
    "trl-trainer": trl_trainer,
    "reasonflux-prm": reasonflux,
    "reasonflux-prm-1.5b": reasonflux_small,
    "eurus-prm": eurus,
    "eurus-prm-stepwise": eurus_stepwise,
    "sequence-classifier": sequence_classifier,
    "thinkprm": thinkprm,
}
