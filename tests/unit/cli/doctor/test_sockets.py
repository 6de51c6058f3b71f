"""What `engines doctor --protocol socket` says of the token, the certificates and this host."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine_cli.doctor.finding import Status
from engine_cli.doctor.sockets import judge_same_host, judge_tls, judge_token
from engine_loader import SocketCredentials
from tests.support.authority import Authority

DAY_S = 86_400
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> SocketCredentials:
    cert, key = authority.issue("a")
    return SocketCredentials(cert=cert, key=key, cacert=authority.cert)


def token(folder: Path, secret: bytes, mode: int = 0o600) -> SocketCredentials:
    file = folder / "token"
    file.write_bytes(secret)
    file.chmod(mode)
    return SocketCredentials(token_file=str(file))


def test_a_token_is_described_without_its_content(tmp_path: Path) -> None:
    finding = judge_token(token(tmp_path, b"0123456789abcdef\n"))
    assert finding.status is Status.OK
    assert finding.what == f"of 16 bytes, in {tmp_path}/token"


def test_a_token_that_all_can_read_is_to_be_looked_at(tmp_path: Path) -> None:
    finding = judge_token(token(tmp_path, b"0123456789abcdef", 0o644))
    assert finding.status is Status.WARN
    assert finding.mend == f"chmod o-r {tmp_path}/token"


def test_a_token_that_is_short_or_missing_fails(tmp_path: Path) -> None:
    short = judge_token(token(tmp_path, b"0123"))
    missing = judge_token(SocketCredentials(token_file=str(tmp_path / "none")))
    assert short.status is missing.status is Status.FAIL
    assert "has 4 bytes, and needs 16" in short.what
    assert "No such file" in missing.what


def test_no_token_is_to_be_looked_at_unless_certificates_say_who_may_read(
    tls: SocketCredentials,
) -> None:
    assert judge_token(SocketCredentials()).status is Status.WARN
    assert judge_token(tls).status is Status.OK


def test_without_certificates_only_a_loopback_address_is_well() -> None:
    assert judge_tls(SocketCredentials(), HOST, 0).status is Status.OK
    for host in ("10.0.0.7", ""):
        assert judge_tls(SocketCredentials(), host, 0).status is Status.WARN


def test_a_certificate_is_tried_as_both_sides_use_it(tls: SocketCredentials) -> None:
    finding = judge_tls(tls, HOST, time.time())
    assert finding.status is Status.WARN, finding  # two days are few
    assert finding.what.endswith("is good for 1 more day")
    assert judge_tls(tls, HOST, time.time() - 30 * DAY_S).status is Status.OK


def test_a_certificate_that_peers_would_not_accept_fails_with_the_reason(
    tls: SocketCredentials, authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.issue("old", expired=True)
    other = Authority(tmp_path, "theirs")
    for bad, host, why in (
        (tls, "10.0.0.7", "IP address mismatch"),
        (replace(tls, cert=cert, key=key), HOST, "certificate has expired"),
        (replace(tls, cacert=other.cert), HOST, "unable to get local issuer certificate"),
        (replace(tls, key=key), HOST, "key values mismatch"),
        (replace(tls, cacert=""), HOST, "without cacert there is none"),
        (replace(tls, cert=str(tmp_path / "none")), HOST, "No such file"),
    ):
        finding = judge_tls(bad, host, time.time())
        assert finding.status is Status.FAIL
        assert why.lower() in finding.what.lower().replace("_", " ")
        assert finding.mend


def test_where_the_host_is_not_known_the_names_are_not_compared(tls: SocketCredentials) -> None:
    assert judge_tls(tls, "", time.time() - 30 * DAY_S).status is Status.OK


def test_reads_within_the_host_are_measured_or_the_kernel_says_why_not() -> None:
    fact = {"nbytes": 2 * 10**9, "seconds": 0.5}
    well = judge_same_host(fact, "", 1)
    assert well.status is Status.OK
    assert well.what.endswith("at 4.0 GB/s (kernel.yama.ptrace_scope = 1)")
    bad = judge_same_host(fact, "Operation not permitted", 2)
    assert bad.status is Status.WARN
    assert "Operation not permitted (kernel.yama.ptrace_scope = 2)" in bad.what
    assert "ptrace_scope" not in judge_same_host(fact, "", 0).what
