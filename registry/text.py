"""Text from outside. Pure."""

from __future__ import annotations


def is_unicode(text: str) -> bool:
    """False for what Python makes of arguments, variables and names that are no text: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
