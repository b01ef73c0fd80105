"""Small seeded checkpoints in the layouts in which verifiers are published: tokenizers of the right kind with the chat
templates' texts, backbones of the right architecture, head tensors under their published names; all written by
transformers into a folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2Tokenizer,
)
from transformers.utils import logging

logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.3,  # so that scores differ from step to step
}

# --- tokenizers ------------------------------------------------------------------------------------------------------

WORDS = (  # earlier merges come first
    *(" \n\n\n\n\n", ".\n\n", ".\n", "?\n\n", "\n\n\n", " +", " -", " ки", "ки", " Yes", " No"),
    *(" the", " is", " so", " solution", "Step", " step", "user", "assistant", "system", " correct", "12", " 4"),
)
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STEP_BY_STEP = "Please reason step by step, and put your final answer within \\\\boxed{}."
# Texts of the templates that the checkpoints come with, without their tools.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + STEP_BY_STEP + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "(message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{% else %}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


def chain_merges(words, alphabet):
    """A vocabulary and merges in which each word is one token, made from the left."""
    vocab, merges = {piece: i for i, piece in enumerate(alphabet)}, []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append(pair)
    return vocab, merges


def byte_level(words=WORDS):
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return chain_merges(["".join(p for p, _ in encoder.pre_tokenize_str(w)) for w in words], byte_alphabet())


def byte_alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def qwen2_tokenizer(*, words=WORDS, specials=("<extra_0>",), **options):
    vocab, merges = byte_level(words)
    specials = ["<|im_start|>", "<|im_end|>", *specials]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, chat_template=CHATML, **options)
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer


def llama3_tokenizer(template=LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|finetune_right_pad_id|>"):
    vocab, merges = byte_level()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [bos, eos, pad, "<|start_header_id|>", "<|end_header_id|>", "<｜User｜>", "<｜Assistant｜>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=template
    )


def r1_tokenizer():
    return llama3_tokenizer(R1, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜pad｜>")


def mistral_tokenizer():
    """Sentencepiece's BPE: spaces as ▁, one in front of the text, bytes for characters that have no token."""
    characters = "▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:;+-*/=()$\\{}'?!ки"
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *characters]
    words = ["▁▁", "▁ки", "▁+", "▁-", "▁the", "▁is", "Step", "▁Step", "▁so", "▁solution"]
    vocab, merges = chain_merges(words, alphabet)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


# --- models ----------------------------------------------------------------------------------------------------------


class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):
    columns = 2

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        d = config.hidden_size
        self.score = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, self.columns))
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.score(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)


class Qwen2ForRewardModel(Qwen2ForProcessRewardModel):
    columns = 1


class Qwen2ForPrmModel(Qwen2PreTrainedModel):
    """Skywork's: a language model with a value head beside it."""

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.v_head = nn.Module()
        self.v_head.summary = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.v_head.summary(hidden).squeeze(-1)


def build(cls, config, *, seed=0, **options):
    torch.manual_seed(seed)
    model = cls(config(**{**SHAPE, "tie_word_embeddings": False, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.dim() == 1:
                parameter.normal_(0, 0.3)  # transformers starts biases at 0, where a forgotten one does not show
    return model


def save(path: Path, model, tokenizer, *, auto_map=None, **options) -> Path:
    if auto_map:
        model.config.auto_map = auto_map
    model.save_pretrained(path, **options)
    tokenizer.save_pretrained(path)
    return path


def save_bin_shards(path: Path, model, tokenizer) -> Path:
    """As older repositories have it: pytorch_model-0000i-of-00002.bin and an index."""
    save(path, model, tokenizer)
    (path / "model.safetensors").unlink()
    state = model.state_dict()
    names = list(state)
    shards = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(shards.values()):
        torch.save({name: state[name] for name in names if shards[name] == file}, path / file)
    index = {"metadata": {}, "weight_map": shards}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


# --- families --------------------------------------------------------------------------------------------------------

REMOTE = {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"}
qwen2 = partial(build, config=Qwen2Config)


def qwen_prm(path, **options):
    return save(path, qwen2(Qwen2ForProcessRewardModel, seed=1, **options), qwen2_tokenizer(), auto_map=REMOTE)


def qwen_rm(path):
    return save(path, qwen2(Qwen2ForRewardModel, seed=2), qwen2_tokenizer())


def skywork(path):
    tokenizer = qwen2_tokenizer(specials=("<|vision_start|>",), bos_token="<|im_start|>")
    return save(path, qwen2(Qwen2ForPrmModel, seed=3), tokenizer)


def math_shepherd(path):
    model = build(MistralForCausalLM, MistralConfig, seed=4, sliding_window=None)
    return save_bin_shards(path, model, mistral_tokenizer())


def llama_lm(path, *, seed=5, **options):
    return save(path, build(LlamaForCausalLM, LlamaConfig, seed=seed, **options), llama3_tokenizer())


def rlhflow(path):
    return save(path, build(LlamaForCausalLM, LlamaConfig, seed=5), llama3_tokenizer(), max_shard_size="60KB")


def versaprm(path):
    return llama_lm(path, seed=6, tie_word_embeddings=True)


def er_prm(path):
    return llama_lm(path, seed=7)


def math_psa(path):
    """LoRA weights merged. As published they stand alone: see test_loading."""
    return save(path, qwen2(Qwen2ForCausalLM, seed=8), qwen2_tokenizer())


def trl(path):
    return save(path, qwen2(Qwen2ForTokenClassification, seed=9, num_labels=2), qwen2_tokenizer())


def reasonflux(path):
    return save(path, qwen2(Qwen2ForProcessRewardModel, seed=10), qwen2_tokenizer(), auto_map=REMOTE)


def reasonflux_small(path):
    save(path, qwen2(Qwen2ForCausalLM, seed=11, tie_word_embeddings=True), qwen2_tokenizer())
    torch.save(nn.Linear(SHAPE["hidden_size"], 1).state_dict(), path / "reward_head.pt")
    return path


def eurus(path):
    """The model; its reference lies beside it."""
    save(path.parent / "reference", qwen2(Qwen2ForCausalLM, seed=13), qwen2_tokenizer())
    return save(path, qwen2(Qwen2ForCausalLM, seed=12), qwen2_tokenizer())


def sequence_classifier(path):
    tokenizer = llama3_tokenizer()
    model = build(
        LlamaForSequenceClassification, LlamaConfig, seed=14, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    return save(path, model, tokenizer)


def thinkprm(path):
    return save(path, qwen2(Qwen2ForCausalLM, seed=15), r1_tokenizer())


WRITERS = {
    "qwen2.5-math-prm": qwen_prm,
    "qwen2.5-math-rm": qwen_rm,
    "skywork-o1-prm": skywork,
    "math-shepherd": math_shepherd,
    "rlhflow": rlhflow,
    "math-psa": math_psa,
    "versaprm": versaprm,
    "er-prm": er_prm,
    "trl": trl,
    "trl-trainer": trl,
    "reasonflux-prm": reasonflux,
    "reasonflux-prm-1.5b": reasonflux_small,
    "eurus-prm": eurus,
    "eurus-prm-stepwise": eurus,
    "sequence-classifier": sequence_classifier,
    "thinkprm": thinkprm,
}
