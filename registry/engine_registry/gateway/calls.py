"""Blocking calls of etcd made from an event loop: each in one of a few threads, with a time by
which there is an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine_registry.errors import EtcdUnavailable

T = TypeVar("T")


class Calls:
    """Starts up to `threads` threads.

    `close` waits for the calls that are under way: end those first, with `Etcd.close`.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def __call__(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def within(self, timeout_s: float, call: Callable[[], T]) -> T:
        """EtcdUnavailable where there is no answer in time; the call itself may go on."""
        try:
            return await asyncio.wait_for(self(call), timeout_s)
        except asyncio.TimeoutError as exc:
            raise EtcdUnavailable(
                f"etcd has not answered within {timeout_s:g} s", "try again"
            ) from exc

    def close(self, wait: bool = True) -> None:
        self._pool.shutdown(wait=wait, cancel_futures=True)
