"""Frozen configs of the GPU kernels: looked up by op, device and geometry, else made by a rule.

    tree_attention.json               tile shapes by architecture: what compiles well, not measured
    OP,device_name=NAME.json          what `tts-kernels tune` measured on that device, a row for each geometry of an op
                                      of KEYS; in this folder, or in the one that TTS_KERNELS_CONFIGS names

A row of tree_attention decides three things for its device and geometry: the tile and split sizes (`config` of the
Triton kernels, `cuda` of the CUDA ones), what backend=None takes (`backend`), and how many tokens a shared run of a
block table has to save reading before it is cut off (`least_saving`). Where no row was measured: the architecture's
entry, else `rule` and `cuda_tree_config`; the order of the backends in attention/api.py, in which cuda stands before
triton, since its merge takes no launch of its own and its results do not depend on siblings; and 0, all whole pages are
shared, since a shared node costs these kernels no launch, only states.

A row of another op decides what backend=None takes, and one of token_logprobs the tiles of its Triton kernel too. Where
none was measured: that family's order of backends, and `logprob_rule`. Which ops have no rows, and why: aggregate and
select are one small launch, whatever its sizes; blocks that compare block tables run once for many calls; the CUDA
kernels of append_kv, merge_states and step_scores have no sizes to choose.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

WARPGROUP_TOKENS = 128
# What tells the rows of a measured table apart, of each op that has some.
KEYS = {
    "tree_attention": ("num_q_heads", "num_kv_heads", "block_dim", "q_bytes", "kv_bytes"),
    "append_kv": ("num_kv_heads", "head_dim", "new_bytes", "kv_bytes"),
    "merge_states": ("num_heads", "head_dim", "bytes"),
    "step_scores": ("dim", "bytes"),
    "token_logprobs": ("dim", "vocabulary", "bytes"),
}


@dataclass(frozen=True)
class TreeConfig:
    """Of the tile kernel of tree attention. A tile is rows x tokens: the packed rows (row, query head of the group)
    that a program holds and the tokens of a block of its loop."""

    wide_rows: int  # nodes with more than narrow_rows packed rows
    wide_tokens: int
    narrow_rows: int  # the others: leaves in decode. 0: every tile is wide
    narrow_tokens: int
    min_chunk: int  # tokens; chunks of a node are multiples of it
    max_chunks: int  # of a node
    num_warps: int
    num_stages: int
    tall_rows: int = 0  # CUDA kernels: all tiles of a node but its last one. 0: none
    warpgroups: int = 0  # CUDA kernels: 1 for those of csrc/cuda/hopper, whose blocks have WARPGROUP_TOKENS tokens
    source: str = dataclasses.field(default="rule", compare=False)  # where the values are from

    def __post_init__(self) -> None:
        for name in ("wide_rows", "wide_tokens", "narrow_tokens", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two, got {value}")
        if self.narrow_rows < 0 or self.narrow_rows & (self.narrow_rows - 1):
            raise ValueError(f"narrow_rows: expected 0 or a power of two, got {self.narrow_rows}")
        if self.min_chunk < 1 or self.min_chunk % max(self.wide_tokens, self.narrow_tokens):
            raise ValueError(f"min_chunk: expected a multiple of wide_tokens and narrow_tokens, got {self.min_chunk}")
        if self.narrow_rows > self.wide_rows:
            raise ValueError(f"narrow_rows: expected at most wide_rows = {self.wide_rows}, got {self.narrow_rows}")
        if self.tall_rows and (self.tall_rows & (self.tall_rows - 1) or self.tall_rows <= self.wide_rows):
            raise ValueError(f"tall_rows: expected 0 or a power of two above wide_rows, got {self.tall_rows}")
        if self.warpgroups not in (0, 1):
            raise ValueError(f"warpgroups: expected 0 or 1, got {self.warpgroups}")
        if self.warpgroups and self.min_chunk % WARPGROUP_TOKENS:
            raise ValueError(
                f"min_chunk: expected a multiple of {WARPGROUP_TOKENS} with warpgroups, got {self.min_chunk}"
            )
        if self.max_chunks < 1 or self.num_stages < 1:
            raise ValueError("max_chunks, num_stages: expected at least 1")

    def invariant(self) -> TreeConfig:
        """One tile shape for all nodes, so that the number of siblings picks no other instruction."""
        return dataclasses.replace(self, narrow_rows=0, source=self.source + ", batch-invariant")


@dataclass(frozen=True)
class LogprobConfig:
    """Of the Triton kernel of token_logprobs. A program takes `rows` rows of hidden states and `tile_tokens` of the
    vocabulary, `tokens` at a time, by products over `lanes` of d. No size depends on how many rows a call has."""

    rows: int
    tokens: int
    lanes: int
    tile_tokens: int
    num_warps: int
    num_stages: int
    source: str = dataclasses.field(default="rule", compare=False)  # where the values are from

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "lanes", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two, got {value}")
        if self.tile_tokens < 1 or self.tile_tokens % self.tokens:
            raise ValueError(f"tile_tokens: expected a multiple of tokens = {self.tokens}, got {self.tile_tokens}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: expected at least 1, got {self.num_stages}")


def block_dim(head_dim: int) -> int:
    """Elements of a head in a tile: the next power of two, at least what a tensor core takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def batch_invariant() -> bool:
    """TTS_KERNELS_BATCH_INVARIANT=1: on GPUs too, a row's result does not depend, bit for bit, on its siblings."""
    value = os.environ.get("TTS_KERNELS_BATCH_INVARIANT", "0")
    if value not in ("0", "1"):
        raise ValueError(f"TTS_KERNELS_BATCH_INVARIANT: expected 0 or 1, got {value!r}")
    return value == "1"


def tree_config(
    device_name: str,
    arch: str,
    head_dim: int,
    num_kv_heads: int,
    q_bytes: int,
    kv_bytes: int,
    num_q_heads: int | None = None,
) -> TreeConfig:
    """The config of a geometry: what was measured on the device, else the entry of its architecture, else `rule`.

    device_name        as torch.cuda.get_device_name() gives it, e.g. "NVIDIA H200"
    arch               "sm_90", "gfx942", ...; "interpreter"
    q_bytes, kv_bytes  size of an element of q and of the caches
    """
    key = {"block_dim": block_dim(head_dim), "q_bytes": q_bytes, "kv_bytes": kv_bytes}
    values = dict(INTERPRETER) if arch == "interpreter" else rule(**key)
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
    for name in (arch, device_name):
        for entry in entries("tree_attention", name, key | heads):
            values |= entry["config"] | {"source": source(entry)}
    # A long node's prefix rows are many, and each chunk costs each of them a state: few chunks, unless heads are few.
    values.setdefault("max_chunks", min(max(64 // num_kv_heads, 16), 64))
    config = TreeConfig(**values)
    return config.invariant() if batch_invariant() else config


def cuda_tree_config(
    device_name: str,
    head_dim: int,
    num_kv_heads: int,
    kv_bytes: int,
    num_q_heads: int,
    fits: Callable[[int, int], bool],
    has_warpgroups: Callable[[], bool] = lambda: False,
) -> TreeConfig:
    """Of the kernels of csrc/cuda: what was measured on the device (`cuda` of a row), else a rule. Results depend on
    the chunks and on `warpgroups`, and on nothing else of it.

    `warpgroups` is 1 where a row says so. Such kernels are for 16-bit KV of heads of 64 or 128 dimensions: a row that
    asks for them elsewhere is wrong. Where this very head_dim has none, or the module was built without them, the other
    kernels run, with the rest of the row.

    fits            whether the shared memory that a block of threads can have takes so many stages, with those kernels
    has_warpgroups  whether there are such kernels for this head_dim on the device
    """
    # What the kernels are made for. More rows would take more registers than a thread has, where heads are long.
    tokens, tall_rows = (64, 128) if head_dim <= 128 else (32, 0)
    values = {
        "wide_rows": 64,
        "wide_tokens": tokens,
        "narrow_rows": 16,
        "narrow_tokens": tokens,
        "tall_rows": tall_rows,
        "num_warps": 8,
        # As in `rule` and tree_config: a state is written for not too little KV; few chunks unless heads are few.
        "min_chunk": 256,
        "max_chunks": min(max(64 // num_kv_heads, 16), 64),
    }
    if device_name == "emulation":
        values |= {"min_chunk": 64, "max_chunks": 8, "source": device_name}
    key = {"block_dim": block_dim(head_dim), "q_bytes": 2, "kv_bytes": kv_bytes}
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
    for entry in entries("tree_attention", device_name, key | heads):
        if "cuda" in entry:
            values |= entry["cuda"] | {"source": source(entry)}
    if values.get("warpgroups") and (kv_bytes != 2 or block_dim(head_dim) not in (64, 128)):
        raise ValueError(
            f"{values['source']}: warpgroups: no such kernels are for heads of {head_dim} and KV of {kv_bytes} bytes"
        )
    if values.get("warpgroups") and not has_warpgroups():
        values["warpgroups"] = 0
    # As much KV on the way as there is room for: two blocks at least, as one of them is worked on.
    most = (3,) if values.get("warpgroups") else (4, 3)
    values.setdefault("num_stages", next((n for n in most if fits(n, values.get("warpgroups", 0))), 2))
    return TreeConfig(**values)


def logprob_config(device_name: str, dim: int, vocabulary: int, num_bytes: int) -> LogprobConfig:
    """What was measured on the device, else `logprob_rule`. num_bytes: of an element of the products' operands."""
    row = row_of("token_logprobs", device_name, dim=dim, vocabulary=vocabulary, bytes=num_bytes)
    if row is None or not row["config"]:
        return LogprobConfig(**logprob_rule(num_bytes))
    return LogprobConfig(**row["config"], source=source(row))


def logprob_rule(num_bytes: int) -> dict:
    """Where nothing was measured: half precision fills the largest tile that the registers of 8 warps hold, with three
    blocks on the way; fp32 products run without tensor cores. 2048 tokens for a program make some hundred programs of a
    usual vocabulary, and the partial sums small beside the weights."""
    rows, tokens, lanes, warps = (128, 128, 64, 8) if num_bytes == 2 else (64, 64, 32, 4)
    return {"rows": rows, "tokens": tokens, "lanes": lanes, "tile_tokens": 2048, "num_warps": warps, "num_stages": 3}


def measured_row(
    op: str, device_name: str, num_q_heads: int, num_kv_heads: int, head_dim: int, q_bytes: int, kv_bytes: int
) -> dict | None:
    """What was measured on the device for this very geometry of heads."""
    return row_of(
        op, device_name, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, block_dim=block_dim(head_dim),
        q_bytes=q_bytes, kv_bytes=kv_bytes,
    )  # fmt: skip


def row_of(op: str, device_name: str, **key: int) -> dict | None:
    """What was measured on the device for this very key: all of KEYS[op]."""
    rows = [e for e in shipped(op) if e["for"] == device_name and "file" in e and key.items() <= e.items()]
    return rows[-1] if rows else None


def entries(op: str, name: str, key: dict) -> list[dict]:
    """Those of a device or architecture that fit, entries that name heads after those for any."""
    fitting = [
        entry for entry in shipped(op) if entry["for"] == name and all(entry.get(k, v) == v for k, v in key.items())
    ]
    return sorted(fitting, key=lambda entry: "num_q_heads" in entry)


def source(entry: dict) -> str:
    """The row or entry, as reports name it."""
    if "file" not in entry:
        return f"tree_attention.json, {entry['for']}"
    if "num_q_heads" in entry:
        return f"{entry['file']}, {entry['num_q_heads']}/{entry['num_kv_heads']} heads"
    key = KEYS[entry["file"].partition(",")[0]]
    return f"{entry['file']}, " + ", ".join(f"{name} {entry[name]}" for name in key)


def table_name(op: str, device_name: str) -> str:
    return f"{op},device_name={device_name.replace(' ', '_')}.json"


def rule(block_dim: int, q_bytes: int, kv_bytes: int) -> dict:
    """Where no entry is shipped: what fits any GPU since sm_80 without spills.

    Half precision: 64 rows, the least that Hopper's warpgroup products take, and 16, the least of any tensor core, with
    blocks of 64 tokens, 32 for heads of 256; 8 warps where 4 run out of registers. fp32 products run without tensor
    cores: 16 rows, 16 tokens, no stages. Chunks of 256 tokens at least: below that a state is written for little KV.
    """
    if q_bytes == 4:
        rows, tokens, stages = 16, 16, 1
    else:
        rows, tokens, stages = 64, 64 if block_dim <= 128 else 32, 2
    return {
        "wide_rows": rows,
        "wide_tokens": tokens,
        "narrow_rows": 16,
        "narrow_tokens": tokens,
        "min_chunk": 256,
        "num_warps": 4 if block_dim <= 64 else 8,
        "num_stages": stages,
    }


# Small tiles and chunks, so that small tests cross their borders.
INTERPRETER = {
    "wide_rows": 32,
    "wide_tokens": 64,
    "narrow_rows": 16,
    "narrow_tokens": 32,
    "min_chunk": 128,
    "max_chunks": 8,
    "num_warps": 4,
    "num_stages": 1,
    "source": "interpreter",
}


def shipped(op: str) -> list[dict]:
    """The entries of the op's tables, each with the device or architecture that it is `for`; measured rows also with
    their `file`. Files are read once."""
    return _read(op, os.environ.get("TTS_KERNELS_CONFIGS", ""))


@functools.cache
def _read(op: str, folder: str) -> list[dict]:
    here = resources.files(__package__)
    by_architecture = here / f"{op}.json"
    found = json.loads(by_architecture.read_text()) if by_architecture.is_file() else []
    for place in (here, *([Path(folder)] if folder else [])):
        for file in sorted(place.iterdir(), key=lambda file: file.name):
            if file.name.startswith(f"{op},device_name=") and file.name.endswith(".json"):
                table = json.loads(file.read_text())
                found += [{"for": table["device"], "file": file.name} | row for row in table["rows"]]
    return found
