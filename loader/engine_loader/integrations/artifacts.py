"""`CompileCache`: the folder in which an engine keeps what it has compiled, from peers before it
compiles, and for peers after.

The integrations call it from the thread that starts the engine. Whatever fails here, the engine
compiles by itself, after one warning.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_loader.artifacts.pull import ArtifactReport, pull_artifact
from engine_loader.artifacts.push import publish_artifact
from engine_loader.errors import (
    ArtifactInvalid,
    Cancelled,
    DigestMismatch,
    SourceLost,
    SourceUnreachable,
    TornRead,
)
from engine_loader.files.hidden import is_hidden
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import (
    Connect,
    Connection,
    StartEngine,
    connect_registry,
    start_engine_of,
)
from engine_loader.integrations.logs import reason
from engine_loader.integrations.seat import Seat
from engine_loader.options import PublishOptions
from engine_loader.publishing.publication import Publication
from engine_registry.errors import EngineRegistryError
from engine_registry.schema.record import WITHIN_HOST
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
TIMEOUT_S = 60.0  # that a pull may delay the start
_OF_A_PEER = (ArtifactInvalid, Cancelled, DigestMismatch, SourceLost, SourceUnreachable, TornRead)
EntryOf = Callable[[str], str]


class CompileCache:
    """Call `pull` before the engine compiles, `publish` after, and `close` in the end."""

    def __init__(
        self,
        config: IntegrationConfig,
        seat: Seat,
        name: str,
        folder: Path,
        key: Callable[[], Mapping[str, str]],
        *,
        entry_of: EntryOf | None = None,
        connect: Connect = connect_registry,
        start_engine: StartEngine = start_engine_of,
    ) -> None:
        """Neither connects nor starts anything.

        Args:
            config: The user's settings.
            seat: Which rank this process is, for the log.
            name: The name of the artifact.
            folder: Where the engine keeps what it has compiled.
            key: Says what that depends on. It is called by `pull`, as an engine's configuration
                may change while it starts.
            entry_of: Which part of the folder a path in it belongs to: only parts that this start
                has used are published. None publishes the whole folder.
            connect: Makes the registry. For tests.
            start_engine: Makes the transfer engine. For tests.
        """
        self._config, self._seat, self._name, self._folder = config, seat, name, folder
        self._say_key, self._entry_of = key, entry_of
        self._key: Mapping[str, str] = {}
        self._connection = Connection(_of_host_memory(config), connect, start_engine)
        self._report: ArtifactReport | None = None
        self._publication: Publication | None = None
        self._failed = False
        self._fetched: frozenset[str] = frozenset()  # paths that were not there before the pull
        self._before: frozenset[str] = frozenset()  # paths that were there when the engine began
        self._added: int | None = None  # files that are new since then
        self._graphs: tuple[int, int] | None = None
        self._publish_s = 0.0

    def pull(self) -> None:
        """Fills the folder from peers, if some have this key."""
        there = paths_in(self._folder)
        self._try("fetches no compile cache", self._pull)
        self._before = paths_in(self._folder)
        self._fetched = self._before - there

    def publish(
        self,
        used: Iterable[str | os.PathLike[str]] = (),
        graphs: tuple[int, int] | None = None,
    ) -> None:
        """Offers what is in the folder to peers, and says whether what was fetched was of use.

        Args:
            used: Folders that the engine says it has used.
            graphs: How many compiled graphs the compiler has found in its cache, and how many it
                has missed there. None where it does not say.
        """
        if self._added is not None:
            return
        self._graphs = graphs
        added = paths_in(self._folder) - self._before
        self._added = len(added)
        entries = None
        if self._entry_of is not None:
            named = filter(None, (self._within(path) for path in used))
            entries = {self._entry_of(path) for path in (*added, *self._fetched, *named)}
        self._try("offers no compile cache", lambda: self._publish(entries))
        log.info("%s", self._outcome(), extra=fields("compile_cache", **self.facts()))

    def facts(self) -> dict[str, Any]:
        """What was done, as JSON can hold it. `added` is the number of files that the engine has
        added since the pull, None before `publish`. `graphs_found` and `graphs_missed` are what
        its compiler says, or None.
        """
        found, missed = self._graphs or (None, None)
        report = self._report
        return {
            "rank": str(self._seat),
            "fetched": report.files if report is not None else 0,
            "nbytes": report.nbytes if report is not None else 0,
            "pull_s": round(report.seconds, 3) if report is not None else None,
            "sources": list(report.sources) if report is not None else [],
            "added": self._added,
            "graphs_found": found,
            "graphs_missed": missed,
            "publish_s": round(self._publish_s, 3),
            "serves": self._publication is not None,
        }

    def close(self) -> None:
        """Withdraws what is offered, any number of times."""
        publication, self._publication = self._publication, None
        for resource in (publication, self._connection):
            if resource is not None:
                with suppress(EngineRegistryError):
                    resource.close()

    def _pull(self) -> None:
        self._key = self._say_key()
        self._report = pull_artifact(
            self._connection.registry,
            self._connection.engine,
            self._name,
            self._folder,
            self._key,
            timeout_s=min(TIMEOUT_S, self._config.timeout_s),
        )
        if self._report is not None:
            log.info(
                "%s has fetched %d files of compile cache, %.1f MB, from %s in %.1f s",
                self._seat,
                self._report.files,
                self._report.nbytes / 1e6,
                ", ".join(self._report.sources),
                self._report.seconds,
                extra=fields("compile_cache_fetched", rank=str(self._seat), **self._report.facts()),
            )

    def _publish(self, entries: set[str] | None) -> None:
        if not self._before and not self._added:
            return
        began = time.monotonic()
        self._publication = publish_artifact(
            self._connection.registry,
            self._connection.engine,
            self._name,
            self._folder,
            self._key,
            only=entries,
            options=PublishOptions(labels=self._config.labels),
        )
        self._publish_s = time.monotonic() - began

    def _within(self, path: str | os.PathLike[str]) -> str:
        """As a path in the folder; empty where it is not below it."""
        try:
            return str(Path(path).resolve().relative_to(self._folder.resolve()))
        except ValueError:
            return ""

    def _outcome(self) -> str:
        facts = self.facts()
        said = f"{self._seat} has fetched {facts['fetched'] or 'no'} files of compile cache"
        if self._graphs is not None:
            said += ", has found {} graphs in its cache and missed {}".format(*self._graphs)
        said += f", and has added {facts['added']} files"
        return said + (", and serves all to peers" if facts["serves"] else "")

    def _try(self, without: str, act: Callable[[], None]) -> None:
        """The engine starts in any case. What fails of one peer keeps it from no other."""
        if self._failed:
            return
        try:
            act()
        except Exception as exc:  # noqa: BLE001
            log.warning(
                "%s %s: %s",
                self._seat,
                without,
                reason(exc),
                extra=fields("artifacts_failed", rank=str(self._seat), error=exc),
            )
            if not isinstance(exc, _OF_A_PEER):
                self._failed = True
                self.close()


def _of_host_memory(config: IntegrationConfig) -> IntegrationConfig:
    """The protocols within a host are for the memory of GPUs."""
    if config.protocol not in WITHIN_HOST:
        return config
    return replace(config, protocol="tcp", device="")


def paths_in(folder: Path) -> frozenset[str]:
    """All files below the folder, but for those in hidden folders of ours."""
    found = set()
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found |= {os.path.relpath(os.path.join(above, name), folder) for name in files}
    return frozenset(found)
