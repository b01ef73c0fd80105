"""Trees and inputs for measurements, against what is written down from the rule of who sees what."""

import pytest
import torch

import tts_kernels as tts
from tts_kernels.measure.inputs import Geometry, Inputs, beam, chain, error, lone, questions, star, steps, tolerance

TREES = {
    "star": star(3, 48, 20),
    "lone": lone(2, 30),
    "questions": questions(2, 3, 32, 5),
    "chain": chain(5, 16),
    "beam": beam(8, 2, 5, 32, 16),
    "steps": steps(3, 32, 16, 7),
}


@pytest.mark.parametrize("name", TREES)
def test_counts_and_numbers(name):
    """Rows, pairs and tokens by brute force; nothing that is unused is read; sets differ."""
    tree = TREES[name]
    inputs = Inputs(tree, Geometry(4, 2, 32, "fp32"), torch.device("cpu"), sets=2)
    assert sorted(page for pages in inputs.pages for page in pages) == list(range(inputs.num_pages))
    assert all(parent < node for node, parent in enumerate(tree.parent))
    pairs, read = 0, set()
    for node, rows in enumerate(tree.rows):
        above = sum(tree.length[n] for n in tree.paths[node][:-1])
        pairs += sum(above + tree.length[node] - rows + j + 1 for j in range(rows))
        if rows:
            read |= {(n, t) for n in tree.paths[node] for t in range(tree.length[n])}
    assert tree.visible == pairs and tree.seen_tokens == len(read)
    assert tree.owners == [node for node, rows in enumerate(tree.rows) for _ in range(rows)]

    outs = [
        tts.tree_attention(inputs.q[i], inputs.k_cache[i], inputs.v_cache[i], inputs.plan(), backend="reference")
        for i in range(2)
    ]
    assert not torch.stack(outs).isnan().any() and not torch.equal(*outs)
    k, _ = inputs.gather(1, inputs.slots([0]))
    assert k.shape == (tree.length[0], 2, 32) and not k.isnan().any()


def test_beam_keeps_what_lives():
    tree = beam(64, 16, 40, 512, 48)
    leaves = [node for node, rows in enumerate(tree.rows) if rows]
    assert len(leaves) == 64 == tree.num_rows and {len(tree.paths[leaf]) for leaf in leaves} == {41}
    assert len({tree.parent[leaf] for leaf in leaves}) == 16
    assert all(served for served in tree.served)


def test_geometry_text():
    for text in ("32/8 d128", "28/4 d64 fp16", "16/1 d256 bf16+fp8"):
        assert str(Geometry.parse(text)) == text
    assert Geometry.parse("32/8 d128").token_bytes == 4096
    with pytest.raises(ValueError, match="geometry: expected text like"):
        Geometry.parse("32x8 d128")
    with pytest.raises(ValueError, match="num_q_heads: expected a multiple of num_kv_heads = 8, got 30"):
        Geometry.parse("30/8 d128")


def test_error_of_a_wrong_row_shows():
    reference = torch.randn(4, 2, 8)
    wrong = reference.clone()
    wrong[2, 1, 0] += 1
    assert error(reference, reference) == 0 and error(wrong, reference) > 100 * tolerance(torch.bfloat16) / 10
    wrong[0, 0, 0] = torch.nan
    assert error(wrong, reference) == float("inf")
