"""A rank that starts from peers or from files: `python -m tests.support.processes.start INSTANCE
FILE [HOW]`.

Prints `starts` when it is about to, and does when it is given a line. Then it prints, as JSON, from
where its weights have come, why, and how many bytes of tensors this process has read from disk; and
ends with its input. With HOW `held` it prints `reading` before it reads the first of them, and
waits for another line. With `call` it reads the file by a function. With `held-call` the function
prints `reading` first, and waits for a byte of input with Python's lock in its hands. With `later`
it makes other tensors of those that the function has read, prints `has read` and waits for another
line if there are any, and publishes them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from collections.abc import Mapping

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine_cli.options import engine_log
from engine_loader import MooncakeEngine, load_or_seed
from engine_loader.files.memory import allocate
from engine_registry import ModelIdentity
from tests.support.registry import connect

MODEL = ModelIdentity("start", "r1")


def content(nbytes: int = 4 << 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        f"t{number}": torch.randint(0, 256, (nbytes // 8,), dtype=torch.uint8, generator=generator)
        for number in range(8)
    }


class Disk:
    """Counts what is read of tensors, however many threads read."""

    def __init__(self, held: bool) -> None:
        self.nbytes = 0
        self._held = held
        self._lock = threading.Lock()
        self._preadv = os.preadv

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            if self._held:
                self._held = False
                print("reading", flush=True)
                sys.stdin.readline()
            nbytes = self._preadv(descriptor, buffers, offset)
            self.nbytes += nbytes
        return nbytes


class OwnLoader:
    """A function that reads the file, as an engine does it."""

    def __init__(self, path: str, tensors: Mapping[str, torch.Tensor], held: bool) -> None:
        self.nbytes = 0
        self._path = path
        self._tensors = tensors
        self._held = held

    def __call__(self) -> None:
        if self._held:
            print("reading", flush=True)
            # unlike CDLL, PyDLL keeps the lock: no thread of this process runs meanwhile
            ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)
        for name, tensor in load_file(self._path).items():
            self._tensors[name].copy_(tensor)
            self.nbytes += tensor.nbytes


def processed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an engine makes of its weights, in other memory and of other names."""
    return {f"{name}.packed": tensor.view(-1, 2) ^ 0xFF for name, tensor in tensors.items()}


def main(instance: str, path: str, how: str = "") -> None:
    disk = Disk(how == "held")
    os.preadv = disk  # type: ignore[assignment]
    with safe_open(path, framework="pt") as file:
        layout = {
            name: (torch.uint8, tuple(file.get_slice(name).get_shape()))
            for name in file.keys()  # noqa: SIM118
        }
    tensors = allocate(layout)
    for tensor in tensors.values():
        tensor.zero_()
    own = OwnLoader(path, tensors, how == "held-call")
    later = how == "later"
    with (
        engine_log(),
        connect(timeout_s=20) as registry,
        MooncakeEngine("127.0.0.1") as engine,
    ):
        print("starts", flush=True)
        sys.stdin.readline()
        made = {name: torch.zeros_like(tensor) for name, tensor in processed(tensors).items()}
        with load_or_seed(
            registry,
            engine,
            MODEL,
            (lambda: made) if later else tensors,
            rank=0,
            world_size=1,
            instance=instance,
            fallback=own if later or how.endswith("call") else path,
            publish_later=later,
            timeout_s=100,
        ) as seeded:
            expected = content()
            if later:
                if seeded.source == "disk":
                    made = processed(tensors)
                    print("has read", flush=True)
                    sys.stdin.readline()
                seeded.publish(made)
                tensors, expected = made, processed(expected)
            right = all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
            outcome = {
                "source": seeded.source,
                "reason": seeded.reason,
                "read": disk.nbytes + own.nbytes,
                "right": right,
            }
            print(json.dumps(outcome), flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
