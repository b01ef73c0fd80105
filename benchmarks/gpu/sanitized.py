"""What the stage `sanitize` runs under compute-sanitizer: each kernel of triton and of cuda once, on shapes small
enough for a checker that makes everything tens of times slower, with rows, tokens and heads that fill no tile. Wrong
results fail too."""

from __future__ import annotations

import sys

import torch

import tts_kernels as tts
from tts_kernels.measure.inputs import Geometry, Inputs, beam, error, star, steps, tolerance
from tts_kernels.scoring import ScoreHead

BACKENDS = ("triton", "cuda")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> int:
    wrong = []
    geometries = ["28/4 d128", "32/8 d128 bf16+fp8", "32/8 d64"] if DEVICE.type == "cuda" else ["4/2 d16 fp32"]
    trees = [star(5, 112, 21), steps(3, 48, 16, 9), beam(4, 2, 3, 32, 16)]
    for geometry in map(Geometry.parse, geometries):
        for tree in trees if DEVICE.type == "cuda" else trees[:1]:
            inputs = Inputs(tree, geometry, DEVICE)
            tensors = inputs.q[0], inputs.k_cache[0], inputs.v_cache[0]
            exact = tts.tree_attention(*tensors, inputs.plan(), backend="reference").float()
            for backend in BACKENDS:
                if reasons := tts.unsupported_reasons("tree_attention", backend, *tensors):
                    print(f"not run: {backend} {geometry}: {'; '.join(reasons)}")
                    continue
                found = error(tts.tree_attention(*tensors, inputs.plan(), backend=backend), exact)
                if not found <= tolerance(geometry.q_dtype):
                    wrong.append(f"tree_attention {backend} {geometry}, {len(tree.length)} nodes: {found:.2g}")
    for backend in BACKENDS:
        if reasons := tts.unsupported_reasons("append_kv", backend, torch.empty(0, device=DEVICE)):
            print(f"not run: {backend}: {'; '.join(reasons)}")
            continue
        wrong += [f"{name} {backend}" for name, right in others(backend) if not right]
    for text in wrong:
        print(f"wrong: {text}", file=sys.stderr)
    print(f"{len(wrong)} wrong results")
    return int(bool(wrong))


def others(backend: str):
    """append_kv, merge_states, the comparison of block tables, scoring: names, and whether each is right."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    k, cache = randn(7, 3, 40), torch.zeros(9, 16, 3, 40, device=DEVICE)
    slots = torch.tensor([5, 17, 143, 0, -1, 99, 64], device=DEVICE)
    tts.append_kv(k, k, cache, cache.clone(), slots, backend=backend)
    used = slots >= 0
    yield "append_kv", torch.equal(cache.view(-1, 3, 40)[slots[used]], k[used])

    states = randn(5, 7, 3, 40), randn(5, 7, 3)
    got, exact = (tts.merge_states(*states, backend=b)[0] for b in (backend, "reference"))
    yield "merge_states", torch.allclose(got, exact, rtol=1e-4, atol=1e-5)

    table = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 4, 6]], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([60, 50, 63], dtype=torch.int32, device=DEVICE)
    plan = tts.TreePlan.from_block_table(table, lens, page_size=16)
    yield "from_block_table", plan.num_tokens == 32 + 28 + 16 + 2 + 15

    hidden, positions = randn(50, 70), torch.arange(3, 45, 2, device=DEVICE)
    head = ScoreHead.mlp(randn(70, 70) / 8, randn(70), randn(2, 70) / 8, randn(2))
    offsets = torch.tensor([0, 5, 5, 21], device=DEVICE)
    got, exact = (tts.verify(hidden, positions, head, offsets=offsets, backend=b) for b in (backend, "reference"))
    yield "step_scores", torch.allclose(got[0].prob, exact[0].prob, atol=1e-3)
    yield "select", torch.equal(got[1].indices, exact[1].indices)

    if backend == "cuda":  # it leaves token_logprobs to triton
        return
    weight, targets = randn(333, 70) / 8, torch.arange(50, device=DEVICE)
    got, exact = (tts.token_logprobs(hidden, weight, targets, backend=b) for b in (backend, "reference"))
    yield "token_logprobs", torch.allclose(got, exact, atol=1e-3)


if __name__ == "__main__":
    sys.exit(main())
