"""What a load of the released version loads: the contents of the release, as etcd has it.

Used by every call that takes LoadOptions, before it looks for sources.
"""

from __future__ import annotations

import time
from dataclasses import replace

from engine_loader.errors import Cancelled, VersionUnavailable
from engine_loader.options import RELEASED, LoadOptions
from engine_registry import ModelIdentity, Registry, Release
from engine_registry.watching.waiting import Wanted


def pinned(
    registry: Registry, source: Wanted, options: LoadOptions, timeout_s: float
) -> LoadOptions:
    """The options with the version and the contents of the release in the place of `released`.

    Waits until there is a release. Raises VersionUnavailable where there is none, or its ranks do
    not hold it any more, and what `Registry.ready` raises.
    """
    if options.version != RELEASED:
        return options
    if options.contents is not None:  # of the release that another process has found
        return replace(options, version=None)
    deadline = time.monotonic() + timeout_s
    release = registry.released(source, timeout_s, options.cancel)
    if options.cancel is not None and options.cancel.is_set():
        raise Cancelled("the load was cancelled")
    if release is None:
        raise VersionUnavailable(
            f"no version of {_name_of(source)} is released, after {timeout_s:.3g} s",
            "release one with `Publication.release`, or leave `version` out",
            version=RELEASED,
            served=[],
        )
    contents = release.contents or _contents_of(registry, release, options, deadline)
    return replace(options, version=release.version, contents=contents)


def _contents_of(
    registry: Registry, release: Release, options: LoadOptions, deadline: float
) -> tuple[str, ...]:
    """Those of an instance with so many ranks that the release has only their digest."""
    wait_s = max(0.0, deadline - time.monotonic())
    (status,) = registry.ready(release.instance, wait_s, options.cancel)
    contents = status.as_of(release.version).contents
    if not release.is_of(release.version, contents):
        raise VersionUnavailable(
            f"version {release.version} of {release.instance} is released, and not all of its "
            "ranks hold it any more",
            "load the weights that are served now, or wait for the next release",
            version=release.version,
            served=[] if status.version is None else [status.version],
        )
    return contents


def _name_of(source: Wanted) -> str:
    if isinstance(source, str | ModelIdentity):
        return str(source)
    return " or ".join(source)
