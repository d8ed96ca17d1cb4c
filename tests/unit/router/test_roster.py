"""Instances that the operator has named by address: who may register, and who is missing."""

from dataclasses import replace
from typing import Any

import pytest
from twinpool.v1 import common_pb2, worker_pb2
from typer.testing import CliRunner

from router.__main__ import app
from router.config import RouterConfig
from router.membership import Instance, Role
from router.roster import Roster
from service.errors import Incompatible
from service.registration import RegistrationRefused
from tests.unit.router.fakes import FakePrefill
from tests.unit.router.system import running, until
from tests.unit.router.test_membership import instance

HERE, THERE = "127.0.0.1:7001", "127.0.0.1:7002"


def decode_at(address: str) -> Instance:
    return replace(instance(), address=address)


def test_only_instances_that_are_named_may_register() -> None:
    roster = Roster(decode=(HERE,))
    roster.check(decode_at(HERE))
    with pytest.raises(Incompatible, match=f"at {THERE} is none of .* with --decode") as caught:
        roster.check(decode_at(THERE))
    assert caught.value.reason == "NOT_NAMED"


def test_role_without_a_list_takes_any() -> None:
    Roster().check(decode_at(HERE))
    Roster(prefill=(THERE,)).check(decode_at(HERE))


def test_address_of_one_role_is_not_good_for_the_other() -> None:
    with pytest.raises(Incompatible):
        Roster(prefill=(HERE,), decode=(THERE,)).check(decode_at(HERE))


def test_those_that_have_not_come_are_missing() -> None:
    roster = Roster(prefill=(HERE,), decode=(HERE, THERE))
    assert roster.missing([decode_at(HERE)]) == [(Role.PREFILL, HERE), (Role.DECODE, THERE)]
    assert Roster().missing([]) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prefill", "nowhere"], "--prefill: found ['nowhere'] (flag); must be host:port"),
        (["--decode", f"{HERE},{HERE}"], "must name each instance once"),
    ],
)
def test_lists_that_make_no_sense_are_refused_in_one_line(flags: list[str], said: str) -> None:
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_lists_are_repeated_or_separated_by_commas() -> None:
    given: dict[str, Any] = {"prefill": [f"{HERE}, {THERE}"], "decode": [HERE, THERE]}
    config = RouterConfig(**given)
    assert config.prefill == config.decode == (HERE, THERE)


async def test_status_and_metrics_tell_who_is_missing_and_strangers_are_refused() -> None:
    listed = FakePrefill("listed", lambda _: None)  # type: ignore[arg-type, return-value]
    await listed.start()
    async with running(prefill=(listed.address,), decode=(HERE,)) as system:

        async def missing() -> list[tuple[int, str]]:
            status = await system.membership.GetStatus(worker_pb2.GetStatusRequest())
            return [(one.role, one.address) for one in status.missing]

        lacks_decode = (common_pb2.ROLE_DECODE, HERE)
        assert await missing() == [(common_pb2.ROLE_PREFILL, listed.address), lacks_decode]
        listed.join(system.router.server.address)
        await until(lambda: bool(system.router.groups.members()))
        assert await missing() == [lacks_decode]
        read = system.registry.get_sample_value
        name = "twinpool_router_missing_instances"
        assert [read(name, {"role": role.value}) for role in Role] == [0, 1]

        stranger = FakePrefill("stranger", system.decode_named)
        await stranger.start()
        with pytest.raises(RegistrationRefused, match="--prefill"):
            await stranger.join(system.router.server.address)
        for one in (stranger, listed):
            await one.die()
