"""`Registry`: the front door. Safe to share between threads; not to be carried over a fork.

Longer than other modules: each operation of the package is a method here, with its documentation.
The work is done in the modules that it calls.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import engine_registry.registration.metrics  # noqa: F401  declares what is counted of keepers
from engine_registry.errors import RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, absolute, parse_endpoints
from engine_registry.etcd.environment import settings_in
from engine_registry.holders.look import find_updating, look, read_roster
from engine_registry.holders.query import HolderQuery, Holders, everything
from engine_registry.holders.waiting import HolderWatch, wait_for_holders, wait_for_instances
from engine_registry.lifetime import Closable
from engine_registry.pulls.follow import AllPulls
from engine_registry.pulls.queries import all_pulls, count_pulls, readers_of, wait_for_no_pulls
from engine_registry.pulls.taking import Pulling, take_ticket
from engine_registry.pulls.ticket import PullTicket
from engine_registry.pulls.watch import OnPull, PullWatch
from engine_registry.registration.checks import how_to_delete
from engine_registry.registration.descriptors import Descriptors, closed_on_error
from engine_registry.registration.eviction import by_this_process, evict_each
from engine_registry.registration.handle import OnState, Registration
from engine_registry.registration.hold import Hold
from engine_registry.registration.keeper.process import check_can_start
from engine_registry.registration.manifests import (
    encode_manifest,
    fetch_manifest,
    fetch_manifests,
)
from engine_registry.releases.finding import find_release, uses_of, wait_while_released
from engine_registry.releases.writing import Order, release
from engine_registry.schema.keys import (
    ENGINES,
    check_instance,
    evicted_key,
    record_key,
)
from engine_registry.schema.keyvalue import Snapshot
from engine_registry.schema.labels import Selector
from engine_registry.schema.location import UNKNOWN, Location
from engine_registry.schema.manifest import Manifest
from engine_registry.schema.moment import utc
from engine_registry.schema.numbers import (
    MAX_TTL_S,
    MIN_TTL_S,
    MIN_UNRESPONSIVE_S,
    UNRESPONSIVE_AFTER_S,
    seconds,
    whole,
)
from engine_registry.schema.pull_ticket import Pull
from engine_registry.schema.record import (
    ModelIdentity,
    RankRecord,
    RankState,
    check_content,
    check_version,
    new_content,
    new_incarnation,
)
from engine_registry.schema.record_format import decode_item
from engine_registry.schema.release import Release
from engine_registry.schema.roster import Roster, assess_all
from engine_registry.schema.status import InstanceStatus
from engine_registry.telemetry.logs import fields
from engine_registry.version import package_version
from engine_registry.watching.cleanup import CleaningWatch
from engine_registry.watching.election import Election
from engine_registry.watching.follow import AllInstances
from engine_registry.watching.ranks import follow_ranks
from engine_registry.watching.waiting import Wanted, wait_until_ready
from engine_registry.watching.watch import Watch

log = logging.getLogger(__name__)


class Registry(Closable):
    """Register ranks, find the ranks of others, watch them come and go."""

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self._etcd = Etcd(config)
        self._mark_open()

    @classmethod
    def connect(
        cls,
        endpoints: str | Sequence[str] = "127.0.0.1:2379",
        *,
        namespace: str = "",
        timeout_s: float = 5.0,
        cacert: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        user: str | None = None,
        password: str | None = None,
        lazy: bool = False,
    ) -> Registry:
        """A registry over the etcd at `endpoints` (`HOST:PORT[,HOST:PORT…]`).

        Asks etcd for its version, so that EtcdUnavailable or EtcdRefused come here and not at the
        first use. With `lazy` nothing is asked here: the first use connects, and raises them. So a
        process starts while etcd is away. Arguments that are not valid raise InvalidField in both
        cases.

        `timeout_s` bounds one call to etcd, with its retries. The keepers of registrations may take
        20 s and three times as long to start.
        """
        config = EtcdConfig(
            parse_endpoints(endpoints),
            namespace,
            timeout_s,
            absolute(cacert),
            absolute(cert),
            absolute(key),
            user,
            password,
        )
        registry = cls(config)
        if lazy:
            return registry
        try:
            registry._etcd.status()
        except BaseException:
            registry.close()
            raise
        return registry

    @classmethod
    def from_env(cls, *, lazy: bool = False) -> Registry:
        """A registry over the etcd that variables of the environment name, as `connect` makes it.

        They are those of the command line: ENGINES_ETCD, ENGINES_NAMESPACE, ENGINES_TIMEOUT,
        ENGINES_CACERT, ENGINES_CERT, ENGINES_KEY, ENGINES_USER and ENGINES_ETCD_PASSWORD. What is
        not set has the default of `connect`. Raises as `connect` does.
        """
        return cls.connect(**settings_in(os.environ), lazy=lazy)

    def close(self) -> None:
        """Ends the connection, any number of times. Calls that are under way end with an EtcdError.

        Registrations live on: the keeper of each has its own connection. Watches, elections and
        waits that this registry has begun end.
        """
        self._mark_closed()
        self._etcd.close()

    def _label(self) -> str:
        return f"of {self._config}"

    @property
    def config(self) -> EtcdConfig:
        """How etcd is reached; with the password."""
        return self._config

    def local_address(self) -> str:
        """The address of this machine on the way to etcd: as a rule the one that other machines
        reach it by too.
        """
        return self._etcd.local_address()

    def register(
        self,
        *,
        instance: str,
        rank: int,
        world_size: int,
        model: ModelIdentity,
        manifest: Manifest,
        session_id: str,
        protocol: str,
        header_addr: int,
        incarnation: str | None = None,
        generation: str | None = None,
        topology: Mapping[str, tuple[int, int]] | None = None,
        version: int = 0,
        content: str | None = None,
        state: RankState = RankState.READY,
        fabric: str = "",
        rails: Mapping[str, str] | None = None,
        location: Location = UNKNOWN,
        device: str = "cpu",
        labels: Mapping[str, str] | None = None,
        ttl_s: float = 10.0,
        unresponsive_after_s: float = UNRESPONSIVE_AFTER_S,
        on_state: OnState | None = None,
        descriptors: Descriptors | None = None,
        hold: Hold | None = None,
        replaces: str = "",
    ) -> Registration:
        """Claims the rank for this process and holds it. `content` says which weights it has; the
        default is one that no other rank has. `labels` are names and values in the syntax of
        Kubernetes, 16 at most, by which people find the instance. All of its ranks have the same.
        `location` is where this machine stands.

        Raises InvalidField, RankConflict (another process has the rank), InstanceMismatch (it
        disagrees with its siblings), KeeperFailed (no process or file descriptor is to be had) or
        an EtcdError; nothing is left in etcd then.

        A process that is stopped, or in which no thread gets the GIL, for `unresponsive_after_s` is
        marked in its record, until it answers again.

        `descriptors` stand for memory of the manifest. The keeper hands them out to processes of
        the same user and host that know the place, also while this process is stopped. They belong
        to the registration from then on, also where this raises: it closes them at its end, and the
        keeper closes its own. KeeperFailed where the keeper cannot hold as many.

        With `hold`, the keeper holds the `descriptors` for a while if this process ends without
        leaving the registry, and the record is ready then: see `RankRecord.held`. Another process
        of the same user and host can take them, or any process the rank. `replaces` is the
        incarnation of the rank whose memory this process has taken: its keeper may not have been
        able to say in etcd yet that it has ended.

        `on_state` is called for every change of the state, in order, from another thread:
        it may call the registration, and may get CLOSED after `withdraw` has returned.
        """
        with closed_on_error(descriptors):
            ttl_s = seconds("ttl_s", ttl_s, MIN_TTL_S, MAX_TTL_S)
            unresponsive_after_s = seconds(
                "unresponsive_after_s", unresponsive_after_s, MIN_UNRESPONSIVE_S, MAX_TTL_S
            )
            check_can_start(f"{ENGINES}{instance}/{rank}")
            ref, parts = encode_manifest(manifest)
            record = RankRecord(
                incarnation=incarnation or new_incarnation(),
                instance=instance,
                rank=rank,
                world_size=world_size,
                model=model,
                session_id=session_id,
                protocol=protocol,
                manifest=ref,
                header_addr=header_addr,
                registered_at=utc(),
                generation=generation or "",
                topology=dict(topology or {}),
                version=version,
                content=new_content() if content is None else check_content(content),
                state=state,
                fabric=fabric,
                rails=dict(rails or {}),
                location=location,
                host=socket.gethostname(),
                pid=os.getpid(),
                device=device,
                writer=package_version(),
                labels=labels or {},
            )
        return Registration(
            self._config,
            record,
            parts,
            ttl_s,
            unresponsive_after_s,
            on_state,
            descriptors,
            hold,
            replaces,
        )

    def held(self, instance: str, rank: int | None = None) -> tuple[RankRecord, ...]:
        """The records of the instance's ranks whose processes have ended, and whose keepers hold
        their memory; or of this rank, if it is held.
        """
        held = self.instance(instance).held
        return tuple(record for record in held if rank in (None, record.rank))

    def let_go_of_held(
        self, instance: str, rank: int | None = None, reason: str = ""
    ) -> tuple[RankRecord, ...]:
        """Ends what `held` returns, on whatever host: the keepers let the memory go as soon as they
        hear of it. Returns the records that were ended, and leaves alone what has changed since it
        was read, as where another process has taken the rank.

        The `reason` and the errors are as for `evict`.
        """
        held = self.held(instance, rank)
        return tuple(itertools.compress(held, self.evict_each(held, reason)))

    def instances(self, selector: str = "") -> tuple[InstanceStatus, ...]:
        """All instances by name. What cannot be read is among their problems, never an error. One
        of which only ranks are left that are held is GONE, and has these in `held`.

        `selector` chooses by labels, as in Kubernetes: `team=x,tier!=test,owner,!beta`. Raises
        InvalidField.
        """
        chosen = Selector.parse(selector)
        found = assess_all(self._etcd.snapshot(ENGINES).items)
        return tuple(status for status in found if chosen.matches(status.labels))

    def instance(self, name: str) -> InstanceStatus:
        """One instance as it is now; state GONE where no rank is registered."""
        return self._roster(name).status()

    def damaged(self, instance: str, rank: int | None = None) -> tuple[RecordDamaged, ...]:
        """What is wrong with each of the instance's keys, or with the rank's, that hold no good
        record, and how to delete it.
        """
        damaged = self._roster(instance).damaged.items()
        return tuple(
            RecordDamaged(error.what, how_to_delete(self._etcd, key, error), key=key)
            for key, error in damaged
            if rank is None or key == record_key(instance, rank)
        )

    def ranks(self, instance: str) -> tuple[RankRecord, ...]:
        """The instance's ranks that are registered now, by rank.

        A damaged record is left out, with a logged warning.
        """
        roster = self._roster(instance)
        for problem in roster.damaged.values():
            log.warning(
                "%s: %s", instance, problem, extra=fields("record_damaged", **problem.details)
            )
        return roster.status().records

    def current(self, record: RankRecord) -> RankRecord | None:
        """The registration that `record` was read from, as it is now; None where it has ended."""
        now = self.record_at(record.key)
        return now if now and not now.ended and now.incarnation == record.incarnation else None

    def record_at(self, key: str) -> RankRecord | None:
        """The record under the key, also of a rank that has ended and is held; None where there is
        none, or it cannot be read.
        """
        found = self._etcd.get(key)
        try:
            return decode_item(found) if found else None
        except RecordDamaged as exc:
            log.warning("%s", exc, extra=fields("record_damaged", **exc.details))
            return None

    def _roster(self, instance: str) -> Roster:
        return read_roster(self._etcd, check_instance(instance))

    def resolve(
        self, instance: str | Sequence[str], timeout_s: float = 0.0
    ) -> tuple[RankRecord, ...]:
        """All ranks of an instance that is complete and consistent; of several, of the first in the
        list that is.

        Waits for that, watching, for up to `timeout_s`. Raises InstanceNotFound, InstanceIncomplete
        (with what is missing), or RecordDamaged.
        """
        return wait_until_ready(self._etcd, instance, seconds("timeout_s", timeout_s))[0].records

    def ready(
        self,
        wanted: Wanted,
        timeout_s: float = 0.0,
        cancel: threading.Event | None = None,
        *,
        usable: Callable[[InstanceStatus], bool] = everything,
        version: int | None = None,
        near: Location = UNKNOWN,
    ) -> tuple[InstanceStatus, ...]:
        """All of the named instances that are ready; of a model some that are, however many there
        are: of the `version`, or else of the newest, and `usable` ones if there are any. They are
        some whose rank 0 is in the zone of `near`, if there are any. `usable`, `version` and `near`
        are for a model alone: of a named instance, look at what is returned.

        Waits as `resolve` for the first. `cancel`, set in another thread, ends the wait as the end
        of its time does.
        """
        timeout_s = seconds("timeout_s", timeout_s)
        if isinstance(wanted, ModelIdentity):
            return wait_for_instances(self._etcd, wanted, usable, version, timeout_s, cancel, near)
        return wait_until_ready(self._etcd, wanted, timeout_s, cancel)

    def holders(
        self,
        query: HolderQuery,
        timeout_s: float = 0.0,
        cancel: threading.Event | None = None,
        *,
        boxes: bool = False,
    ) -> Holders:
        """A few ranks that hold a model's weights, whatever else of their instances is missing.

        Waits as `resolve` for the first that is ready, or with `boxes` for an instance that is.
        `cancel` is as for `ready`.
        """
        timeout_s = seconds("timeout_s", timeout_s)
        return wait_for_holders(self._etcd, query, boxes, timeout_s, cancel)

    def find_holders(self, query: HolderQuery) -> Holders:
        """As `holders`, now; where nobody has the weights, that is no error."""
        return look(self._etcd, query)

    def watch_holders(self, model: ModelIdentity, rank: int | None = None) -> HolderWatch:
        """Says when it is time to look again for holders of the model's rank, or of any rank."""
        return HolderWatch(self._etcd.sibling(), model, rank)

    def updating(self, model: ModelIdentity, rank: int) -> tuple[RankRecord, ...]:
        """Some ranks of the model with this number whose weights are being changed now."""
        return find_updating(self._etcd, model, rank)

    def was_evicted(self, rank: RankRecord | Pull) -> bool:
        """Whether this registration, or the one that is read from, was evicted within a day."""
        key = evicted_key(rank.instance, rank.rank, rank.incarnation)
        return self._etcd.get(key) is not None

    def manifest(self, record: RankRecord) -> Manifest:
        """The manifest that belongs to the record; RecordDamaged where it is gone or not the one
        that the record means.
        """
        return fetch_manifest(self._etcd, record)

    def manifests(self, records: Sequence[RankRecord]) -> list[Manifest | RecordDamaged]:
        """The manifests that belong to the records, in their order, in a few requests. Where one
        is gone, or not the one that the record means, that error stands in its place.
        """
        return fetch_manifests(self._etcd, records)

    def pull(
        self, record: RankRecord, reader: RankRecord | None = None, free_since: int | None = None
    ) -> PullTicket | None:
        """A ticket that says that we are reading from this rank; None where its record has changed
        since it was read.

        `reader` is the rank that we read for, if it is registered. With `free_since`, a revision
        of etcd, None also where another load has taken a ticket to read from the rank since.
        """
        return take_ticket(self._etcd, record, reader, free_since)

    def pulling(self) -> Pulling:
        """Takes tickets for one load, from several ranks at once. To be closed at its end."""
        return Pulling(self._etcd)

    def pulls(self, record: RankRecord) -> int:
        """How many loads hold a ticket to read from the rank."""
        return self.count_pulls([record])[record.incarnation]

    def count_pulls(self, records: Sequence[RankRecord]) -> dict[str, int]:
        """How many loads hold a ticket to read from each of the ranks, by incarnation."""
        return count_pulls(self._etcd, records)

    def readers(self, record: RankRecord) -> tuple[Pull, ...]:
        """The loads that hold a ticket to read from this registration, and how far each is."""
        return readers_of(self._etcd, record)

    def all_pulls(self, instance: str | None = None) -> tuple[Pull, ...]:
        """The loads that hold a ticket to read from a rank of the instance, or of any instance."""
        return all_pulls(self._etcd, instance)

    def follow_pulls(self) -> AllPulls:
        """The tickets of all loads, kept up to date until it is closed."""
        return AllPulls(self._etcd.sibling())

    def follow_instances(self, selector: str = "") -> AllInstances:
        """What `instances` returns, kept up to date until it is closed. Raises InvalidField."""
        return AllInstances(self._etcd.sibling(), Selector.parse(selector))

    def wait_for_no_pulls(
        self, instance: str, rank: int, timeout_s: float, content: str = ""
    ) -> int:
        """Waits until no load holds a ticket to read from the rank, or the time is over. With
        `content`, loads do not matter that read another one.

        Returns how many loads still hold one.
        """
        place = check_instance(instance), whole("rank", rank)
        return wait_for_no_pulls(self._etcd, *place, seconds("timeout_s", timeout_s), content)

    def watch_pulls(self, record: RankRecord, on_pull: OnPull) -> PullWatch:
        """Reports each reader that begins or ends to read from the registration, until closed."""
        return PullWatch(self._etcd.sibling(), record, on_pull)

    def release(
        self, instance: str, version: int, timeout_s: float = 0.0, *, rank: int = 0
    ) -> Release:
        """Says in etcd that this version of the instance is released: that all ranks hold it, as
        their present version or a retained one. Waits for that, watching, for up to `timeout_s`.

        Of several that release one version, one writes it, and the others find it done. It stays
        released until another version is, or the registration of `rank` ends.

        Raises ReleaseIncomplete, which names the ranks that do not hold the version;
        InstanceNotFound; InvalidField where a newer one is released; or an EtcdError.
        """
        return self._release(Order(instance, version, rank), timeout_s)

    def rollback(
        self, instance: str, version: int, timeout_s: float = 0.0, *, rank: int = 0
    ) -> Release:
        """As `release`, of a version that may be older than the released one, if all ranks still
        retain it.
        """
        return self._release(Order(instance, version, rank, back=True), timeout_s)

    def keep_released(self, former: Release, timeout_s: float = 0.0, *, rank: int = 0) -> Release:
        """Puts a release that this process has made under the lease that the registration of `rank`
        has now: after that was lost, the release may be gone, or about to go.

        Returns the release that stands then: another one, if it was made since. Raises what
        `release` does.
        """
        order = Order(former.instance, former.version, rank, back=True, former=former)
        return self._release(order, timeout_s)

    def _release(self, order: Order, timeout_s: float) -> Release:
        instance, version = check_instance(order.instance), check_version(order.version)
        order = replace(order, version=version, rank=whole("rank", order.rank))
        made = release(self._etcd, order, seconds("timeout_s", timeout_s))
        log.info(
            "version %d of %s is released",
            made.version,
            instance,
            extra=fields("released", instance=instance, version=made.version),
        )
        return made

    def released(
        self, wanted: Wanted, timeout_s: float = 0.0, cancel: threading.Event | None = None
    ) -> Release | None:
        """The released version of the instance. Of several, or of all instances of a model, the
        newest that all ranks of its instance hold now, or else the newest.

        Waits for one, watching, for up to `timeout_s`; None where there is none then. `cancel`, set
        in another thread, ends the wait before. Raises InvalidField or an EtcdError.
        """
        return find_release(self._etcd, wanted, seconds("timeout_s", timeout_s), cancel)

    def uses_of(self, record: RankRecord) -> tuple[int | None, frozenset[str]]:
        """What keeps versions of a rank where they are: the released version of its instance, if
        there is one, and the contents that loads read from the rank. At one moment.
        """
        return uses_of(self._etcd, record)

    def wait_while_released(self, instance: str, version: int, timeout_s: float) -> bool:
        """Waits until another version of the instance is released than this one, or none. False if
        it is still this one after `timeout_s`.
        """
        name = check_instance(instance)
        return wait_while_released(self._etcd, name, version, seconds("timeout_s", timeout_s))

    def watch(
        self, instance: str | None = None, rank: int | None = None, selector: str = ""
    ) -> Watch:
        """Events about one instance or all, beginning with what is there now.

        With `rank` only those about that rank, with `selector` only those about instances that it
        chooses, as in `instances`.
        """
        name = check_instance(instance) if instance is not None else None
        chosen = Selector.parse(selector)
        return Watch(self._etcd.sibling(), name, rank, selector=chosen)

    def watch_ranks(self, records: Sequence[RankRecord], start: Snapshot | None = None) -> Watch:
        """Events about these ranks, one at least, over one stream of etcd. `start` has their
        records at one revision, if they were read just now: then it begins there.

        Where there are many of one instance, events about its other ranks come, too.
        """
        etcd = self._etcd.sibling()
        return Watch(etcd, follower=follow_ranks(etcd, records, start))

    def cleaning_watch(
        self, instance: str | None = None, *, grace_s: float, dry_run: bool = False
    ) -> CleaningWatch:
        """A watch that evicts what is left of an instance that lost a rank and is still degraded
        after `grace_s` seconds.

        Of all that run over the same instances, one evicts. With `dry_run` each only reports the
        registrations that it would evict.
        """
        grace_s = seconds("grace_s", grace_s)
        etcd = self._etcd.sibling()
        watch = Watch(etcd, check_instance(instance) if instance is not None else None)
        election = self.election(f"cleanup/{instance}" if instance else "cleanup-all")
        return CleaningWatch(etcd, watch, election, grace_s, dry_run)

    def election(self, name: str) -> Election:
        """Of all processes that campaign under this name one leads at a time.

        Campaigns from `start` (or the `with` block) on.
        """
        return Election(self._etcd.sibling(), name)

    def evict(self, record: RankRecord, reason: str = "") -> bool:
        """Ends the registration that `record` was read from; False if it has changed or gone since
        (read it again).

        Its process and all watches get the `reason`, and the user and the host that it comes from.
        InvalidField unless that is one line of printable text of at most 200 characters.
        """
        return self.evict_each([record], reason)[0]

    def evict_each(self, records: Sequence[RankRecord], reason: str = "") -> tuple[bool, ...]:
        """`evict` of several, 40 in one transaction: of each record, in their order, whether its
        registration was ended. The `reason` and the errors are as there.
        """
        evicted = evict_each(self._etcd, records, by_this_process(reason))
        for record in itertools.compress(records, evicted):
            log.info(
                "%s is evicted",
                record.key,
                extra=fields("evicted", instance=record.instance, rank=record.rank, reason=reason),
            )
        return evicted
