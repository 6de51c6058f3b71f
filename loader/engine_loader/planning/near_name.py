"""Which tensor of a source may have been meant. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

_LIKENESS = 0.8  # of 1; below it, names are guesses
_NUMBER = re.compile("[0-9]+")
_MOST_COMPARED = 2_000  # letter by letter, which takes long


def near_name(name: str, known: Collection[str]) -> str:
    """The known name that has more or fewer parts in front, else the one that is most like it.
    Empty if there is none.
    """
    for other in known:
        if other.endswith(f".{name}") or name.endswith(f".{other}"):
            return other
    if len(known) > _MOST_COMPARED:
        return ""
    numbers = _NUMBER.findall(name)  # another layer is no slip
    alike = [other for other in known if _NUMBER.findall(other) == numbers]
    return next(iter(difflib.get_close_matches(name, alike, 1, _LIKENESS)), "")
