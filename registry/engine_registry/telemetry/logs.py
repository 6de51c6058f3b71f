"""What log lines say to machines: an event whose name stays, and its facts, beside the sentence for
people.

They are in the record's attribute `fields`, a dictionary of JSON-able values with `event` first.
docs/reference/log-events.md lists them.
"""

from __future__ import annotations

from typing import Any


def fields(event: str, **facts: Any) -> dict[str, Any]:
    """For `extra=` of a logging call.

    Errors are given by the name of their type: the sentence has their text.
    """
    given = {
        name: type(fact).__name__ if isinstance(fact, BaseException) else fact
        for name, fact in facts.items()
    }
    return {"fields": {"event": event, **given}}
