"""Text that may go to a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line without control characters, which could move the cursor or worse: each is shown as
    its escape.
    """
    return (
        text
        if text.isprintable()
        else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    )
