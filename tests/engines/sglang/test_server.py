"""SGLang's server as users start it: its own processes, each of which imports everything itself."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from engine_registry import Registry
from tests.engines.sglang.engines import PROMPTS, Engines, free_port
from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


@contextmanager
def server(
    engines: Engines, model: Path, settings: dict[str, object], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            engines.command(model, settings, port),
            env=engines.environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def answers(process: subprocess.Popen[bytes], url: str) -> bool:
    assert process.poll() is None, "the server has ended"
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_a_server_copies_from_an_engine_answers_the_same_and_follows_its_updates(
    engines: Engines,
    registry: Registry,
    settings: dict[str, object],
    model: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    first = engines.start(model, settings)
    log = tmp_path / "server.log"
    with server(engines, model, settings, log) as (process, url):
        wait_until(lambda: answers(process, url), timeout_s=400)
        assert "MB of weights from" in log.read_text()
        parameters = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        found = [
            httpx.post(
                f"{url}/generate",
                json={"input_ids": prompt, "sampling_params": parameters},
                timeout=60,
            ).json()["output_ids"]
            for prompt in PROMPTS
        ]
        assert found == first.tokens()
        assert len(registry.instances()) == 2
        answer = httpx.post(
            f"{url}/update_weights_from_disk", json={"model_path": str(trained)}, timeout=60
        )
        assert answer.json()["success"]
        assert sorted(
            record.version for status in registry.instances() for record in status.records
        ) == [0, 1]
    wait_until(lambda: len(registry.instances()) == 1)
