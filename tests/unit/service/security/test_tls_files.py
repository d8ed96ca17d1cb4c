"""What is wrong with certificates is told when a process starts, by the flag's name."""

import subprocess
from pathlib import Path

import pytest

from service.errors import StartError
from service.security.tls import Tls, TlsFiles
from tests.certificates import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def test_key_of_another_certificate_is_refused(authority: Authority) -> None:
    a, b = authority.issue("a"), authority.issue("b")
    with pytest.raises(StartError, match=r"--tls-key: .*b\.key is not the key"):
        Tls(TlsFiles(cert=a.cert, key=b.key))


def test_missing_file_is_refused(authority: Authority, tmp_path: Path) -> None:
    a = authority.issue("a")
    with pytest.raises(StartError, match="--tls-key: cannot read"):
        Tls(TlsFiles(cert=a.cert, key=tmp_path / "none"))
    with pytest.raises(StartError, match="--tls-cert: cannot read"):
        Tls(TlsFiles(cert=tmp_path / "none", key=a.key))
    with pytest.raises(StartError, match="--tls-ca: cannot read"):
        Tls(TlsFiles(cert=a.cert, key=a.key, ca=tmp_path / "none"))


def test_key_with_a_password_is_refused_without_asking_for_it(
    authority: Authority, tmp_path: Path
) -> None:
    a = authority.issue("a")
    locked = tmp_path / "locked.key"
    command = ("openssl", "ec", "-in", str(a.key), "-out", str(locked), "-aes256")
    subprocess.run([*command, "-passout", "pass:secret"], check=True, capture_output=True)
    with pytest.raises(StartError, match="the key without a password"):
        Tls(TlsFiles(cert=a.cert, key=locked))


def test_unreadable_key_is_refused(authority: Authority, tmp_path: Path) -> None:
    a = authority.issue("a")
    with pytest.raises(StartError, match=r"--tls-key: cannot read .*: Is a directory"):
        Tls(TlsFiles(cert=a.cert, key=tmp_path))


@pytest.mark.parametrize("text", ["", "no certificate", "č"])
def test_ca_file_without_a_certificate_is_refused(
    authority: Authority, tmp_path: Path, text: str
) -> None:
    a = authority.issue("a")
    empty = tmp_path / "ca"
    empty.write_text(text)
    with pytest.raises(StartError, match=r"--tls-ca: .* holds no certificate"):
        Tls(TlsFiles(cert=a.cert, key=a.key, ca=empty))
