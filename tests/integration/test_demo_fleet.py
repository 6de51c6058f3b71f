"""`engines demo --keep`: a fleet for trying commands on, which ends without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_cli.demo.engines import INSTANCE
from engine_cli.demo.link import Throttle, load_again_and_again
from engine_cli.exits import Exit
from engine_loader import MooncakeEngine, Progress, publish
from engine_registry import ModelIdentity, Pull, RankJoined, RankState, Registry
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, events_until, line_of
from tests.integration.test_cli import _descendants, _is_keeper, wait_for_end
from tests.support.checkout import PACKAGES
from tests.support.waiting import wait_until


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_fleet_that_is_kept_answers_commands_and_leaves_nothing_behind(
    processes: Processes, tmp_path: Path, number: int
) -> None:
    weights = {f"layer.{number}.w": torch.rand(1024, 1024) for number in range(4)}
    save_file(weights, tmp_path / "model.safetensors")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    demo = processes.engines(
        "demo",
        "--keep",
        "--weights",
        str(tmp_path / "model.safetensors"),
        TMPDIR=str(scratch),
        PYTHONPATH=os.pathsep.join(PACKAGES),
    )
    said = ""
    while "engines doctor" not in said:
        said += line_of(demo)
    (endpoint,) = set(re.findall(r"--etcd (\S+)", said))
    (url,) = re.findall(r"dashboard is (\S+)", said)
    listed = json.loads(processes.run("list", "--json", "--etcd", endpoint).stdout)["instances"]
    assert [each["instance"] for each in listed] == ["copy", "demo", "link-1", "link-2", "link-3"]
    assert [each["state"] for each in listed[:2]] == ["ready", "ready"]
    with Registry.connect(endpoint) as registry:
        wait_until(lambda: any(map(_is_in_chain, registry.all_pulls())))
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  on 127.0.0.1
        assert answer.status == 200
    (victim,) = (int(pid) for pid in re.findall(r"kill -9 (\d+)", said))
    started = set(_descendants(demo.pid))
    assert victim in started

    # As a terminal does it, Ctrl-C goes to the whole process group.
    group = [pid for pid in started if os.getpgid(pid) == os.getpgid(demo.pid)]
    for pid in [demo.pid, *(group if number == signal.SIGINT else [])]:
        os.kill(pid, number)
    out, err = demo.communicate(timeout=100)
    if number == signal.SIGINT:
        assert (demo.returncode, out) == (Exit.DONE, "the fleet has ended\n")
        # a link may lose its source a moment before it is asked to end itself
        assert all("going on with another source" in line for line in err.splitlines())
        assert list(scratch.iterdir()) == []
    for pid in sorted(started, key=_is_keeper):
        if number == signal.SIGKILL and _is_keeper(pid):
            os.kill(pid, signal.SIGKILL)  # it would wait for the etcd that was killed along
        wait_for_end(pid)


def _is_in_chain(pull: Pull) -> bool:
    """One link reads from another one."""
    reader = pull.reader
    return reader is not None and {reader.instance[:4], pull.instance[:4]} == {"link"}


def test_a_link_of_the_chain_loads_again_and_again_until_it_is_stopped(own_etcd: LocalEtcd) -> None:
    stop = threading.Event()
    args = ("link", 0, own_etcd.endpoint, stop, 0.1)
    link = threading.Thread(target=load_again_and_again, args=args)
    with (
        Registry.connect(own_etcd.endpoint) as registry,
        MooncakeEngine("127.0.0.1") as engine,
        publish(
            registry,
            engine,
            instance=INSTANCE,
            rank=0,
            world_size=1,
            tensors={"w": torch.rand(300_000)},
            model=ModelIdentity(INSTANCE),
        ),
        registry.watch("link") as watch,
    ):
        link.start()
        try:
            for _ in range(3):
                joined = events_until(watch, lambda event: isinstance(event, RankJoined))[-1]
                assert isinstance(joined, RankJoined)
                assert joined.record.state is RankState.LOADING
        finally:
            stop.set()
            link.join(60)
        assert not link.is_alive()
        assert registry.ranks("link") == ()


def test_a_throttle_lets_a_load_go_that_is_late_or_is_to_end() -> None:
    stop = threading.Event()
    throttle = Throttle(0.0, stop)
    throttle(Progress(50, 100))  # late from the beginning on
    stop.set()
    Throttle(10**9, stop)(Progress(100, 100))
