"""Changes modules a little, one change at a time, and lists the changes that no test notices.

python -m scripts.mutate registry/engine_registry/schema/roster.py -t TEST.py [-t …] [-j 2]

Run by hand: each change (a swapped comparison, a deleted statement) takes one run of the tests
given with -t. Each of the -j workers has a copy of the working tree in a temporary folder, which is
removed at the end. An unnoticed change is printed as file:line with the old line and the new one.
Either it makes no difference that a caller could see, or a test is missing.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

from scripts.mutations import Mutant, mutants

ROOT = Path(__file__).parents[1]
PACKAGES = ("registry", "loader", "cli")  # folders that packages are imported from
# In the environment of all that is started here, by which it is found and ended.
MARK, SESSION = "MUTATE_RUN", uuid.uuid4().hex


class Tree:
    """A copy of the working tree, in which tests run."""

    def __init__(self, folder: Path, tests: list[str]) -> None:
        self._folder, self._tests = folder, tests
        self._writes = 0
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        if (ROOT / ".venv").exists() and not (folder / ".venv").exists():
            (folder / ".venv").symlink_to((ROOT / ".venv").resolve())

    def outcome(self, mutant: Mutant, timeout_s: float) -> str:
        path = self._folder / mutant.path
        original = path.read_text()
        try:
            self._write(path, mutant.source)
            return self.run(timeout_s)
        finally:
            self._write(path, original)

    def run(self, timeout_s: float) -> str:
        """`survived`, `killed`, or `timed out`, which is noticed as well."""
        mark = f"{SESSION}.{uuid.uuid4().hex}"
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
        process = subprocess.Popen(
            [*command, "--hypothesis-seed=0", *self._tests],
            cwd=self._folder,
            env={
                **os.environ,
                MARK: mark,
                "PYTHONPATH": os.pathsep.join(str(self._folder / each) for each in PACKAGES),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return "killed" if process.wait(timeout_s) else "survived"
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            end(mark)
            process.wait()

    def _write(self, path: Path, text: str) -> None:
        """At a new time each, or Python would run what it compiled before."""
        path.write_text(text)
        self._writes += 1
        os.utime(path, (self._writes, self._writes))


def end(mark: str) -> None:
    """Kills all processes with a mark that begins so, in whichever session they are."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"\0{MARK}={mark}".encode() in b"\0" + (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def search(todo: queue.SimpleQueue[Mutant], trees: list[Tree], timeout_s: float) -> Counter[str]:
    """Prints the changes that survive. Returns how many had each outcome."""
    counts, lock = Counter[str](), threading.Lock()

    def work(tree: Tree) -> None:
        with suppress(queue.Empty):
            while True:
                mutant = todo.get_nowait()
                outcome = tree.outcome(mutant, timeout_s)
                with lock:
                    counts[outcome] += 1
                    if outcome == "survived":
                        say(str(mutant))

    threads = [threading.Thread(target=work, args=(tree,)) for tree in trees]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # all done, or interrupted, which once is enough for
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        while not todo.empty():
            with suppress(queue.Empty):
                todo.get_nowait()
        end(SESSION)
        for thread in threads:
            thread.join()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("modules", nargs="+")
    add("-t", "--test", action="append", required=True, help="as for pytest: FILE, FILE::NAME")
    add("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    add("--lines", default="1-999999", metavar="FIRST-LAST", help="only changes in these lines")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    first, _, last = options.lines.partition("-")
    todo = queue.SimpleQueue[Mutant]()
    for name in options.modules:
        for mutant in mutants(name, (ROOT / name).read_text()):
            if int(first) <= mutant.line <= int(last or first):
                todo.put(mutant)
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        trees = [Tree(Path(folder) / str(number), options.test) for number in range(options.jobs)]
        began = time.monotonic()
        if trees[0].run(3600) != "survived":
            raise SystemExit("these tests fail before anything is changed: run them with pytest")
        timeout_s = 10 + 5 * (time.monotonic() - began)
        say(f"{todo.qsize()} changes; the tests may take {timeout_s:.0f} s for each\n")
        counts = search(todo, trees, timeout_s)
    say(", ".join(f"{counts[each]} {each}" for each in ("killed", "timed out", "survived")))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
