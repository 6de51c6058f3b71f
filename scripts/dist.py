"""Builds the sdist and the wheel into dist/, and tries the wheel on each Python of this machine:
`make dist`.

The wheel is built from the sdist, as a packager would. Each try has an empty environment in a
temporary folder, with the pins of constraints.txt, and runs scripts/smoke.py there. Weights are
loaded with the Python of .venv alone, for which pip has a torch already; the others try the
registry and the command.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
MINORS = range(10, 15)  # of Python 3
WITH_TORCH = sys.version_info[:2]


def main() -> None:
    found = list(pythons())
    if not found:
        raise SystemExit("dist: no Python to try the wheel on: put one of 3.10 to 3.14 on PATH")
    with tempfile.TemporaryDirectory(prefix="engines-dist-") as folder:
        wheel = build(Path(folder))
        check_metadata(wheel)
        for version, python in found:
            try_on(version, python, wheel, Path(folder))


def say(text: str) -> None:
    sys.stdout.write(f"dist: {text}\n")
    sys.stdout.flush()


def run(*args: str | Path, cwd: Path = ROOT) -> str:
    ran = subprocess.run(args, cwd=cwd, env=ENV, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"dist: failed: {' '.join(map(str, args))}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


ENV = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
PINS = ("--constraint", ROOT / "constraints.txt")


def build(scratch: Path) -> Path:
    """The wheel; it and the sdist are all that is in dist/."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", DIST)
    (sdist,) = DIST.glob("*.tar.gz")
    pins = ("--build-constraint", ROOT / "constraints.txt")
    run(sys.executable, *PIP, "wheel", "--no-deps", *pins, "-w", scratch / "wheel", sdist)
    (wheel,) = (scratch / "wheel").glob("*.whl")
    for path in (sdist, Path(shutil.copy(wheel, DIST))):
        say(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:,.0f} kB")
    return DIST / wheel.name


def check_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=True)
    if not metadata.project_urls:
        say("the metadata has no URLs: give pyproject.toml [project.urls] before a release")


def pythons() -> Iterator[tuple[tuple[int, int], str]]:
    """The first of each version: on PATH, or in pyenv's folder."""
    pyenv = shutil.which("pyenv")
    versions = Path(run(pyenv, "root").strip()) / "versions" if pyenv else Path("/nonexistent")
    for minor in MINORS:
        here = [f"python3.{minor}", *map(str, versions.glob(f"3.{minor}.*/bin/python3"))]
        works = next((each for each in here if version_of(each) == (3, minor)), None)
        if works:
            yield (3, minor), works
        else:
            say(f"Python 3.{minor}: not on this machine")


def version_of(python: str) -> tuple[int, ...] | None:
    code = "import sys; print(*sys.version_info[:2])"
    try:
        ran = subprocess.run([python, "-c", code], env=ENV, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # a shim of pyenv for another version
        return None
    return tuple(map(int, ran.stdout.split()))


def try_on(version: tuple[int, int], python: str, wheel: Path, scratch: Path) -> None:
    extras = "cpu,local" if version == WITH_TORCH else "local"
    place = scratch / f"python{version[1]}"
    run(python, "-m", "venv", place)
    run(place / "bin" / "python", *PIP, "install", *PINS, f"{wheel}[{extras}]")
    empty = place / "empty"
    empty.mkdir()
    said = run(place / "bin" / "python", "-I", ROOT / "scripts" / "smoke.py", cwd=empty)
    say(f"Python {version[0]}.{version[1]}, [{extras}]: {said.strip()}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
