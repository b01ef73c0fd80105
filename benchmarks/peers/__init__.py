"""What tree_attention is measured against: one file for each peer.

A peer is a module with
    NAME                 what the table calls it
    reason_against(case) why it cannot run the case, or ""
    prepare(inputs)      a function without arguments that computes [N, Hq, D]; what it copies for that is not timed
    bytes_read(case)     bytes of the tensors it is handed and of its result, each once
"""

from . import cascade, sdpa, sdpa_packed

PEERS = (cascade, sdpa_packed, sdpa)
