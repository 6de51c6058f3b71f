"""Two NIXL agents with the UCX backend: one transfer of all tensors, whose lists are prepared
once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nixl._api import nixl_agent, nixl_agent_config

from benchmarks.peers.sets import Tensors, storages
from benchmarks.peers.work import Facts, Load, LoadFailed, Work

_LOOK_S = 0.0005


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    agent = _agent("source")
    registered = _registered(agent, tensors)
    yield {"metadata": agent.get_agent_metadata().hex(), "memory": _memory(tensors)}
    agent.deregister_memory(registered)


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    agent = _agent("reader")
    registered = _registered(agent, tensors)
    peer = agent.add_remote_agent(bytes.fromhex(work.facts["metadata"]))
    there = [tuple(one) for one in work.facts["memory"]]
    local = agent.prep_xfer_dlist("", _memory(tensors), "DRAM")
    remote = agent.prep_xfer_dlist(peer, there, "DRAM")
    numbers = list(range(len(tensors)))

    def run() -> None:
        transfer = agent.make_prepped_xfer("READ", local, numbers, remote, numbers)
        state = agent.transfer(transfer)
        while state == "PROC":
            time.sleep(_LOOK_S)
            state = agent.check_xfer_state(transfer)
        agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise LoadFailed(f"the state of the transfer is {state}")

    yield Load(run)
    agent.deregister_memory(registered)


def _agent(name: str) -> Any:
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))


def _registered(agent: Any, tensors: Tensors) -> Any:
    return agent.register_memory([(*one, 0, "") for one in storages(tensors)], "DRAM")


def _memory(tensors: Tensors) -> list[tuple[int, int, int]]:
    """Address, bytes and device of each."""
    return [(tensor.data_ptr(), tensor.nbytes, 0) for tensor in tensors.values()]
