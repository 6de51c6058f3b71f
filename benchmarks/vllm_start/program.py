"""One vLLM, from its start to its first token; runs in vLLM's environment.

`python -m benchmarks.vllm_start.program REQUEST`, with JSON as `Request` has it. It prints a line
of JSON, and lives until it is killed, with all of its group.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `probe` is sent to the workers
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


LOGGING = {  # seconds and message, so that parts of a start can be told
    "version": 1,
    "formatters": {"timed": {"format": "%(created).3f %(message)s"}},
    "handlers": {
        "out": {
            "class": "logging.StreamHandler",
            "formatter": "timed",
            "stream": "ext://sys.stdout",
        }
    },
    "loggers": {"vllm": {"handlers": ["out"], "level": "INFO", "propagate": False}},
}


def main(request: dict[str, Any]) -> None:
    os.environ.update(SETTINGS)
    if "kind" in request:
        from benchmarks.vllm_start import checkpoints

        checkpoints.make(**request)
        say({})
        return
    path = Path(tempfile.mkdtemp(), "logging.json")
    path.write_text(json.dumps(LOGGING))
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(path)
    say(measure(**request))
    sys.stdin.read()


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def measure(model: str, settings: dict[str, Any], compiling: bool, began: float) -> dict[str, Any]:
    """`began`: when the process was started, by the clock of the machine."""
    from vllm import LLM, SamplingParams

    imported = time.monotonic()
    llm = LLM(
        model=model,
        dtype="bfloat16",
        enforce_eager=not compiling,
        max_model_len=256,
        max_num_seqs=4,
        gpu_memory_utilization=0.3,  # the source and a peer share it
        seed=0,
        **settings,
    )
    started = time.monotonic()
    how = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    (output,) = llm.generate(["The capital of France"], how, use_tqdm=False)
    end = time.monotonic()
    found: dict[str, Any] = {
        "import_s": imported - began,
        "engine_s": started - imported,
        "first_token_s": end - began,
        "token": output.outputs[0].token_ids[0],
    }
    if "load_format" in settings:
        from benchmarks.vllm_start import probe

        (found["loader"],) = llm.collective_rpc(probe.facts)
        (found["compile_caches"],) = llm.collective_rpc(probe.compile_caches)
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
