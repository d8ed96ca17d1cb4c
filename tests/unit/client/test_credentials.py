"""What clients show, and whom they believe."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from twinpool import AsyncClient, Client, Tls, Unavailable

from tests.certificates import Authority, Pair
from tests.unit.client.fake_router import FakeRouter, running_server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("router", names="IP:127.0.0.1,DNS:router.example")


def server_credentials(pair: Pair, ca: Path, *, mtls: bool) -> grpc.ServerCredentials:
    keys = [(pair.key.read_bytes(), pair.cert.read_bytes())]
    return grpc.ssl_server_credentials(
        keys, root_certificates=ca.read_bytes() if mtls else None, require_client_auth=mtls
    )


def test_ca_file_is_all_that_tls_needs(authority: Authority, pair: Pair) -> None:
    router = FakeRouter()
    with running_server(router, server_credentials(pair, authority.pem, mtls=False)):
        for tls in (authority.pem, str(authority.pem), Tls(ca=authority.pem)):
            with Client(router.address, tls=tls) as client:
                assert client.count_tokens("four") == 4
        named = Tls(ca=authority.pem, server_name="router.example")
        with Client(router.address, tls=named) as client:
            assert client.count_tokens("four") == 4
        for wrong in (True, False, Tls(ca=authority.pem, server_name="other.example")):
            with Client(router.address, tls=wrong) as client, pytest.raises(Unavailable):
                client.count_tokens("four")


async def test_certificate_is_shown_where_one_is_wanted(authority: Authority, pair: Pair) -> None:
    router = FakeRouter()
    mine = authority.issue("me")
    with running_server(router, server_credentials(pair, authority.pem, mtls=True)):
        tls = Tls(ca=authority.pem, cert=mine.cert, key=mine.key)
        async with AsyncClient(router.address, tls=tls) as client:
            assert await client.count_tokens("four") == 4
        async with AsyncClient(router.address, tls=authority.pem) as client:
            with pytest.raises(Unavailable):
                await client.count_tokens("four")


def test_tokens_file_is_read_again_when_it_changes(router: FakeRouter, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("first\n")
    with Client(router.address, token_file=path) as client:
        client.describe()
        assert router.metadata["authorization"] == "Bearer first"
        path.write_text("second-token\n")
        client.describe()
        assert router.metadata["authorization"] == "Bearer second-token"
        path.unlink()
        client.describe()
        assert router.metadata["authorization"] == "Bearer second-token"


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"token": "a", "token_file": "b"}, ValueError, "give one of them"),
        ({"token_file": "/does/not/exist"}, ValueError, "token_file"),
        ({"token": ""}, ValueError, "token is empty"),
        ({"token": "two words"}, ValueError, "characters that no token has"),
        ({"token": 5}, TypeError, "token has type int"),
        ({"tls": "/does/not/exist"}, ValueError, "cannot read ca"),
        ({"tls": 5}, TypeError, "tls has type int"),
        (
            {"tls": True, "credentials": grpc.local_channel_credentials()},
            ValueError,
            "give one of them",
        ),
    ],
)
def test_credentials_that_cannot_be_used_are_refused_at_once(
    options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        Client("127.0.0.1:1", **options)

    async def make() -> None:
        AsyncClient("127.0.0.1:1", **options)

    with pytest.raises(error, match=complaint):
        asyncio.run(make())


def test_half_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="cert and key go together"):
        Tls(cert="cert.pem")
