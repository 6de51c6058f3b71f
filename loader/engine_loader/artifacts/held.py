"""Which artifacts the instances of a registry offer. Pure; used by `engines artifacts`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine_loader.artifacts.key import ArtifactName
from engine_registry import InstanceState, InstanceStatus, RankRecord


@dataclass(frozen=True)
class Held:
    """An artifact in one content, and the ranks that offer it."""

    name: ArtifactName
    content: str
    records: Sequence[RankRecord]

    @property
    def nbytes(self) -> int:
        return self.records[0].manifest.nbytes


def held_in(statuses: Iterable[InstanceStatus]) -> list[Held]:
    """By name and key. Instances that are not ready, and hold no artifact, are left out."""
    found: defaultdict[tuple[str, str], list[RankRecord]] = defaultdict(list)
    names: dict[str, ArtifactName] = {}
    for status in statuses:
        name = ArtifactName.of(status.model)
        if name is not None and status.state is InstanceState.READY:
            names[str(name)] = name
            found[str(name), status.records[0].content] += status.records
    return [
        Held(names[name], content, records) for (name, content), records in sorted(found.items())
    ]
