"""The files that say who may read: what is wrong with them is said before an engine starts."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from engine_loader.engines.sockets.credentials import SocketCredentials
from engine_loader.errors import EngineUnavailable
from tests.support.authority import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> SocketCredentials:
    cert, key = authority.issue("a")
    return SocketCredentials(cert=cert, key=key, cacert=authority.cert)


def with_token(folder: Path, token: bytes) -> SocketCredentials:
    (folder / "token").write_bytes(token)
    return SocketCredentials(token_file=str(folder / "token"))


def test_none_are_no_fault() -> None:
    credentials = SocketCredentials()
    credentials.check()
    assert credentials.token() == b""
    assert credentials.context(server=True) is credentials.context(server=False) is None


def test_they_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN_FILE", "CERT", "KEY", "CACERT"):
        monkeypatch.setenv(f"ENGINES_SOCKET_{name}", f"/{name}")
    assert SocketCredentials.from_environment() == SocketCredentials(
        "/TOKEN_FILE", "/CERT", "/KEY", "/CACERT"
    )


def test_whitespace_around_a_token_does_not_count(tmp_path: Path) -> None:
    credentials = with_token(tmp_path, b"  0123456789abcdef \r\n")
    credentials.check()
    assert credentials.token() == b"0123456789abcdef"


def test_a_token_is_read_anew(tmp_path: Path) -> None:
    credentials = with_token(tmp_path, b"0123456789abcdef")
    with_token(tmp_path, b"another token of 16")
    assert credentials.token() == b"another token of 16"


@pytest.mark.parametrize("token", [b"", b"\n", b" 0123456789abcde\n"])
def test_a_short_token_is_refused_with_its_length(tmp_path: Path, token: bytes) -> None:
    with pytest.raises(
        EngineUnavailable, match=rf"has {len(token.strip())} bytes, and needs 16: .*TOKEN_FILE"
    ):
        with_token(tmp_path, token).check()


def test_files_that_are_missing_are_named(tmp_path: Path, tls: SocketCredentials) -> None:
    missing = str(tmp_path / "missing")
    for one in (
        SocketCredentials(token_file=missing),
        replace(tls, cert=missing),
        replace(tls, key=missing),
        replace(tls, cacert=missing),
    ):
        with pytest.raises(EngineUnavailable, match=f"No such file or directory: '{missing}'"):
            one.check()


@pytest.mark.parametrize("missing", ["cert", "key", "cacert"])
def test_tls_needs_all_three_files(tls: SocketCredentials, missing: str) -> None:
    with pytest.raises(
        EngineUnavailable, match=f"without {missing} there is none.*ENGINES_SOCKET_CERT"
    ):
        replace(tls, **{missing: ""}).check()


def test_files_of_one_authority_are_taken(tls: SocketCredentials) -> None:
    tls.check()


def test_a_key_of_another_certificate_is_refused(
    authority: Authority, tls: SocketCredentials
) -> None:
    _, other = authority.issue("b")
    with pytest.raises(EngineUnavailable, match=r"KEY_VALUES_MISMATCH|key values mismatch"):
        replace(tls, key=other).check()


@pytest.mark.parametrize("broken", ["cert", "key", "cacert"])
def test_a_file_that_is_no_pem_is_refused(
    tmp_path: Path, tls: SocketCredentials, broken: str
) -> None:
    (tmp_path / "pem").write_text("no certificate, no key\n")
    with pytest.raises(EngineUnavailable, match=f"cannot be used: .*{tmp_path}/pem .*in PEM"):
        replace(tls, **{broken: str(tmp_path / "pem")}).check()


def test_nobody_is_asked_for_the_password_of_a_key(tmp_path: Path, tls: SocketCredentials) -> None:
    encrypted = tmp_path / "encrypted"
    subprocess.run(
        ["openssl", "ec", "-in", tls.key, "-out", encrypted, "-aes256", "-passout", "pass:secret"],
        check=True,
        capture_output=True,
    )
    with pytest.raises(EngineUnavailable, match="the key is encrypted"):
        replace(tls, key=str(encrypted)).check()


def test_what_is_shown_of_them_has_no_secret(tmp_path: Path) -> None:
    assert "0123456789abcdef" not in repr(with_token(tmp_path, b"0123456789abcdef"))
