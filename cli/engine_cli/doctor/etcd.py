"""All checks of etcd, in two steps: every endpoint by itself, and then, with those that answer,
what they do together.

The second step waits for the first, and is skipped where nothing answers. `close` ends whatever
still hangs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine_cli.doctor import access, endpoints, store, tls
from engine_cli.doctor.endpoints import EndpointFacts, all_loopback
from engine_cli.doctor.finding import Finding, described
from engine_cli.doctor.runner import Check, Once, Skip, at_once

if TYPE_CHECKING:
    from engine_registry.errors import EtcdError
    from engine_registry.etcd.client import Etcd
    from engine_registry.etcd.config import EtcdConfig

_LATE = "etcd stopped answering meanwhile: look at its log and its disk"


@dataclass(frozen=True)
class Login:
    """What a first read that needs a quorum ended with."""

    error: EtcdError | None = None

    @property
    def denied(self) -> bool:
        """Whether the user is good, but may not read there."""
        return self._reason == "denied"

    @property
    def refused(self) -> bool:
        """Whether etcd answers, and refuses this user."""
        return self._reason in ("credentials", "auth_off", "denied")

    @property
    def unread(self) -> EtcdError | None:
        """Why etcd answers no reads, other than a refusal of this user: no quorum, or it hangs."""
        return None if self.refused else self.error

    @property
    def _reason(self) -> object:
        return self.error.details.get("reason") if self.error is not None else None


class EtcdChecks:
    def __init__(self, config: EtcdConfig, limit_s: float) -> None:
        """`limit_s` is for each of the two steps."""
        self._config = config
        self._limit_s = limit_s
        self._opened: list[Etcd] = []
        self._survey = Once(self._look)
        self._etcd = Once(self._connect)
        self._login = Once(self._log_in)
        self._trip = Once(lambda: store.round_trip(self.ready()))
        self._client = Once(
            lambda: (
                tls.client_certificate(config.cert, config.key)
                if config.cert and config.key
                else None
            )
        )

    def checks(self) -> list[Check]:
        steps: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
            ("etcd.endpoint", self._endpoints),
            ("etcd.version", self._version),
            ("etcd.quorum", self._quorum),
            ("etcd.alarms", self._alarms),
            ("etcd.database", self._database),
            ("etcd.tls", self._tls),
            ("etcd.auth", self._auth),
            ("etcd.permissions", self._permissions),
            ("etcd.lease", self._lease),
            ("etcd.latency", self._latency),
            ("etcd.namespace", self._namespace),
        ]
        # A little more than both steps take, so that a call's own deadline comes first: it says
        # more.
        limit_s = 2 * self._limit_s + 0.4
        return [
            Check(name, run, limit_s, _LATE, tidies=name == "etcd.lease") for name, run in steps
        ]

    def close(self) -> None:
        for etcd in self._opened:
            etcd.close()

    # -- shared
    # ----------------------------------------------------------------------------------------------

    def _look(self) -> list[EndpointFacts]:
        alone = [
            replace(self._config, endpoints=(endpoint,)) for endpoint in self._config.endpoints
        ]
        return at_once(lambda config: endpoints.look(config, self._limit_s), alone)

    def _connect(self) -> Etcd:
        """To the endpoints that answer; to a learner only where no voting member does."""
        from engine_registry.etcd.client import Etcd

        answering = {
            facts.endpoint: facts.status for facts in self._survey() if facts.status is not None
        }
        if not answering:
            raise Skip("no endpoint of etcd answers")
        good = {endpoint for endpoint, status in answering.items() if not status.learner} or set(
            answering
        )
        usable = tuple(endpoint for endpoint in self._config.endpoints if str(endpoint) in good)
        etcd = Etcd(replace(self._config, endpoints=usable, timeout_s=self._limit_s))
        self._opened.append(etcd)
        return etcd

    def _log_in(self) -> Login:
        from engine_registry.errors import EtcdError

        try:
            self._etcd().get("/engines/-")
        except EtcdError as exc:
            return Login(exc)
        return Login()

    def ready(self) -> Etcd:
        """The connection, once etcd has let us in; else Skip."""
        etcd, login = self._etcd(), self._login()
        if login.error is not None and not login.denied:
            raise Skip(
                "etcd does not let us in: see etcd.auth"
                if login.refused
                else "etcd answers no reads: see etcd.quorum"
            )
        return etcd

    # -- checks
    # ----------------------------------------------------------------------------------------------

    def _endpoints(self) -> Iterator[Finding]:
        yield from endpoints.judge_endpoints(self._survey())

    def _version(self) -> Iterator[Finding]:
        self._etcd()
        yield endpoints.judge_version(
            [facts.status for facts in self._survey() if facts.status is not None]
        )

    def _quorum(self) -> Iterator[Finding]:
        from engine_registry.errors import EtcdError

        etcd = self._etcd()
        statuses = {
            facts.status.member_id: facts.status
            for facts in self._survey()
            if facts.status is not None
        }
        members = None
        with suppress(EtcdError):  # some releases let only root ask
            members = etcd.members()
        unseen = [
            url
            for member in members or ()
            if member.member_id not in statuses
            for url in member.client_urls[:1]
        ]
        for facts in at_once(self._look_at, unseen):
            if facts is not None and facts.status is not None:
                statuses[facts.status.member_id] = facts.status
        unread = self._login().unread
        yield endpoints.judge_quorum(
            members,
            list(statuses.values()),
            described(unread) if unread is not None else ("", ""),
        )

    def _look_at(self, url: str) -> EndpointFacts | None:
        """At a member that was not named, where it says that its clients find it."""
        from engine_registry.errors import InvalidField
        from engine_registry.etcd.config import parse_endpoints

        try:
            return endpoints.look(
                replace(self._config, endpoints=parse_endpoints(url)), self._limit_s / 2
            )
        except InvalidField:  # a unix socket
            return None

    def _alarms(self) -> Iterator[Finding]:
        from engine_registry.errors import EtcdRefused

        try:
            yield from store.judge_alarms(self.ready().alarms())
        except EtcdRefused as exc:
            raise Skip(
                f"this user may not ask for alarms ({exc.details.get('reason') or exc})"
            ) from exc

    def _database(self) -> Iterator[Finding]:
        self._etcd()
        answered = [facts for facts in self._survey() if facts.status is not None]
        statuses = [facts.status for facts in answered if facts.status is not None]
        quota = next((status.quota_nbytes for status in statuses if status.quota_nbytes), None)
        if quota is None:
            endpoint = next(
                each for each in self._config.endpoints if str(each) == answered[0].endpoint
            )
            quota = store.quota_of(self._config, endpoint, self._limit_s / 2)
        yield store.judge_database(statuses, quota)

    def _tls(self) -> Iterator[Finding]:
        config = self._config
        if not (config.cacert or config.endpoints[0].tls):
            yield tls.judge_plaintext(config)
            return
        listening = {facts.endpoint for facts in self._survey() if facts.dialled.trouble is None}
        looked_at = [endpoint for endpoint in config.endpoints if str(endpoint) in listening]
        if not looked_at:
            raise Skip("nothing listens at any endpoint of etcd")
        shown = at_once(lambda each: tls.server_certificate(config, each, self._limit_s), looked_at)
        ours = self._client()
        yield from tls.judge_certificates(
            [*shown, *([ours] if ours is not None else [])], time.time()
        )

    def _auth(self) -> Iterator[Finding]:
        self._etcd()
        login = self._login()
        if login.unread is not None:
            raise Skip("etcd answers no reads: see etcd.quorum")
        config = self._config
        yield access.judge_login(
            config.user, login.error, all_loopback(config), by_certificate=config.cert is not None
        )

    def _permissions(self) -> Iterator[Finding]:
        from engine_registry.errors import EtcdError

        etcd = self.ready()
        ours = self._client()
        name = self._config.user or (ours.name if ours is not None else "")
        if not name:
            raise Skip("no user: see etcd.auth")
        try:
            user = etcd.user(name)
        except EtcdError as exc:
            if self._config.user is None:
                raise Skip(f"etcd knows no user {name!r}, after the client certificate") from exc
            raise
        yield access.judge_permissions(user, self._config.namespace)

    def _lease(self) -> Iterator[Finding]:
        yield store.judge_lease(self._trip())

    def _latency(self) -> Iterator[Finding]:
        try:
            trip = self._trip()
        except Skip:
            raise
        except Exception as exc:
            raise Skip("not measured, as etcd.lease has failed") from exc
        yield store.judge_latency(trip)

    def _namespace(self) -> Iterator[Finding]:
        yield from store.check_namespace(self.ready())
