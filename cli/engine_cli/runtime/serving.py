"""A rank that serves until it is asked to end, and how it leaves. Used by `register` and
`load --serve`.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import TYPE_CHECKING

import click

from engine_cli.options import Seconds
from engine_cli.signals import on_ending
from engine_registry import RegistrationState

if TYPE_CHECKING:
    from engine_loader import Publication

drain_option = click.option(
    "--drain",
    type=Seconds(),
    default=25.0,
    show_default=True,
    metavar="S",
    help=(
        "How long to let running loads finish at the end; a second Ctrl-C or SIGTERM does not wait."
    ),
)

_LOST = "lost"


class Endings:
    """The reasons to go on towards the end, as they come: a signal, the end of standard input, the
    registration's loss, drained, or what went wrong with that.
    """

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def listen(self, until_eof: bool = False) -> None:
        """From now on signals are such reasons."""
        on_ending(lambda: self._inbox.put("signal"))
        if until_eof:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        self._inbox.put("end of input")

    def on_state(self, state: RegistrationState, why: str) -> None:
        if state is RegistrationState.LOST:
            self._inbox.put(_LOST)

    def _drain(self, publication: Publication, timeout_s: float) -> None:
        def drain() -> None:
            try:
                publication.drain(timeout_s)
                self._inbox.put("drained")
            except Exception as exc:  # noqa: BLE001  raised again by the thread that waits
                self._inbox.put(exc)

        threading.Thread(target=drain, daemon=True).start()

    def hold(self, publication: Publication, drain_s: float) -> None:
        """Until there is a reason to end; then drains, unless the registration is lost, or a second
        signal comes.
        """
        if self._inbox.get() == _LOST:
            return
        self._drain(publication, drain_s)
        ending = self._inbox.get()  # drained, or asked to hurry
        if isinstance(ending, Exception):
            raise ending

    def say(self, publication: Publication, *, err: bool = False) -> None:
        """When the publication is closed: raises why it was lost, if it was."""
        if publication.registration.lost is not None:
            raise publication.registration.lost
        if publication.registration.withdrawn:
            click.echo(f"withdrew {publication.record.instance}/{publication.record.rank}", err=err)
