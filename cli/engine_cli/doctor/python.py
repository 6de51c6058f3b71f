"""The interpreter and its packages: the right versions, and etcd3 beside this protobuf."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from engine_cli.doctor.finding import Finding, Status, fail, ok, warn
from engine_registry.schema.printable import count

_OLDEST, _WITHOUT_ENGINE = (3, 10), (3, 14)
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?P<op>>=|==)\s*(?P<version>[0-9.]+)"
)
_OLDER_ONLY = re.compile(r"python_version\s*<\s*['\"](\d+)\.(\d+)['\"]")
WHEELS = {
    "mooncake-transfer-engine-non-cuda": "cpu",
    "mooncake-transfer-engine": "cuda12",
    "mooncake-transfer-engine-cuda13": "cuda13",
}
WITHOUT_MOONCAKE = ("socket", "cuda_ipc")  # protocols
INSTALL = "pip install 'engine-registry[cpu]' (or [cuda12], [cuda13] on GPU machines)"


def check_version() -> Iterator[Finding]:
    yield judge_version(sys.version_info[:3])


def judge_version(version: Sequence[int]) -> Finding:
    said = f"Python {'.'.join(map(str, version))}"
    if tuple(version[:2]) < _OLDEST:
        return fail("python.version", f"{said} is not supported", "use Python 3.10 to 3.13")
    if tuple(version[:2]) >= _WITHOUT_ENGINE:
        return warn(
            "python.version",
            f"{said}: the transfer engine has no wheels for it",
            "use Python 3.10 to 3.13 to publish and load weights",
        )
    return ok("python.version", said)


def check_packages() -> Iterator[Finding]:
    try:
        required = metadata.requires("engine-registry") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        required = []
    yield judge_packages(required, _installed())


def check_wheels(wanted: bool) -> Iterator[Finding]:
    yield judge_wheels(sorted(wheel for wheel in WHEELS if _version(wheel)), wanted)


def _installed() -> dict[str, str]:
    """Versions by name."""
    # read once: each look at `metadata` or `version` parses the whole text again
    texts = (each.metadata for each in metadata.distributions())
    return {text["Name"].lower(): text["Version"] for text in texts if text["Name"]}


def judge_packages(required: Sequence[str], installed: Mapping[str, str]) -> Finding:
    """`required` as in the distribution's metadata.

    Packages of extras count where they are installed.
    """
    name, wrong, seen = "python.packages", list[str](), list[str]()
    for line in required:
        text, _, marker = line.partition(";")
        found = _REQUIREMENT.match(text)
        package = found["name"].lower() if found else ""
        version = installed.get(package)
        older = _OLDER_ONLY.search(marker)
        if (
            found is None
            or (older is not None and sys.version_info >= (int(older[1]), int(older[2])))
            or (version is None and "extra" in marker)
            or "'dev'" in marker
            or '"dev"' in marker
        ):
            continue
        if version is None:
            wrong.append(f"{package} is missing")
        elif not _meets(version, found["op"], found["version"]):
            wrong.append(
                f"{package} {version} is installed, "
                f"{found['op']}{found['version'].rstrip('.')} is needed"
            )
        else:
            seen.append(package)
    if wrong:
        return fail(
            name,
            "; ".join(sorted(set(wrong))),
            "pip install --upgrade engine-registry, or a separate virtual environment",
        )
    return ok(
        name,
        f"{count(len(set(seen)), 'package')}, each of a version that will do"
        if seen
        else "not known which are needed: not installed by pip",
    )


def _meets(version: str, op: str, wanted: str) -> bool:
    have, want = _numbers(version), _numbers(wanted)
    return have[: len(want)] == want if op == "==" else have >= want


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", version)[0]))


def judge_wheels(wheels: Sequence[str], wanted: bool) -> Finding:
    """`wanted`: the user asks for transfers, so that none is there is a failure."""
    name = "engine.wheel"
    if len(wheels) > 1:
        return fail(
            name,
            f"{len(wheels)} transfer engines are installed, and each overwrites the others' "
            f"module: {', '.join(wheels)}",
            f"pip uninstall -y {' '.join(wheels)}, then {INSTALL}",
        )
    if not wheels:
        what = (
            "no transfer engine is installed: list, show, watch and evict work, register and "
            "load do not"
        )
        return Finding(name, Status.FAIL if wanted else Status.WARN, what, INSTALL)
    return ok(name, f"{wheels[0]} {_version(wheels[0])}, extra [{WHEELS[wheels[0]]}]")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def check_etcd3() -> Iterator[Finding]:
    error: Exception | None = None
    try:
        import engine_registry.etcd.client  # noqa: F401
    except Exception as exc:  # noqa: BLE001  protobuf raises its own TypeErrors
        error = exc
    yield judge_etcd3(error, _version("etcd3"), _version("protobuf"), _version("grpcio"))


def judge_etcd3(error: Exception | None, etcd3: str, protobuf: str, grpcio: str) -> Finding:
    name = "python.etcd3"
    versions = (
        f"etcd3 {etcd3 or 'missing'}, protobuf {protobuf or 'missing'}, grpcio "
        f"{grpcio or 'missing'}"
    )
    if error is not None:
        return fail(
            name,
            f"the client of etcd cannot be imported with {versions}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}",
            "pip install --force-reinstall 'etcd3==0.12.*' 'protobuf>=3.20.3' 'grpcio>=1.66.2'",
        )
    return ok(name, f"{versions} work together")
