"""Over `socket` only those read, and are read, that have the token and a certificate."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine_loader.engines.base import read
from engine_loader.engines.sockets import server, wire
from engine_loader.engines.sockets.credentials import SocketCredentials
from engine_loader.engines.sockets.engine import SocketEngine
from engine_loader.engines.sockets.wire import Welcome
from engine_loader.errors import EngineUnavailable, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_registry import Region
from tests.integration.conftest import Processes, line_of
from tests.support.authority import Authority
from tests.support.processes.served import content
from tests.support.socket_peers import BareReader, BareSource
from tests.support.waiting import wait_until

NBYTES = 9 << 20  # more than one batch
TOKEN, OTHER = b"the token of this fleet\n", b"the token of another one\n"
NONE = SocketCredentials()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("credentials")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def issue(folder: Path, authority: Authority) -> Callable[..., SocketCredentials]:
    numbers = itertools.count()

    def issue(by: Authority = authority, **how: object) -> SocketCredentials:
        cert, key = by.issue(f"engine-{next(numbers)}", **how)  # type: ignore[arg-type]
        return SocketCredentials(cert=cert, key=key, cacert=authority.cert)

    return issue


@pytest.fixture(scope="module")
def tls(issue: Callable[..., SocketCredentials]) -> SocketCredentials:
    return issue()


@pytest.fixture(scope="module")
def token(folder: Path) -> SocketCredentials:
    (folder / "token").write_bytes(TOKEN)
    return SocketCredentials(token_file=str(folder / "token"))


@pytest.fixture(scope="module")
def other_token(folder: Path) -> SocketCredentials:
    (folder / "other").write_bytes(OTHER)
    return SocketCredentials(token_file=str(folder / "other"))


class Pair:
    """A source and a reader of this process."""

    def __init__(self, source: SocketEngine, reader: SocketEngine) -> None:
        self.source, self.reader = source, reader
        self.src = torch.arange(NBYTES // 8).view(torch.uint8)
        self.dst = torch.zeros_like(self.src)
        source.register(Region(self.src.data_ptr(), NBYTES))
        reader.lend(Region(self.dst.data_ptr(), NBYTES))

    def read(self) -> None:
        self.dst.zero_()
        op = ReadOp("a/0", self.src.data_ptr(), self.dst.data_ptr(), NBYTES)
        read(self.reader, self.source.session_id, op)
        assert torch.equal(self.src, self.dst)

    def refused(self) -> str:
        with pytest.raises(ReadFailed) as caught:
            self.read()
        assert not self.dst.any()
        return caught.value.what


@pytest.fixture(params=[True, False], ids=["within the host", "over connections"])
def pair(request: pytest.FixtureRequest) -> Iterator[Callable[..., Pair]]:
    with ExitStack() as stack:

        def pair(source: SocketCredentials, reader: SocketCredentials) -> Pair:
            engines = [
                stack.enter_context(
                    SocketEngine("127.0.0.1", credentials=one, same_host=request.param)
                )
                for one in (source, reader)
            ]
            return Pair(*engines)

        yield pair


Make = Callable[..., Pair]
Issue = Callable[..., SocketCredentials]


def event_of(record: logging.LogRecord) -> object:
    return vars(record)["fields"]["event"]


# -- the token
# -------------------------------------------------------------------------------------------------


def test_with_the_same_token_all_bytes_come(pair: Make, token: SocketCredentials) -> None:
    pair(token, token).read()


def test_a_reader_without_the_token_is_refused(pair: Make, token: SocketCredentials) -> None:
    assert "it demands a token, and this engine has none" in pair(token, NONE).refused()


def test_a_source_without_the_token_is_not_read(pair: Make, token: SocketCredentials) -> None:
    why = pair(NONE, token).refused()
    assert "it has no token, and this engine reads only from engines that have ours" in why


def test_another_token_is_refused_and_the_source_says_who_came(
    pair: Make,
    token: SocketCredentials,
    other_token: SocketCredentials,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert "it has another token than this engine" in pair(token, other_token).refused()
        wait_until(lambda: bool(caplog.records))
    (record,) = caplog.records
    assert event_of(record) == "reader_refused"
    assert record.getMessage() == (
        "a reader at 127.0.0.1 is refused: it does not have the token of this engine"
    )
    assert TOKEN.strip().decode() not in caplog.text


def test_who_passes_words_on_between_a_reader_and_a_source_learns_nothing(
    pair: Make, token: SocketCredentials
) -> None:
    """A false record leads the reader to it."""
    both = pair(token, token)

    def pass_on(reader: socket.socket) -> None:
        with BareReader(both.source.session_id) as source:
            source.socket.sendall(reader.recv(len(wire.MAGIC), socket.MSG_WAITALL))
            reader.sendall(source.hear(wire.HELLO_NBYTES))
            source.socket.sendall(reader.recv(wire.ANSWER_NBYTES, socket.MSG_WAITALL))
            welcomes.append(Welcome.read(source.hear(wire.WELCOME_NBYTES)))
            reader.sendall(welcomes[-1].packed())

    welcomes: list[Welcome] = []
    with BareSource(pass_on) as false, pytest.raises(ReadFailed, match="it has another token"):
        both.reader.connect(false.session_id)
    assert welcomes == [Welcome(False)]


def test_readers_that_are_refused_again_and_again_are_in_the_log_once(
    pair: Make,
    token: SocketCredentials,
    other_token: SocketCredentials,
    caplog: pytest.LogCaptureFixture,
) -> None:
    both = pair(token, other_token)
    for _ in range(5):
        both.refused()
    wait_until(lambda: bool(caplog.records))
    assert len(caplog.records) == 1


def test_a_token_that_was_replaced_counts_from_the_next_contact(pair: Make, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(TOKEN)
    here = SocketCredentials(token_file=str(file))
    before, after = pair(here, here), pair(here, here)
    before.read()
    file.write_bytes(OTHER)
    before.read()  # has made its contact
    after.read()
    shutil.copy(file, tmp_path / "kept")
    file.write_bytes(TOKEN)
    late = pair(here, SocketCredentials(token_file=str(tmp_path / "kept")))
    assert "another token" in late.refused()


def test_a_token_that_is_lost_lets_nobody_read_until_it_is_back(
    pair: Make, tmp_path: Path, token: SocketCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_bytes(TOKEN)
    both = pair(SocketCredentials(token_file=str(file)), token)
    file.unlink()
    assert "it has closed the connection" in both.refused()
    wait_until(lambda: bool(caplog.records))
    assert event_of(caplog.records[0]) == "credentials_unusable"
    file.write_bytes(TOKEN)
    both.read()


def test_a_reader_whose_own_token_is_lost_says_so(pair: Make, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(TOKEN)
    both = pair(NONE, SocketCredentials(token_file=str(file)))
    file.unlink()
    assert "our own credentials cannot be used" in both.refused()


# -- TLS
# -------------------------------------------------------------------------------------------------


def test_with_certificates_of_one_authority_all_bytes_come(
    pair: Make, tls: SocketCredentials, issue: Issue
) -> None:
    pair(tls, issue()).read()


def test_with_both_all_bytes_come(
    pair: Make, tls: SocketCredentials, token: SocketCredentials
) -> None:
    both = replace(tls, token_file=token.token_file)
    pair(both, both).read()
    assert "it demands a token" in pair(both, tls).refused()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"san": "IP:10.1.2.3"}, "its certificate is not accepted: IP address mismatch"),
        ({"expired": True}, "its certificate is not accepted: certificate has expired"),
    ],
)
def test_a_source_whose_certificate_is_not_its_own_or_too_old_is_not_read(
    pair: Make, tls: SocketCredentials, issue: Issue, how: dict[str, object], why: str
) -> None:
    assert why in pair(issue(**how), tls).refused()


def test_a_source_with_a_certificate_of_another_authority_is_not_read(
    pair: Make, tls: SocketCredentials, issue: Issue, tmp_path: Path
) -> None:
    strange = issue(by=Authority(tmp_path, "theirs"))
    assert "its certificate is not accepted" in pair(strange, tls).refused()


@pytest.mark.parametrize("expired", [True, False])
def test_a_reader_with_a_bad_certificate_is_refused_and_the_source_says_so(
    pair: Make,
    tls: SocketCredentials,
    issue: Issue,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    expired: bool,
) -> None:
    strange = issue(expired=True) if expired else issue(by=Authority(tmp_path, "theirs"))
    why = pair(tls, strange).refused()
    assert re.search("does not accept the certificate", why)
    wait_until(lambda: bool(caplog.records))
    assert event_of(caplog.records[0]) == "reader_refused"


def test_a_reader_without_certificates_learns_at_once_that_the_source_has_some(
    pair: Make, tls: SocketCredentials
) -> None:
    why = pair(tls, NONE).refused()
    assert "has just ended, or it demands a certificate, and this engine has none" in why


def test_a_reader_with_certificates_reads_nothing_in_the_clear(
    pair: Make, tls: SocketCredentials
) -> None:
    assert "it speaks no TLS, and this engine reads only" in pair(NONE, tls).refused()


def test_certificates_that_were_replaced_count_from_the_next_contact(
    pair: Make, tls: SocketCredentials, issue: Issue, tmp_path: Path
) -> None:
    mine = SocketCredentials(
        cert=str(tmp_path / "cert"), key=str(tmp_path / "key"), cacert=tls.cacert
    )

    def take(other: SocketCredentials) -> None:
        shutil.copy(other.cert, mine.cert)
        shutil.copy(other.key, mine.key)

    take(tls)
    before, after = pair(mine, tls), pair(mine, tls)
    before.read()
    take(issue(san="IP:10.1.2.3"))
    before.read()
    assert "IP address mismatch" in after.refused()
    take(tls)
    after.read()


def test_a_reader_that_takes_nothing_keeps_no_encrypted_memory_from_being_taken_back(
    tls: SocketCredentials,
) -> None:
    nbytes = 64 << 20
    memory = torch.ones(nbytes, dtype=torch.uint8)
    region = Region(memory.data_ptr(), nbytes)
    with (
        SocketEngine("127.0.0.1", credentials=tls) as source,
        BareReader(source.session_id, tls.context(server=False)) as stuck,
    ):
        source.register(region)
        stuck.greet().ask((region.addr, nbytes))
        wait_until(lambda: any(one.sends(region) for one in list(source._server._connections)))
        source.unregister(region)
        memory.fill_(2)
        sent = stuck.hear_all()
        assert len(sent) < nbytes
        assert b"\2" not in sent[5:]


def test_a_stranger_that_says_nothing_to_a_source_with_certificates_is_cut_off(
    tls: SocketCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_HANDSHAKE_S", 0.2)
    with SocketEngine("127.0.0.1", credentials=tls) as source:
        with BareReader(source.session_id) as silent:
            assert silent.ended
        wait_until(lambda: not source._server._connections)


# -- processes
# -------------------------------------------------------------------------------------------------


def test_a_process_takes_its_credentials_from_its_environment(
    processes: Processes, tls: SocketCredentials, token: SocketCredentials
) -> None:
    both = replace(tls, token_file=token.token_file)
    source = processes.start(
        *("-m", "tests.support.processes.served", str(NBYTES), "socket", "127.0.0.1"),
        ENGINES_SOCKET_TOKEN_FILE=both.token_file,
        ENGINES_SOCKET_CERT=both.cert,
        ENGINES_SOCKET_KEY=both.key,
        ENGINES_SOCKET_CACERT=both.cacert,
    )
    session_id, addr = line_of(source).split()
    dst = torch.zeros(NBYTES, dtype=torch.uint8)
    op = ReadOp("a/0", int(addr), dst.data_ptr(), NBYTES)
    with SocketEngine("127.0.0.1", credentials=both) as reader:
        reader.lend(Region(dst.data_ptr(), NBYTES))
        read(reader, session_id, op)
        assert dst.numpy().tobytes() == content(NBYTES)
    for bad in (NONE, token, tls):
        with SocketEngine("127.0.0.1", credentials=bad) as reader, pytest.raises(ReadFailed):
            reader.connect(session_id)


def test_an_engine_with_bad_credentials_does_not_start(token: SocketCredentials) -> None:
    with pytest.raises(EngineUnavailable, match="needs cert, key and cacert"):
        SocketEngine("127.0.0.1", credentials=replace(token, cert="/etc/hostname"))
