"""The only door to etcd: every call has a deadline, works through all endpoints, and fails with an
error of ours.

Used by everything else in `registry`, from any thread. Starts one thread for each connection that
renews leases; gRPC keeps some per connection. All calls may be repeated safely (writes are guarded
by revisions), so a call that fails in transit is tried again on a fresh connection to the next
endpoint until its deadline: this is what gets a client off a dead, cut off or quorumless member,
and what renews an authentication token that etcd does not accept any more. `close`, from any
thread, ends the calls that are under way.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc
import tenacity

import engine_registry.etcd.stubs  # noqa: F401  must come before etcd3

import etcd3  # isort: skip
from engine_registry.errors import (
    AnswerTooLarge,
    EtcdError,
    EtcdRefused,
    EtcdUnavailable,
    HistoryLost,
    LeaseNotFound,
)
from engine_registry.etcd.admin import Alarm, Member, MemberStatus, Permission, User, numbers_in
from engine_registry.etcd.config import EtcdConfig
from engine_registry.etcd.descriptors import check_left, explain
from engine_registry.etcd.errors import (
    from_cancelled_watch,
    is_of_grpc,
    is_turned_off,
    translate,
    wants_token,
)
from engine_registry.etcd.lease_stream import LeaseStream
from engine_registry.schema.keyvalue import (
    Batch,
    Change,
    Delete,
    Deletion,
    Guard,
    KeyValue,
    Put,
    Snapshot,
)
from engine_registry.telemetry import metrics

T = TypeVar("T")
pb = etcd3.etcdrpc

# Values that survived cut, stalled and restarted servers. Without http2.ping_timeout_ms a silent
# peer may never be noticed. etcd answers pings that come faster than every 5 s, or while no call is
# open, with GOAWAY.
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    (
        "grpc.enable_http_proxy",
        0,
    ),  # http_proxy is for the web; etcd is in the cluster, and one on this machine has no way back
)
_CONNECTION_DESCRIPTORS = 8  # that gRPC takes for the first one of a process
_PAGE_KEYS = 1_000
_NO_TOKEN = ()  # a connection's metadata while etcd has authentication turned off
_DELETE_EVENT = 1  # mvccpb.Event.DELETE
_BACK_OFF = tenacity.wait_exponential(multiplier=0.02, max=0.5) + tenacity.wait_random(0, 0.05)
_unless_compacted_between_pages = tenacity.retry(
    retry=tenacity.retry_if_exception_type(HistoryLost),
    stop=tenacity.stop_after_attempt(10),
    reraise=True,
)


class WatchStream:
    """Batches of changes, until `cancel` or its time is over (which end the iteration) or an
    EtcdError.
    """

    def __init__(
        self,
        etcd: Etcd,
        client: Any,
        call: Any,
        requests: queue.SimpleQueue[Any],
        timed: bool = False,
    ) -> None:
        """`timed`: the call has a deadline."""
        self._timed = timed
        self._etcd = etcd
        self._client = client
        self._call: Any = call  # None once it is cancelled
        self._requests = requests
        self._cancelled = False

    def __iter__(self) -> Iterator[Batch]:
        # What gRPC raises is the call itself. With its traceback, or as the cause of an error that
        # somebody keeps, it would be part of a cycle and so be collected late; at the interpreter's
        # end its __del__ may wait for a lock that one of gRPC's threads holds, stopped for good. So
        # it is let go of here, and the error is raised where it is not being handled.
        error: EtcdError | None = None
        try:
            for response in self._call or ():
                if response.compact_revision:
                    raise HistoryLost(
                        f"etcd has compacted its history up to revision {response.compact_revision}"
                    )
                if response.canceled:
                    raise from_cancelled_watch(response.cancel_reason)
                if response.events:
                    changes = tuple(self._change(event) for event in response.events)
                    yield Batch(changes[-1].mod_revision, changes)
                elif not response.created:  # progress: nothing up to this revision is still to come
                    yield Batch(response.header.revision, ())
            raise EtcdUnavailable("etcd ended the watch")
        except (grpc.RpcError, EtcdError) as exc:
            # The stream's own deadline, which etcd may notice first and tell as UNKNOWN: no fault
            # of a connection that others use.
            late = (
                self._timed
                and isinstance(exc, grpc.RpcError)
                and "deadline exceeded" in (exc.details() or "").lower()
            )
            if not self._cancelled and not late:
                error = self._etcd._failed(self._client, exc)
            exc.__traceback__ = None
        finally:
            self.cancel()
        if isinstance(
            error, AnswerTooLarge
        ):  # changes that come at once cannot be had in parts, what is there now can
            raise HistoryLost(error.what, error.remedy)
        if error is not None:
            raise error

    def _change(self, event: Any) -> Change:
        strip = len(self._etcd.config.namespace)
        if event.type == _DELETE_EVENT:
            return Deletion(_text(event.kv.key)[strip:], event.kv.mod_revision)
        return _key_value(event.kv, strip)

    def cancel(self) -> None:
        """From any thread, any number of times."""
        self._cancelled = True
        self._requests.put(None)
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


class Etcd:
    """A connection to etcd, shared by all threads of a process. Do not carry it over a fork."""

    def __init__(self, config: EtcdConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._authenticating = threading.Lock()
        self._known_here = False  # etcd has taken our credentials once
        self._client: Any = None
        self._renewals: tuple[Any, LeaseStream | None] = (
            None,
            None,
        )  # the stream of renewals, and its connection
        self._next_endpoint = 0
        self._closed = threading.Event()
        self._siblings: weakref.WeakSet[Etcd] = weakref.WeakSet()

    def sibling(self) -> Etcd:
        """A connection of its own to the same etcd, for who must be able to end its calls alone.

        Closing this one closes it.
        """
        sibling = Etcd(self.config)
        sibling._known_here = self._known_here
        with self._lock:
            self._siblings.add(sibling)
            if self._closed.is_set():
                sibling.close()
        return sibling

    def close(self) -> None:
        """From any thread, any number of times.

        Calls and streams that are under way end at once, with an EtcdError.
        """
        with self._lock:
            self._closed.set()
            client, self._client = self._client, None
            self._renewals = None, None
            siblings = list(self._siblings)
        if client is not None:
            client.close()
        for sibling in siblings:
            sibling.close()

    # -- calls
    # ----------------------------------------------------------------------------------------------

    def status(self) -> str:
        """The server's version.

        One look at every endpoint, so that a wrong address is told at once.
        """
        attempts = tenacity.stop_after_attempt(len(self.config.endpoints) + 1)
        response = self._unary("Maintenance", "Status", pb.StatusRequest(), attempts)
        return str(response.version)

    def leads(self) -> bool:
        """Whether the member that we are connected to is the leader."""
        response = self._unary("Maintenance", "Status", pb.StatusRequest())
        return bool(response.leader and response.leader == response.header.member_id)

    def get(self, key: str, revision: int = 0) -> KeyValue | None:
        """The key now, or as it was at `revision`; HistoryLost where that is compacted or does not
        exist.
        """
        response = self._range(pb.RangeRequest(key=self._key(key), revision=revision))
        return _key_value(response.kvs[0], len(self.config.namespace)) if response.kvs else None

    def count(self, prefix: str, revision: int = 0) -> int:
        """How many keys lie under the prefix, or lay at `revision`; HistoryLost where that is
        compacted or does not exist.
        """
        key = self._key(prefix)
        request = pb.RangeRequest(
            key=key, range_end=_prefix_end(key), revision=revision, count_only=True
        )
        return int(self._range(request).count)

    def snapshot(self, prefix: str) -> Snapshot:
        """All keys under the prefix at one revision, fetched in pages."""
        return self._snapshot(prefix)

    @_unless_compacted_between_pages
    def _snapshot(self, prefix: str) -> Snapshot:
        strip = len(self.config.namespace)
        items: list[KeyValue] = []
        start, end, revision, limit = (
            self._key(prefix),
            _prefix_end(self._key(prefix)),
            0,
            _PAGE_KEYS,
        )
        while True:
            try:
                page = self._range(
                    pb.RangeRequest(key=start, range_end=end, limit=limit, revision=revision)
                )
            except (
                AnswerTooLarge
            ):  # none of ours are as large as that, but whoever may write may write anything
                if limit == 1:
                    raise
                limit = max(1, limit // 4)
                continue
            revision = revision or page.header.revision
            items.extend(_key_value(kv, strip) for kv in page.kvs)
            if not page.more:
                return Snapshot(revision, tuple(items))
            start = page.kvs[-1].key + b"\0"

    def oldest(self, prefix: str, limit: int) -> Snapshot:
        """The first `limit` keys under the prefix by the time when they were created."""
        response = self._range(
            pb.RangeRequest(
                key=self._key(prefix),
                range_end=_prefix_end(self._key(prefix)),
                limit=limit,
                sort_order=pb.RangeRequest.ASCEND,
                sort_target=pb.RangeRequest.CREATE,
            )
        )
        strip = len(self.config.namespace)
        return Snapshot(
            response.header.revision, tuple(_key_value(kv, strip) for kv in response.kvs)
        )

    def commit(self, guards: Sequence[Guard], writes: Sequence[Put | Delete]) -> int:
        """All writes at once if all guards hold: the new revision, else 0.

        At most 128 of each, where a guard that has a content counts twice, and 1.5 MiB together.
        """
        compare = [each for guard in guards for each in self._compare(guard)]
        request = pb.TxnRequest(compare=compare, success=[self._op(write) for write in writes])
        response = self._unary("KV", "Txn", request)
        return int(response.header.revision) if response.succeeded else 0

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
        self, prefix: str, start_revision: int, timeout_s: float | None = None
    ) -> WatchStream:
        """Changes under the prefix from `start_revision` on, for at most `timeout_s`."""
        key = self._key(prefix)
        create = pb.WatchCreateRequest(
            key=key, range_end=_prefix_end(key), start_revision=start_revision, progress_notify=True
        )
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests.put(pb.WatchRequest(create_request=create))

        def begin(client: Any, _: float) -> tuple[Any, Any]:
            # "hasleader" ends the watch when the member loses its quorum; else it would stay
            # silent.
            metadata = (*(client.metadata or ()), ("hasleader", "true"))
            return client, pb.WatchStub(client.channel).Watch(
                iter(requests.get, None), timeout_s, metadata=metadata
            )

        client, call = self._call(begin)
        return WatchStream(self, client, call, requests, timed=timeout_s is not None)

    # -- what an operator asks
    # ----------------------------------------------------------------------------------------------

    def member(self) -> MemberStatus:
        """The member that answers first, as it sees itself.

        One look at every endpoint, as with `status`.
        """
        attempts = tenacity.stop_after_attempt(len(self.config.endpoints) + 1)
        response = self._unary("Maintenance", "Status", pb.StatusRequest(), attempts)
        told = numbers_in(
            response.SerializeToString()
        )  # etcd3's classes are older than some of the fields
        return MemberStatus(
            version=str(response.version),
            member_id=int(response.header.member_id),
            leader_id=int(response.leader),
            raft_index=int(response.raftIndex),
            db_nbytes=int(response.dbSize),
            used_nbytes=told.get(_STATUS_USED),
            quota_nbytes=told.get(_STATUS_QUOTA),
            learner=bool(told.get(_STATUS_LEARNER)),
        )

    def members(self) -> tuple[Member, ...]:
        """All members of the cluster, by name, also those that are away."""
        response = self._unary("Cluster", "MemberList", pb.MemberListRequest())
        return tuple(sorted(map(_member, response.members), key=lambda member: member.name))

    def alarms(self) -> tuple[Alarm, ...]:
        response = self._unary("Maintenance", "Alarm", pb.AlarmRequest(action=pb.AlarmRequest.GET))
        return tuple(
            Alarm(int(each.memberID), _ALARMS.get(each.alarm, f"number {each.alarm}"))
            for each in response.alarms
        )

    def user(self, name: str) -> User:
        """What that user may do. Every user may ask it of himself, root of all."""
        roles = tuple(
            map(str, self._unary("Auth", "UserGet", pb.AuthUserGetRequest(name=name)).roles)
        )
        bounded = [role for role in roles if role != "root"]  # which may do all, and need not exist
        granted = [
            p
            for role in bounded
            for p in self._unary("Auth", "RoleGet", pb.AuthRoleGetRequest(role=role)).perm
        ]
        return User(
            name,
            roles,
            tuple(
                Permission(p.key, p.range_end, p.permType in _READS, p.permType in _WRITES)
                for p in granted
            ),
        )

    def first_keys(self, limit: int) -> tuple[str, ...]:
        """The first keys of the whole store, whatever namespace they are in."""
        response = self._range(
            pb.RangeRequest(key=b"\0", range_end=b"\0", limit=limit, keys_only=True)
        )
        return tuple(kv.key.decode(errors="replace") for kv in response.kvs)

    def local_address(self) -> str:
        """Which of our addresses the way to etcd begins at.

        Nothing is sent: a datagram socket only looks up the route.
        """
        endpoint = self.config.endpoints[self._next_endpoint % len(self.config.endpoints)]
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                endpoint.host, endpoint.port, type=socket.SOCK_DGRAM
            )[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as exc:
            why, remedy = explain(exc)
            raise EtcdUnavailable(f"there is no way to etcd at {endpoint}: {why}", remedy) from exc

    # -- how a call is made
    # ----------------------------------------------------------------------------------------------

    def _unary(self, service: str, method: str, request: Any, stop: Any = None) -> Any:
        def operation(client: Any, timeout_s: float) -> Any:
            stub = getattr(pb, f"{service}Stub")(client.channel)
            return getattr(stub, method)(request, timeout_s, metadata=client.metadata)

        return self._call(operation, stop)

    def _call(self, operation: Callable[[Any, float], T], stop: Any = None) -> T:
        deadline = time.monotonic() + self.config.timeout_s
        share_s = self.config.timeout_s / len(self.config.endpoints)
        said: list[EtcdUnavailable] = []  # by etcd itself, in this call
        late = tenacity.stop_after_delay(self.config.timeout_s)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(EtcdUnavailable),
            stop=tenacity.stop_any(stop, late) if stop else late,
            wait=_BACK_OFF,
            sleep=tenacity.sleep_using_event(self._closed),
            reraise=True,
        )
        result: T = retrying(self._attempt, operation, deadline, share_s, said)
        return result

    def _attempt(
        self,
        operation: Callable[[Any, float], T],
        deadline: float,
        share_s: float,
        said: list[EtcdUnavailable],
    ) -> T:
        client = None
        try:
            client = self._connected()
            if self.config.user is not None:
                self._authenticate(client, _share(share_s, deadline))
            return operation(client, _share(share_s, deadline))
        except (grpc.RpcError, etcd3.Etcd3Exception, ValueError, OSError, RuntimeError) as exc:
            if isinstance(exc, ValueError | RuntimeError) and not is_of_grpc(exc):
                raise
            error = _most_telling(self._failed(client, exc), exc, said)
            if not self._closed.is_set():  # else we have ended it ourselves
                metrics.etcd_error(error)
            raise error from exc

    def _lease_stream(self, client: Any) -> LeaseStream:
        """The connection's. That of a connection that was dropped has ended with it."""
        with self._lock:
            owner, stream = self._renewals
            if stream is None or stream.over or owner is not client:
                stream = LeaseStream(pb.LeaseStub(client.channel), client.metadata or ())
                self._renewals = client, stream
            return stream

    def _failed(self, client: Any, exc: Exception) -> EtcdError:
        """The error to raise; a connection that may be at fault is not used again."""
        error = translate(str(self.config), exc)
        if client is not None and client.metadata == _NO_TOKEN and wants_token(exc):
            error = EtcdUnavailable(f"authentication is on again: {error.what}", error.remedy)
        if isinstance(error, EtcdUnavailable):
            self._drop(client)
        return error

    def _connected(self) -> Any:
        with self._lock:
            if self._closed.is_set():
                raise EtcdError("the connection to etcd is closed")
            if self._client is None:
                self._client = self._new_client()
            return self._client

    def _new_client(self) -> Any:
        check_left(_CONNECTION_DESCRIPTORS)
        config = self.config
        endpoint = config.endpoints[self._next_endpoint % len(config.endpoints)]
        return etcd3.client(
            host=f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host,
            port=endpoint.port,
            ca_cert=config.cacert or (_system_ca() if endpoint.tls else None),
            cert_cert=config.cert,
            cert_key=config.key,
            timeout=config.timeout_s,
            grpc_options=_CHANNEL_OPTIONS,
        )

    def _authenticate(self, client: Any, timeout_s: float) -> None:
        """Gives the connection a token if it has none.

        The client library would ask for one before `close` knows the connection.
        """
        with self._authenticating:
            if client.metadata is not None:
                return
            request = pb.AuthenticateRequest(name=self.config.user, password=self.config.password)
            try:
                token = pb.AuthStub(client.channel).Authenticate(request, timeout_s).token
            except grpc.RpcError as exc:
                if not (self._known_here and is_turned_off(exc)):
                    raise
                # who turns authentication off for a while does not mean to end what runs
                client.metadata = _NO_TOKEN
            else:
                client.metadata = (("token", token),)
                self._known_here = True

    def _drop(self, client: Any) -> None:
        """The next call gets a fresh connection, to the next endpoint.

        `client` None: connecting itself has failed.
        """
        with self._lock:
            if client is not self._client:
                return  # another thread has dropped it already
            self._client = None
            self._renewals = None, None
            self._next_endpoint += 1
        if client is not None:
            client.close()

    def _range(self, request: Any) -> Any:
        return self._unary("KV", "Range", request)

    # -- ours to theirs and back
    # ---------------------------------------------------------------------------------------------

    def _key(self, key: str) -> bytes:
        return (self.config.namespace + key).encode(errors="surrogateescape")

    def _compare(self, guard: Guard) -> Iterator[Any]:
        key = self._key(guard.key)
        compare = pb.Compare(
            key=key,
            target=_TARGETS[guard.target],
            result=getattr(pb.Compare, guard.result),
            **{guard.target: guard.value},
        )
        if guard.prefix:
            compare.range_end = _prefix_end(key)
        yield compare
        if guard.content is not None:
            yield pb.Compare(
                key=key, target=pb.Compare.VALUE, result=pb.Compare.EQUAL, value=guard.content
            )

    def _op(self, write: Put | Delete) -> Any:
        key = self._key(write.key)
        if isinstance(write, Put):
            keep = write.lease_id is None
            return pb.RequestOp(
                request_put=pb.PutRequest(
                    key=key, value=write.value, lease=write.lease_id or 0, ignore_lease=keep
                )
            )
        end = _prefix_end(key) if write.prefix else b""
        return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key, range_end=end))


def _most_telling(error: EtcdError, exc: Exception, said: list[EtcdUnavailable]) -> EtcdError:
    """The last try of a call may be too short for any answer.

    What etcd said before tells more than that.
    """
    if not (isinstance(exc, grpc.RpcError) and isinstance(error, EtcdUnavailable)):
        return error
    if (exc.details() or "").startswith("etcdserver: "):
        said.append(error)
    return said[-1] if said and exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED else error


def _share(share_s: float, deadline: float) -> float:
    """How long one try may take."""
    return max(0.05, min(share_s, deadline - time.monotonic()))


_CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
)
_MEMBER_LEARNER = 5  # a field of etcd's Member
_STATUS_USED, _STATUS_LEARNER, _STATUS_QUOTA = 9, 10, 12  # fields of etcd's StatusResponse
_ALARMS = {1: "NOSPACE", 2: "CORRUPT"}
_READS, _WRITES = (0, 2), (1, 2)  # authpb.Permission.Type: READ, WRITE, READWRITE
_TARGETS = {"create_revision": pb.Compare.CREATE, "mod_revision": pb.Compare.MOD}


def _system_ca() -> str:
    import ssl  # seldom needed, and big

    paths = (
        ssl.get_default_verify_paths().cafile,
        *_CA_FILES,
    )  # a Python from elsewhere may not know where this system has it
    found = next((path for path in paths if path and os.path.isfile(path)), None)
    if found is None:
        raise EtcdRefused(
            "this system has no file of trusted certificates", "give etcd's CA as `cacert`"
        )
    return found


def _text(key: bytes) -> str:
    """A key that is no text stays what it is: the same key again when it is encoded."""
    return key.decode(errors="surrogateescape")


def _key_value(kv: Any, strip: int) -> KeyValue:
    return KeyValue(_text(kv.key)[strip:], kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _member(member: Any) -> Member:
    learner = bool(numbers_in(member.SerializeToString()).get(_MEMBER_LEARNER))
    return Member(int(member.ID), str(member.name), tuple(map(str, member.clientURLs)), learner)


def _prefix_end(prefix: bytes) -> bytes:
    """The first key after all with the prefix; etcd takes a zero byte as `to the end`."""
    end = bytearray(prefix)
    while end and end[-1] == 255:
        end.pop()
    if not end:
        return b"\0"
    end[-1] += 1
    return bytes(end)
