"""The steps of a vLLM engine as an attention backend sees them: requests that come, share blocks, grow and go; buffers
that stay where they are; decode batches padded to the sizes that are captured."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import torch
import vllm_fakes
from vllm_batches import BLOCK, HKV, HQ, D, builder_of, empty_cache, plain, slots_of

SIZES = (6, 3, 1)  # that are captured, in vLLM's order
MOST, WIDTH, BLOCKS = SIZES[0], 40, 150  # requests, blocks of one, blocks of all
WINDOWS = (None, 9)  # of the KV cache groups
LAYERS = (0, 0, 1)  # the group of each layer, where nothing else is said
NULL = 0  # the block that vLLM puts where none is


class Request:
    def __init__(self, tokens: int, blocks: list[list[int]]) -> None:
        self.tokens = tokens
        self.blocks = blocks  # of each group


class Engine:
    """Its CUDA graphs are full ones where vLLM can have them."""

    def __init__(self, plugin, dtype=torch.float32, device="cpu", layers=LAYERS):
        self.plugin, self.dtype, self.device, self.layers = plugin, dtype, device, layers
        mode = vllm_fakes.CUDAGraphMode.FULL_AND_PIECEWISE
        self.gen = torch.Generator().manual_seed(3)
        self.builders = [builder_of(plugin, dtype, None, device, mode, SIZES) for _ in WINDOWS]
        sinks = torch.randn(HQ, generator=self.gen)
        self.sinks = [None, sinks, None]
        self.impls = [
            plugin.TreeImpl(HQ, D, 0.2, HKV, sliding_window=WINDOWS[group], sinks=s if s is None else s.to(device))
            for group, s in zip(self.layers, self.sinks)
        ]
        caches = [empty_cache(dtype, "tokens first", BLOCKS) for _ in self.layers]
        for cache in caches:
            cache[NULL] = 5.0  # what lies there is read, and masked
        self.caches = [cache.to(device) for cache in caches]
        self.stored = [torch.zeros(2, BLOCKS * BLOCK, HKV, D) for _ in self.layers]  # K and V by slot
        self.tables = [torch.full((MOST, WIDTH), NULL, dtype=torch.int32, device=device) for _ in WINDOWS]
        self.slots = [torch.full((MOST,), -1, dtype=torch.int64, device=device) for _ in WINDOWS]
        self.seq_lens = torch.zeros(MOST, dtype=torch.int32, device=device)
        self.q, self.out = (torch.zeros(len(self.layers), MOST, HQ, D, dtype=dtype, device=device) for _ in range(2))
        self.kv = torch.zeros(len(self.layers), 2, MOST, HKV, D, dtype=dtype, device=device)
        self.requests: list[Request] = []
        self.used = [Counter({NULL: 1}) for _ in WINDOWS]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.gen).to(self.dtype)

    def take(self, group: int) -> int:
        block = next(b for b in reversed(range(BLOCKS)) if not self.used[group][b])
        self.used[group][block] = 1
        return block

    def start(self, tokens: int, like: Request | None = None, shared: int = 0) -> Request:
        """A request whose first `shared` blocks are those of another; the KV of the rest is stored."""
        blocks = []
        for group in range(len(WINDOWS)):
            mine = like.blocks[group][:shared] if like else []
            self.used[group].update(mine)
            mine = mine + [self.take(group) for _ in range(-(-tokens // BLOCK) - len(mine))]
            blocks.append(mine)
        for layer, group in enumerate(self.layers):
            slots = slots_of(blocks[group], shared * BLOCK, tokens)
            self.store(layer, slots, self.random(2, len(slots), HKV, D))
        self.requests.append(Request(tokens, blocks))
        return self.requests[-1]

    def finish(self, *requests: Request) -> None:
        for request in requests:
            self.requests.remove(request)
            for used, blocks in zip(self.used, request.blocks):
                used.subtract(block for block in blocks if block != NULL)

    def store(self, layer: int, slots: list[int], kv: torch.Tensor) -> None:
        self.stored[layer][:, slots] = kv.float()
        self.impls[layer].do_kv_cache_update(
            None, *kv.to(self.device), self.caches[layer], torch.tensor(slots, dtype=torch.int64).to(self.device)
        )

    def grow(self) -> None:
        """A token for each request, and the queries and KV of this step; what was in the buffers stays behind them."""
        for request in self.requests:
            for group, window in enumerate(WINDOWS):
                blocks = request.blocks[group]
                if request.tokens == len(blocks) * BLOCK:
                    blocks.append(self.take(group))
                if window:  # vLLM takes the blocks that no row will see
                    gone = max(request.tokens + 1 - window, 0) // BLOCK
                    for i in range(gone):
                        if blocks[i] != NULL:
                            self.used[group][blocks[i]] -= 1
                            blocks[i] = NULL
            request.tokens += 1
        self.q.copy_(self.random(*self.q.shape))
        self.kv.copy_(self.random(*self.kv.shape))
        for layer, group in enumerate(self.layers):
            slots = [slots_of(r.blocks[group], r.tokens - 1, r.tokens)[0] for r in self.requests]
            self.stored[layer][:, slots] = self.kv[layer, :, : len(slots)].cpu().float()

    def metadata(self, size: int) -> list[SimpleNamespace]:
        """vLLM's, for each group, of a decode batch padded to `size`: blocks NULL, 0 tokens, no row, slot -1."""
        n = len(self.requests)
        for group, (table, slots) in enumerate(zip(self.tables, self.slots)):
            for row, request in enumerate(self.requests):
                blocks = torch.tensor(request.blocks[group], dtype=torch.int32)
                table[row, : len(blocks)].copy_(blocks)
                slots[row] = slots_of(request.blocks[group], request.tokens - 1, request.tokens)[0]
            table[n:size] = NULL
            slots[n:size] = -1
        for row, request in enumerate(self.requests):
            self.seq_lens[row] = request.tokens
        self.seq_lens[n:] = 0
        return self.common(size, n)

    def dummy(self, size: int) -> list[SimpleNamespace]:
        """That of vLLM's runs before a capture, and in it: one token for each request, in block NULL, not stored."""
        for table, slots in zip(self.tables, self.slots):
            table[:size] = NULL
            slots.fill_(-1)
        self.seq_lens[:size], self.seq_lens[size:] = 1, 0
        return self.common(size, size)

    def common(self, size: int, n: int) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                num_reqs=size, num_actual_tokens=size, max_query_len=1, causal=True, block_table_tensor=table[:size],
                query_start_loc=torch.arange(size + 1, dtype=torch.int32).clamp(max=n),
                seq_lens=self.seq_lens[:size],
            )
            for table in self.tables
        ]  # fmt: skip

    def forward(self, size: int, made: list) -> None:
        """What a graph holds."""
        for layer, group in enumerate(self.layers):
            impl, cache = self.impls[layer], self.caches[layer]
            impl.do_kv_cache_update(None, *self.kv[layer, :, :size], cache, self.slots[group][:size])
            impl.forward(None, self.q[layer, :size], None, None, cache, made[group], self.out[layer, :size])

    def check(self, size: int, tolerance: float) -> None:
        """`out` is that of a softmax over each request's own tokens; the rows that pad are 0."""
        n = len(self.requests)
        for layer, group in enumerate(self.layers):
            got = self.out[layer].cpu()
            assert not got[n:size].any()
            exact = plain(
                self.q[layer, :n].cpu(), *self.stored[layer], [(r.blocks[group], r.tokens, 1) for r in self.requests],
                scale=0.2, causal=True, window=WINDOWS[group], softcap=0, sinks=self.sinks[layer],
            )  # fmt: skip
            torch.testing.assert_close(got[:n].double(), exact, rtol=tolerance, atol=tolerance)


def life(engine: Engine):
    """Changes the requests; yields where a decode step is to be made."""
    first = engine.start(131)
    second = engine.start(130, first, 32)
    engine.start(139, first, 32)
    yield
    yield
    alone = engine.start(17)
    engine.start(30, alone, 4)
    engine.start(150, second, 33)  # shares what `second` has grown by too
    yield
    engine.finish(first, engine.requests[2])
    yield  # four, padded
    yield
    engine.finish(alone, engine.requests[-1])
    yield  # two, padded
    engine.finish(second)
    yield  # one
    chain = engine.start(9)
    for i in range(4):  # deeper than a plan's room: each shares more with the one before
        chain = engine.start(13 + 4 * i, chain, 2 + i)
    yield
    engine.requests.reverse()
    engine.finish(*engine.requests[:3])
    yield
