"""The guest's disk: `python -m scripts.rdma.image UNPACKED IMAGE`, called by setup.sh.

An ext4 file system with this Python, the packages that the project and its tests import, the
libraries that these are linked against, busybox, and what is in UNPACKED (Debian packages of RDMA).
The project itself is not on it: each run sends that to the guest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("engine-registry[cpu]", "pytest", "pytest-timeout")
SITE = Path("/site-packages")
PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
# Of packages, but never imported by us.
_LEFT_OUT = re.compile(
    r"torch/(include|share|test)/|torch/bin/(?!torch_shm)|mooncake/(mooncake_|transfer_engine_|store\.so)"
    r"|\.(a|pyi|h|cuh|hpp)$|/tests?/|^\.\./"
)
_LEFT_OUT_OF_PYTHON = {"site-packages", "dist-packages", "test", "idlelib", "tkinter", "ensurepip"}
_TOOLS = ("rdma", "ibv_devinfo", "ibv_rc_pingpong")
_SPARE_NBYTES = 64 << 20


def distributions(packages: tuple[str, ...]) -> Iterator[Distribution]:
    """The packages and all that they require here."""
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(package), "") for package in packages]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # for another system
        if (found.name, "") not in seen:
            yield found
        for wanted in ("", *requirement.extras):
            if (found.name, wanted) not in seen:
                seen.add((found.name, wanted))
                waiting += [(Requirement(line), wanted) for line in found.requires or []]


def files_of_packages() -> Iterator[tuple[Path, Path]]:
    """Each file, and its place in the guest."""
    for package in distributions(PACKAGES):
        for file in package.files or []:
            if not _LEFT_OUT.search(str(file)):
                yield Path(str(file.locate())), SITE / file


def files_of_python() -> Iterator[tuple[Path, Path]]:
    """At the places that they have here, by which Python finds them."""
    yield PYTHON, PYTHON
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    for name in ("stdlib", "platstdlib"):
        folder = Path(
            sysconfig.get_path(
                name,
                vars={
                    **base,
                    "installed_base": sys.base_prefix,
                    "installed_platbase": sys.base_exec_prefix,
                },
            )
        )
        for path in folder.rglob("*"):
            if path.is_file() and not _LEFT_OUT_OF_PYTHON & set(path.relative_to(folder).parts):
                yield path, path


def files_of_rdma(unpacked: Path) -> Iterator[tuple[Path, Path]]:
    for name in _TOOLS:
        for folder in ("usr/bin", "bin", "usr/sbin", "sbin"):
            if (unpacked / folder / name).exists():
                yield unpacked / folder / name, Path("/bin") / name
    for pattern in ("etc/libibverbs.d/*", "usr/lib/*/libibverbs/*"):
        for path in unpacked.glob(pattern):
            yield path, Path("/") / path.relative_to(unpacked)


def libraries(files: dict[Path, Path], unpacked: Path) -> Iterator[tuple[Path, Path]]:
    """What the programs and libraries among the files are linked against."""
    linked = [str(path) for path in files.values() if _is_elf(path)]
    folder = next(unpacked.glob("usr/lib/*/libibverbs")).parent
    out = subprocess.run(
        ["ldd", *linked],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,  # some are linked statically
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
    ).stdout
    for found in sorted(set(re.findall(r"(?:=> )?(/\S+) \(0x", out))):
        path = Path(found)
        if path in files:
            continue
        if path.name.startswith("ld-linux"):
            yield path.resolve(), path
        elif SITE not in path.parents and "site-packages" not in path.parts:
            yield path.resolve(), Path("/lib") / path.name


def _is_elf(path: Path) -> bool:
    if ".so" not in path.name and not os.access(path, os.X_OK):
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def lay_out(root: Path, unpacked: Path) -> int:
    """Links or copies everything into its place under `root`. Returns the bytes."""
    files: dict[Path, Path] = {}
    for found in (files_of_packages(), files_of_python(), files_of_rdma(unpacked)):
        files.update({there: here for here, there in found})
    files.update({there: here for here, there in libraries(files, unpacked)})
    files[Path("/bin/busybox")] = Path(shutil.which("busybox") or "/bin/busybox")
    here = Path(__file__).parent
    files[Path("/guest/main.sh")] = here / "main.sh"
    files[Path("/guest/retry_count.so")] = unpacked.parent / "retry_count.so"
    files[Path("/guest/agent.py")] = here.parents[1] / "tests/rdma/agent.py"
    for there, path in files.items():
        target = root / there.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target)
        except OSError:  # on another file system
            shutil.copy2(path, target)
    for name in ("dev", "proc", "sys", "tmp", "run", "project", "etc"):
        (root / name).mkdir(exist_ok=True)
    (root / "guest/python").symlink_to(PYTHON)
    (root / "etc/ld.so.conf").write_text("/lib\n/usr/lib\n")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    subprocess.run(["ldconfig", "-r", str(root)], check=True)
    return sum(path.stat().st_size for path in files.values())


def main(unpacked: str, image: str) -> None:
    with tempfile.TemporaryDirectory(dir=Path(image).parent, prefix="root-") as folder:
        nbytes = lay_out(Path(folder), Path(unpacked).resolve())
        blocks = (int(nbytes * 1.1) + _SPARE_NBYTES) >> 10
        Path(image).unlink(missing_ok=True)
        subprocess.run(
            ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", folder, image, f"{blocks}k"],
            check=True,
        )
    print(f"{nbytes >> 20} MiB")  # noqa: T201  said by setup.sh


if __name__ == "__main__":
    main(*sys.argv[1:])
