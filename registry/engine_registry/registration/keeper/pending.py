"""Requests to a keeper that it has not answered yet.

Used by `keeper.link`, which holds its lock during each call.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from engine_registry.errors import RegistryError

Message = dict[str, Any]


class Pending:
    """By sequence number. An answer is the keeper's message, whose `error` says that it failed."""

    def __init__(self) -> None:
        self._requests: dict[int, tuple[Message, Future[Message]]] = {}
        self._seq = 0

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, message: Message) -> tuple[Message, Future[Message]]:
        """The message with its number, and its answer to come."""
        self._seq += 1
        self._requests[self._seq] = {**message, "seq": self._seq}, Future()
        return self._requests[self._seq]

    def take(self, seq: int) -> tuple[Message, Future[Message] | None]:
        """The request that was answered; an empty one if it is not pending."""
        return self._requests.pop(seq, ({}, None))

    def ends(self) -> list[Message]:
        """The requests to end the registration, which the next keeper is asked again."""
        return [message for message, _ in self._requests.values() if message.get("op") == "end"]

    def settle_updates(self) -> None:
        """Answers the updates: the next keeper is started with the record that they have made."""
        for seq, (message, reply) in list(self._requests.items()):
            if message.get("op") != "end":
                del self._requests[seq]
                reply.set_result({})

    def fail(self, error: RegistryError) -> None:
        """Answers all of them with the error."""
        for _, reply in self._requests.values():
            reply.set_result({"error": error.to_wire()})
        self._requests.clear()
