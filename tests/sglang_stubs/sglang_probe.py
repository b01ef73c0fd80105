"""A plugin of SGLang for the tests: writes a line of JSON for each plan that the backend "tts_kernels" makes, into the
file that TTS_KERNELS_PROBE names."""

import json
import os


def register():
    from tts_kernels.integrations import sglang_backend

    make_plan = sglang_backend.make_plan

    def probed(req_to_token, req_pool_indices, seq_lens, **options):
        plan = make_plan(req_to_token, req_pool_indices, seq_lens, **options)
        facts = {
            "requests": len(seq_lens),
            "decode": options["q_lens"] is None,
            "graph": options["into"] is not None,
            "page_size": options["page_size"],
            "window pool": options["window_slots"] is not None,
            "tokens": int(seq_lens.sum()),
            "read": plan.num_tokens,
            "rows": plan.num_rows,
        }
        with open(os.environ["TTS_KERNELS_PROBE"], "a") as file:
            file.write(json.dumps(facts) + "\n")
        return plan

    sglang_backend.make_plan = probed
