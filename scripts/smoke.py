"""Whether an installation works, as a user would see it first. Run by `scripts.dist` with the
Python of a new environment, in an empty folder.

Starts an etcd and, where there is a torch, a rank that serves files and a load that copies them.
Uses no module of the checkout.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engine_registry
from engine_registry import Manifest, ModelIdentity, Region, Registry, TensorEntry
from engine_registry.etcd.local import LocalEtcd

ENGINES = str(Path(sys.prefix) / "bin" / "engines")


def main() -> None:
    if not Path(engine_registry.__file__).is_relative_to(sys.prefix):
        raise SystemExit(f"{engine_registry.__file__} is not what was installed")
    said = engines("--version")
    if version("engine-registry") not in said:
        raise SystemExit(f"engines --version says {said}")
    with LocalEtcd() as etcd:
        where = ("--etcd", etcd.endpoint)
        if find_spec("torch"):
            copied(where)
            sys.stdout.write("registered, listed and loaded a rank\n")
        else:
            listed(etcd.endpoint, where)
            sys.stdout.write("registered and listed a rank; there is no torch to load with\n")


def listed(endpoint: str, where: tuple[str, ...]) -> None:
    entry = TensorEntry("w", "float32", (4,), 4096, 16, (4,), (0,))
    with (
        Registry.connect(endpoint) as registry,
        registry.register(
            instance="smoke",
            rank=0,
            world_size=1,
            model=ModelIdentity("smoke"),
            manifest=Manifest((entry,), (Region(4096, 16),)),
            session_id="127.0.0.1:1",
            protocol="tcp",
            header_addr=8192,
        ),
    ):
        expect_ready(where)
    if json.loads(engines("list", "--json", *where))["instances"]:
        raise SystemExit("the rank is still listed after it has left")


def copied(where: tuple[str, ...]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = {"embed": torch.randn(1000, 64), "head": torch.randn(64, 1000)}
    save_file(weights, "weights.safetensors")
    rank = ("--rank", "0", "--host", "127.0.0.1", *where)
    serve = [ENGINES, "register", "smoke", "--world-size", "1", "--weights", "weights.safetensors"]
    with subprocess.Popen([*serve, *rank], stdout=subprocess.PIPE, text=True) as server:
        try:
            engines("wait", "smoke", *where)
            expect_ready(where)
            engines("load", "smoke", "--out", "copy", "--verify", *rank)
        finally:
            server.send_signal(signal.SIGTERM)
        said, _ = server.communicate(timeout=60)
    loaded = load_file("copy/rank-0.safetensors")
    if server.returncode or "withdrew smoke/0" not in said:
        raise SystemExit(f"the rank ended with code {server.returncode}: {said}")
    if not all(torch.equal(loaded[name], tensor) for name, tensor in weights.items()):
        raise SystemExit("the copy differs from what was served")


def expect_ready(where: tuple[str, ...]) -> None:
    (status,) = json.loads(engines("list", "--json", *where))["instances"]
    if (status["instance"], status["state"]) != ("smoke", "ready"):
        raise SystemExit(f"engines list says {status}")


def engines(*args: str) -> Any:
    ran = subprocess.run([ENGINES, *args], capture_output=True, text=True, check=False, timeout=120)
    if ran.returncode:
        raise SystemExit(f"engines {' '.join(args)} ended with {ran.returncode}: {ran.stderr}")
    return ran.stdout


if __name__ == "__main__":
    main()
