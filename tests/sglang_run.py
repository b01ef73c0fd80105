"""Runs engines of SGLang on the CPU, one after another, and writes what they generated.

    python sglang_run.py JOBS RESULTS

JOBS is a JSON file with a list of {"name", "options", "environment", "calls"}: the engine's arguments, variables of its
processes, and the arguments of generate(), call by call. RESULTS gets {name: {"calls": [...]}} with token ids, logprobs
and retractions of each sequence, or {"error"}.
"""

import json
import os
import sys
import traceback

ALWAYS = {
    "device": "cpu",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "random_seed": 0,
    "chunked_prefill_size": 64,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 4096,
    "watchdog_timeout": 600,
    "log_level": "error",
}


def generate(engine, call):
    outputs = engine.generate(return_logprob=True, **call)
    return [
        {
            "ids": output["output_ids"],
            "logprobs": [value for value, *_ in output["meta_info"]["output_token_logprobs"]],
            "retractions": output["meta_info"]["num_retractions"],
            "cached": output["meta_info"]["cached_tokens"],
        }
        for output in outputs
    ]


def run(job):
    from sglang.srt.entrypoints.engine import Engine

    os.environ.update(job["environment"])
    try:
        engine = Engine(**{**ALWAYS, **job["options"]})
    finally:
        for name in job["environment"]:
            del os.environ[name]
    try:
        return {"calls": [generate(engine, call) for call in job["calls"]]}
    finally:
        engine.shutdown()


def main(jobs_file, results_file):
    results = {}
    with open(jobs_file) as file:
        jobs = json.load(file)
    for job in jobs:
        try:
            results[job["name"]] = run(job)
        except Exception as error:
            traceback.print_exc()
            results[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        with open(results_file, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
