"""SGLang's part with real weights: `python -m tests.support.processes.sglang seed|client
GATEWAY_URL NBYTES`.

Does to the transfer engine and over HTTP what SGLang's seeds and its remote instance loader do, in
their order. A seed prints the answer to its registration and serves until standard input ends; a
client prints `equal` or `differs` and ends.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import httpx
import torch

from tests.support.processes.source import content, empty


def transfer_engine(tensors: dict[str, torch.Tensor]) -> tuple[Any, str]:
    os.environ.update(MC_FORCE_TCP="1", MC_LOG_LEVEL="ERROR")
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    for tensor in tensors.values():
        assert (
            engine.register_memory(tensor.data_ptr(), tensor.numel() * tensor.element_size()) == 0
        )
    return engine, f"127.0.0.1:{engine.get_rpc_port()}"


def seed(url: str, nbytes: int) -> None:
    tensors = content(0, nbytes)
    engine, session_id = transfer_engine(tensors)
    weights = {
        name: (tensor.data_ptr(), tensor.numel(), tensor.element_size())
        for name, tensor in tensors.items()
    }
    payload = {
        "tp_rank": 0,
        "transfer_engine_info": {"session_id": session_id, "weights_info_dict": weights},
    }
    answer = httpx.put(f"{url}/register_transfer_engine_info", json=payload, timeout=60)
    print(answer.status_code, answer.text, flush=True)
    sys.stdin.read()
    del engine


def client(url: str, nbytes: int) -> None:
    tensors = empty(nbytes)
    engine, _ = transfer_engine(tensors)
    answer = httpx.get(
        f"{url}/get_remote_instance_transfer_engine_info", params={"rank": 0}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    session_id, weights = answer.json()["remote_instance_transfer_engine_info"]
    here, there, lengths = [], [], []
    for name, tensor in tensors.items():
        seed_ptr, seed_numel, seed_element_size = weights[name]
        assert (seed_numel, seed_element_size) == (tensor.numel(), tensor.element_size())
        here.append(tensor.data_ptr())
        there.append(seed_ptr)
        lengths.append(seed_numel * seed_element_size)
    assert engine.batch_transfer_sync_read(session_id, here, there, lengths) == 0
    wanted = content(0, nbytes)
    print(
        "equal"
        if all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
        else "differs",
        flush=True,
    )


if __name__ == "__main__":
    {"seed": seed, "client": client}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
