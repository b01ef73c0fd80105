"""Seeded stand-ins for models that cannot be downloaded everywhere: a tokenizer made from a text, and models of the
Qwen2 architecture with random weights. What they write means nothing; what they cost is real."""

from __future__ import annotations

import math
import re
from itertools import count, islice, product
from string import ascii_lowercase

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

PIECE = r"\n\n|\d| ?[^\W\d]+|\s|[^\w\s]"  # words, digits and signs, about as many as a real tokenizer makes
UNKNOWN, STEP = "<unk>", "\n\n"
FIXED = [UNKNOWN, STEP, "\n", " ", " ки", "+", "-"]  # the last three: tag and verdicts of Math-Shepherd


def tokenizer(vocab_size: int, text: str = "") -> transformers.PreTrainedTokenizerFast:
    """Every piece of `text`, as far as there is room, and made-up words are a token each."""
    made_up = (" " + "".join(letters) for size in count(2) for letters in product(ascii_lowercase, repeat=size))
    pieces = islice(dict.fromkeys([*FIXED, *re.findall(PIECE, text), *islice(made_up, vocab_size)]), vocab_size)
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=UNKNOWN)


def causal_lm(
    seed: int, *, step_tokens: float | None = None, dtype: torch.dtype = torch.float32, **sizes: int
) -> transformers.Qwen2ForCausalLM:
    """A model with these sizes of a Qwen2Config. With `step_tokens` its LM head has a bias that makes STEP come about
    once in so many tokens, as in the text of a model that reasons in steps."""
    config = transformers.Qwen2Config(
        **{"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **sizes}
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(config)
    if step_tokens:
        head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        head.weight = model.lm_head.weight
        torch.nn.init.zeros_(head.bias)
        head.bias.data[FIXED.index(STEP)] = math.log(config.vocab_size / step_tokens)
        model.lm_head = head
    return model.to(dtype).eval()
