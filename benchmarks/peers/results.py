"""What has been found so far: one file of JSON for each part, written anew after each turn, so that
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One candidate in one round. `error` has a type and a message; then nothing was found.

    Attributes:
        place: Where: loopback, or a link.
        tensor_set: Its name.
        number: Of the round.
        count, nbytes: Of its tensors.
    """

    place: str
    tensor_set: str
    number: int
    candidate: str
    count: int
    nbytes: int
    found: Found = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.place, self.tensor_set, self.number, self.candidate


class SettingsDiffer(Exception):
    """Turns of other settings are in the file already."""


class PartResults:
    """Of one part; `settings` and `machine` are what it was measured with."""

    def __init__(self, path: Path, settings: Found, machine: Found) -> None:
        """Reads the file if there is one. SettingsDiffer if that is of another run."""
        self._path = path
        self._document: Found = {"settings": settings, "machine": machine, "turns": []}
        if path.exists():
            before = json.loads(path.read_text())
            if before["settings"] != settings:
                raise SettingsDiffer(
                    f"{path} was measured with {before['settings']}, not {settings}: "
                    "choose another folder, or delete that file"
                )
            self._document = before
        self._known = {turn.key for turn in turns_of(self._document)}

    def forget(self, wanted: Callable[[Turn], bool]) -> None:
        """Turns that are to be measured again."""
        turns = [turn for turn in turns_of(self._document) if not wanted(turn)]
        self._document["turns"] = [asdict(turn) for turn in turns]
        self._known = {turn.key for turn in turns}
        self._write()

    def has(self, key: tuple[str, str, int, str]) -> bool:
        return key in self._known

    def add(self, turn: Turn) -> None:
        self._known.add(turn.key)
        self._document["turns"].append(asdict(turn))
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._document) + "\n")
        os.replace(new, self._path)


def turns_of(document: Found) -> Iterator[Turn]:
    return (Turn(**turn) for turn in document["turns"])


def collected(results: Path) -> Found:
    """The documents of all parts by their names: of a folder, or of a file with all of them."""
    if results.is_file():
        everything: Found = json.loads(results.read_text())
        return everything
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
