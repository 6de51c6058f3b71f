"""Tokens that expire, passwords that change, and authentication that is turned on or off, while a
rank is held and watched.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine_registry import (
    InstanceCleaned,
    InstanceDegraded,
    InstanceReady,
    RankLost,
    RankUpdated,
    RegistrationState,
    Registry,
)
from engine_registry.errors import EtcdRefused
from engine_registry.etcd.library import pb
from engine_registry.etcd.local import LocalEtcd, find_binary
from tests.integration.conftest import events_until
from tests.integration.test_faults import hold
from tests.support.faults import QUICK_PASSWORDS
from tests.support.waiting import wait_until


@pytest.fixture
def users(binary: str) -> Iterator[LocalEtcd]:
    """An etcd with users, in plain text, that a test may break."""
    with LocalEtcd(binary=binary, extra_args=QUICK_PASSWORDS) as etcd:
        ctl(
            etcd,
            "user add root:secret",
            "user grant-role root root",
            "user add rank:secret",
            "user grant-role rank root",
        )
        yield etcd


def ctl(etcd: LocalEtcd, *commands: str) -> None:
    program = Path(find_binary()).with_name("etcdctl")
    for command in commands:
        run = subprocess.run(
            [program, "--endpoints", etcd.endpoint, *command.split()],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr


AS_ROOT = "--user root:secret"
RANK: dict[str, Any] = {"user": "rank", "password": "secret"}
ROOT_USER: dict[str, Any] = {"user": "root", "password": "secret"}


def test_a_changed_password_suspends_the_rank_with_a_clear_line_until_it_holds_again(
    users: LocalEtcd,
) -> None:
    ctl(users, "auth enable")
    with (
        Registry.connect(users.endpoint, **RANK) as registry,
        Registry.connect(users.endpoint, **ROOT_USER) as other,
    ):
        registration, states = hold(registry)
        with registration, other.watch() as watch:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            _change_password(users, "changed")
            states.wait_for(RegistrationState.SUSPENDED)
            assert "refuses the credentials" in states.why
            assert "check `user` and the password" in states.why
            assert "secret" not in states.why
            with pytest.raises(EtcdRefused, match="refuses the credentials"):
                registry.instances()
            events_until(watch, lambda event: isinstance(event, RankLost))
            _change_password(users, "secret")
            states.wait_for(RegistrationState.REGISTERED)
            events_until(watch, lambda event: isinstance(event, InstanceReady))


def _change_password(etcd: LocalEtcd, password: str) -> None:
    program = Path(find_binary()).with_name("etcdctl")
    command = [
        str(program),
        "--endpoints",
        etcd.endpoint,
        *AS_ROOT.split(),
        "user",
        "passwd",
        "rank",
        "--interactive=false",
    ]
    subprocess.run(command, input=f"{password}\n", check=True, capture_output=True, text=True)


def test_authentication_that_is_turned_on_is_an_error_only_for_a_client_without_a_user(
    users: LocalEtcd,
) -> None:
    with Registry.connect(users.endpoint) as registry:
        registration, states = hold(registry)
        with registration, registry.watch() as watch:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            ctl(users, "auth enable")
            registration.update(version=1)  # else it would go on with the streams that it has
            states.wait_for(RegistrationState.SUSPENDED)
            assert "refuses the credentials" in states.why
            with pytest.raises(
                EtcdRefused, match=r"user name is empty.*check `user` and the password"
            ):
                registry.instances()
            why = ""
            try:  # its stream is as good as before, unless etcd breaks it off, as 3.4 does
                events_until(watch, lambda event: isinstance(event, InstanceDegraded | RankLost))
            except EtcdRefused as exc:
                why = str(exc)
            assert not why or "check `user` and the password" in why
            ctl(users, f"{AS_ROOT} auth disable")
            states.wait_for(RegistrationState.REGISTERED)
            assert [record.rank for record in registry.ranks("a")] == [0]


@pytest.mark.parametrize("restart", [False, True])
def test_authentication_that_is_turned_off_for_a_while_ends_nothing_that_runs(
    users: LocalEtcd, restart: bool
) -> None:
    ctl(users, "auth enable")
    with (
        Registry.connect(users.endpoint, timeout_s=20, **RANK) as registry,
        registry.watch() as watch,
    ):
        registration, states = hold(registry)
        with registration:
            events = events_until(watch, lambda event: isinstance(event, InstanceReady))
            for number, command in enumerate((f"{AS_ROOT} auth disable", "auth enable")):
                ctl(users, command)
                if restart:
                    users.kill()
                    users.launch()
                registration.update(version=2 * number + 1)
                events += events_until(watch, lambda event: isinstance(event, RankUpdated))
                assert [record.version for record in registry.ranks("a")] == [2 * number + 1]
                if not number:
                    with pytest.raises(
                        EtcdRefused, match="authentication turned off: leave out `user`"
                    ):
                        Registry.connect(users.endpoint, **RANK)
            assert states.seen[-1:] in ([], [RegistrationState.REGISTERED])
    assert [event for event in events if isinstance(event, RankLost)] == []


@pytest.fixture
def short_lived(tmp_path: Path, binary: str) -> Iterator[LocalEtcd]:
    """Its tokens expire after a second, however much they are used."""
    (tmp_path / "secret").write_bytes(os.urandom(32))
    token = f"jwt,sign-method=HS256,ttl=1s,priv-key={tmp_path / 'secret'}"
    with LocalEtcd(binary=binary, extra_args=[*QUICK_PASSWORDS, "--auth-token", token]) as etcd:
        ctl(etcd, "user add root:secret", "user grant-role root root", "auth enable")
        yield etcd


class Token:
    """One that was given out just now; when it has expired, so have all before it."""

    def __init__(self, etcd: LocalEtcd) -> None:
        self._registry = Registry.connect(etcd.endpoint, **ROOT_USER)
        self._etcd = self._registry._etcd
        self._client = self._etcd._client

    def has_expired(self) -> bool:
        """Asked with this very token, which the connection would give up for another."""
        try:
            pb.KVStub(self._client.channel).Range(
                pb.RangeRequest(key=b"k"), 5, metadata=self._client.metadata
            )
        except grpc.RpcError as exc:
            self._registry.close()
            return "invalid auth token" in str(exc)
        return False


def test_a_watch_a_keeper_and_a_ticket_outlive_their_tokens(
    short_lived: LocalEtcd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine_registry.pulls.ticket.TTL_S", 2.0)
    with Registry.connect(short_lived.endpoint, **ROOT_USER) as registry, registry.watch() as watch:
        registration, states = hold(registry)
        with registration:
            events = events_until(watch, lambda event: isinstance(event, InstanceReady))
            ticket = registry.pull(registry.ranks("a")[0])
            assert ticket is not None
            with ticket:
                for _ in range(4):  # longer than any lease here
                    wait_until(Token(short_lived).has_expired)
                assert registry.pulls(registration.record) == 1
            assert registry.pulls(registration.record) == 0
            registration.update(version=1)
            events += events_until(watch, lambda event: isinstance(event, RankUpdated))
    assert [event for event in events if isinstance(event, RankLost)] == []
    assert RegistrationState.SUSPENDED not in states.seen
    assert [message for message in caplog.messages if "secret" in message] == []


def test_a_watch_that_cleans_outlives_its_token_and_still_leads(short_lived: LocalEtcd) -> None:
    with (
        Registry.connect(short_lived.endpoint, **ROOT_USER) as registry,
        registry.cleaning_watch(grace_s=0.1) as watch,
    ):
        first, second = (hold(registry, rank=rank, world_size=2)[0] for rank in range(2))
        with first:
            events_until(watch, lambda event: isinstance(event, InstanceReady))  # type: ignore[arg-type]
            for _ in range(6):  # longer than the leader's lease
                wait_until(Token(short_lived).has_expired)
            assert watch._election.leading
            second.withdraw()
            events_until(watch, lambda event: isinstance(event, InstanceCleaned))  # type: ignore[arg-type]
