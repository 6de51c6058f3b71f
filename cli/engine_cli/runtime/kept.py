"""The events that a watch keeps in a file, for `engines events`: one JSON object a line, in a file
and the one before it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from engine_registry.errors import InvalidField
from engine_registry.schema.moment import moment
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
MAX_NBYTES = 16 << 20  # of each of the two files


class KeptEvents:
    """A file that one process appends to. A context manager.

    When it is full, it takes the place of the one before it, whose name ends with `.1`.
    """

    def __init__(self, path: Path, max_nbytes: int = MAX_NBYTES) -> None:
        self._path = path
        self._max_nbytes = max_nbytes
        self._file = -1
        self._failed = False  # at the last event
        self._torn = False  # the last line is not whole

    def __enter__(self) -> KeptEvents:
        """InvalidField where the file cannot be written, or another process appends to it."""
        try:
            self._open()
        except BlockingIOError as exc:
            raise InvalidField(
                f"another process keeps events in {self._path}", "name another file", field="keep"
            ) from exc
        except OSError as exc:
            raise InvalidField(
                f"events cannot be kept in {self._path}: {exc.strerror}", field="keep"
            ) from exc
        return self

    def put(self, data: dict[str, Any]) -> None:
        """A watch goes on where this fails: it may clean up, too."""
        line = json.dumps(data, separators=(",", ":")).encode() + b"\n"
        try:
            size = os.fstat(self._file).st_size
            if size and size + len(line) > self._max_nbytes:
                full = self._file
                os.replace(self._path, before(self._path))
                self._open()
                os.close(full)
            line = b"\n" + line if self._torn else line
            self._torn = os.write(self._file, line) < len(line)
            self._failed = False
        except OSError as exc:
            if not self._failed:
                log.warning(
                    "events are not kept in %s: %s",
                    self._path,
                    exc,
                    extra=fields("events_not_kept", path=str(self._path), error=exc),
                )
            self._failed = True

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o666)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(self._file).st_size
        self._torn = bool(size) and os.pread(self._file, 1, size - 1) != b"\n"


def before(path: Path) -> Path:
    """The file that was full before."""
    return path.with_name(f"{path.name}.1")


def kept_since(path: Path, since: datetime) -> Iterator[dict[str, Any]]:
    """The events from then on, the oldest first. Lines that hold none are left out.

    InvalidField where the file cannot be read.
    """
    for each in (before(path), path):
        try:
            lines = each.open("rb")
        except FileNotFoundError:
            if each == path:
                raise InvalidField(
                    f"{path} does not exist",
                    "name the file that a watch keeps: `engines watch --keep FILE`",
                    field="file",
                ) from None
            continue
        except OSError as exc:
            raise InvalidField(f"{each} cannot be read: {exc.strerror}", field="file") from exc
        with lines:
            for line in lines:
                event = _event(line)
                if event is not None and moment(event["at"]) >= since:
                    yield event


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
        is_event = moment(data["at"]).tzinfo and isinstance(data["text"], str)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return data if is_event else None
