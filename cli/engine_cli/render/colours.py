"""The colours of states and findings. Where output goes to a pipe, or NO_COLOR is set, rich leaves
them out. Needs no `registry`. Pure.
"""

from __future__ import annotations

_STYLES = {
    "ready": "green",
    "ok": "green",
    "loading": "cyan",
    "load": "cyan",
    "updating": "yellow",
    "draining": "yellow",
    "held": "yellow",
    "warn": "yellow",
    "degraded": "red",
    "fail": "bold red",
    "skipped": "dim",
}


def style_of(state: str) -> str:
    """The style, as rich names it, of a text that begins with a state. Empty for other texts."""
    return _STYLES.get(state.partition(" ")[0], "")
