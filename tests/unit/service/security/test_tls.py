"""TLS between two processes' ports, as `Server` and `dial` make it."""

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import service.security.files
from service.channels import dial
from service.lifecycle import Server
from service.security.settings import PLAIN, Security
from service.security.tls import Tls, TlsFiles
from tests.certificates import Authority, Pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("node")


def secured(pair: Pair, ca: Path, *, mtls: bool = True, server_name: str = "") -> Security:
    files = TlsFiles(cert=pair.cert, key=pair.key, ca=ca)
    return Security(tls=Tls(files, require_client_cert=mtls, server_name=server_name))


@asynccontextmanager
async def serving(security: Security) -> AsyncIterator[str]:
    server = Server("test", security=security)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop()


async def code_of(address: str, security: Security) -> grpc.StatusCode:
    """How a call ends: OK where the two understand each other."""
    async with dial(address, security=security) as channel:
        return await ask(channel)


async def ask(channel: grpc.aio.Channel) -> grpc.StatusCode:
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_both_sides_show_certificates_of_their_authority(
    authority: Authority, pair: Pair
) -> None:
    security = secured(pair, authority.pem)
    async with serving(security) as address:
        assert await code_of(address, security) is grpc.StatusCode.OK


async def test_callers_without_a_good_certificate_are_refused(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger").issue("node")
    expired = authority.issue("expired", days=-1)
    only_ca = Security(tls=Tls(TlsFiles(ca=authority.pem)))
    async with serving(secured(pair, authority.pem)) as address:
        for caller in (
            PLAIN,
            only_ca,
            secured(stranger, authority.pem),
            secured(expired, authority.pem),
        ):
            assert await code_of(address, caller) is grpc.StatusCode.UNAVAILABLE


async def test_without_the_requirement_callers_need_no_certificate(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger").issue("node")
    async with serving(secured(pair, authority.pem, mtls=False)) as address:
        only_ca = Security(tls=Tls(TlsFiles(ca=authority.pem)))
        assert await code_of(address, only_ca) is grpc.StatusCode.OK
        assert await code_of(address, secured(stranger, authority.pem)) is grpc.StatusCode.OK
        assert await code_of(address, PLAIN) is grpc.StatusCode.UNAVAILABLE


async def test_servers_that_are_not_who_they_should_be_are_not_called(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    caller = secured(pair, authority.pem)
    others = (
        Authority(tmp_path, "stranger").issue("node"),
        authority.issue("expired", days=-1),
        authority.issue("elsewhere", names="DNS:pool.example,IP:192.0.2.1"),
    )
    for other in others:
        async with serving(secured(other, authority.pem)) as address:
            assert await code_of(address, caller) is grpc.StatusCode.UNAVAILABLE


async def test_server_name_stands_for_the_address(authority: Authority) -> None:
    pool = authority.issue("pool", names="DNS:pool.example")
    security = secured(pool, authority.pem, server_name="pool.example")
    async with serving(security) as address:
        assert await code_of(address, security) is grpc.StatusCode.OK


# ---- certificates that change


def put(pair: Pair, into: Pair) -> None:
    shutil.copy(pair.key, into.key)
    shutil.copy(pair.cert, into.cert)


def shown_by(address: str, ca: Path, caller: Pair) -> object:
    """The name in the certificate that a server shows."""
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(caller.cert, caller.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        certificate = secure.getpeercert()
    assert certificate is not None
    return certificate["subject"]


@pytest.fixture
def always_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.security.files, "LOOK_S", 0.0)


@pytest.mark.usefixtures("always_looks")
async def test_changed_certificate_is_shown_from_the_next_connection_on(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    mine = Pair(tmp_path / "mine.pem", tmp_path / "mine.key")
    first, second = authority.issue("first"), authority.issue("second")
    put(first, mine)
    async with serving(secured(mine, authority.pem)) as address:

        async def shown() -> object:
            return await asyncio.to_thread(shown_by, address, authority.pem, pair)

        assert "first" in str(await shown())
        mine.cert.write_text("half written")
        assert "first" in str(await shown())
        put(second, mine)
        assert "second" in str(await shown())


@pytest.mark.usefixtures("always_looks")
async def test_authority_of_callers_can_change_while_a_server_runs(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    other = stranger.issue("other")
    ca = tmp_path / "callers.pem"
    shutil.copy(authority.pem, ca)
    caller = secured(other, authority.pem)
    async with serving(secured(pair, ca)) as address:
        assert await code_of(address, caller) is grpc.StatusCode.UNAVAILABLE
        ca.write_bytes(authority.pem.read_bytes() + stranger.pem.read_bytes())
        assert await code_of(address, caller) is grpc.StatusCode.OK


@pytest.mark.usefixtures("always_looks")
async def test_channel_shows_the_certificate_of_now(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    mine = Pair(tmp_path / "mine.pem", tmp_path / "mine.key")
    put(authority.issue("expired", days=-1), mine)
    async with (
        serving(secured(pair, authority.pem)) as address,
        dial(address, security=secured(mine, authority.pem)) as channel,
    ):
        assert await ask(channel) is grpc.StatusCode.UNAVAILABLE
        put(authority.issue("renewed"), mine)
        assert await ask(channel) is grpc.StatusCode.OK
        await channel.channel_ready()
