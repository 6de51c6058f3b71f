"""Real engines of vLLM, an etcd, and checkpoints that are made for the run.

`make test-engines` installs vLLM first. Without it every test here fails; none is skipped.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engine_loader import MooncakeEngine, Publication, PublishOptions, publish_state_dict
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import KeeperFailed
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.held import keepers_here, let_go
from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

PYTHON = ROOT / ".engines" / "vllm" / "bin" / "python"


class Engine:
    """One vLLM: the LLM class with all its processes."""

    def __init__(self, path: Path, log: Path) -> None:
        self.log = log
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rw", encoding="utf-8")
        self._send({"log": str(log)})
        self._pid = int(self.ask("pid"))

    def ask(self, do: str, **arguments: Any) -> Any:
        """AssertionError with the engine's traceback if that raises there."""
        self._send({"do": do, **arguments})
        line = self._lines.readline()
        if not line:
            raise AssertionError(f"the engine has ended: {self.log.read_text('utf-8')[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["done"]

    def generate(self, adapter: str = "") -> list[list[int]]:
        tokens: list[list[int]] = self.ask("generate", adapter=adapter)
        return tokens

    def facts(self) -> list[dict[str, Any]]:
        """Of the models of all workers."""
        return [one for worker in self.ask("facts") for one in worker]

    def sources(self) -> list[str]:
        """Where the weights of each rank came from."""
        return [facts["source"] for facts in self.facts()]

    def copied(self) -> list[int]:
        """Bytes that each of its ranks has copied from peers."""
        return [facts["nbytes"] for facts in self.facts()]

    def instance(self) -> str:
        return str(self.facts()[0]["rank"]).partition("/")[0]

    def lines(self, having: str) -> list[str]:
        """Of the engine's log."""
        text = self.log.read_text("utf-8", errors="replace")
        return [line for line in text.splitlines() if having in line]

    def warnings(self) -> list[str]:
        """Of our loader, in the engine's log."""
        return [line for line in self.lines("WARNING") if "serves no peers" in line]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """None of its processes runs inside the block; the keeper of its rank does."""
        os.killpg(self._pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        """As a crash of the host's engine."""
        os.killpg(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends all its processes."""
        self._lines.close()
        self._socket.close()

    def _send(self, request: dict[str, Any]) -> None:
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make test-engines`, which installs vLLM")
    folder = tmp_path_factory.mktemp("zygote")
    path = folder / "socket"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [PYTHON, "-m", "tests.engines.vllm.zygote", path],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        )
    try:
        wait_until(lambda: path.exists() or process.poll() is not None, 300)
        assert process.poll() is None, (folder / "log").read_text("utf-8")
        yield path
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def etcd() -> Iterator[LocalEtcd]:
    with LocalEtcd() as etcd:
        yield etcd


@pytest.fixture
def registry(etcd: LocalEtcd, namespace: str) -> Iterator[Registry]:
    with Registry.connect(etcd.endpoint, namespace=namespace) as registry:
        yield registry


@pytest.fixture
def namespace() -> str:
    return f"/{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def checkpoint(zygote: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a checkpoint, which is made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(kind: str, **shape: int) -> str:
        name = "-".join([kind, *(f"{key}{value}" for key, value in sorted(shape.items()))])
        if name not in made:
            maker = Engine(zygote, folder / f"{name}.log")
            made[name] = str(folder / name)
            if kind == "llama-lora":
                maker.ask("adapt", source=get("llama", **shape), folder=made[name])
            elif kind == "llama-int8":
                maker.ask("quantize", source=get("llama", **shape), folder=made[name])
            else:
                maker.ask("checkpoint", kind=kind, folder=made[name], **shape)
            maker.close()
        return made[name]

    return get


class Engines:
    """Starts engines that end with the test."""

    def __init__(self, zygote: Path, folder: Path, ours: dict[str, Any], stack: ExitStack) -> None:
        self._zygote, self._folder, self._ours, self._stack = zygote, folder, ours, stack
        self._count = 0
        self.last: Engine

    def start(
        self,
        model: str,
        ours: dict[str, Any] | None = None,
        *,
        env: dict[str, str] | None = None,
        patches: tuple[str, ...] = (),
        **settings: Any,
    ) -> Engine:
        """With our load format and these of its settings. Without `ours`, vLLM as it is."""
        if ours is not None:
            settings["load_format"] = "engine_registry"
            settings["model_loader_extra_config"] = {**self._ours, **ours}
        engine = self.new()
        engine.ask("start", model=model, settings=settings, env=env or {}, patches=list(patches))
        return engine

    def new(self) -> Engine:
        """A process that starts nothing yet."""
        self._count += 1
        engine = Engine(self._zygote, self._folder / f"engine-{self._count}.log")
        self._stack.callback(engine.close)
        self.last = engine
        return engine


def held(registry: Registry, instance: str) -> list[int]:
    """Bytes of the tensors that each rank of the instance publishes."""
    return [
        record.manifest.nbytes
        for status in registry.instances()
        for record in status.records
        if record.instance == instance
    ]


def wait_for_withdrawal(registry: Registry) -> None:
    """Until the keepers of all engines have withdrawn them: without etcd they would try on. What
    they hold of engines that were killed is let go.
    """

    def withdrawn() -> bool:
        for kept in keepers_here():
            if kept.held and kept.key.startswith("/engines/vllm."):
                with suppress(KeeperFailed):
                    let_go(kept)
        return not any(one.instance.startswith("vllm.") for one in registry.instances())

    wait_until(withdrawn, 60)


@pytest.fixture
def engines(
    zygote: Path, etcd: LocalEtcd, registry: Registry, namespace: str, tmp_path: Path
) -> Iterator[Engines]:
    ours = {
        "etcd": etcd.endpoint,
        "namespace": namespace,
        "model": "m",
        "host": "127.0.0.1",
        "timeout_s": 120,
    }
    with ExitStack() as stack:
        stack.callback(wait_for_withdrawal, registry)
        yield Engines(zygote, tmp_path, ours, stack)


@pytest.fixture
def trainer(registry: Registry, checkpoint: Callable[..., str]) -> Iterator[Publication]:
    """It publishes other weights than the engines have, as version 7."""
    state = load_file(Path(checkpoint("llama", seed=7), "model.safetensors"))
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
            options=PublishOptions(version=7),
        ) as publication,
    ):
        yield publication
