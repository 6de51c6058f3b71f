"""A process that has imported SGLang, and forks one engine for each that a test asks for:
`python -m tests.engines.sglang.zygote FOLDER`.

It listens at `FOLDER/zygote`, an engine at `FOLDER/NAME`. Its log is `FOLDER/NAME.log`.
SGLang starts its own processes as forks too, so that nothing is imported twice.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import sglang
import sglang.srt.entrypoints.engine
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.registry
import torch

from engine_loader.integrations.sglang import request
from tests.support.room import fill_device


def serve(folder: Path, name: str, arguments: dict[str, Any], environment: dict[str, str]) -> None:
    """One engine, until the test closes its connection."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    if "TEST_NO_ROOM" in environment:
        fill_device()
    with Listener(str(folder / name), "AF_UNIX") as listener, listener.accept() as test:
        try:
            engine = sglang.Engine(**arguments)
        except BaseException:  # noqa: BLE001  the test raises it
            traceback.print_exc()
            test.send(("failed", traceback.format_exc()))
            return
        test.send(("done", None))
        answer(engine, test)


def answer(engine: Any, test: Connection) -> None:
    """Calls of the engine's methods."""
    while True:
        try:
            method, args, kwargs = test.recv()
        except EOFError:
            return
        try:
            result = call(engine, method, *args, **kwargs)
        except BaseException:  # noqa: BLE001  the test raises it
            test.send(("failed", traceback.format_exc()))
        else:
            test.send(("done", result))


def call(engine: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    return (
        pull(engine, *args, **kwargs)
        if method == "pull"
        else getattr(engine, method)(*args, **kwargs)
    )


def pull(engine: Any, source: str, **order: Any) -> list[Any]:
    """An update of the weights, as a driver of reinforcement learning makes it."""
    path = "engine_loader.integrations.sglang.pull"
    return [
        engine.begin_weight_update(),
        engine.update_weights_from_tensor(request(source, **order), load_format=path),
        engine.end_weight_update(),
    ]


def without_cuda() -> None:
    """SGLang asks CUDA's allocator which memory to register with its transfer engine. Where there
    is none, its own older way is used: each parameter by itself.
    """
    from sglang.srt.model_loader import remote_instance_weight_loader_utils as utils

    utils.register_memory_region_v2 = utils.register_memory_region_v1


def main(folder: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None
    torch.set_num_threads(1)
    without_cuda()
    with Listener(str(folder / "zygote"), "AF_UNIX") as listener, listener.accept() as test:
        while True:
            try:
                name, arguments, environment = test.recv()
            except EOFError:
                return
            pid = os.fork()
            if not pid:
                try:
                    serve(folder, name, arguments, environment)
                finally:
                    os.killpg(0, signal.SIGKILL)
            test.send(pid)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the engines
    main(Path(sys.argv[1]))
