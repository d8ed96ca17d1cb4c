import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prefill.config import PrefillConfig
from router.config import RouterConfig
from service.errors import StartError
from service.security.settings import (
    Security,
    instance_security,
    is_loopback,
    router_security,
)
from service.security.tls import Tls, TlsFiles
from service.security.tokens import new_token
from tests.certificates import Authority

FILE = Path("some.pem")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"tls_cert": FILE}, "--tls-key: is required where --tls-cert is given"),
        ({"tls_key": FILE}, "--tls-cert: is required where --tls-key is given"),
        ({"tls_ca": FILE}, "--tls-cert: is required where --tls-ca is given"),
        (
            {"tls_cert": FILE, "tls_key": FILE, "tls_require_client_cert": True},
            "--tls-ca: is required where --tls-require-client-cert is given",
        ),
        ({"tls_server_name": "pool"}, "--tls-cert: is required where --tls-server-name"),
    ],
)
@pytest.mark.parametrize("role", ["router", "prefill"])
def test_flags_that_need_others_are_refused(
    role: str, given: dict[str, Any], complaint: str
) -> None:
    make: Any = RouterConfig if role == "router" else partial(PrefillConfig, model=Path("m"))
    with pytest.raises(ValidationError, match=complaint):
        make(**given)


def test_by_default_nothing_is_asked_for_and_nothing_shown() -> None:
    assert router_security(RouterConfig(), None) == Security()
    assert instance_security(PrefillConfig(model=Path("m"))) == Security()


def test_missing_files_stop_the_start(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    with pytest.raises(StartError, match="--tokens-file: cannot read"):
        router_security(RouterConfig(), missing)
    with pytest.raises(StartError, match="--worker-token-file: cannot read"):
        instance_security(PrefillConfig(model=Path("m"), worker_token_file=missing))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "nowhere.invalid"])
def test_other_addresses_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker"
    path.write_text(new_token())
    return path


def _warned(security: Security, host: str, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    security.warn_if_exposed("router", host)
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


def test_port_that_others_reach_and_that_asks_nobody_is_warned_of(
    worker: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "asks no caller for a token" in _warned(Security(), "10.0.0.1", caplog)
    assert _warned(Security(), "127.0.0.1", caplog) == ""
    only_workers = router_security(RouterConfig(worker_token_file=worker), None)
    assert "set --tokens-file" in _warned(only_workers, "10.0.0.1", caplog)
    instance = instance_security(PrefillConfig(model=Path("m"), worker_token_file=worker))
    assert "has no TLS" in _warned(instance, "10.0.0.1", caplog)
    authority = Authority(tmp_path)
    node = authority.issue("node")
    files = TlsFiles(cert=node.cert, key=node.key, ca=authority.pem)
    assert _warned(Security(tls=Tls(files, require_client_cert=True)), "0.0.0.0", caplog) == ""
    open_tls = Security(tls=Tls(files))
    assert "asks no caller for a token" in _warned(open_tls, "0.0.0.0", caplog)
    assert _warned(Security(tls=Tls(files), access=instance.access), "0.0.0.0", caplog) == ""
