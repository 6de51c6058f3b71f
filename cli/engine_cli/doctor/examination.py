"""All checks of `engines doctor` put together and run: which there are, what they share, and that
nothing of them stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from engine_cli.connection import config_of
from engine_cli.doctor import engine, held, network, peer, plugins, python, rdma, sockets
from engine_cli.doctor.child import Probe
from engine_cli.doctor.endpoints import all_loopback
from engine_cli.doctor.etcd import EtcdChecks
from engine_cli.doctor.finding import Finding
from engine_cli.doctor.runner import Check, Skip, run_all, within

if TYPE_CHECKING:
    from engine_registry.etcd.config import EtcdConfig

_STEP_S = 2.0  # each of two steps of etcd, and the ranks' answers
_HERE_S = 4.0  # looks at this machine
_LATE = "this machine is overloaded, or its name server does not answer"


@dataclass(frozen=True)
class Asked:
    """The options.

    `limit_s` None: of our choice; `transfers`: the user wants to register or load here.
    """

    etcd: dict[str, Any]
    limit_s: float | None
    peer: str | None
    rank: int | None
    host: str | None
    protocol: str
    device: str
    transfers: bool
    debug: bool


def examine(asked: Asked) -> list[Finding]:
    """Every finding, in a fixed order. InvalidField where the options are not valid."""
    with ExitStack() as undo:
        probe = Probe(asked.debug)  # first: importing torch takes longest
        undo.callback(probe.close)
        config = _config(asked)
        step_s = asked.limit_s or _STEP_S
        here_s = max(_HERE_S, step_s)
        etcd = EtcdChecks(config, step_s) if config is not None else None
        if etcd is not None:
            undo.callback(etcd.close)
        return run_all(
            [
                *_python_checks(here_s),
                *(
                    etcd.checks()
                    if etcd is not None
                    else [Check("etcd.endpoint", _no_client, _HERE_S, _LATE)]
                ),
                *_machine_checks(asked, config, here_s),
                *_engine_checks(asked, config, probe),
                *_plugin_checks(here_s),
                *([_peer_check(asked, etcd, probe, step_s)] if asked.peer else []),
            ]
        )


def _config(asked: Asked) -> EtcdConfig | None:
    """None where `registry` cannot be imported, which is a finding of another check."""
    try:
        import engine_registry.etcd.client  # noqa: F401  on this thread, so that no check imports it at the same time as another
        from engine_registry.schema.keys import check_instance
    except Exception:  # noqa: BLE001  whatever a broken installation raises
        return None
    if asked.peer is not None:
        check_instance(asked.peer)
    return config_of(asked.etcd)


def _no_client() -> Iterator[Finding]:
    raise Skip("the client of etcd cannot be imported: see python.etcd3")


def _python_checks(here_s: float) -> list[Check]:
    return [
        Check("python.version", python.check_version, here_s, _LATE),
        Check("python.packages", python.check_packages, here_s, _LATE),
        Check("python.etcd3", python.check_etcd3, here_s, _LATE),
    ]


def _plugin_checks(here_s: float) -> list[Check]:
    return [
        Check(f"{each.module}.plugin", partial(plugins.check_plugin, each), here_s, _LATE)
        for each in plugins.installed()
    ]


def _machine_checks(asked: Asked, config: EtcdConfig | None, here_s: float) -> list[Check]:
    rdma_wanted = asked.protocol == "rdma"
    etcd_here = config is not None and all_loopback(config)
    return [
        Check(
            "network.hostname",
            network.check_hostname,
            here_s,
            "the name server does not answer: see /etc/resolv.conf",
        ),
        Check(
            "network.address",
            lambda: network.check_address(_host(asked, config), asked.host is not None, etcd_here),
            here_s,
            _LATE,
        ),
        Check("network.files", network.check_files, here_s, _LATE),
        Check(held.CHECK, held.check_held, here_s, _LATE),
        Check("rdma.devices", lambda: rdma.check_devices(rdma_wanted), here_s, _LATE),
        Check("rdma.memlock", lambda: rdma.check_memlock(rdma_wanted), here_s, _LATE),
        Check("rdma.libibverbs", lambda: rdma.check_libibverbs(asked.protocol), here_s, _LATE),
        *(
            [
                Check(
                    "socket.token",
                    lambda: sockets.check_credentials(lambda: _host(asked, config)),
                    here_s,
                    _LATE,
                )
            ]
            if asked.protocol == "socket"
            else []
        ),
    ]


def _engine_checks(asked: Asked, config: EtcdConfig | None, probe: Probe) -> list[Check]:
    limit_s = engine.IMPORT_S + 2 * engine.ENGINE_S + _HERE_S
    mooncake = asked.transfers and asked.protocol not in python.WITHOUT_MOONCAKE  # is wanted

    def check_engine() -> Iterator[Finding]:
        try:
            host = _host(asked, config)
        except Skip:  # network.address says so; the engine can be tried all the same
            host = "127.0.0.1"
        probe.begin(host, asked.protocol, asked.device)
        yield from engine.check_engine(probe, asked.protocol, asked.transfers)

    return [
        Check("engine.wheel", lambda: python.check_wheels(mooncake), _HERE_S, _LATE),
        Check(
            "engine.torch",
            lambda: engine.check_torch(probe, asked.protocol, asked.transfers),
            limit_s,
            _LATE,
        ),
        Check("engine.import", check_engine, limit_s, _LATE),
        *(
            [
                Check(
                    "socket.same_host",
                    lambda: sockets.check_same_host(probe, limit_s - 1),
                    limit_s,
                    _LATE,
                )
            ]
            if asked.protocol == "socket"
            else []
        ),
    ]


def _peer_check(asked: Asked, etcd: EtcdChecks | None, probe: Probe, step_s: float) -> Check:
    def check() -> Iterator[Finding]:
        if etcd is None or asked.peer is None:
            raise Skip("the client of etcd cannot be imported: see python.etcd3")
        yield from peer.check_peer(
            etcd.ready(), probe, asked.peer, asked.rank, asked.protocol, asked.device, step_s
        )

    return Check(
        "peer.registered",
        check,
        engine.IMPORT_S + engine.ENGINE_S + 5 * step_s,
        "etcd or a rank stopped answering meanwhile: run it again",
    )


def _host(asked: Asked, config: EtcdConfig | None) -> str:
    """The address that a rank here would register."""
    if asked.host is not None:
        return asked.host
    if config is None:
        raise Skip("the client of etcd cannot be imported: see python.etcd3")
    from engine_registry.errors import EtcdError
    from engine_registry.etcd.client import Etcd

    try:
        return within(_STEP_S, Etcd(config).local_address)
    except (EtcdError, TimeoutError) as exc:
        raise Skip(
            "the way to etcd would show it, and there is none: see etcd.endpoint, or give --host"
        ) from exc
