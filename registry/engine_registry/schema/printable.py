"""Text for people, also of what comes from outside. Pure."""

from __future__ import annotations


def is_unicode(text: str) -> bool:
    """False for what Python makes of arguments, variables and names that are no text: half of a
    surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `1,000 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(value: object, most: int = 200) -> str:
    """As text of at most so many characters: what lies in etcd may be of any length."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
