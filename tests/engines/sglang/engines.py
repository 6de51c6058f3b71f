"""Real engines of SGLang for tests, each with its own processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from tests.engines.sglang.processes import kill, of_session, with_mark
from tests.support.checkout import ROOT

VENV = ROOT / ".engines" / "sglang"
PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [200, 7, 91, 33])
START_S, CALL_S = 240.0, 120.0
_ON_CPU: dict[str, Any] = {
    "device": "cpu",
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 2048,
    "context_length": 256,
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_server_warmup": True,
    "log_level": "info",
}


class EngineFailed(Exception):
    """What the engine raised, in its own words."""


class Engine:
    """One engine. Ends with `close`, as does every process of it."""

    def __init__(self, name: str, folder: Path, pid: int) -> None:
        self.name = name
        self.pid = pid
        self._folder = folder
        self._test: Connection | None = _connected(folder / name)

    def ready(self) -> Engine:
        """Itself, once it has started. Raises EngineFailed with what it raised."""
        self._received(START_S)
        return self

    def tokens(self) -> list[list[int]]:
        """Greedy tokens, one prompt at a time: a batch may round otherwise."""
        parameters = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        return [
            self.call("generate", input_ids=prompt, sampling_params=parameters)["output_ids"]
            for prompt in PROMPTS
        ]

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of `sglang.Engine`."""
        if self._test is None:
            raise EngineFailed("it is closed")
        self._test.send((method, args, kwargs))
        return self._received(CALL_S)

    def log(self) -> str:
        """All that its processes have printed."""
        return (self._folder / f"{self.name}.log").read_text(errors="replace")

    def lines(self, text: str) -> list[str]:
        """The lines of the log that have the text in them."""
        return [line for line in self.log().splitlines() if text in line]

    def close(self) -> None:
        """Any number of times."""
        if self._test is not None:
            self._test.close()
            self._test = None
        for pid in of_session(self.pid):
            kill(pid)

    def _received(self, timeout_s: float) -> Any:
        assert self._test is not None
        if not self._test.poll(timeout_s):
            raise TimeoutError(f"{self.name} does not answer:\n{self.log()[-4000:]}")
        try:
            outcome, value = self._test.recv()
        except EOFError:
            raise EngineFailed(f"{self.name} has ended:\n{self.log()[-4000:]}") from None
        if outcome == "failed":
            raise EngineFailed(value)
        return value


class Engines:
    """Starts engines in one process that has imported SGLang."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = f"TEST_ENGINES={uuid.uuid4().hex}"  # all their processes inherit it
        self.environment = os.environ | {
            "TEST_ENGINES": self._mark.partition("=")[2],
            "PYTHONPATH": os.pathsep.join(
                [
                    str(Path(__file__).parent / "cpu"),
                    *(str(ROOT / name) for name in ("registry", "loader", "cli")),
                    str(ROOT),
                ]
            ),
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "MC_FORCE_TCP": "1",
            "MOONCAKE_PROTOCOL": "tcp",
            "SGLANG_HOST_IP": "127.0.0.1",
            "HOST_IP": "127.0.0.1",
            "TMPDIR": str(folder),  # SGLang leaves its sockets there
        }
        with open(folder / "zygote.log", "wb") as log:
            self._process = subprocess.Popen(
                [str(VENV / "bin" / "python"), "-m", "tests.engines.sglang.zygote", str(folder)],
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._zygote = _connected(folder / "zygote", self._process)
        self._count = 0
        self.open: list[Engine] = []

    def start(
        self,
        model: Path,
        settings: Mapping[str, object] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> Engine:
        """Starts one, and waits until it is ready. With `settings` it loads through this library.

        Raises EngineFailed with what it raised.
        """
        return self.begin(model, settings, environment=environment, **arguments).ready()

    def begin(
        self,
        model: Path,
        settings: Mapping[str, object] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> Engine:
        """As `start`, and does not wait."""
        self._count += 1
        name = f"e{self._count}"
        if settings is not None:
            arguments |= {
                "load_format": "private",
                "model_loader_extra_config": json.dumps(settings),
            }
        environment = dict(environment or {})
        size = arguments.get("tp_size", 1) * arguments.get("pp_size", 1)
        if size > 1:
            cores = sorted(os.sched_getaffinity(0))
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                str(cores[rank % len(cores)]) for rank in range(size)
            )
        self._zygote.send(
            (
                name,
                _ON_CPU | {"model_path": str(model), "port": free_port()} | arguments,
                environment,
            )
        )
        engine = Engine(name, self.folder, self._zygote.recv())
        self.open.append(engine)
        return engine

    def command(self, model: Path, settings: Mapping[str, object], port: int) -> list[str]:
        """SGLang's server on the command line, which starts its processes as users have them."""
        options = _ON_CPU | {
            "model_path": str(model),
            "port": port,
            "load_format": "private",
            "model_loader_extra_config": json.dumps(settings),
        }
        words = [str(VENV / "bin" / "python"), "-m", "sglang.launch_server"]
        for name, value in options.items():
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
        return words

    def last_log(self) -> str:
        """Of the engine that was started last, also where that has failed."""
        return (self.folder / f"e{self._count}.log").read_text(errors="replace")

    def close_engines(self) -> None:
        """All that were started."""
        for engine in self.open:
            engine.close()
        self.open.clear()

    def close(self) -> None:
        """The engines, the process that starts them, and keepers whose etcd has ended before."""
        self.close_engines()
        self._zygote.close()
        self._process.wait(20)
        for pid in with_mark(self._mark):
            kill(pid)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _connected(path: Path, process: subprocess.Popen[bytes] | None = None) -> Connection:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return Client(str(path), "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            if process is not None and process.poll() is not None:
                raise EngineFailed(path.with_suffix(".log").read_text()) from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
