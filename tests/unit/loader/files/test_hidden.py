"""Folders of files that are not complete: those of killed writers go, and no others."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine_loader.files.hidden import hidden_folder, sweep

WRITER = """
import sys
from pathlib import Path
from engine_loader.files.hidden import hidden_folder
with hidden_folder(Path(sys.argv[1])) as folder:
    (folder / sys.argv[2]).write_bytes(b"half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(folder: Path, name: str = "model.safetensors") -> Iterator[Path]:
    """The hidden folder of a process that writes until the block ends, and is killed then."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().rstrip())
        process.kill()


def test_what_a_killed_writer_left_is_swept_and_a_living_writers_files_stay(tmp_path: Path) -> None:
    with writer(tmp_path) as living:
        with writer(tmp_path) as killed:
            sweep(tmp_path)
            assert {path.name for path in tmp_path.iterdir()} == {living.name, killed.name}
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [living]
        assert (living / "model.safetensors").read_bytes() == b"half"


def test_a_folder_of_another_host_is_left_alone_as_its_lock_may_not_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = socket.gethostname()
    with monkeypatch.context() as elsewhere:
        for host in ("elsewhere", f"{name}.elsewhere"):
            elsewhere.setattr(socket, "gethostname", lambda host=host: host)
            with hidden_folder(tmp_path) as folder:
                folder.with_name(f"{folder.name}.kept").mkdir()
            folder.with_name(f"{folder.name}.kept").rename(folder)
    assert len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_were_being_replaced_are_kept_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with writer(tmp_path, "former-model.safetensors") as killed:
        pass
    with caplog.at_level(logging.WARNING):
        sweep(tmp_path)
    assert (killed / "former-model.safetensors").exists()
    (record,) = caplog.records
    assert record.fields == {"event": "partial_kept", "path": str(killed)}  # type: ignore[attr-defined]


def test_what_only_looks_like_a_hidden_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "file").touch()
    prefix = f".{socket.gethostname()}"
    (tmp_path / f"{prefix}.aaaaaaaa.partial").symlink_to(tmp_path / "user")
    (tmp_path / f"{prefix}.bbbbbbbb.partial").touch()
    (tmp_path / f"{prefix}.c.partial").mkdir()
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_writer_whose_new_folder_another_sweeps_takes_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[Path] = []
    really_lock = fcntl.flock

    def lock(descriptor: int, how: int) -> None:
        if not swept:
            (folder,) = tmp_path.iterdir()
            swept.append(folder)
            folder.rmdir()
        really_lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    with hidden_folder(tmp_path) as folder:
        assert folder != swept[0]
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_files_are_written_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(os.EX_UNAVAILABLE, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hidden_folder(tmp_path) as folder:
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [folder]
