"""A seed as SGLang runs it: `python -m tests.support.processes.seed GATEWAY_URL RANK [TENSORS
[PORT]]`.

Listens, as its transfer engine would, registers once, prints the answer and its session, and goes
on until standard input ends or says `again`, at which it registers again.
"""

from __future__ import annotations

import socket
import sys

import httpx


def main(url: str, rank: str, tensors: str = "2", port: str = "0") -> None:
    with socket.create_server(("127.0.0.1", int(port)), backlog=4096) as listener:
        session_id = f"127.0.0.1:{listener.getsockname()[1]}"
        weights = {f"layers.{n}.weight": [4096 + 128 * n, 64, 2] for n in range(int(tensors))}
        payload = {
            "tp_rank": int(rank),
            "transfer_engine_info": {"session_id": session_id, "weights_info_dict": weights},
        }
        print(register(url, payload), session_id, flush=True)
        while sys.stdin.readline().strip() == "again":
            print(register(url, payload), session_id, flush=True)


def register(url: str, payload: object) -> str:
    answer = httpx.put(f"{url}/register_transfer_engine_info", json=payload, timeout=60)
    return f"{answer.status_code} {answer.text}"


if __name__ == "__main__":
    main(*sys.argv[1:])
