"""What a token makes of a request, at a router that asks for tokens."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from twinpool import AsyncClient
from twinpool.errors import InvalidRequest, PermissionDenied, Refused, Unauthenticated, Unavailable

import service.errors
from router.callers import Callers
from service.security.settings import Security
from service.security.tokens import WorkerToken, hash_of, new_token
from tests.unit.router.fakes import FakeDecode, FakePrefill
from tests.unit.router.system import System, running

TOKENS = {name: new_token() for name in ("acme", "other", "admin", "small")}
WORKER = new_token()


def entry(name: str, *rights: str, tenant: str = "", **limits: int) -> dict[str, Any]:
    hashed = hash_of(TOKENS[name])
    return {"name": name, "tenant": tenant or name, "rights": [*rights], "sha256": hashed} | limits


@asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[tuple[System, FakePrefill, FakeDecode]]:
    """A router with tokens, and instances that show theirs."""
    entries = [
        entry("acme", "inference", max_priority=3),
        entry("other", "inference"),
        entry("small", "inference", max_new_tokens=4, max_concurrent_requests=1),
        entry("admin", "admin"),
    ]
    (folder / "tokens").write_text(yaml.safe_dump({"tokens": entries}))
    (folder / "worker").write_text(WORKER)
    settings = {"tokens_file": folder / "tokens", "worker_token_file": folder / "worker"}
    security = Security(shows=WorkerToken(folder / "worker"))
    async with running(**settings) as system:
        prefill = await system.add_prefill(security=security)
        decode = await system.add_decode(security=security)
        yield system, prefill, decode


def client(system: System, token: str | None) -> AsyncClient:
    return AsyncClient(system.router.server.address, token=token)


async def test_tenant_priority_and_cache_are_the_tokens_whatever_is_claimed(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as (system, prefill, decode):
        for name in ("acme", "other"):
            async with client(system, TOKENS[name]) as asking:
                await asking.complete("hi", tenant="somebody", priority=9, cache_salt="salt")
        acme, other = prefill.starts
        assert (acme.tenant, other.tenant) == ("acme", "other")
        assert (acme.priority, other.priority) == (3, 9)
        assert len({"salt", acme.cache_salt, other.cache_salt}) == 3
        assert {r.cache_salt for r in decode.reserves.values()} == {
            acme.cache_salt,
            other.cache_salt,
        }


async def test_status_is_for_admins_and_answers_are_not(tmp_path: Path) -> None:
    async with guarded(tmp_path) as (system, _, _):
        async with client(system, TOKENS["admin"]) as admin:
            assert len((await admin.status()).instances) == 2
            with pytest.raises(PermissionDenied):
                await admin.complete("hi")
        async with client(system, TOKENS["acme"]) as tenant:
            with pytest.raises(PermissionDenied):
                await tenant.status()
        for token in (None, new_token()):
            async with client(system, token) as nobody:
                with pytest.raises(Unauthenticated):
                    await nobody.complete("hi")


async def test_tokens_limits_hold_for_its_requests(tmp_path: Path) -> None:
    async with guarded(tmp_path) as (system, _, decode), client(system, TOKENS["small"]) as small:
        with pytest.raises(InvalidRequest, match="max_new_tokens"):
            await small.complete("hi", max_new_tokens=5)
        assert len((await small.complete("hi", ignore_eos=True)).token_ids) == 4
        decode.step_gate.clear()
        held = small.generate("hi", max_new_tokens=4)
        await anext(held)
        with pytest.raises(Refused) as caught:
            await small.complete("hi")
        assert caught.value.reason == "TOO_MANY_REQUESTS"
        assert caught.value.retry_after_s is not None
        held.close()
        decode.step_gate.set()
        await system.settled()
        await small.complete("hi", max_new_tokens=1)


async def test_instance_without_the_workers_token_is_refused(tmp_path: Path) -> None:
    async with guarded(tmp_path) as (system, _, _):
        stranger = FakeDecode("stranger", epoch=9)
        await stranger.start()
        try:
            joined = stranger.join(system.router.server.address)
            with pytest.raises(Exception, match="needs a token"):
                await joined
        finally:
            await stranger.hang_up()


async def test_router_whose_token_an_instance_refuses_does_not_blame_the_client(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as (system, prefill, _), client(system, TOKENS["other"]) as other:
        prefill.errors = [service.errors.Unauthenticated("the token is not known here")] * 5
        with pytest.raises(Unavailable, match="does not take this router's token") as caught:
            await other.complete("hi")
        assert caught.value.reason == "ROUTER_REFUSED"


async def test_new_tokens_count_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.security.files.LOOK_S", 0.0)
    async with guarded(tmp_path) as (system, _, _), client(system, TOKENS["acme"]) as acme:
        await acme.complete("hi")
        path = tmp_path / "tokens"
        path.write_text("broken: [")
        await acme.complete("hi")
        path.write_text(yaml.safe_dump({"tokens": [entry("other", "inference")]}))
        with pytest.raises(Unauthenticated):
            await acme.complete("hi")
        async with client(system, TOKENS["other"]) as other:
            await other.complete("hi")


def test_caller_without_limits_has_none() -> None:
    callers = Callers()
    with callers.admitted(None), callers.admitted(None):
        pass
