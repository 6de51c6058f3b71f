"""The programs in examples/, run as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import LoadOptions, MooncakeEngine, read_catalogue
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from examples.rl_loop import Book
from tests.integration.conftest import Processes, children_of, line_of
from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(own_etcd: LocalEtcd) -> Iterator[Start]:
    """They use no namespace, so they have an etcd to themselves."""
    started = Processes(dict(os.environ))
    yield lambda name, *args: started.start(
        str(ROOT / "examples" / name), "--etcd", own_etcd.endpoint, *args
    )
    started.end()


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out


def test_a_module_is_served_and_loaded_and_its_server_leaves_in_order(start: Start) -> None:
    server = start("serve_module.py")
    said = line_of(server)
    assert said.startswith("serving /engines/demo/0, content ")
    loaded = ended(start("load_module.py"))
    assert loaded.split()[-1] == said.split()[-1]
    server.send_signal(signal.SIGINT)
    ended(server)


def test_of_two_that_start_cold_the_second_copies_from_the_first(
    start: Start, tmp_path: Path
) -> None:
    save_file({"w": torch.randn(1000)}, tmp_path / "w.safetensors")
    first, second = (
        start("cold_start.py", "--instance", name, str(tmp_path / "w.safetensors")) for name in "ab"
    )
    said = sorted(line_of(process).partition(";")[0] for process in (first, second))
    reader = next(line.split()[0] for line in said if line.endswith("w.safetensors"))
    other = {"a": "b", "b": "a"}[reader]
    assert f"{other} has its weights from {reader}" in said
    for process in (first, second):
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        ended(process)


def watches(etcd: LocalEtcd) -> float:
    """How many there are."""
    with urllib.request.urlopen(f"http://{etcd.endpoint}/metrics", timeout=60) as answer:
        found = re.search(
            rb"^etcd_debugging_mvcc_watcher_total (\S+)$", answer.read(), re.MULTILINE
        )
    return float(found[1]) if found else 0.0


def test_a_server_follows_a_trainer_to_its_last_version(start: Start, own_etcd: LocalEtcd) -> None:
    server = start("follow.py")
    wait_until(lambda: watches(own_etcd) == 2)  # of ranks, and of the release
    trainer = start("train.py", "--steps", "2", "--pause", "4")
    trained = ended(trainer).splitlines()
    loaded = [line for line in ended(server).splitlines() if line.startswith("loaded")]
    assert loaded[-1] == f"loaded {trained[-1]}"


class Taker:
    """An HTTP server in vLLM's place: it answers every request, and takes the weights of the
    version that it is asked to.
    """

    def __init__(self, registry: Registry) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.taken: list[dict[str, torch.Tensor]] = []
        taker = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                taker._answer(
                    registry, self.path, self.rfile.read(int(self.headers["Content-Length"]))
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, registry: Registry, route: str, body: bytes) -> None:
        said = json.loads(body)
        self.asked.append((route, said))
        if route == "/update_weights":
            options = LoadOptions(version=said["update_info"]["version"])
            with MooncakeEngine("127.0.0.1") as engine:
                catalogue = read_catalogue(registry, engine, "trainer", options=options)
                self.taken.append({name: tensor.clone() for name, tensor in catalogue})


@pytest.mark.slow  # three programs that import torch and FSDP
def test_a_trainer_with_fsdp_has_each_of_its_steps_taken(
    own_etcd: LocalEtcd, tmp_path: Path
) -> None:
    started = Processes({**os.environ, "TMPDIR": str(tmp_path)})  # torchrun leaves its logs
    with ExitStack() as stack:
        registry = stack.enter_context(Registry.connect(own_etcd.endpoint))
        taker = stack.enter_context(closing(Taker(registry)))
        stack.callback(started.end)
        ended(
            started.start(
                *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
                str(ROOT / "examples" / "fsdp_to_vllm.py"),
                *("--etcd", own_etcd.endpoint, "--vllm", taker.url, "--steps", "2"),
            )
        )
    reach = {"source": "trainer", "etcd": own_etcd.endpoint}
    assert taker.asked[0] == ("/init_weight_transfer_engine", {"init_info": reach})
    assert taker.asked[1:] == [
        step
        for version in (1, 2)
        for step in [
            ("/start_weight_update", {}),
            ("/update_weights", {"update_info": {"version": version}}),
            ("/finish_weight_update", {}),
            ("/reset_prefix_cache", {}),
        ]
    ]
    first, second = taker.taken
    shapes = {"0.weight": (1000, 64), "1.weight": (64, 64), "1.bias": (64,)}
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == shapes
    assert {name for name in shapes if torch.equal(first[name], second[name])} == set()


def test_a_version_that_readers_mix_is_seen() -> None:
    """By the book of rl_loop.py. The second launch begins with what the first had as version 2."""
    book = Book()
    for launch, version, digests in [(1, 1, "ab"), (1, 2, "cd"), (2, 2, "cd"), (2, 3, "ef")]:
        for rank, digest in enumerate(digests):
            book.write(launch, version, rank, digest)
    book.write(1, 3, 0, "g")  # the other rank was killed before it had this version
    book.loads = [("reader", 1, ["a", "b"]), ("reader", 2, ["c", "d"]), ("reader", 3, ["e", "f"])]
    assert book.wrong() == []
    for version, digests in [(2, "ad"), (2, "ab"), (1, "ba"), (3, "gf"), (3, "e?")]:
        book.loads = [("reader", version, list(digests))]
        assert len(book.wrong()) == 1, digests


@pytest.mark.slow  # eight programs that import torch and FSDP
def test_readers_of_a_loop_are_exact_through_the_end_of_one_and_of_a_rank(start: Start) -> None:
    lines = ended(start("rl_loop.py", "--steps", "8")).splitlines()
    assert {"reader 1  is killed", "rank 1    is killed"} <= set(lines)
    assert "trainer   launch 2 begins with version 4" in lines
    for reader in range(3):
        assert any(line.startswith(f"reader {reader}  version 8: ") for line in lines)
    loads = [line for line in lines if " bytes of deltas" in line]
    assert any("       0 bytes of weights" in line for line in loads)
    assert lines[-1] == f"readers   {len(loads)} loads, {len(loads)} of them exact"


@pytest.mark.slow  # five programs that import torch and FSDP
def test_ctrl_c_ends_all_processes_of_a_loop(start: Start) -> None:
    loop = start("rl_loop.py")
    while not line_of(loop).startswith("reader"):
        pass
    started = children_of(loop.pid)
    assert len(started) == 5
    loop.send_signal(signal.SIGINT)
    _, err = loop.communicate(timeout=100)
    assert (loop.returncode, err) == (1, "ended before its time\n")
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def test_every_example_is_named_in_the_list_of_examples() -> None:
    listed = (ROOT / "examples" / "README.md").read_text("utf-8")
    assert all(f"`{path.name}`" in listed for path in (ROOT / "examples").glob("*.py"))
