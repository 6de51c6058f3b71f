"""What a gateway answers to clients that want to read from a rank: looked up in etcd for every
question, rendered once a revision.

Runs in the gateway's event loop. Questions for one rank that wait at the same time share one look
at etcd that begins after all of them have come: so an answer is never older than its question, and
a hundred loaders that start together cost etcd little.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

from engine_registry.errors import InstanceNotFound, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.sglang import render
from engine_registry.registration.manifests import fetch_manifest
from engine_registry.schema.keys import record_key
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.record import RankRecord, RankState
from engine_registry.schema.record_format import decode_item
from engine_registry.schema.status import why_held

_CACHE_NBYTES = 64 << 20
_WHY_NOT = {
    RankState.LOADING: "its weights are not complete yet",
    RankState.UPDATING: "its weights are being changed, which your loader would not notice",
    RankState.DRAINING: "it is about to leave",
}


@dataclass(frozen=True)
class _Rendered:
    item: KeyValue  # of which it was made
    body: bytes


class Answers:
    """`timeout_s` bounds a look at etcd."""

    def __init__(
        self, etcd: Etcd, calls: Calls, timeout_s: float, cache_nbytes: int = _CACHE_NBYTES
    ) -> None:
        self._etcd = etcd
        self._calls = calls
        self._timeout_s = timeout_s
        self._free_nbytes = cache_nbytes
        self._cache: OrderedDict[str, _Rendered] = OrderedDict()  # the one used last at the end
        self._looking: dict[str, asyncio.Task[bytes]] = {}
        self._waiting: dict[str, asyncio.Task[bytes]] = {}  # for the look before to end

    async def of(self, instance: str, rank: int) -> bytes:
        """JSON in SGLang's form.

        InstanceNotFound where there is no such rank to read from now; an EtcdError.
        """
        key = record_key(instance, rank)
        task = self._waiting.get(key)
        if task is None:
            task = self._waiting[key] = asyncio.create_task(self._look(key, self._looking.get(key)))
            # when nobody waits for it any more
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        # a client that goes away must not take the others' answer along
        return await asyncio.shield(task)

    async def _look(self, key: str, before: asyncio.Task[bytes] | None) -> bytes:
        if before is not None:
            await asyncio.wait([before])
        self._looking[key] = self._waiting.pop(key)
        try:
            known = self._cache.get(key)
            item = await self._calls.within(self._timeout_s, partial(self._etcd.get, key))
            if known is not None and known.item == item:
                self._cache.move_to_end(key)
                return known.body
            # What follows may take a large manifest its time: only its calls to etcd are bounded,
            # by their own.
            rendered = await self._calls(partial(self._render, key, item))
            self._remember(key, rendered)
            return rendered.body
        finally:
            del self._looking[key]

    def _render(self, key: str, item: KeyValue | None) -> _Rendered:
        if item is None:
            raise InstanceNotFound(f"{key} is not registered", "see `Registry.instances()`")
        record = decode_item(item)
        _check_readable(record)
        try:
            return _Rendered(item, render(record, fetch_manifest(self._etcd, record)))
        except RecordDamaged:
            now = self._etcd.get(key)
            if now == item:
                raise
            return self._render(key, now)  # it has registered again in between

    def _remember(self, key: str, rendered: _Rendered) -> None:
        before = self._cache.pop(key, None)
        self._free_nbytes += len(before.body) if before else 0
        self._cache[key] = rendered
        self._free_nbytes -= len(rendered.body)
        while self._free_nbytes < 0:
            _, oldest = self._cache.popitem(last=False)
            self._free_nbytes += len(oldest.body)


def _check_readable(record: RankRecord) -> None:
    """SGLang's loader knows nothing of versions: it must not read what changes while it reads."""
    if record.held:
        raise InstanceNotFound(f"{record.key} is {why_held(record)}")
    if record.ended:
        raise InstanceNotFound(f"{record.key} has ended: {record.ended}")
    if record.state is not RankState.READY:
        raise InstanceNotFound(
            f"{record.key} is {record.state.value}: {_WHY_NOT[record.state]}; try again"
        )
