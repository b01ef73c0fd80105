"""The shape of a model: what its public config.json says, and the counts that costs are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tts_kernels.errors import check_int, fail

from .checks import fail_unknown

BF16 = 2  # bytes
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one compressed key and value for all heads."""

    kv_rank: int
    q_rank: int  # 0: queries are not compressed
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the layers from `dense_layers` on."""

    count: int
    per_token: int
    intermediate_size: int
    shared_size: int = 0  # intermediate size of all shared experts together
    dense_layers: int = 0


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with gated MLPs. Parameters are counted as transformers counts those of the causal LM:
    biases and norms included, tied embeddings once, multi-token-prediction modules and buffers left out.

    Bytes are those of bf16. Raises TypeError or ValueError for sizes that make no model.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    latent: LatentAttention | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            fail("name", "a name", repr(self.name), TypeError)
        for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
                      "vocab_size", "max_positions"):  # fmt: skip
            check_int(f"{self.name}: {field}", getattr(self, field), 1)
        if self.num_heads % self.num_kv_heads:
            fail(f"{self.name}: num_heads", f"a multiple of num_kv_heads = {self.num_kv_heads}", self.num_heads)

    @classmethod
    def preset(cls, name: str) -> ModelShape:
        """One of the models of models.json, by its lower-case name: "qwen2.5-7b", "deepseek-r1", ... Raises ValueError
        that names the nearest for another."""
        if not isinstance(name, str):
            fail("model", "the name of a preset", repr(name), TypeError)
        known = model_table()
        key = name.rsplit("/", 1)[-1].lower()
        if key not in known:
            fail_unknown("model", key, known)
        return cls.from_config(known[key]["config"], name=key)

    @classmethod
    def from_config(cls, config: Mapping | str | Path | object, *, name: str | None = None) -> ModelShape:
        """From a transformers config: its dict, its object, the path of config.json or of the folder that has it.

        Raises ValueError for an architecture whose parameters and KV this module does not know how to count.
        """
        if isinstance(config, (str, Path)):
            path = Path(config)
            path = path / "config.json" if path.is_dir() else path
            name = name or path.parent.resolve().name
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                fail("config", "JSON", f"{path}: {error}")
        elif hasattr(config, "to_dict"):
            config = config.to_dict()
        if not isinstance(config, Mapping):
            fail("config", "a dict, a path or a transformers config", type(config).__name__, TypeError)
        return cls(**_shape_of(config, name))

    # --- parameters -------------------------------------------------------------------------------------------------

    @property
    def num_parameters(self) -> int:
        """All of them, experts that a token does not use included."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.body_weights + self._small_parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token uses: all but the experts it is not routed to."""
        return self.num_parameters - self.body_weights + self.active_body_weights

    @property
    def body_weights(self) -> int:
        """Elements of the matrices of all layers: attention, MLPs, routers, every expert."""
        return self._body_weights(self.experts.count if self.experts else 0)

    @property
    def active_body_weights(self) -> int:
        """The same with the experts of one token: FLOPs of a token are two for each."""
        return self._body_weights(self.experts.per_token if self.experts else 0)

    def touched_body_weights(self, tokens: float) -> float:
        """Elements of the layers' matrices that a pass over so many tokens reads: an expert is read if one of them is
        routed to it, taken as likely for every expert; E (1 - (1 - k/E)^tokens) of E are."""
        if not self.experts:
            return self.body_weights
        count, used = self.experts.count, self.experts.per_token
        return self._body_weights(count * (1 - (1 - used / count) ** tokens))

    @property
    def head_weights(self) -> int:
        """Elements of the LM head; read in every step whether tied or not."""
        return self.vocab_size * self.hidden_size

    def _body_weights(self, experts: float) -> float:
        dense, sparse = self.num_layers, 0
        per_expert = shared = router = 0
        if self.experts:
            dense = self.experts.dense_layers
            sparse = self.num_layers - dense
            per_expert = 3 * self.hidden_size * self.experts.intermediate_size
            shared = 3 * self.hidden_size * self.experts.shared_size
            router = self.hidden_size * self.experts.count
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlps = dense * mlp + sparse * (experts * per_expert + shared + router)
        return self.num_layers * self._attention_weights + mlps

    @property
    def _attention_weights(self) -> int:
        """Of one layer. Latent attention that decodes in the compressed space multiplies by as many elements."""
        hidden, heads, mla = self.hidden_size, self.num_heads, self.latent
        if not mla:
            return 2 * hidden * self.head_dim * (heads + self.num_kv_heads)
        query_dim = heads * (mla.nope_dim + mla.rope_dim)
        queries = mla.q_rank * (hidden + query_dim) if mla.q_rank else hidden * query_dim
        keys = hidden * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * heads * (mla.nope_dim + mla.value_dim)
        return queries + keys + heads * mla.value_dim * hidden

    @property
    def _small_parameters(self) -> int:
        """Norms and biases."""
        norms, biases = 2 * self.hidden_size, 0
        if self.latent:
            norms += self.latent.q_rank + self.latent.kv_rank
            if self.qkv_bias:
                biases += self.latent.q_rank + self.latent.kv_rank + self.latent.rope_dim
        else:
            if self.qk_norm:
                norms += 2 * self.head_dim
            if self.qkv_bias:
                biases += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        if self.out_bias:
            biases += self.hidden_size
        if self.mlp_bias:
            biases += 2 * self.intermediate_size + self.hidden_size
        return self.num_layers * (norms + biases) + self.hidden_size

    # --- KV and attention -------------------------------------------------------------------------------------------

    @property
    def kv_bytes_per_token(self) -> int:
        """kappa, in bf16: 2 L Hkv d elements; latent attention: L (rank + rope)."""
        return self.kv_bytes(BF16)

    def kv_bytes(self, element: int) -> int:
        """kappa with elements of so many bytes."""
        if self.latent:
            return self.num_layers * (self.latent.kv_rank + self.latent.rope_dim) * element
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element

    @property
    def attention_flops_per_key(self) -> int:
        """Of one query token and one key in decode, all layers: 4 L Hq d. Latent attention decodes in the compressed
        space: 2 L Hq ((rank + rope) + rank)."""
        if self.latent:
            return 2 * self.num_layers * self.num_heads * (2 * self.latent.kv_rank + self.latent.rope_dim)
        return 4 * self.num_layers * self.num_heads * self.head_dim

    @property
    def prefill_flops_per_key(self) -> int:
        """The same in a forward over many tokens, where latent attention expands keys and values."""
        if self.latent:
            return 2 * self.num_layers * self.num_heads * (
                self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim
            )  # fmt: skip
        return self.attention_flops_per_key

    @property
    def attention_intensity(self) -> float:
        """FLOP per byte of decode attention in which nothing is shared: Hq / Hkv, or about 242 for DeepSeek-R1. N
        samples that share a read have N times as much."""
        return self.attention_flops_per_key / self.kv_bytes_per_token


def model_table() -> dict[str, dict]:
    """models.json: for each preset the fields of its public config.json that count, the repository whose config.json
    has them and the date of the row."""
    return json.loads(resources.files(__package__).joinpath("models.json").read_text(encoding="utf-8"))


def as_model(model: ModelShape | str) -> ModelShape:
    if isinstance(model, str):
        return ModelShape.preset(model)
    if not isinstance(model, ModelShape):
        fail("model", "a ModelShape or the name of a preset", type(model).__name__, TypeError)
    return model


def _shape_of(config: Mapping, name: str | None) -> dict:
    """The fields of ModelShape from those of a config.json."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        fail("config: model_type", "one of " + ", ".join(MODEL_TYPES), repr(kind))

    def field(key: str) -> int:
        if config.get(key) is None:
            fail(f"config: {key}", "a whole number", "none")
        return config[key]

    if _window(config, kind):
        fail(
            "config: sliding_window", "no window: the cost of windowed layers is not modelled", config["sliding_window"]
        )
    hidden, heads = field("hidden_size"), field("num_attention_heads")
    shape = {
        "name": name or config.get("_name_or_path") or kind,
        "num_layers": field("num_hidden_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "intermediate_size": field("intermediate_size"),
        "vocab_size": field("vocab_size"),
        "max_positions": field("max_position_embeddings"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "qkv_bias": kind == "qwen2" or bool(config.get("attention_bias", False)),
        "out_bias": kind != "qwen2" and bool(config.get("attention_bias", False)),
        "mlp_bias": kind == "llama" and bool(config.get("mlp_bias", False)),
        "qk_norm": kind in ("qwen3", "qwen3_moe"),
    }
    layers = shape["num_layers"]
    if kind == "mixtral":
        shape["experts"] = Experts(field("num_local_experts"), field("num_experts_per_tok"), field("intermediate_size"))
    elif kind == "qwen3_moe":
        every, skipped = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
        dense = sum(layer in skipped or (layer + 1) % every != 0 for layer in range(layers))
        size = field("moe_intermediate_size")
        count = config.get("num_local_experts") or field("num_experts")  # the name in transformers 5, in config.json
        shape["experts"] = Experts(count, field("num_experts_per_tok"), size, 0, dense)
    elif kind == "deepseek_v3":
        size = field("moe_intermediate_size")
        shape["experts"] = Experts(field("n_routed_experts"), field("num_experts_per_tok"), size,
                                   size * (config.get("n_shared_experts") or 0),
                                   min(layers, config.get("first_k_dense_replace") or 0))  # fmt: skip
        shape["latent"] = LatentAttention(field("kv_lora_rank"), config.get("q_lora_rank") or 0,
                                          field("qk_nope_head_dim"), field("qk_rope_head_dim"),
                                          field("v_head_dim"))  # fmt: skip
        shape["head_dim"] = shape["latent"].nope_dim + shape["latent"].rope_dim  # of queries
    return shape


def _window(config: Mapping, kind: str) -> bool:
    if not config.get("sliding_window"):
        return False
    if kind in ("qwen2", "qwen3", "qwen3_moe"):  # they carry a size that is not in use
        return bool(config.get("use_sliding_window", False))
    return kind in ("mistral", "mixtral")
