"""What is told of the prefix cache: bounded messages, and whoever follows them has what it has."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from router.prefix_index import PrefixIndex
from service.prefix_journal import PrefixJournal, PrefixReader
from service.prefix_keys import PrefixKeys, short_key
from tests.unit.router.test_prefix_index import KEY, holder, received

MAX_KEYS = 3


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") + b"the rest"


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def heard(reader: PrefixReader) -> list[tuple[int, bool, list[int], list[int]]]:
    """All that there is to tell now."""
    messages = []
    while (events := reader.next_events()) is not None:
        told = (events.sequence, events.reset, list(events.stored), list(events.removed))
        messages.append(told)
    return messages


def test_nothing_is_told_before_somebody_listens() -> None:
    journal = PrefixJournal()
    reader = journal.reader()
    journal.stored(keys(1, 2))
    assert heard(reader) == []


def test_first_message_resets_even_where_nothing_is_cached() -> None:
    journal = PrefixJournal()
    reader = journal.reader()
    reader.restart()
    assert heard(reader) == [(1, True, [], [])]


def test_only_the_last_change_of_a_key_is_told() -> None:
    journal = PrefixJournal()
    reader = journal.reader()
    reader.restart()
    heard(reader)
    journal.stored(keys(1, 2))
    journal.removed(keys(2))
    journal.removed(keys(3))
    journal.stored(keys(3))
    assert heard(reader) == [(2, False, [1, 3], [2])]
    assert heard(reader) == []


def test_large_set_is_told_in_bounded_messages_oldest_first() -> None:
    journal = PrefixJournal(MAX_KEYS)
    reader = journal.reader()
    journal.stored(keys(*range(7)))
    reader.restart()
    assert heard(reader) == [
        (1, True, [0, 1, 2], []),
        (2, False, [3, 4, 5], []),
        (3, False, [6], []),
    ]


def test_new_listener_hears_everything_again() -> None:
    journal = PrefixJournal(MAX_KEYS)
    reader = journal.reader()
    journal.stored(keys(1, 2))
    reader.restart()
    heard(reader)
    journal.stored(keys(3))
    journal.removed(keys(1))
    reader.restart()
    assert heard(reader) == [(1, True, [2, 3], [])]


def test_changes_that_nobody_takes_end_in_one_reset() -> None:
    journal = PrefixJournal(MAX_KEYS)
    reader = journal.reader()
    reader.restart()
    heard(reader)
    for number in range(1000):
        journal.stored(keys(number + 1))
        journal.removed(keys(number))
    messages = heard(reader)
    assert len(messages) <= 2
    assert messages[0][1]
    assert {key for _, _, stored, _ in messages for key in stored} == {1000}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_index_that_follows_ends_with_the_keys_of_the_cache(data: st.DataObject) -> None:
    """Prompts come and push others out; messages are taken, and streams broken, at any moment."""
    journal, index, present = PrefixJournal(MAX_KEYS), PrefixIndex(), set[int]()
    reader = journal.reader()
    reader.restart()
    index.join(holder())

    def insert(new: Sequence[bytes]) -> None:
        journal.stored(new)
        present.update(map(short_key, new))

    def evict(gone: Sequence[bytes]) -> None:
        journal.removed(gone)
        present.difference_update(map(short_key, gone))

    pool = BlockPool(8)
    cache = PrefixCache(
        pool, block_size=2, keys=PrefixKeys(seed=b"seed"), on_insert=insert, on_evict=evict
    )
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=16)
    action = st.one_of(tokens, st.just("take"), st.just("reconnect"))
    for done in data.draw(st.lists(action, max_size=30)):
        match done:
            case "take":
                events = reader.next_events()
                assert events is None or len(events.stored) + len(events.removed) <= MAX_KEYS
                assert events is None or index.take(KEY, received(events))
            case "reconnect":
                reader.restart()
                index.leave(KEY)
                index.join(holder())
            case prompt:
                assert isinstance(prompt, list)
                acquired = cache.acquire(prompt, b"", -(-len(prompt) // 2))
                cache.insert(prompt, b"", acquired.blocks)
                pool.release(acquired.blocks)
    while (events := reader.next_events()) is not None:
        assert index.take(KEY, received(events))
    assert index.keys(KEY) == present


def test_each_reader_hears_everything_at_its_own_pace() -> None:
    journal = PrefixJournal()
    early, late = journal.reader(), journal.reader()
    early.restart()
    heard(early)
    journal.stored(keys(1))
    assert heard(early) == [(2, False, [1], [])]
    late.restart()
    assert heard(late) == [(1, True, [1], [])]
    early.close()
    journal.stored(keys(2))
    assert heard(late) == [(2, False, [2], [])]
    assert heard(early) == []
