"""Checkpoints on disk: which tensors make the head in each layout of files, what it holds, and what is refused."""

import dataclasses
import json
import sys

import pytest
import torch

pytest.importorskip("transformers")

import verifier_checkpoints as checkpoints
import verifier_published as published
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

from tts_kernels.scoring import ScoreHead
from tts_kernels.verifier.implicit import ImplicitHead
from tts_kernels.verifier.loading import Tensors, load, make_head
from tts_kernels.verifier.recipes import RECIPES
from tts_kernels.verifier.verifier import Verifier


def load_family(family, path, **options):
    recipe = RECIPES[family]
    return load(path, recipe, reference=path.parent / "reference" if recipe.implicit else None, **options)


def test_mlp_head(checkpoint):
    path = checkpoint("qwen2.5-math-prm")
    state = load_file(path / "model.safetensors")
    head = load_family("qwen2.5-math-prm", path).head
    assert isinstance(head, ScoreHead) and (head.act, head.activation, head.positive) == ("relu", "softmax", 1)
    for name, tensor in [("0.weight", head.w1), ("0.bias", head.b1), ("2.weight", head.w2), ("2.bias", head.b2)]:
        assert torch.equal(tensor, state[f"score.{name}"])


def test_rows_of_the_lm_head(checkpoint):
    """Sharded bin files; the rows are those of the tokens, the good one first."""
    path = checkpoint("math-shepherd")
    assert sorted(file.name for file in path.glob("*model*")) == [
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json",
    ]  # fmt: skip
    loaded = load_family("math-shepherd", path)
    weight, vocab = Tensors(path)["lm_head.weight"], loaded.tokenizer.get_vocab()
    assert torch.equal(loaded.head.w2, weight[[vocab["▁+"], vocab["▁-"]]])
    assert (loaded.head.b2, loaded.head.activation, loaded.head.positive) == (None, "softmax", 0)


def test_sharded_safetensors(checkpoint):
    path = checkpoint("rlhflow")
    assert (path / "model.safetensors.index.json").exists() and len(list(path.glob("model-*.safetensors"))) > 1
    loaded = load_family("rlhflow", path)
    vocab = loaded.tokenizer.get_vocab()
    assert torch.equal(loaded.head.w2, Tensors(path)["lm_head.weight"][[vocab["+"], vocab["-"]]])


def test_tied_embeddings(checkpoint):
    """No lm_head on disk: the embedding's rows. VersaPRM has "-" first and reads the other one."""
    path = checkpoint("versaprm")
    assert "lm_head.weight" not in Tensors(path)
    loaded = load_family("versaprm", path)
    vocab, weight = loaded.tokenizer.get_vocab(), Tensors(path)["model.embed_tokens.weight"]
    assert torch.equal(loaded.head.w2, weight[[vocab["-"], vocab["+"]]]) and loaded.head.positive == 1


def test_implicit_heads(checkpoint):
    path = checkpoint("eurus-prm")
    loaded = load_family("eurus-prm", path)
    assert isinstance(loaded.head, ImplicitHead) and loaded.head.beta == 0.001
    for weight, folder in zip(loaded.head.weights, (path, path.parent / "reference")):
        assert torch.equal(weight, load_file(folder / "model.safetensors")["lm_head.weight"])
    assert not torch.equal(*loaded.head.weights)
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, loaded.reference.layers[0].mlp.up_proj.weight)


def test_a_file_beside_the_checkpoint(checkpoint):
    path = checkpoint("reasonflux-prm-1.5b")
    head = load_family("reasonflux-prm-1.5b", path).head
    state = torch.load(path / "reward_head.pt")
    assert torch.equal(head.w2, state["weight"]) and torch.equal(head.b2, state["bias"])


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_backbone(family, checkpoint):
    """Ready for inference, with nothing behind the final norm, and no weight of the checkpoint left out."""
    path = checkpoint(family)
    model = load_family(family, path).model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    tensors = Tensors(path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[f"model.{name}"]), name


def test_dtype_is_the_backbone_s(checkpoint):
    """The head keeps the dtype of its tensors: it is computed in fp32 whatever the backbone's is."""
    loaded = load_family("qwen2.5-math-prm", checkpoint("qwen2.5-math-prm"), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.head.w1.dtype == torch.float32


def test_dtype_of_the_checkpoint_is_the_default(tmp_path):
    model = checkpoints.qwen2(checkpoints.Qwen2ForPrmModel).to(torch.bfloat16)
    tokenizer = checkpoints.qwen2_tokenizer(bos_token="<|im_start|>")
    loaded = load(checkpoints.save(tmp_path / "half", model, tokenizer), RECIPES["skywork-o1-prm"])
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16} == {loaded.head.w2.dtype}


def test_head_from_a_model_in_memory(checkpoint):
    """Recipe.build_head, for a Verifier of a model that is loaded already."""
    recipe, path = RECIPES["skywork-o1-prm"], checkpoint("skywork-o1-prm")
    model = checkpoints.Qwen2ForPrmModel.from_pretrained(path)
    head, expected = recipe.build_head(model, load_family(recipe.name, path).tokenizer), load(path, recipe).head
    assert torch.equal(head.w2, expected.w2) and torch.equal(head.b2, expected.b2) and not head.w2.requires_grad
    with pytest.raises(ValueError, match=r"^recipe: expected a checkpoint with the tensor v_head.summary.weight"):
        recipe.build_head(model.model, load(path, recipe).tokenizer)


# --- a recipe that does not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, other, missing, instead",
    [
        ("qwen2.5-math-prm", "skywork-o1-prm", "score.0.weight", "v_head.summary.bias"),
        ("skywork-o1-prm", "qwen2.5-math-prm", "v_head.summary.weight", "score.0.bias"),
        ("rlhflow", "sequence-classifier", "lm_head.weight", "score.weight"),
        ("trl", "sequence-classifier", "score.bias", "score.weight"),
        ("trl", "math-psa", "score.weight", "lm_head.weight"),
        ("reasonflux-prm", "eurus-prm", "score.0.weight", "lm_head.weight"),
    ],
)
def test_missing_tensor_is_named(family, other, missing, instead, checkpoint):
    with pytest.raises(ValueError) as error:
        load_family(family, checkpoint(other))
    start, _, got = str(error.value).partition(", got ")
    assert start == f"recipe: expected a checkpoint with the tensor {missing}, for {family}"
    assert instead in got and ".layers." not in got


def test_wrong_number_of_columns(checkpoint):
    with pytest.raises(ValueError, match=r"^recipe: expected a checkpoint whose score.2.weight has 2 rows, .*, got 1$"):
        load_family("qwen2.5-math-prm", checkpoint("qwen2.5-math-rm"))
    with pytest.raises(ValueError, match=r"^recipe: expected a checkpoint whose score.weight has 1 rows, .*, got 2$"):
        load_family("sequence-classifier", checkpoint("trl"))


def test_a_bias_that_the_recipe_does_not_read(checkpoint, tmp_path):
    path = checkpoint("trl")
    one = dataclasses.replace(RECIPES["sequence-classifier"].head, columns=2, positive=1)
    with pytest.raises(ValueError, match=r"^recipe: expected a checkpoint without score.bias, .*, got one with it$"):
        load(path, dataclasses.replace(RECIPES["sequence-classifier"], head=one))


def test_a_backbone_without_some_of_its_tensors(tmp_path):
    path = checkpoints.qwen_prm(tmp_path / "model")
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^path: expected .*the backbone's tensor layers.1.mlp.up_proj.weight, got"):
        load_family("qwen2.5-math-prm", path)


def test_a_candidate_that_is_no_token(checkpoint):
    head = dataclasses.replace(RECIPES["rlhflow"].head, candidates=("right", "-"))
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with a token for 'right', got \d tokens$"):
        load(checkpoint("rlhflow"), dataclasses.replace(RECIPES["rlhflow"], head=head))


def test_a_tokenizer_that_loses_spaces(checkpoint):
    """ " Yes" and "Yes" are two rows: as a tokenizer loaded under another one's class takes one for the other."""
    path = checkpoint("thinkprm")
    tokenizer = load_family("thinkprm", path).tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    yes = dataclasses.replace(RECIPES["thinkprm"].head, candidates=(" +", " -"))
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with a token for ' \+', got '\+'$"):
        make_head(dataclasses.replace(RECIPES["thinkprm"], head=yes), Tensors(path), tokenizer)


def test_folders(checkpoint, tmp_path):
    recipe = RECIPES["qwen2.5-math-prm"]
    with pytest.raises(FileNotFoundError, match=r"^path: expected a local folder with a checkpoint, got 'Qwen/Qwen2.5"):
        load("Qwen/Qwen2.5-Math-PRM-7B", recipe)
    with pytest.raises(
        FileNotFoundError, match=r"^path: expected a folder with model.safetensors or pytorch_model.bin"
    ):
        Tensors(tmp_path)
    with pytest.raises(TypeError, match=r"^path: expected the path of a folder, got int$"):
        load(3, recipe)
    with pytest.raises(TypeError, match=r"^recipe: expected a Recipe, got str$"):
        load(tmp_path, "rlhflow")


def test_reference(checkpoint):
    path = checkpoint("eurus-prm")
    with pytest.raises(ValueError, match=r"^reference: expected the folder of the reference model .*, got None$"):
        load(path, RECIPES["eurus-prm"])
    with pytest.raises(ValueError, match=r"^reference: expected None for recipe rlhflow, got "):
        load(path, RECIPES["rlhflow"], reference=path)
    with pytest.raises(FileNotFoundError, match=r"^reference: expected a local folder"):
        load(path, RECIPES["eurus-prm"], reference=path / "none")
    with pytest.raises(ValueError, match=r"^reference: expected the tensors of the reference model"):
        make_head(RECIPES["eurus-prm"], Tensors(path), None)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora_checkpoint(path, base):
    """As openreasoner/Math-psa is published: LoRA weights of q_proj and v_proj alone, beside a tokenizer."""
    peft = pytest.importorskip("peft", reason="LoRA checkpoints are read with peft, which is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which starts as zero
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return model.eval()


def test_lora(checkpoint, tmp_path):
    base = checkpoint("math-psa")
    adapted = lora_checkpoint(tmp_path / "lora", base)
    loaded = load(tmp_path / "lora", RECIPES["math-psa"])  # adapter_config.json names the base
    ids = torch.tensor([loaded.tokenizer("12 + 4 is 16.")["input_ids"]])
    with torch.no_grad():
        logits = adapted(ids).logits[0]
        plain = load(base, RECIPES["math-psa"]).model(ids).last_hidden_state[0] @ loaded.head.w2.T
    vocab = loaded.tokenizer.get_vocab()
    got = loaded.model(ids).last_hidden_state[0] @ loaded.head.w2.T
    torch.testing.assert_close(got, logits[:, [vocab["Ġ+"], vocab["Ġ-"]]], rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.1  # the adapter is in
    assert torch.equal(load(tmp_path / "lora", RECIPES["math-psa"], base=base).head.w2, loaded.head.w2)
    texts = ["What is 12 + 4?"], [["12 + 4 is 16.\n\nso 16", "17"]]
    (expected,) = published.score("math-psa", tmp_path / "lora", *texts)  # transformers finds the adapter by itself
    (got,) = Verifier.from_pretrained(tmp_path / "lora", "math-psa").score(*texts)
    assert [pytest.approx(scores, abs=2e-5) for scores in expected] == got


def test_lora_without_its_base(checkpoint, tmp_path):
    path = tmp_path / "lora"
    lora_checkpoint(path, checkpoint("math-psa"))
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Qwen/Qwen2.5-Math-7B-Instruct"
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"^base: expected a local folder with a checkpoint, got 'Qwen/Qwen2.5"):
        load(path, RECIPES["math-psa"])


def test_lora_without_peft(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    path = checkpoints.math_psa(tmp_path / "lora")
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ImportError, match=r"^path: .* holds LoRA weights: reading them needs `pip install peft`$"):
        load(path, RECIPES["math-psa"])
    with pytest.raises(ValueError, match=r"^path: expected a whole checkpoint for recipe trl, .*, got LoRA weights$"):
        load(path, RECIPES["trl"])
