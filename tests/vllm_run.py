"""Run by tests/integrations/test_vllm.py: `vllm_run.py CASE.json MODEL` samples with vLLM from a small seeded model and
prints, as the last line, tokens, log-probabilities, what the plans of tts_kernels read, and full CUDA graphs: the sizes
that were captured, and the sizes (on a GPU the number) of the replays."""

import json
import os
import random
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

import torch
import transformers
from vllm import LLM, SamplingParams

case, folder = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
if not Path(folder).exists():
    architecture = case.get("architecture", "Qwen2")
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**case["base"] | case["sizes"])
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)

plans, captured, replayed, groups = {"plans": 0, "read": 0, "held": 0}, set(), [], 0
if os.environ.get("TTS_KERNELS_VLLM"):
    from tts_kernels.integrations import vllm as plugin

    build = plugin.TreeBuilder.build

    def counted(self, common_prefix_len, common, fast_build=False):
        metadata = build(self, common_prefix_len, common, fast_build)
        plans["plans"] += 1
        plans["read"] += metadata.plan.num_tokens
        plans["held"] += int(common.seq_lens[: common.num_reqs].sum())
        return metadata

    plugin.TreeBuilder.build = counted
    build_for_capture = plugin.TreeBuilder.build_for_cudagraph_capture

    def noted(self, common):
        captured.add(common.num_reqs)
        return build_for_capture(self, common)

    plugin.TreeBuilder.build_for_cudagraph_capture = noted
if torch.cuda.is_available():
    replay = torch.cuda.CUDAGraph.replay

    def listed(self):
        replayed.append(None)
        return replay(self)

    torch.cuda.CUDAGraph.replay = listed

llm = LLM(
    folder, skip_tokenizer_init=True, dtype=case["dtype"], max_model_len=1024, block_size=32, seed=7,
    enable_prefix_caching=True, max_num_batched_tokens=256, **{"enforce_eager": True} | case["engine"],
)  # fmt: skip
if case["graphs"] and os.environ.get("TTS_KERNELS_VLLM"):
    import vllm_graphs

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    replayed, groups = vllm_graphs.capture(runner, case["graphs"]).replayed, len(runner.attn_groups)
draw = random.Random(0)
shared = draw.choices(range(3, 512), k=300)
prompts = [shared + draw.choices(range(3, 512), k=draw.randrange(1, 60)) for _ in range(5)]
prompts += [[5, 6, 7], draw.choices(range(3, 512), k=700)]
samplings = [
    SamplingParams(
        n=3 if case["temperature"] else 1, temperature=case["temperature"], max_tokens=6 + 3 * i, logprobs=1,
        detokenize=False, ignore_eos=True,
    )
    for i in range(len(prompts))
]  # fmt: skip
done = []
for _ in range(2):
    done += llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], samplings, use_tqdm=False)
outputs = [output for request in done for output in request.outputs]
print()
print(json.dumps({
    "tokens": [list(output.token_ids) for output in outputs],
    "logprobs": [output.cumulative_logprob for output in outputs],
    "captured": sorted(captured),
    "replayed": replayed,
    "groups": groups,
    **plans,
}))  # fmt: skip
