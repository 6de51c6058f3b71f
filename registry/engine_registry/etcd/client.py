"""The only door to etcd: reads, transactions, leases and watches of keys.

Used by everything else in `engine_registry`, from any thread. `etcd.connection` says how a call is
made. Starts one thread for each connection that renews leases; gRPC keeps some per connection.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Sequence
from typing import Any

from engine_registry.errors import AnswerTooLarge, LeaseNotFound
from engine_registry.etcd.config import EtcdConfig
from engine_registry.etcd.inspection import Inspection
from engine_registry.etcd.library import pb
from engine_registry.etcd.messages import (
    compares,
    found_in,
    key_in,
    key_value,
    prefix_end,
    range_op,
    request_op,
)
from engine_registry.etcd.retry import unless_compacted_between_pages
from engine_registry.etcd.watch import WatchStream
from engine_registry.schema.keyvalue import (
    Delete,
    Found,
    Guard,
    KeyValue,
    Outcome,
    Put,
    Range,
    Snapshot,
)

_PAGE_KEYS = 1_000
MAX_OPERATIONS = 128  # of a transaction


class Etcd(Inspection):
    """A connection to etcd, shared by all threads of a process. Do not carry it over a fork."""

    def __init__(self, config: EtcdConfig, accepted: bool = False) -> None:
        """`accepted`: etcd has taken the credentials of `config` before."""
        super().__init__(config, accepted)
        self._siblings: weakref.WeakSet[Etcd] = weakref.WeakSet()

    def sibling(self) -> Etcd:
        """Another connection to the same etcd, whose calls can be ended alone.

        Closing this one closes it.
        """
        sibling = Etcd(self.config, self._authentication.accepted)
        with self._lock:
            self._siblings.add(sibling)
            if self._closed.is_set():
                sibling.close()
        return sibling

    def close(self) -> None:
        """From any thread, any number of times.

        Calls and streams that are under way end at once, with an EtcdError.
        """
        super().close()
        with self._lock:
            siblings = list(self._siblings)
        for sibling in siblings:
            sibling.close()

    def get(self, key: str, revision: int = 0) -> KeyValue | None:
        """The key now, or as it was at `revision`; HistoryLost where that is compacted or does not
        exist.
        """
        response = self._range(pb.RangeRequest(key=self._key(key), revision=revision))
        return key_value(self.config.namespace, response.kvs[0]) if response.kvs else None

    def count(self, prefix: str, revision: int = 0, exact: bool = False) -> int:
        """How many keys lie under the prefix, or lay at `revision`; HistoryLost where that is
        compacted or does not exist. `exact`: only the key of that name counts.
        """
        key, end = self._keys(prefix, exact)
        request = pb.RangeRequest(key=key, range_end=end, revision=revision, count_only=True)
        return int(self._range(request).count)

    def snapshot(self, prefix: str, exact: bool = False) -> Snapshot:
        """All keys under the prefix at one revision, fetched in pages; or the key, if it is
        `exact`.
        """
        return self._snapshot(prefix, exact)

    @unless_compacted_between_pages
    def _snapshot(self, prefix: str, exact: bool) -> Snapshot:
        items: list[KeyValue] = []
        start, end = self._keys(prefix, exact)
        revision, limit = 0, _PAGE_KEYS
        while True:
            try:
                page = self._range(
                    pb.RangeRequest(key=start, range_end=end, limit=limit, revision=revision)
                )
            except AnswerTooLarge:
                # no key of ours is as large as that, but other writers may write anything
                if limit == 1:
                    raise
                limit = max(1, limit // 4)
                continue
            revision = revision or page.header.revision
            items.extend(key_value(self.config.namespace, kv) for kv in page.kvs)
            if not page.more:
                return Snapshot(revision, tuple(items))
            start = page.kvs[-1].key + b"\0"

    def read(self, ranges: Sequence[Range]) -> tuple[int, list[Found]]:
        """Several ranges at one revision, which comes first; in one request for 128 of them, and
        then at the revision of the first.
        """
        revision, found = 0, list[Found]()
        for start in range(0, len(ranges), MAX_OPERATIONS):
            some = ranges[start : start + MAX_OPERATIONS]
            request = pb.TxnRequest(
                success=[range_op(self.config.namespace, each, revision) for each in some]
            )
            response = self._unary("KV", "Txn", request)
            revision = revision or int(response.header.revision)
            found += [found_in(self.config.namespace, each) for each in response.responses]
        return revision, found

    def commit(self, guards: Sequence[Guard], writes: Sequence[Put | Delete]) -> int:
        """All writes at once if all guards hold: the new revision, else 0.

        At most 128 of each, where a guard that has a content counts twice, and 1.5 MiB together.
        """
        outcome = self.decide(guards, writes)
        return outcome.revision if outcome.done else 0

    def decide(
        self,
        guards: Sequence[Guard],
        writes: Sequence[Put | Delete],
        then: Sequence[Range] = (),
        otherwise: Sequence[Range] = (),
    ) -> Outcome:
        """As `commit`, and reads in the same request what is wanted after it: `then`, if all
        guards hold, or `otherwise`. At most 128 of each, with the writes.
        """
        namespace = self.config.namespace
        request = pb.TxnRequest(
            compare=[each for guard in guards for each in compares(namespace, guard)],
            success=[
                *(request_op(namespace, write) for write in writes),
                *(range_op(namespace, wanted, 0) for wanted in then),
            ],
            failure=[range_op(namespace, wanted, 0) for wanted in otherwise],
        )
        response = self._unary("KV", "Txn", request)
        ahead = len(writes) if response.succeeded else 0
        return Outcome(
            bool(response.succeeded),
            int(response.header.revision),
            [found_in(namespace, each) for each in response.responses[ahead:]],
        )

    def grant(self, ttl_s: float) -> int:
        """A new lease's id. etcd rounds up to whole seconds, and to 2 s at least."""
        request = pb.LeaseGrantRequest(TTL=max(1, int(-(-ttl_s // 1))))
        response = self._unary("Lease", "LeaseGrant", request)
        return int(response.ID)

    def keep_alive(self, lease_id: int) -> float:
        """Gives the lease its full time again; for how many seconds it now lives at least.
        LeaseNotFound if it is gone.

        All leases are renewed by one stream that stays open, so from any number of threads at once.
        """
        ttl_s = self._call(
            lambda client, timeout_s: self._lease_stream(client).renew(lease_id, timeout_s)
        )
        if ttl_s <= 0:  # how etcd says that a lease is gone: not by an error
            raise LeaseNotFound(f"lease {lease_id:x} has expired or was revoked")
        return float(ttl_s)

    def revoke(self, lease_id: int) -> None:
        """Ends the lease and deletes its keys. A lease that is gone already is no error."""
        request = pb.LeaseRevokeRequest(ID=lease_id)
        try:
            self._unary("Lease", "LeaseRevoke", request)
        except LeaseNotFound:
            return

    def watch(
        self,
        prefix: str,
        start_revision: int,
        timeout_s: float | None = None,
        exact: bool = False,
        others: Sequence[tuple[str, int, bool]] = (),
    ) -> WatchStream:
        """Changes under the prefix from `start_revision` on, for at most `timeout_s`; or of the
        key, if it is `exact`.

        `others` are watched on the same stream: each a prefix, its revision, and whether it is
        exact. Their batches have the numbers from 1 on.
        """
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for each, revision, one_key in [(prefix, start_revision, exact), *others]:
            key, end = self._keys(each, one_key)
            create = pb.WatchCreateRequest(
                key=key, range_end=end, start_revision=revision, progress_notify=True
            )
            requests.put(pb.WatchRequest(create_request=create))

        def begin(client: Any, _: float) -> tuple[Any, Any]:
            # "hasleader" ends the watch when the member loses its quorum; else it would stay
            # silent.
            metadata = (*(client.metadata or ()), ("hasleader", "true"))
            return client, pb.WatchStub(client.channel).Watch(
                iter(requests.get, None), timeout_s, metadata=metadata
            )

        client, call = self._call(begin)
        stream = WatchStream(self, client, call, requests, timed=timeout_s is not None)
        with self._lock:
            self._watches.add(stream)
        return stream

    def _keys(self, prefix: str, exact: bool = False) -> tuple[bytes, bytes]:
        """The first key and the end of a range, as etcd takes them."""
        key = self._key(prefix)
        return key, b"" if exact else prefix_end(key)

    def _key(self, key: str) -> bytes:
        return key_in(self.config.namespace, key)
