"""The embedded etcd: one folder, one etcd; nothing of it is left when it cannot start."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from engine_cli.exits import Exit
from engine_registry.errors import LocalEtcdFailed
from engine_registry.etcd import ports
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from tests.integration.conftest import Processes, children_of, line_of


def test_a_folder_in_use_is_reported_at_once_and_its_log_is_left_alone(tmp_path: Path) -> None:
    with LocalEtcd(data_dir=str(tmp_path)) as etcd:
        etcd.log_path.write_text("what the first one said\n")
        with pytest.raises(
            LocalEtcdFailed,
            match=f"cannot use the folder {tmp_path}: another etcd has its data there",
        ):
            LocalEtcd(data_dir=str(tmp_path)).start()
        assert etcd.log_path.read_text().startswith("what the first one said\n")
    with LocalEtcd(data_dir=str(tmp_path)):
        pass


def test_an_etcd_that_was_killed_has_its_folder_again(tmp_path: Path) -> None:
    with LocalEtcd(data_dir=str(tmp_path)) as etcd:
        etcd.kill()
        etcd.start()


def test_a_process_that_is_being_started_does_not_keep_the_folder_of_a_killed_etcd(
    tmp_path: Path,
) -> None:
    """Between its fork and its exec it has a copy of every descriptor."""
    etcd = LocalEtcd(data_dir=str(tmp_path))
    with etcd, ExitStack() as copies:
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the descriptor of the listing itself
                if os.path.samefile(f"/proc/self/fd/{name}", etcd.log_path):
                    copies.callback(os.close, os.dup(int(name)))
        etcd.kill()
        etcd.start()


@pytest.mark.parametrize("folder", ["/proc/nowhere", "FILE/below"])
def test_a_folder_that_cannot_be_made_is_reported_in_one_line(
    processes: Processes, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "file").touch()
    folder = folder.replace("FILE", str(tmp_path / "file"))
    result = processes.run("etcd", "--port", str(free_port()), "--data-dir", folder)
    assert result.returncode == Exit.FAILED
    assert result.stderr.startswith(f"engines: error: etcd cannot use the folder {folder}: ")
    assert len(result.stderr.splitlines()) == 1


def test_variables_for_another_etcd_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETCD_CLIENT_CERT_AUTH", "true")
    monkeypatch.setenv("ETCD_LOG", "nonsense")
    with LocalEtcd(data_dir=str(tmp_path)) as etcd:
        assert "ETCD_" not in etcd.log_path.read_text()


@pytest.fixture
def stuck(tmp_path: Path) -> str:
    """A program that starts like etcd and never answers."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "etcd"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    return str(program)


def test_a_start_that_fails_leaves_no_process_and_no_folder(
    stuck: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    etcd = LocalEtcd(binary=stuck)
    monkeypatch.setattr(
        etcd, "_wait_until_healthy", lambda timeout_s: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt), etcd:
        pytest.fail("it has started")
    assert (etcd.running, etcd.pid) == (False, 0)
    assert not Path(etcd.data_dir).exists()


def test_a_free_port_is_none_that_the_kernel_gives_to_others() -> None:
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(20)]
    assert all(20_000 <= port < given for port in ports)
    for port in ports:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_no_port_is_given_twice_before_a_server_listens_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = [free_port() for _ in range(4)]
    monkeypatch.setattr(ports, "_given", set())
    monkeypatch.setattr(ports, "_ports", lambda: few)
    assert sorted(free_port() for _ in few) == sorted(few)
    assert free_port() not in few


def test_nor_where_only_the_kernel_has_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = iter([20_001, 20_001, 20_002])
    monkeypatch.setattr(ports, "_given", set())
    monkeypatch.setattr(ports, "_ports", lambda: range(0))
    monkeypatch.setattr(ports, "_port_of_the_kernel", lambda host: next(kernels))
    assert [free_port(), free_port()] == [20_001, 20_002]


@pytest.mark.parametrize("which", [0, 1], ids=["client", "peer"])
def test_a_port_that_another_took_since_it_was_chosen_is_replaced(
    monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        taken = other.getsockname()[1]
        chosen = [free_port() for _ in range(4)]
        chosen[which] = taken
        ports = iter(chosen)
        monkeypatch.setattr("engine_registry.etcd.local.free_port", lambda host: next(ports))
        with LocalEtcd() as etcd:
            assert etcd.port == chosen[2]
            etcd.kill()
            etcd.start()
            assert etcd.port == chosen[2]


def test_a_port_that_the_user_gave_is_not_replaced() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        port = other.getsockname()[1]
        in_use = f"port {port} on 127.0.0.1 is in use"
        with pytest.raises(LocalEtcdFailed, match=in_use), LocalEtcd(port):
            pytest.fail("it has started")


_STUCK = """
import sys, engine_cli.main, engine_registry.etcd.local
program = sys.argv.pop(1)
engine_registry.etcd.local.find_binary = lambda: program
engine_cli.main.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_an_etcd_that_is_still_starting(
    processes: Processes, stuck: str, tmp_path: Path, number: int
) -> None:
    port = free_port()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    server = processes.start("-c", _STUCK, stuck, "etcd", "--port", str(port), TMPDIR=str(scratch))
    while not children_of(server.pid):  # ends with the test's own time
        assert server.poll() is None
    server.send_signal(number)
    assert server.wait(60) == 128 + number
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_running_etcd_with_its_data(
    processes: Processes, tmp_path: Path, number: int
) -> None:
    server = processes.engines("etcd", "--port", str(free_port()), TMPDIR=str(tmp_path))
    assert line_of(server).startswith("etcd is ready")
    assert list(tmp_path.iterdir())
    server.send_signal(number)
    out, err = server.communicate(timeout=100)
    assert (server.returncode, out, err) == (Exit.DONE, "etcd has ended\n", "")
    assert list(tmp_path.iterdir()) == []
