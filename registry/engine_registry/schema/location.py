"""Where a rank's machine stands: its zone, its rack and its node. Pure.

It is no label. All ranks of an instance have the same labels, by which people find the instance;
its ranks may stand in several racks and zones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine_registry.errors import InvalidField
from engine_registry.schema.printable import short

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Location:
    """Where a machine stands. Each name may be empty: then it is not known.

    Attributes:
        zone: A part of the network that is slow, or costs money, to leave.
        rack: A part of the zone.
        node: The machine. Processes in containers of one machine have host names of their own, so
            only this shows that they share it.

    Raises:
        InvalidField: A name is not valid.

    Example:
        `Location.parse("eu-1a/r17/node-5")`
    """

    zone: str = ""
    rack: str = ""
    node: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        for name in (self.zone, self.rack, self.node):
            if not isinstance(name, str) or (name and not _NAME.fullmatch(name)):
                raise InvalidField(
                    f"location has the name {short(repr(name))}, which is not valid",
                    "use at most 253 of the characters A-Z a-z 0-9 . _ -, with a letter or digit "
                    "at both ends",
                    field="location",
                )

    @classmethod
    def parse(cls, text: str) -> Location:
        """Reads `ZONE[/RACK[/NODE]]`, as `str` writes it.

        Args:
            text: The names. Each may be empty.

        Returns:
            The location.

        Raises:
            InvalidField: A name is not valid, or there are more than three.
        """
        if not isinstance(text, str) or text.count("/") > 2:
            raise InvalidField(
                f"location {short(repr(text))} is not valid",
                "say ZONE, ZONE/RACK or ZONE/RACK/NODE; each name may be empty",
                field="location",
            )
        return cls(*text.split("/"))

    def __str__(self) -> str:
        return f"{self.zone}/{self.rack}/{self.node}".rstrip("/")

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self.zone or self.rack or self.node)

    @property
    def within_zone(self) -> tuple[str, ...]:
        """Names for keys of the node and of the rack, as far as they are known. No two areas have
        the same one, and no zone has one of them.
        """
        node = (f"{self.zone}::{self.node}",) if self.node else ()
        rack = (f"{self.zone}:{self.rack}",) if self.rack else ()
        return node + rack

    @property
    def areas(self) -> tuple[str, ...]:
        """Names for keys of all that it lies in, the smallest first."""
        return (*self.within_zone, self.zone) if self.zone else self.within_zone


UNKNOWN = Location()
