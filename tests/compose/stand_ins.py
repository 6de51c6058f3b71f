"""The images that docker-compose.yml and the Dockerfile begin with: those that the daemon has or
can pull, or else stand-ins.

A stand-in has the name of the real image and takes its place on a machine that reaches no image
registry. What it cannot show is what depends on the real image: that etcd is 3.6, and that pip and
apt find everything on their own.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from engine_registry.etcd.local import find_binary
from tests.compose.daemon import INSTALL, Docker, DockerMissing, run
from tests.support.checkout import ROOT

_PULL_S = 300
_DEBOOTSTRAP_S = 600
# The Debian packages that the Dockerfile asks for, so that its `apt-get install` finds them without
# a network.
_PACKAGES = (
    "ca-certificates,ibverbs-providers,libcurl4,libibverbs1,libnuma1,"
    "python3,python3-pip,python3-venv"
)


@contextlib.contextmanager
def base_images(docker: Docker, say: Callable[[str], None]) -> Iterator[None]:
    """Whatever was not there before is removed at the end."""
    made: list[str] = []
    try:
        for name, make in _WANTED.items():
            if docker.can("image", "inspect", name):
                say(f"{name}: the image that is on this machine")
                continue
            made.append(name)
            if not docker.own and docker.can("pull", "--quiet", name, timeout_s=_PULL_S):
                say(f"{name}: pulled")
            else:
                say(
                    f"{name}: no registry can be reached; a STAND-IN made here of "
                    f"{make(docker, name)}"
                )
        yield
    finally:
        for name in made:
            docker.can("image", "rm", name)


def _etcd(docker: Docker, name: str) -> str:
    binary = Path(find_binary())
    with _root_filesystem() as root:
        programs = root / "usr" / "local" / "bin"
        programs.mkdir(parents=True)
        (root / "tmp").mkdir()
        for program in (binary, binary.with_name("etcdctl")):
            shutil.copy(program, programs)
        _import(docker, root, name, 'CMD ["/usr/local/bin/etcd"]')
    version = run([str(binary), "--version"], docker.env, 20).splitlines()[0]
    return f"the embedded etcd ({version})"


def _python(docker: Docker, name: str) -> str:
    """Debian as debootstrap makes it, with its own Python, and all wheels that the Dockerfile
    wants.
    """
    if shutil.which("debootstrap") is None:
        raise DockerMissing(
            f"{name} cannot be pulled, and there is no debootstrap to make a stand-in: {INSTALL}"
        )
    mirror, suite = _debian()
    with _root_filesystem() as root:
        run(
            [
                "debootstrap",
                "--variant=minbase",
                f"--include={_PACKAGES}",
                suite,
                str(root),
                mirror,
            ],
            docker.env,
            _DEBOOTSTRAP_S,
        )
        (
            root / "etc" / "apt" / "sources.list"
        ).unlink()  # without a network there is nothing to update from
        for mark in root.glob(
            "usr/lib/python3*/EXTERNALLY-MANAGED"
        ):  # the real image's pip installs where its options say
            mark.unlink()
        (root / "usr" / "bin" / "python").symlink_to("python3")
        version = Path((root / "usr" / "bin" / "python3").readlink()).name.removeprefix("python")
        _collect_wheels(root / "wheels", version, docker.env)
        (root / "etc" / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        _import(docker, root, name, 'CMD ["python3"]')
    return f"Debian {suite} with its Python {version} and a folder of wheels"


def _debian() -> tuple[str, str]:
    """Where this machine's apt has its packages from, and which Debian that is."""
    if shutil.which("apt-get") is None:
        raise DockerMissing(
            "no image registry can be reached, and only Debian's apt gives a stand-in for "
            "the base image"
        )
    os_release = Path("/etc/os-release").read_text()
    found = re.search(r"^VERSION_CODENAME=(\w+)$", os_release, re.MULTILINE)
    suite = found[1] if found else ""
    form = "$(REPO_URI) $(CODENAME) $(ORIGIN) $(COMPONENT)"
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", form], capture_output=True, text=True, check=True
    ).stdout
    for line in targets.splitlines():
        mirror, *rest = line.split()
        if rest == [suite, "Debian", "main"]:
            return mirror, suite
    raise DockerMissing(
        "no image registry can be reached, and apt knows no Debian to make a stand-in for "
        "the base image from"
    )


def _collect_wheels(folder: Path, version: str, env: dict[str, str]) -> None:
    """What the Dockerfile's pip will ask for, for that Python, which need not be ours."""
    ours = [
        each for each in map(Requirement, requires("engine-registry") or ()) if _is_wanted(each)
    ]
    wanted = [*(f"{each.name}{_extras(each)}{each.specifier}" for each in ours), "hatchling", "pip"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pins = ["--constraint", str(ROOT / "constraints.txt")]
    # etcd3 is there as source only. It is pure Python, so a wheel of it fits every version.
    etcd3 = next(name for name in wanted if name.startswith("etcd3"))
    run([*pip, "wheel", *pins, "--no-deps", "--wheel-dir", str(folder), etcd3], env, 300)
    only = ["--only-binary=:all:", "--python-version", version, "--find-links", str(folder)]
    run([*pip, "download", *pins, *only, "--dest", str(folder), *wanted], env, 1800)


def _is_wanted(requirement: Requirement) -> bool:
    extras = ("cpu", "gateway", "metrics")  # those of the Dockerfile
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in extras
    )


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(requirement.extras)}]" if requirement.extras else ""


@contextlib.contextmanager
def _root_filesystem() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="engines-stand-in-") as folder:
        root = Path(folder) / "root"
        root.mkdir()
        root.chmod(0o755)
        yield root


def _import(docker: Docker, root: Path, name: str, change: str) -> None:
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        docker("import", "--change", change, "-", name, stdin=tar.stdout.fileno(), timeout_s=300)
    assert tar.returncode == 0


def _first_image(path: str, pattern: str) -> str:
    found = re.search(pattern, (ROOT / path).read_text(), re.MULTILINE)
    assert found is not None, f"{path} names no image"
    return found[1]


_WANTED: dict[str, Callable[[Docker, str], str]] = {
    _first_image("docker-compose.yml", r"image: (\S*/etcd:\S+)$"): _etcd,
    _first_image("Dockerfile", r"^FROM (python:\S+)"): _python,
}
