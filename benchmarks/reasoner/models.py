"""The models' sizes, their tokenizer, and how they are saved and loaded: checkpoints that transformers' own
`from_pretrained` reads, without code of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from .task import BREAK, END, REGISTERS

WEIGHTS = Path(__file__).parent / "weights"
KINDS = ("reasoner", "direct", "prm", "orm")
STEP_TAG = "<extra_0>"  # ends a step, in the layout of Qwen2.5-Math-PRM
CHARACTERS = "0123456789" + REGISTERS + "+-*=>#"
# Byte-level tokenizers write a line break as this character.
LINE_BREAK = "\u010a"
VOCABULARY = [END, STEP_TAG, LINE_BREAK * 2, LINE_BREAK, *CHARACTERS]
# The template drops a system message: these models know no instructions.
TEMPLATE = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
SIZES = {
    "vocab_size": 48,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
_ID_OF_BYTE = np.zeros(128, dtype=np.int64)
for _i, _token in enumerate(VOCABULARY):
    if len(_token) == 1 and _token != LINE_BREAK:
        _ID_OF_BYTE[ord(_token)] = _i
_ID_OF_BYTE[ord("\n")] = VOCABULARY.index(LINE_BREAK * 2)  # of a text whose breaks were shortened
_ID_OF_BYTE[ord("~")] = VOCABULARY.index(STEP_TAG)


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A token per character, but for a blank line and the step tag, which are one each: a Qwen2 tokenizer, which is
    what `AutoTokenizer` makes beside a Qwen2 config, with a single merge."""
    made = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY)},
        merges=[(LINE_BREAK, LINE_BREAK)],
        unk_token=None,
        bos_token=None,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[STEP_TAG],
    )
    made.chat_template = TEMPLATE
    return made


def encode(texts: list[str]) -> torch.Tensor:
    """[len(texts), length] int64: the tokenizer's ids of texts of equal length, made a hundred times faster."""
    flat = "".join(texts).replace(BREAK, "\n").replace(STEP_TAG, "~")
    ids = _ID_OF_BYTE[np.frombuffer(flat.encode("ascii"), dtype=np.uint8)]
    return torch.from_numpy(ids).view(len(texts), -1)


def config(**changes: object) -> transformers.Qwen2Config:
    end = VOCABULARY.index(END)
    return transformers.Qwen2Config(
        **SIZES | {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end} | changes
    )


def new_policy(seed: int) -> transformers.Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(config())


def save_policy(model: transformers.Qwen2ForCausalLM, folder: Path) -> None:
    """As float16, which loses nothing that matters here and halves the file."""
    half = transformers.Qwen2ForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def load_policy(folder: Path, device: str = "cpu") -> transformers.Qwen2ForCausalLM:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device).eval()
