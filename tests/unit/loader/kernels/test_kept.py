"""Compiled kernels in files: which are used, and what a write leaves."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

from engine_loader.kernels.kept import Compiled, can_be_written, folder, path_of, read, write
from tests.support.checkout import PACKAGES

COMPILED = Compiled("_double", b"\x7fELF", shared_nbytes=64, threads=256, parameters=3)
IS_ROOT = os.geteuid() == 0


@pytest.fixture
def path() -> Path:
    return folder() / "double-sm_90"


def test_what_was_written_is_read(path: Path) -> None:
    assert read(path) is None
    write(path, COMPILED)
    assert read(path) == COMPILED


def test_it_is_kept_in_the_cache_of_the_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder() == cache / "engine-registry" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert folder() == Path.home() / ".cache" / "engine-registry" / "kernels"


def as_nobody(program: str, **passed: Any) -> str:
    """What the program prints that a user runs who has no name and no home."""
    begin = "import os; from engine_loader.kernels.kept import *; os.setuid(54_321);"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PACKAGES)}
    for name in ("HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "-c", begin + program]
    ran: subprocess.CompletedProcess[str] = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, **passed
    )
    return ran.stdout


@pytest.mark.skipif(not IS_ROOT, reason="needs root, to become another user")
def test_a_user_without_a_home_keeps_nothing() -> None:
    assert as_nobody("print(can_be_written(), read(folder() / 'double'))") == "False None\n"


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_is_not_used(path: Path, mode: int) -> None:
    write(path, COMPILED)
    path.chmod(mode)
    assert read(path) is None


@pytest.mark.skipif(not IS_ROOT, reason="needs root, to give a file away")
def test_a_file_of_another_user_is_not_used(path: Path) -> None:
    write(path, COMPILED)
    os.chown(path, 54_321, -1)
    assert read(path) is None


@pytest.mark.skipif(not IS_ROOT, reason="needs root, whose file it is")
def test_a_file_of_root_is_used_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write(path := tmp_path / "kernels" / "double-sm_90", COMPILED)
    finally:
        os.umask(before)
    with open(path, "rb") as file:  # the folders above it are closed to others
        number = file.fileno()
        printed = as_nobody(f"print(read(f'/proc/self/fd/{number}').threads)", pass_fds=[number])
    assert printed == "256\n"
    assert path.stat().st_mode & 0o077 == path.parent.stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("nbytes", [0, 1, 10, -1])
def test_a_truncated_file_is_not_used(path: Path, nbytes: int) -> None:
    write(path, COMPILED)
    path.write_bytes(path.read_bytes()[:nbytes])
    assert read(path) is None


@pytest.mark.parametrize("content", [b"\x7fELF and more", b"\x93\x01\x02\x03", b"\x80", b"\xc1"])
def test_a_foreign_file_is_not_used(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert read(path) is None


def test_a_folder_in_the_place_of_a_file_is_not_used(path: Path) -> None:
    path.mkdir(parents=True)
    assert read(path) is None
    with pytest.raises(IsADirectoryError):
        write(path, COMPILED)
    assert os.listdir(path.parent) == [path.name]


def test_a_file_is_replaced_as_a_whole(path: Path) -> None:
    write(path, COMPILED)
    with open(path, "rb") as before:
        write(path, Compiled("_double", b"new", 0, 32, 3))
        assert msgspec.msgpack.decode(before.read(), type=Compiled) == COMPILED
    assert os.listdir(path.parent) == [path.name]


def test_a_place_that_is_a_file_cannot_be_written(cache: Path, path: Path) -> None:
    cache.write_bytes(b"")
    assert not can_be_written()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        write(path, COMPILED)


def test_it_is_known_before_whether_the_folder_can_be_made(cache: Path, path: Path) -> None:
    assert can_be_written()
    assert not cache.exists()
    write(path, COMPILED)
    assert can_be_written()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an open file
def test_a_write_that_is_interrupted_at_any_line_leaves_no_half_file(path: Path) -> None:
    for line in itertools.count(1):
        was_hit = write_interrupted(path, line)
        left = os.listdir(path.parent) if path.parent.exists() else []
        assert left in ([], [path.name])
        assert read(path) == (COMPILED if left else None)
        if not was_hit:
            break
        path.unlink(missing_ok=True)
    assert line > 5


def write_interrupted(path: Path, line: int) -> bool:
    """Whether the function has so many lines; then Ctrl-C comes before that one is run."""
    left = line

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code is not write.__code__:
            return None
        left -= event == "line"
        if event == "line" and left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with suppress(KeyboardInterrupt):
            write(path, COMPILED)
    finally:
        sys.settrace(before)
    return left <= 0


# -- names
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That can be imported as `kernels_of_test`."""
    source = tmp_path / "modules" / "kernels_of_test.py"
    source.parent.mkdir()
    source.write_text("KERNELS = {}\n")
    monkeypatch.syspath_prepend(source.parent)
    return source


def test_the_name_says_which_kernel_it_is_and_for_which_gpus(module: Path) -> None:
    path = path_of("kernels_of_test", "double()", "double", 90)
    assert path.name.startswith("double-sm_90-")
    assert path.parent == folder()


def test_the_name_depends_on_the_source_the_constants_and_the_kind_of_gpu(module: Path) -> None:
    def paths() -> list[Path]:
        return [
            path_of("kernels_of_test", constants, name, arch)
            for constants, name, arch in (
                ("double()", "double", 90),
                ("double((('TILE', 2),))", "double", 90),
                ("double()", "double", 100),
                ("treble()", "treble", 90),
            )
        ]

    before = paths()
    assert before == paths()
    module.write_text("KERNELS = {1: 2}\n")
    assert len({*before, *paths()}) == 2 * len(before)


def test_to_look_for_a_file_does_not_import_the_module(module: Path) -> None:
    path_of("kernels_of_test", "double()", "double", 90)
    assert "kernels_of_test" not in sys.modules


def test_the_same_name_is_found_by_another_process(module: Path) -> None:
    ours = path_of("kernels_of_test", "double()", "double", 90)
    program = (
        "from engine_loader.kernels.kept import path_of\n"
        "print(path_of('kernels_of_test', 'double()', 'double', 90))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*PACKAGES, str(module.parent)])}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == str(ours)
