"""Tiny seeded models and tokenizers to search with."""

from __future__ import annotations

import string

import tokenizers
import torch
import transformers
from transformers_models import VOCAB, build

from tts_kernels.search import Policy

EOS, TAG = "<eos>", "<tag>"
ENDS = [0, *range(90, 96)]  # the tokenizer's and those of a policy with `ends`
PROMPT = "A question about 17 apples and 4 pears.\nHow many?"


def characters() -> transformers.PreTrainedTokenizerFast:
    """A token for each character, and one for two line breaks."""
    return from_vocabulary([EOS, TAG, "\n\n", "\n", " ", *string.ascii_letters, *string.digits, *string.punctuation])


def from_vocabulary(known: list[str]) -> transformers.PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(known[:VOCAB])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=TAG))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n\n|[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, additional_special_tokens=[TAG]
    )


def short_steps() -> transformers.PreTrainedTokenizerFast:
    """As `characters`, but what a policy writes has an e behind every few tokens, for steps that end there."""
    letters = string.ascii_letters.replace("e", "").replace("E", "")
    known = [
        EOS,
        TAG,
        "\n\n",
        "\n",
        " ",
        "e",
        *letters[:25],
        *"AHQ?,.",
        *string.digits,
        *(f"{a}e" for a in letters[:25]),
    ]
    return from_vocabulary([*known, *string.punctuation.replace("?", "").replace(",", "").replace(".", "")])


def words() -> transformers.PreTrainedTokenizerFast:
    """As sentencepiece: a space is part of the word behind it, and what is decoded first loses it."""
    known = [EOS, "<unk>", "▁", *(f"▁{a}{b}" for a in "abcdefghij" for b in "abcdefghi"), "x", "y", "z"]
    vocab = {token: i for i, token in enumerate(known)}
    assert len(vocab) == VOCAB
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def bytes_() -> transformers.PreTrainedTokenizerFast:
    """Byte-level: é is two tokens, and half of it is no character. One token goes on behind its line breaks."""
    known = [EOS, "Ã", "©", "Ċ", "xĊĊy", "zĊ", "Ċz", *string.ascii_letters]
    known += [f"{a}{b}" for a in "abcd" for b in string.ascii_lowercase]
    vocab = {token: i for i, token in enumerate(known[:VOCAB])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=EOS))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def policy(name: str = "qwen2", *, ends: bool = False, tokenizer=None, max_tokens: int = 4096, **settings) -> Policy:
    """With `ends`, the end token is one of many: several ids end a text, so that texts do end."""
    model = build(name, max_position_embeddings=settings.pop("max_position_embeddings", 256))
    tokenizer = characters() if tokenizer is None else tokenizer
    if ends:
        model.generation_config.eos_token_id = ENDS[1:]
    else:
        tokenizer.eos_token = None
    return Policy(model, tokenizer, max_tokens=max_tokens, **settings)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
