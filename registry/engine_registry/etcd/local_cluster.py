"""A cluster of three members on this machine, for tests of what a client sees when members fail."""

from __future__ import annotations

import contextlib

from engine_registry.errors import EtcdUnavailable
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from engine_registry.lifetime import Closable


class LocalCluster(Closable):
    """Three members on this machine, any of which can be killed and started again."""

    def __init__(self, binary: str | None = None) -> None:
        peers = [free_port() for _ in range(3)]
        initial = ",".join(
            f"m{number}=http://127.0.0.1:{port}" for number, port in enumerate(peers)
        )
        self.members = [
            LocalEtcd(binary=binary, name=f"m{number}", peer_port=port, initial_cluster=initial)
            for number, port in enumerate(peers)
        ]
        self._mark_open()

    @property
    def endpoints(self) -> str:
        return ",".join(member.endpoint for member in self.members)

    def start(self) -> LocalCluster:
        """Starts the members that do not run, and returns when the cluster answers."""
        for member in self.members:
            if not member.running:
                member.launch()
        self.wait_until_healthy()
        return self

    def wait_until_healthy(self, timeout_s: float = 30.0) -> None:
        with contextlib.closing(
            Etcd(EtcdConfig(parse_endpoints(self.endpoints), timeout_s=timeout_s))
        ) as etcd:
            etcd.get("/health")

    def leader(self) -> LocalEtcd:
        """The member that leads now; EtcdUnavailable while there is none."""
        for member in filter(lambda member: member.running, self.members):
            with contextlib.closing(Etcd(EtcdConfig(parse_endpoints(member.endpoint)))) as etcd:
                if etcd.leads():
                    return member
        raise EtcdUnavailable("no member of the cluster leads")

    def __enter__(self) -> LocalCluster:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops all members, and removes their folders. Any number of times."""
        self._mark_closed()
        for member in self.members:
            member.close()

    def _label(self) -> str:
        return f"at {self.endpoints}"
