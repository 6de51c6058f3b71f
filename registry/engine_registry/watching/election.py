"""Of all processes that campaign under one name, one leads at a time.

`watching.campaign` does the work, in a thread.
"""

from __future__ import annotations

from engine_registry.errors import EtcdRefused
from engine_registry.etcd.client import Etcd
from engine_registry.lifetime import Closable
from engine_registry.schema.record import RankRecord
from engine_registry.watching.campaign import Campaign


class Election(Closable):
    """Campaigns from `start`, or the begin of the `with` block, to `close`, in a thread."""

    def __init__(self, etcd: Etcd, name: str) -> None:
        """`etcd` is for this election alone, which closes it at the end."""
        self._name = name
        self._campaign = Campaign(etcd, name)

    def start(self) -> Election:
        """Begins to campaign, in a thread. Returns the election itself."""
        self._campaign.start()
        self._mark_open()
        return self

    @property
    def leading(self) -> bool:
        """Whether this process leads now, by its own clock; never longer than its lease lives."""
        return self._campaign.leading

    @property
    def refusal(self) -> EtcdRefused | None:
        """Why this process cannot lead: etcd refuses it. None if it does not."""
        return self._campaign.refusal

    @property
    def unreachable_since(self) -> float | None:
        """When etcd was lost, on the clock of time.monotonic; None while it can be reached, as far
        as is known. Until etcd has answered for the first time, when the campaign began.
        """
        return self._campaign.unreachable_since

    def keep_with(self, record: RankRecord) -> bool:
        """From now on we lead for as long as this registration of ours is held, or until `close`;
        False if we do not lead.

        Its keeper renews the lease whatever our threads do, and ends it as soon as our process has
        ended; where it holds our memory then, when it lets go.
        """
        return self._campaign.keep_with(record)

    def keep_for(self, ttl_s: float) -> bool:
        """After `keep_with`: that registration may end from now on, and we lead for `ttl_s`
        seconds, or until `close`. False if no registration of ours keeps the lead.
        """
        return self._campaign.keep_for(ttl_s)

    def close(self) -> None:
        """Stops campaigning; if we lead, the next one takes over at once. Any number of times."""
        self._mark_closed()
        self._campaign.close()

    def __enter__(self) -> Election:
        return self.start()

    def _label(self) -> str:
        return self._name
