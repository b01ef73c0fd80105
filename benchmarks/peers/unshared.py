"""Our own kernels without sharing: every row's path as a sequence of its own over the same pages. No peer, but what
tells from where on sharing pays."""

from tts_kernels.attention import api
from tts_kernels.tree.plan import TreePlan

NAME = "ours, not shared"
OURS = True


def reason_against(case):
    if not case.whole_pages:
        return "inner nodes end inside a page"
    return ""


def prepare(inputs):
    tree = inputs.tree
    leaves = [node for node, rows in enumerate(tree.rows) if rows]
    plan = TreePlan.from_nodes(
        [-1] * len(leaves),
        [sum(tree.length[node] for node in tree.paths[leaf]) for leaf in leaves],
        [[page for node in tree.paths[leaf] for page in inputs.pages[node]] for leaf in leaves],
        [tree.rows[leaf] for leaf in leaves],
        page_size=inputs.geometry.page_size,
        device=inputs.q.device,
    )
    return lambda: api.tree_attention(inputs.q, inputs.k_cache, inputs.v_cache, plan)


def bytes_read(case):
    return case.replicated_kv_bytes + case.row_bytes
