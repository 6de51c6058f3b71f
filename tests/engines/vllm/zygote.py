"""Imports vLLM once; every engine of the tests is a fork of it. Runs in vLLM's environment.

`python -m tests.engines.vllm.zygote SOCKET`: each connection to the socket is an engine. A request
is a line of JSON, `{"do": NAME, …}`, and so is its answer, `{"done": …}` or `{"error": TEXT}`. The
engine ends, with all its processes, when its connection does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the tests send functions to the workers
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork",
}
PROMPTS = ("Hello, my name is", "The capital of France", "1 2 3 4 5", "zzzz!")


class EngineProcess:
    """The operations that a test can ask for."""

    def __init__(self) -> None:
        self.llm: Any = None

    def pid(self) -> int:
        """The number of the group of all its processes."""
        return os.getpgid(0)

    def checkpoint(self, kind: str, folder: str, **shape: int) -> None:
        from benchmarks.vllm_start import checkpoints

        checkpoints.make(kind, folder, **shape)

    def quantize(self, source: str, folder: str) -> None:
        from benchmarks.vllm_start import checkpoints

        checkpoints.quantize(source, folder)

    def adapt(self, source: str, folder: str) -> None:
        from benchmarks.vllm_start import checkpoints

        checkpoints.adapt(source, folder)

    def start(
        self, model: str, settings: dict[str, Any], env: dict[str, str], patches: list[str]
    ) -> None:
        from vllm import LLM

        from tests.engines.vllm import patches as known

        os.environ.update(env)
        for name in patches:
            getattr(known, name)()
        common = {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 4,
            "seed": 0,
        }
        self.llm = LLM(model=model, **{**common, **settings})

    def generate(self, adapter: str = "") -> list[list[int]]:
        """The tokens for each prompt. One prompt at a time: what is computed in one batch depends
        on timing, and changes results in bfloat16.
        """
        return [self.tokens(prompt, 32, adapter) for prompt in PROMPTS]

    def tokens(self, prompt: str, count: int, adapter: str = "") -> list[int]:
        """The first tokens after the prompt, with the weights of an adapter if one is named."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        (output,) = self.llm.generate([prompt], how, use_tqdm=False, lora_request=lora)
        return list(output.outputs[0].token_ids)

    def stop(self) -> None:
        """As SIGTERM to a server does."""
        self.llm.llm_engine.engine_core.shutdown()

    def facts(self) -> list[list[dict[str, Any]]]:
        """For each worker, what its models' starts say."""
        from benchmarks.vllm_start import probe

        found: list[list[dict[str, Any]]] = self.llm.collective_rpc(probe.facts)
        return found

    def compile_caches(self) -> list[dict[str, Any]]:
        """What the compile caches of all workers say."""
        from benchmarks.vllm_start import probe

        return [one for worker in self.llm.collective_rpc(probe.compile_caches) for one in worker]

    def checksums(self) -> list[dict[str, str]]:
        """vLLM's own, of all parameters and buffers, for each worker."""
        found: list[dict[str, str]] = self.llm.collective_rpc("compute_weight_checksums")
        return found

    def transferred(self) -> list[Any]:
        """For each worker, what its transfer of weights says it has."""
        from benchmarks.vllm_start import probe

        found: list[Any] = self.llm.collective_rpc(probe.transferred)
        return found

    def last_update(self) -> list[dict[str, Any]]:
        """For each worker, what its transfer of weights says of its last update."""
        from benchmarks.vllm_start import probe

        found: list[dict[str, Any]] = self.llm.collective_rpc(probe.last_update)
        return found

    def call(self, method: str, **kwargs: Any) -> None:
        """A method of all workers; what was computed with old weights is forgotten."""
        self.llm.collective_rpc(method, kwargs=kwargs)
        self.llm.reset_prefix_cache()

    def follow(self, init_info: dict[str, Any]) -> None:
        """Begins to take weights from a trainer."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def update(self, update_info: dict[str, Any]) -> None:
        """Takes the trainer's weights."""
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": update_info})
        self.llm.finish_weight_update()
        self.llm.reset_prefix_cache()


def main(path: str) -> None:
    os.environ.update(SETTINGS)
    _import_engine()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # engines are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _serve(connection)
            connection.close()


def _import_engine() -> None:
    import vllm.v1.engine.coordinator
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    def forks() -> Any:
        return multiprocessing.get_context("fork")

    for module in ("engine.coordinator", "engine.utils", "executor.multiproc_executor"):
        sys.modules[f"vllm.v1.{module}"].get_mp_context = forks  # type: ignore[attr-defined]


def _serve(connection: socket.socket) -> None:
    os.setsid()
    engine, lines = EngineProcess(), connection.makefile("rw", encoding="utf-8")
    try:
        log = Path(json.loads(lines.readline())["log"])
        descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        for line in lines:
            request = json.loads(line)
            answer = _answer(getattr(engine, request.pop("do")), request)
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
    finally:
        with suppress(OSError):
            os.killpg(0, signal.SIGKILL)  # with the workers; keepers see their ranks end
        os._exit(0)


def _answer(act: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"done": act(**request)}
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main(sys.argv[1])
