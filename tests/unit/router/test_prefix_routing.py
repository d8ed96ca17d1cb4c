"""Prompts go where their beginning is cached, for as long as the instance says that it has it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from twinpool.v1 import worker_pb2

from router.ledger import InstanceKey
from router.membership import Role
from service.prefix_keys import PrefixKeys, prefix_salt, short_key
from tests.unit.router.fakes import FakeDecode, FakePrefill
from tests.unit.router.served import TOKENIZER
from tests.unit.router.system import System, collect, running, until
from tests.unit.router.test_prefix_index import holder as an_instance
from tests.unit.router.test_prefix_index import received

SEED = b"seed"
PROMPT = "a long beginning that many prompts share, and then something of its own"
BLOCK = 16


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.registration.PREFIX_INTERVAL_S", 0.01)


class Told:
    """Tells what it is given."""

    def __init__(self, *events: worker_pb2.PrefixEvents) -> None:
        self.given = list(events)

    def restart(self) -> None:
        """What is given fits the stream that it is told on."""

    def next_events(self) -> worker_pb2.PrefixEvents | None:
        return self.given.pop(0) if self.given else None


def keys_of(prompt: str, salt: str = "") -> list[int]:
    keys, tokens = PrefixKeys(seed=SEED), TOKENIZER.encode(prompt)
    above, short = keys.root(prefix_salt(0, salt.encode())), []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        above = keys.block(above, keys.piece(tokens[start : start + BLOCK]))
        short.append(short_key(above))
    return short


def news(
    sequence: int, stored: Sequence[int] = (), removed: Sequence[int] = ()
) -> worker_pb2.PrefixEvents:
    return worker_pb2.PrefixEvents(
        sequence=sequence, reset=sequence == 1, stored=stored, removed=removed
    )


async def known(system: System, name: str) -> int:
    status = await system.membership.GetStatus(worker_pb2.GetStatusRequest())
    [blocks] = [i.known_prefix_blocks for i in status.instances if i.name == name]
    return int(blocks)


async def with_two(system: System, *events: worker_pb2.PrefixEvents) -> tuple[FakePrefill, Told]:
    """One instance by whose name requests go there by default, and one that tells."""
    await system.add_prefill("first")
    told = Told(*events)
    holder = await system.add_prefill("holder", prefix_seed=SEED, prefixes=told)
    await until(lambda: not told.given)
    return holder, told


def key(holder: FakePrefill | FakeDecode) -> InstanceKey:
    return InstanceKey(holder.name, holder.epoch)


async def ask(system: System, prompt: str = PROMPT, cache_salt: str = "") -> str:
    """Which instance answers."""
    messages = await collect(system.generate(prompt, max_new_tokens=1, cache_salt=cache_salt))
    await system.settled()
    return str(messages[-1].stats.prefill_instance)


async def test_prompt_goes_where_its_beginning_is_cached() -> None:
    keys = keys_of(PROMPT)
    async with running() as system:
        holder, _ = await with_two(system, news(1, keys))
        await until(lambda: system.group.pools.prefixes.known_blocks(key(holder)) == len(keys))
        assert await known(system, "holder") == len(keys)
        assert await known(system, "first") == 0
        assert await ask(system) == "holder"
        assert await ask(system, PROMPT + "?") == "holder"
        assert await ask(system, "another prompt with another beginning") == "first"
        assert await ask(system, cache_salt="mine") == "first"
        sample = "twinpool_router_expected_cached_tokens_total"
        most = [(len(PROMPT + end) - 1) // BLOCK * BLOCK for end in ("", "?")]
        assert system.sample(sample) == sum(most)


async def test_prompt_goes_elsewhere_once_its_beginning_is_given_up() -> None:
    keys = keys_of(PROMPT)
    async with running() as system:
        holder, told = await with_two(system, news(1, keys))
        known_blocks = system.group.pools.prefixes.known_blocks
        await until(lambda: known_blocks(key(holder)) == len(keys))
        told.given.append(news(2, removed=keys[:1]))
        await until(lambda: known_blocks(key(holder)) == len(keys) - 1)
        assert await ask(system) == "first"


async def test_busy_holder_is_passed_by_where_its_queue_is_longer_than_the_saving() -> None:
    keys = keys_of(PROMPT)
    async with running() as system:
        holder, _ = await with_two(system, news(1, keys[:1]))
        await until(lambda: system.group.pools.prefixes.known_blocks(key(holder)) == 1)
        holder.compute_gate.clear()
        waiting = system.generate(PROMPT, max_new_tokens=1)
        await until(lambda: len(holder.starts) == 1)
        messages = await collect(system.generate(PROMPT, max_new_tokens=1))
        assert messages[-1].stats.prefill_instance == "first"
        holder.compute_gate.set()
        assert (await collect(waiting))[-1].stats.prefill_instance == "holder"
        await system.settled()


async def test_holder_that_dies_is_forgotten_and_others_take_over() -> None:
    keys = keys_of(PROMPT)
    async with running() as system:
        holder, _ = await with_two(system, news(1, keys))
        known_blocks = system.group.pools.prefixes.known_blocks
        await until(lambda: known_blocks(key(holder)) == len(keys))
        await holder.die()
        await until(lambda: known_blocks(key(holder)) == 0)
        assert await ask(system) == "first"


async def test_restarted_holder_starts_with_nothing() -> None:
    keys = keys_of(PROMPT)
    async with running() as system:
        holder, _ = await with_two(system, news(1, keys))
        known_blocks = system.group.pools.prefixes.known_blocks
        await until(lambda: known_blocks(key(holder)) == len(keys))
        again = await system.add_prefill("holder", prefix_seed=SEED, prefixes=Told(news(1)))
        assert known_blocks(key(holder)) == known_blocks(key(again)) == 0
        assert await ask(system) == "first"


async def test_news_with_a_gap_are_not_believed_and_not_fatal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = keys_of(PROMPT)
    async with running() as system:
        await with_two(system, news(1, keys), news(3, keys))
        await until(lambda: "news of the prefix cache of holder are missing" in caplog.text)
        assert await known(system, "holder") == 0
        assert await ask(system) == "first"


async def test_news_of_a_stream_that_was_replaced_count_no_more() -> None:
    """The same process has come again; its old stream's last words arrive after that."""
    async with running() as system:
        instance = replace(an_instance(), role=Role.PREFILL)
        group, old, _ = system.router.groups.join(instance)
        pools = group.pools
        pools.take_prefixes(old, received(news(1, [1, 2])))
        assert pools.prefixes.keys(instance.key) == {1, 2}
        new, replaced = pools.join(instance)
        assert replaced is old
        pools.take_prefixes(old, received(news(1, [1, 2])))
        assert pools.prefixes.known_blocks(instance.key) == 0
        pools.take_prefixes(new, received(news(1, [3])))
        assert pools.prefixes.keys(instance.key) == {3}


async def with_two_decodes(system: System, keys: Sequence[int]) -> tuple[FakeDecode, FakeDecode]:
    """One decode instance by whose name requests go there by default, and one that tells."""
    await system.add_prefill()
    first = await system.add_decode("first")
    holder = await system.add_decode("holder", prefix_seed=SEED, prefixes=Told(news(1, keys)))
    known_blocks = system.group.pools.prefixes.known_blocks
    await until(lambda: known_blocks(key(holder)) == len(keys))
    return first, holder


async def decoded(system: System, prompt: str = PROMPT, cache_salt: str = "") -> tuple[str, int]:
    """Which instance decodes, and how much of the prompt it says that it had."""
    call = system.generate(prompt, max_new_tokens=2, cache_salt=cache_salt)
    stats = (await collect(call))[-1].stats
    await system.settled()
    return stats.decode_instance, stats.decode_cached_tokens


async def test_conversation_goes_on_at_the_decode_instance_that_has_it() -> None:
    async with running() as system:
        first, holder = await with_two_decodes(system, keys_of(PROMPT))
        holder.cached_tokens = 64
        assert await decoded(system, PROMPT + "?") == ("holder", 64)
        assert await decoded(system, "another beginning") == ("first", 0)
        assert await decoded(system, cache_salt="mine") == ("first", 0)
        [reserve] = holder.reserves.values()
        assert list(reserve.prompt_token_ids) == list(TOKENIZER.encode(PROMPT + "?"))
        # One that keeps nothing need not know the prompt.
        assert not any(reserve.prompt_token_ids for reserve in first.reserves.values())
        assert [r.cache_salt for r in first.reserves.values()] == ["", "mine"]


async def test_decode_instance_that_restarts_has_nothing_any_more() -> None:
    async with running() as system:
        _, holder = await with_two_decodes(system, keys_of(PROMPT))
        assert await decoded(system) == ("holder", 0)
        await holder.die()
        again = await system.add_decode("holder", prefix_seed=SEED, prefixes=Told(news(1)))
        known_blocks = system.group.pools.prefixes.known_blocks
        assert known_blocks(key(holder)) == known_blocks(key(again)) == 0
        assert await decoded(system) == ("first", 0)
