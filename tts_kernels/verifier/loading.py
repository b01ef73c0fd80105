"""A checkpoint on disk as its family publishes it -> backbone, tokenizer and head. Nothing is downloaded, and no code
that comes with a checkpoint is run."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from tts_kernels.scoring import ScoreHead
from tts_kernels.tree.checks import fail

from .implicit import ImplicitHead
from .recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Loaded:
    """What a Verifier is made of. `model` and `reference` are backbones: they end with the final norm."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: ScoreHead | ImplicitHead
    reference: PreTrainedModel | None = None


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint, or of one file beside it, by name; read when they are asked for."""

    FILES = ("model.safetensors", "pytorch_model.bin")

    def __init__(self, path: Path, file: str = "") -> None:
        self.files: dict[str, Path] = {}  # of each tensor
        index = next((path / f"{f}.index.json" for f in self.FILES if (path / f"{f}.index.json").exists()), None)
        whole = path / file if file else next((path / f for f in self.FILES if (path / f).exists()), None)
        if whole is not None and whole.exists():
            self.files = dict.fromkeys(names_of(whole), whole)
        elif index is not None and not file:
            self.files = {name: path / f for name, f in json.loads(index.read_text())["weight_map"].items()}
        else:
            fail("path", f"a folder with {file or ' or '.join(self.FILES)}", path, FileNotFoundError)

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        if file.suffix != ".safetensors":
            return read_bin(file)[name].clone()
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def names_of(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(read_bin(file))
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def read_bin(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def load(
    path: str | Path,
    recipe: Recipe,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    reference: str | Path | None = None,
    base: str | Path | None = None,
) -> Loaded:
    """The backbone, tokenizer and head of a checkpoint in a local folder.

    Args:
        path: the folder, as its family publishes it: config, tokenizer, weights (safetensors or bin, one file or
            several). A folder with LoRA weights alone (adapter_config.json) needs `peft` and the model under them.
        recipe: which tensors make the head.
        dtype: of the backbone; default that of the checkpoint. The head keeps its own: it is computed in fp32.
        device: of everything.
        reference: folder of the reference model, for an implicit recipe.
        base: folder of the model under LoRA weights; default the one that adapter_config.json names.

    Raises:
        OSError: there is no checkpoint.
        ImportError: LoRA weights without `peft`.
        ValueError: the recipe does not fit the checkpoint, by the tensor that is missing or of another shape.
    """
    if not isinstance(recipe, Recipe):
        fail("recipe", "a Recipe", type(recipe).__name__, TypeError)
    if (reference is not None) != recipe.implicit:
        expected = "the folder of the reference model" if recipe.implicit else "None"
        fail("reference", f"{expected} for recipe {recipe.name}", reference)
    from transformers import AutoTokenizer

    path = folder("path", path)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model, tensors = load_backbone(path, recipe, dtype, device, base)
    other, others = (None, None)
    if reference is not None:
        other, others = load_backbone(folder("reference", reference), recipe, dtype, device, None)
    return Loaded(model, tokenizer, make_head(recipe, tensors, tokenizer, reference=others, device=device), other)


def folder(argument: str, path: str | Path) -> Path:
    if not isinstance(path, (str, Path)):
        fail(argument, "the path of a folder", type(path).__name__, TypeError)
    if not Path(path).is_dir():
        fail(argument, "a local folder with a checkpoint", repr(str(path)), FileNotFoundError)
    return Path(path)


def load_backbone(
    path: Path, recipe: Recipe, dtype: torch.dtype | None, device: torch.device | str, base: str | Path | None
) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
    """The backbone, in inference mode, and the tensors that a head can be made of."""
    from transformers import AutoConfig, AutoModel

    options = {"dtype": dtype or "auto", "local_files_only": True, "trust_remote_code": False}
    if (path / "adapter_config.json").exists():
        return load_lora(path, recipe, options, device, base)
    tensors: Mapping[str, Tensor] = Tensors(path, recipe.head.file)
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    tied = LM_HEAD in recipe.head.tensors and config.get_text_config().tie_word_embeddings
    for name in recipe.head.tensors:  # before the backbone, which takes its time
        if name not in tensors and not (tied and name == LM_HEAD):
            refuse(recipe, name, tensors)
    with quiet():
        model, report = AutoModel.from_pretrained(path, output_loading_info=True, **options)
    lost = sorted(report["missing_keys"])
    if lost:
        fail("path", f"a checkpoint with the backbone's tensor {lost[0]}", f"one without it ({len(lost)} are missing)")
    model = model.eval().requires_grad_(False).to(device)
    return model, ChainMap({LM_HEAD: model.get_input_embeddings().weight}, tensors) if tied else tensors


def load_lora(
    path: Path, recipe: Recipe, options: dict, device: torch.device | str, base: str | Path | None
) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
    """LoRA weights merged into the language model under them."""
    if LM_HEAD not in recipe.head.tensors:
        fail(
            "path",
            f"a whole checkpoint for recipe {recipe.name}, whose head is none of a language model",
            "LoRA weights",
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"path: {path} holds LoRA weights: reading them needs `pip install peft`") from error
    from transformers import AutoModelForCausalLM

    base = base or json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder("base", base), **options)
        model = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    model = model.eval().requires_grad_(False).to(device)
    return model.get_decoder(), {LM_HEAD: model.get_output_embeddings().weight}


class quiet:
    """transformers reports tensors that a backbone does not use, such as a head's: here those are expected."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.before, self.bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.before)
        if self.bar:
            logging.enable_progress_bar()


def make_head(
    recipe: Recipe,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    reference: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> ScoreHead | ImplicitHead:
    """The head that a recipe asks for, from tensors by their published names.

    Raises ValueError where one is missing, has another shape, or where the tokenizer has no single token for a
    candidate.
    """
    spec = recipe.head
    found = [take(recipe, tensors, name, device) for name in spec.tensors]
    if spec.kind == "implicit":
        if reference is None:
            fail("reference", f"the tensors of the reference model for recipe {recipe.name}", "None")
        (name,) = spec.tensors
        return ImplicitHead(found[0], take(recipe, reference, name, device), spec.beta)
    if spec.kind == "vocab_rows":
        ids = [candidate_id(tokenizer, text) for text in spec.candidates]
        return ScoreHead.vocab_rows(found[0], ids, *found[1:], activation=spec.activation, positive=spec.positive)
    last = spec.tensors[2 if spec.kind == "mlp" else 0]
    columns = found[spec.tensors.index(last)].shape[0]
    if columns != spec.columns:
        fail("recipe", f"a checkpoint whose {last} has {spec.columns} rows, for {recipe.name}", columns)
    if spec.kind == "mlp":
        return ScoreHead.mlp(*found, act=spec.act, activation=spec.activation, positive=spec.positive)
    bias = last.removesuffix("weight") + "bias"
    if len(found) == 1 and bias in tensors:
        fail("recipe", f"a checkpoint without {bias}, for {recipe.name}", "one with it")
    return ScoreHead.linear(*found, activation=spec.activation, positive=spec.positive)


def take(recipe: Recipe, tensors: Mapping[str, Tensor], name: str, device: torch.device | str | None) -> Tensor:
    if name not in tensors:
        refuse(recipe, name, tensors)
    tensor = tensors[name].detach()
    return tensor if device is None else tensor.to(device)


def refuse(recipe: Recipe, name: str, tensors: Mapping[str, Tensor]) -> NoReturn:
    """What lies beside the layers says which family a checkpoint is of."""
    others = [other for other in tensors if "layers" not in other.split(".")]
    got = f"{', '.join(others[:8])}{', ...' if len(others) > 8 else ''}" if others else "none beside its layers"
    fail("recipe", f"a checkpoint with the tensor {name}, for {recipe.name}", f"one with {got}")


def candidate_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        fail("tokenizer", f"one with a token for {text!r}", f"{len(ids)} tokens")
    shown = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if shown != text:  # a tokenizer loaded as the wrong class can lose spaces
        fail("tokenizer", f"one with a token for {text!r}", f"{shown!r}")
    return ids[0]
