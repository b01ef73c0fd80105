"""torch's FlexAttention, compiled, over every distinct token once: the tree is its mask."""

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

NAME = "flex attention"
COMPILED = True


def reason_against(case):
    if not case.flex:
        return "compiled anew for every shape, which takes long: a few cases only"
    if case.num_rows * case.seen_tokens > 1 << 28:
        return f"a mask of {case.num_rows} x {case.seen_tokens} tokens"
    return ""


def prepare(inputs):
    mask, attend = inputs.once(NAME, lambda: masked(inputs.tree, inputs.q.device))
    nodes = list(range(len(inputs.tree.length)))
    k, v = (x.transpose(0, 1)[None].contiguous() for x in inputs.gather(nodes))  # [1, Hkv, T, D]
    queries = inputs.q.transpose(0, 1)[None]  # [1, Hq, R, D]
    return lambda: attend(queries, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def masked(tree, device):
    seen, last = visibility(tree, device)
    owner = torch.repeat_interleave(torch.tensor(tree.length)).to(device)
    place = torch.cat([torch.arange(length) for length in tree.length]).to(device)

    def sees(batch, head, row, token):
        return seen[row, owner[token]] & (place[token] <= last[row, owner[token]])

    mask = create_block_mask(sees, None, None, tree.num_rows, tree.num_tokens, device=device)
    torch._dynamo.reset()  # a shape for each case: not more and more versions of one function
    return mask, torch.compile(flex_attention, dynamic=False)


def visibility(tree, device):
    """For each row and node: whether the row sees tokens of it, and the last one that it sees."""
    seen = torch.zeros(tree.num_rows, len(tree.length), dtype=torch.bool)
    last = torch.zeros(tree.num_rows, len(tree.length), dtype=torch.int64)
    row = 0
    for node, rows in enumerate(tree.rows):
        path = tree.paths[node]
        for j in range(rows):
            seen[row, path] = True
            last[row, path] = torch.tensor([tree.length[n] - 1 for n in path])
            last[row, node] = tree.length[node] - rows + j
            row += 1
    return seen.to(device), last.to(device)


def bytes_read(case):
    return case.least_bytes
