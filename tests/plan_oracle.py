"""Reading a TreePlan back: what its tables say each row sees, and what holds in every plan."""

import torch


def rows_of(plan):
    """Per row of q: its position and the (page, offset) of each token that it sees, read the way a kernel reads
    the tables: for each node the range of rows that it serves."""
    position, seen = [None] * plan.num_rows, [[] for _ in range(plan.num_rows)]
    pages, (source, owner) = plan.pages.tolist(), plan.rows.tolist()
    for node, (_, length, start, page, own, own_end, rows_end) in enumerate(plan.nodes.T.tolist()):
        for row in range(own, rows_end):
            visible = length
            if row < own_end:
                assert owner[row] == node
                position[source[row]] = start + length - (own_end - row)
                if plan.causal:
                    visible = max(0, length - (own_end - own) + (row - own) + 1)
            seen[source[row]] += [(pages[page + t // plan.page_size], t % plan.page_size) for t in range(visible)]
    return list(zip(position, seen))


def check_tables(plan, still=0):
    """What holds in every plan. `still` nodes do not grow though they have rows and no children."""
    parent, length, position, _, own, own_end, rows_end = plan.nodes.tolist()
    n = plan.num_nodes
    for table in (plan.nodes, plan.pages, plan.rows, plan.grows):
        assert table.dtype == torch.int32 and table.is_contiguous() and table.device == plan.device
    assert plan.nodes.shape == (7, n) and plan.rows.shape == (2, plan.num_rows) and plan.grows.shape == (n,)
    assert sorted(plan.rows[0].tolist()) == list(range(plan.num_rows))
    assert plan.num_tokens == sum(length)
    assert plan.max_page == max(plan.pages.tolist(), default=-1)
    depth, growing = [], 0
    for k, p in enumerate(parent):
        assert -1 <= p < k
        depth.append(1 + (depth[p] if p >= 0 else 0))
        assert position[k] == (position[p] + length[p] if p >= 0 else 0)
        assert own[k] <= own_end[k] <= rows_end[k]
        # Depth-first: the parent of the next node is this one or one of its ancestors.
        if k:
            chain = [k - 1]
            while chain[-1] >= 0:
                chain.append(parent[chain[-1]])
            assert p in chain
        grows = k not in parent and own_end[k] > own[k] and length[k] > 0
        assert plan.grows[k] <= grows
        growing += grows
    assert plan.depth == max(depth, default=0)
    assert plan.num_growing == int(plan.grows.sum()) == growing - still
