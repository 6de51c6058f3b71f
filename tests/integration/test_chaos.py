"""Hundreds of small loads while sources and replicas are killed, stopped, updated, evicted and
started again with other weights.

Seeded, and bounded in time. Each load ends in the words of one launch and version, or in an error
of ours; none hangs, and nothing is left over. A long one, of 1,000 loads:

    export CHAOS_LOADS=1000 CHAOS_SECONDS=3000
    pytest tests/integration/test_chaos.py -s -o faulthandler_timeout=0
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine_loader import (
    Engine,
    LoaderError,
    LoadOptions,
    MooncakeEngine,
    Pace,
    Shard,
    SocketEngine,
    load,
    load_full,
    load_instance,
    open_engine,
)
from engine_loader.files.whole_files import WholeFiles
from engine_registry import Registry, RegistryError
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, line_of
from tests.support import servers
from tests.support.launches import Origin, origins, origins_of_bytes, the_origin
from tests.support.options import for_load
from tests.support.processes import shards as shards_process
from tests.support.processes.source import MODEL, empty
from tests.support.waiting import wait_until

NBYTES = 2 << 20
SEED = int(os.environ.get("CHAOS_SEED", "1"))
LOADS = int(os.environ.get("CHAOS_LOADS", "300"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))
PACE = Pace(64 << 10, 4, stall_s=0.3, patience_s=1.0, starve_s=0.5, check_s=0.05)
SHARDED = "s"  # an instance whose two ranks hold rows, all in one process
# and how long each waits after everything that comes, as over a slow link
REPLICAS = {
    "r0": "0.02",
    "r1": "0.1",
}


class Monkey:
    """Three sources, an instance of two ranks and two replicas. Something happens to one of them
    every now and then; what has died is started again.
    """

    def __init__(
        self, processes: Processes, etcd: LocalEtcd, registry: Registry, seed: int
    ) -> None:
        self._processes = processes
        self._etcd = etcd
        self._registry = registry
        self._random = random.Random(seed)
        self._sources: dict[str, subprocess.Popen[str]] = {}
        self._replicas: dict[str, subprocess.Popen[str]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.done: Counter[str] = Counter()
        self.replicas: Counter[str] = Counter()  # how their loads have ended
        self.mixes: list[str] = []  # what they said that had loaded a mix

    def __enter__(self) -> Monkey:
        for name in ["a", "b", "c", SHARDED]:
            self._start(name)
        for name in REPLICAS:
            self._start_replica(name)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        for process in [*self._sources.values(), *self._replicas.values()]:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def _start(self, name: str) -> None:
        """With the weights of one of two launches, both of version 0. Its rank may be taken until
        the lease of the one before has expired: then it ends, and is started again next time.
        """
        launch = self._random.choice("112")
        program = (
            "tests.support.processes.shards"
            if name == SHARDED
            else "tests.support.processes.source"
        )
        self._sources[name] = self._processes.start(
            "-m", program, name, str(NBYTES), "127.0.0.1", "2", launch
        )
        with suppress(AssertionError):
            line_of(self._sources[name])

    def _start_replica(self, name: str) -> None:
        process = self._processes.start(
            "-m", "tests.support.processes.replica", name, str(NBYTES), REPLICAS[name]
        )
        self._replicas[name] = process
        threading.Thread(target=self._follow, args=(process,), daemon=True).start()

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.write("\n")
            process.stdin.flush()
        for line in process.stdout:
            words = line.split()
            if words[0] == "loaded":
                self.replicas["loaded"] += 1
                if words[2] != "equal":
                    self.mixes.append(line)
            elif words[0] == "failed":
                self.replicas[words[1].rstrip(":")] += 1

    def _run(self) -> None:
        faults: list[Callable[[str], None]] = [
            self._kill,
            self._stop,
            self._update,
            self._update_for_long,
            self._evict,
            self._replace_replica,
            self._restart_etcd,
        ]
        weights = [4, 4, 6, 3, 3, 4, 1]
        while not self._over.wait(self._random.uniform(0.0, 0.4)):
            for name, process in self._sources.items():
                if process.poll() is not None:
                    self._start(name)
            for name, process in self._replicas.items():
                if process.poll() is not None:
                    self._start_replica(name)
            fault = self._random.choices(faults, weights)[0]
            with suppress(RegistryError):
                fault(self._random.choice(list(self._sources)))
            self.done[fault.__name__.strip("_")] += 1

    def _kill(self, name: str) -> None:
        self._sources[name].kill()
        self._sources[name].wait()

    def _stop(self, name: str) -> None:
        self._sources[name].send_signal(signal.SIGSTOP)
        self._over.wait(self._random.uniform(0.0, 1.5))
        self._sources[name].send_signal(signal.SIGCONT)

    def _update(self, name: str) -> None:
        self._say(name, "\n")

    def _update_for_long(self, name: str) -> None:
        """As a rule it ends; else the source is killed in the middle, and comes back under the same
        version.
        """
        self._say(name, "begin\n")
        self._over.wait(self._random.uniform(0.0, 1.5))
        if self._random.random() < 0.4:
            self._kill(name)
        else:
            self._say(name, "\n")

    def _say(self, name: str, line: str) -> None:
        process = self._sources[name]
        if process.stdin is None or process.poll() is not None:
            return
        with suppress(OSError, AssertionError):
            process.stdin.write(line)
            process.stdin.flush()
            line_of(process)

    def _evict(self, name: str) -> None:
        for record in self._registry.ranks(name):
            self._registry.evict(record)
        self._kill(name)

    def _replace_replica(self, _: str) -> None:
        process = self._replicas[self._random.choice(sorted(REPLICAS))]
        process.kill()
        process.wait()

    def _restart_etcd(self, _: str) -> None:
        self._etcd.kill()
        self._etcd.start()


def held() -> Counter[str]:
    """This process's threads, and what its descriptors lead to, without the numbers
    that distinguish one from another.
    """
    names = [f"thread {thread.name}" for thread in threading.enumerate()]
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{name}"))
    return Counter(name.partition("[")[0] for name in names)


def left_over(before: Counter[str]) -> list[str]:
    return sorted((held() - before).elements())


def open_sockets() -> list[str]:
    """This process's lines of the kernel's tables: kind, addresses, state, inode."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:")}
    tables = {
        kind: Path("/proc/self/net", kind).read_text().splitlines()
        for kind in ("tcp", "tcp6", "unix", "netlink", "udp")
    }
    return [
        f"{kind} {line}"
        for kind, lines in tables.items()
        for line in lines
        if inodes & set(line.split())
    ]


class Loads:
    """Loads of all kinds.

    Each gives whose its words are, and the version that it says they have.
    """

    def __init__(self, registry: Registry, engine: Engine) -> None:
        self._registry = registry
        self._engine = engine
        self._kept = empty(NBYTES)  # with whatever the loads before have left there
        self.kinds: dict[str, Callable[[], tuple[Origin, int]]] = {
            "any": lambda: self._one(MODEL),
            "published": lambda: self._one(MODEL, publish="here"),
            "two": lambda: self._one(["a", "b"]),
            "three": lambda: self._one(["c", "a", "b"]),
            "named": lambda: self._one("a"),
            "digests": lambda: self._one(["a", "b", "c"], verify="digest"),
            "reused": lambda: self._one(MODEL, self._kept, reuse=True),
            "reused, published": lambda: self._one(MODEL, self._kept, reuse=True, publish="here"),
            "beside others": lambda: self._one("a", also_from=MODEL),
            "beside others, published": lambda: self._one(MODEL, also_from="b", publish="here"),
            "instance": self._instance,
            "full": self._full,
            "reshard": self._reshard,
        }

    def _one(
        self, wanted: object, tensors: dict[str, torch.Tensor] | None = None, **options: object
    ) -> tuple[Origin, int]:
        tensors = empty(NBYTES) if tensors is None else tensors
        report = load(
            self._registry,
            self._engine,
            wanted,  # type: ignore[arg-type]
            rank=0,
            tensors=tensors,
            timeout_s=1.0,
            **for_load({"pace": PACE, **options}),
        )
        if report.publication is not None:
            report.publication.close()
        return the_origin(origins_of_bytes(tensors)), report.version

    def _instance(self) -> tuple[Origin, int]:
        tensors = empty(NBYTES)
        reports = load_instance(
            self._registry, self._engine, MODEL, tensors={0: tensors}, timeout_s=1.0
        )
        return the_origin(origins_of_bytes(tensors)), reports[0].version

    def _full(self) -> tuple[Origin, int]:
        """Of several files, each a separate load."""
        with tempfile.TemporaryDirectory() as name:
            with WholeFiles(Path(name)) as files:
                report = load_full(
                    self._registry,
                    self._engine,
                    MODEL,
                    files=files,
                    max_file_nbytes=NBYTES // 3,
                    timeout_s=1.0,
                )
            found = {
                key: tensor
                for path in Path(name).glob("*.safetensors")
                for key, tensor in load_file(path).items()
            }
        return the_origin(
            origins_of_bytes({key: found[key] for key in empty(NBYTES)})
        ), report.version

    def _reshard(self) -> tuple[Origin, int]:
        """Half the columns of rows that two ranks hold, so each of them gives half of them."""
        rows, columns = shards_process.shape_of(NBYTES)
        half = torch.zeros(rows, columns // 2, dtype=torch.int64)
        tensors, shards = (
            {shards_process.NAME: half},
            {shards_process.NAME: Shard((rows, columns), (0, columns // 2))},
        )
        report = load(
            self._registry,
            self._engine,
            SHARDED,
            tensors=tensors,
            shards=shards,
            options=LoadOptions(pace=PACE),
            timeout_s=1.0,
        )
        places = torch.arange(rows * columns).view(rows, columns)[:, columns // 2 :]
        return the_origin(origins(half, places)), report.version


@pytest.mark.timeout(240 + SECONDS)
@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["tcp", "socket"])
def test_every_load_ends_in_one_launch_and_version_or_a_typed_error_and_leaves_nothing_behind(
    own_etcd: LocalEtcd, namespace: str, protocol: str
) -> None:
    processes = Processes(
        {
            **os.environ,
            "ENGINES_ETCD": own_etcd.endpoint,
            "TEST_NAMESPACE": namespace,
            "TEST_PROTOCOL": protocol,
        }
    )
    outcomes: Counter[str] = Counter()
    choose = random.Random(SEED)
    with open_engine("127.0.0.1", protocol):
        pass  # what the library opens once a process, and keeps
    servers.programs()  # stays until the run is over
    before = held()
    with (
        Registry.connect(own_etcd.endpoint, namespace=namespace, timeout_s=5) as registry,
        open_engine("127.0.0.1", protocol) as engine,
    ):
        assert isinstance(engine, (MooncakeEngine, SocketEngine))
        loads = Loads(registry, engine)
        with Monkey(processes, own_etcd, registry, SEED) as monkey:
            give_up = time.monotonic() + SECONDS
            while sum(outcomes.values()) < LOADS and time.monotonic() < give_up:
                kind = choose.choice(sorted(loads.kinds))
                try:
                    origin, version = loads.kinds[kind]()
                except (LoaderError, RegistryError) as exc:
                    outcomes[type(exc).__name__] += 1
                else:
                    outcomes[f"loaded {kind}"] += 1
                    assert origin.version == version, kind
        print(f"seed {SEED}: {sum(outcomes.values())} loads {dict(outcomes)}")
        print(f"replicas {dict(monkey.replicas)} under {dict(monkey.done)}")
        assert monkey.mixes == []
        assert monkey.replicas["loaded"] > 0
        assert sum(count for kind, count in outcomes.items() if kind.startswith("loaded")) > 0
        assert sum(monkey.done.values()) > 3
        assert not [*engine._served, *engine._lent]
        # those that could not be given back expire
        wait_until(lambda: not registry._etcd.snapshot("/pulls/").items)
    processes.end()
    with suppress(TimeoutError):
        wait_until(lambda: not left_over(before))
    assert left_over(before) == [], open_sockets()
