"""Hidden folders in which files are written until they are complete. Used by `write_weights`,
`WholeFiles` and `unpack`.

A writer holds a lock on its folder. The kernel takes the lock away when the process ends, however
it ends, so the next writer knows what a killed one has left. A lock may not be seen from another
host, so only folders of this host are swept: a name says whose it is.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_SUFFIX = ".partial"
FORMER = "former-"  # begins the name of a file that is being replaced


@contextmanager
def hidden_folder(folder: Path) -> Iterator[Path]:
    """Within `folder`, until the block ends. OSError where there can be none."""
    with ExitStack() as undo:
        while not (hidden := _locked(folder, undo)):
            undo.pop_all().close()  # a sweeping writer had it before us
        undo.callback(shutil.rmtree, hidden, ignore_errors=True)
        yield hidden


def sweep(folder: Path) -> None:
    """Deletes what killed writers of this host have left in the folder."""
    for hidden in folder.glob(f"{_prefix()}????????{_SUFFIX}"):  # as mkdtemp makes them
        with ExitStack() as undo, suppress(OSError):
            if not _lock(hidden, undo):
                continue
            kept = sorted(hidden.glob(f"{FORMER}*"))
            if kept:
                log.warning(
                    "%s was left by a process that was killed while it replaced files, and holds "
                    "%s: move what you want to keep, and delete the folder",
                    hidden,
                    kept[0].name,
                    extra=fields("partial_kept", path=str(hidden)),
                )
                continue
            shutil.rmtree(hidden)
            log.info(
                "%s was left by a process that was killed, and is deleted",
                hidden,
                extra=fields("partial_swept", path=str(hidden)),
            )


def is_hidden(name: str) -> bool:
    """Whether a folder of this name is one of ours, of any host."""
    return name.startswith(".") and name.endswith(_SUFFIX)


def _prefix() -> str:
    return f".{socket.gethostname()}."


def _locked(folder: Path, undo: ExitStack) -> Path | None:
    """None where another process took it for left over."""
    hidden = Path(tempfile.mkdtemp(prefix=_prefix(), suffix=_SUFFIX, dir=folder))
    try:
        return hidden if _lock(hidden, undo) else None
    except OSError:  # a file system without locks: nothing is swept there either
        return hidden


def _lock(hidden: Path, undo: ExitStack) -> bool:
    """Until `undo` is closed. False where another has the lock, or has deleted the folder.

    OSError where there can be no lock.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(hidden, flags)
        undo.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), hidden.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
