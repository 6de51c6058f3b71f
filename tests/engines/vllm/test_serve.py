"""vLLM's server as a user starts it: new processes, the plugin found by its entry point, and vLLM's
own routes.

The command `vllm` of the build for CPUs does not start, because it asks for the version of a
package `vllm`, so the test starts the module that `vllm serve` runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engine_loader import MooncakeEngine, publish_state_dict
from engine_registry import ModelIdentity, Registry
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from tests.engines.vllm.conftest import PYTHON, Engines, wait_for_withdrawal
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
Checkpoint = Callable[..., str]
PROMPT = "1 2 3"
_MODULE = "vllm.entrypoints.openai.api_server"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # with the routes for trainers
}


class Server:
    """A server on a free port."""

    def __init__(self, model: str, log: Path, *options: str) -> None:
        self.log = log
        self._port = free_port("127.0.0.1")
        where = ["--host", "127.0.0.1", "--port", str(self._port)]
        small = ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
        with log.open("w") as lines:
            self._process = subprocess.Popen(
                [PYTHON, "-m", _MODULE, "--model", model, *where, *small, *options],
                stdout=lines,
                stderr=lines,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT, "TMPDIR": str(log.parent)},
            )

    def wait(self) -> None:
        """Until it answers."""
        wait_until(lambda: self._process.poll() is not None or self._is_healthy(), 400)
        assert self._process.poll() is None, self.log.read_text("utf-8")[-4000:]

    def post(self, route: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{route}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            return json.loads(answer.read())

    def tokens(self, model: str, prompt: str, count: int) -> list[int]:
        how = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = self.post("/v1/completions", model=model, prompt=prompt, max_tokens=count, **how)
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _is_healthy(self) -> bool:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5)
            return True
        return False


@pytest.fixture
def serve(tmp_path: Path, registry: Registry) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:
        stack.callback(wait_for_withdrawal, registry)

        def start(model: str, *options: str) -> Server:
            server = Server(model, tmp_path / f"{len(list(tmp_path.iterdir()))}.log", *options)
            stack.callback(server.close)
            server.wait()
            return server

        yield start


def test_a_second_server_copies_from_the_first_and_then_follows_a_trainer(
    engines: Engines,  # before the servers: they end first
    serve: Callable[..., Server],
    checkpoint: Checkpoint,
    etcd: LocalEtcd,
    registry: Registry,
    namespace: str,
) -> None:
    model, trained = checkpoint("llama"), checkpoint("llama", seed=7)
    reach = {"etcd": etcd.endpoint, "namespace": namespace, "host": "127.0.0.1"}
    ours = ["--load-format", "engine_registry", "--model-loader-extra-config", json.dumps(reach)]
    transfer = ["--weight-transfer-config", json.dumps({"backend": "engine_registry"})]
    first = serve(model, *ours)
    second = serve(model, *ours, *transfer)
    assert "and serves them to peers" in first.log.read_text("utf-8")
    assert "has copied" in second.log.read_text("utf-8")
    assert first.tokens(model, PROMPT, 16) == second.tokens(model, PROMPT, 16)
    first.close()

    state = load_file(Path(trained, "model.safetensors"))
    with (
        MooncakeEngine("127.0.0.1") as engine,
        publish_state_dict(
            registry,
            engine,
            state,
            instance="trainer",
            rank=0,
            world_size=1,
            model=ModelIdentity("policy"),
        ),
    ):
        second.post("/init_weight_transfer_engine", init_info={"source": "trainer"})
        second.post("/start_weight_update")
        second.post("/update_weights", update_info={})
        second.post("/finish_weight_update")
        second.post("/reset_prefix_cache")
    expected = engines.start(trained).ask("tokens", prompt=PROMPT, count=16)
    assert second.tokens(model, PROMPT, 16) == expected
