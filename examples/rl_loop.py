"""Reinforcement learning on one machine: a trainer of two ranks, and three readers that follow it.

The ranks train a small transformer with FSDP2 and AdamW, and offer a snapshot of its weights as
bfloat16 after each step. Each reader has whole tensors, and copies what has changed. On the way a
reader is killed, and then a rank of the trainer, which goes on from its last checkpoint. In the end
each version that a reader has had is compared with those that the ranks have written. The exit code
is 0 if each was one version of all ranks, byte for byte.

Starts rl_process.py for each rank and reader, and an etcd unless there is one.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engine_registry.etcd.local import LocalEtcd

RANKS, READERS = 2, 3
PROCESS = str(Path(__file__).with_name("rl_process.py"))


def say(name: str, text: str) -> None:
    print(f"{name:10}{text}", flush=True)


class Book:
    """What ranks have written and what readers have had, as digests."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, int, list[str]]] = []  # reader, version, a digest by rank
        self._written: dict[str, set[tuple[int, int, int]]] = {}  # launch, version, rank

    def write(self, launch: int, version: int, rank: int, digest: str) -> None:
        self._written.setdefault(digest, set()).add((launch, version, rank))

    def wrong(self) -> list[str]:
        """The loads that have not brought one version of all ranks of one launch."""
        wrong = []
        for reader, version, digests in self.loads:
            found = [self._written.get(digest, set()) for digest in digests]
            whole = set.intersection(
                *({one[:2] for one in some if one[2] == rank} for rank, some in enumerate(found))
            )
            if version not in {one[1] for one in whole}:
                wrong.append(f"{reader}, version {version}: launch, version and rank are {found}")
        return wrong


class Loop:
    """Starts the ranks and readers, kills two of them, and compares what they tell."""

    def __init__(self, options: argparse.Namespace, etcd: str, folder: str) -> None:
        self._steps = options.steps
        self._given = [
            *(f"--etcd={etcd}", f"--folder={folder}", f"--world-size={RANKS}"),
            *(f"--steps={options.steps}", f"--host={options.host}"),
            f"--protocol={options.protocol}",
        ]
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._told: queue.Queue[tuple[str, dict[str, Any] | None]] = queue.Queue()
        self._to_kill = {"reader 1": options.steps // 4, "rank 1": options.steps // 2 + 1}
        self._killed = set[str]()
        self._launch = 0
        self._book = Book()
        self._at: dict[str, int] = {}  # the version that a reader has
        self._shares: list[float] = []

    def run(self) -> bool:
        """Whether all that readers have had were versions of the trainer."""
        self._start_trainer()
        for number in range(READERS):
            self._start(f"reader {number}")
        while sum(version == self._steps for version in self._at.values()) < READERS:
            name, told = self._told.get()
            if told is None:
                self._on_end(name)
            elif "trouble" in told:
                say(name, told["trouble"])
            elif "digest" in told:
                self._on_step(name, **told)
            else:
                self._on_load(name, **told)
        for process in self._running.values():
            process.stdin.close()  # type: ignore[union-attr]  # that they wait for
        codes = [process.wait(30) for process in self._running.values()]
        return self._compare() and not any(codes)

    def end(self) -> None:
        """All processes, if they still run."""
        for process in self._running.values():
            process.kill()
            process.wait()

    def _start_trainer(self) -> None:
        self._launch += 1
        for rank in range(RANKS):
            self._start(f"rank {rank}", f"--launch={self._launch}")

    def _start(self, name: str, *args: str) -> None:
        process = subprocess.Popen(
            [sys.executable, PROCESS, *name.split(), *self._given, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us alone
        )
        self._running[name] = process
        threading.Thread(target=self._listen, args=(name, process.stdout), daemon=True).start()

    def _listen(self, name: str, lines: Iterable[str]) -> None:
        for line in lines:
            if line.endswith("\n"):  # a process that is killed may leave a part of one
                self._told.put((name, json.loads(line)))
        self._told.put((name, None))

    def _on_end(self, name: str) -> None:
        """A reader that was killed is started again; so are all ranks, if one was killed."""
        code = self._running.pop(name).wait()
        if name in self._killed and name.startswith("reader"):
            self._start(name)
        elif "rank 1" in self._killed and name.startswith("rank"):
            if not any(other.startswith("rank") for other in self._running):
                self._killed.remove("rank 1")
                self._start_trainer()
        else:
            raise SystemExit(f"{name} has ended by itself, with code {code}")

    def _on_step(self, name: str, version: int, digest: str, share: float | None = None) -> None:
        rank = int(name[-1])
        self._book.write(self._launch, version, rank, digest)
        if share is None and rank == 0:
            say("trainer", f"launch {self._launch} begins with version {version}")
        if share is not None:
            self._shares.append(share)
            if rank == 0:
                say("trainer", f"step {version}: {share:.2%} of the elements have changed")
        self._kill_if_due(name, version)

    def _on_load(self, name: str, version: int, digests: list[str], how: str) -> None:
        say(name, f"version {version}: {how}")
        self._book.loads.append((name, version, digests))
        self._at[name] = version
        self._kill_if_due(name, version)

    def _kill_if_due(self, name: str, version: int) -> None:
        if version >= self._to_kill.get(name, version + 1):
            del self._to_kill[name]
            self._killed.add(name)
            self._running[name].kill()
            self._at.pop(name, None)  # it begins anew
            say(name, "is killed")

    def _compare(self) -> bool:
        wrong = self._book.wrong()
        for load in wrong:
            say("WRONG", load)
        loads, share = len(self._book.loads), sum(self._shares) / len(self._shares)
        say("trainer", f"in a step {share:.2%} of the elements change")
        say("readers", f"{loads} loads, {loads - len(wrong)} of them exact")
        return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="4 at least")
    parser.add_argument("--etcd", metavar="HOST:PORT", help="by default one is started")
    parser.add_argument("--host", default="127.0.0.1", help="the address of this machine")
    parser.add_argument("--protocol", default="socket", help="how readers read")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error("readers and ranks are killed on the way, so there are 4 steps at least")
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rl-loop-"))
            etcd = options.etcd or stack.enter_context(LocalEtcd()).endpoint
            loop = Loop(options, etcd, folder)
            stack.callback(loop.end)
            exact = loop.run()
    except KeyboardInterrupt:
        raise SystemExit("ended before its time") from None
    raise SystemExit(0 if exact else 1)


if __name__ == "__main__":
    main()
