"""What a sequence leaves behind is there for the next that begins alike, and for nobody else."""

from collections.abc import Sequence

import pytest

from decode.admission import Admission
from decode.prefixes import Prefixes
from decode.refusals import NoRoom
from decode.sequence import Reservation, SequenceRecord
from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.sampling import SamplingParams
from engine.stopping import StopCriteria
from service.prefix_keys import PrefixKeys

BLOCKS = 12
BLOCK_SIZE = 4
LAYERS = 2
PROMPT = tuple(range(100, 110))


def make(*, caches: bool = True, blocks: int = BLOCKS, prompts_only: bool = False) -> Admission:
    pool = BlockPool(blocks)
    keys = PrefixKeys(seed=b"model")
    cache = PrefixCache(pool, block_size=BLOCK_SIZE, keys=keys) if caches else None
    return Admission(
        prefixes=[Prefixes(pool, cache=cache, layers=LAYERS, prompts_only=prompts_only)],
        block_size=BLOCK_SIZE,
        max_sequences=8,
        revoke=lambda _: None,
    )


def reserve(
    admission: Admission,
    request_id: int,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 2,
    salt: bytes = b"",
    said: bool = True,
) -> SequenceRecord:
    """`said` is whether the router tells the prompt's tokens."""
    return admission.reserve(
        Reservation(
            request_id=request_id,
            router_id="r",
            prompt_tokens=len(prompt),
            prompt_ids=prompt if said else (),
            sampling=SamplingParams(),
            stop=StopCriteria(max_new_tokens=max_new_tokens),
            ttl_s=10.0,
            cache_salt=salt,
        )
    )


def run(
    admission: Admission,
    request_id: int,
    prompt: Sequence[int],
    answer: Sequence[int],
    salt: bytes = b"",
) -> SequenceRecord:
    """Let a sequence be complete and answer, and end it."""
    record = reserve(admission, request_id, prompt, max_new_tokens=len(answer) + 1, salt=salt)
    admission.complete(record.transfer.transfer_id)
    admission.activate(request_id, answer[0])
    for token_id in answer[1:]:
        record.append(token_id)
    admission.end(request_id)
    return record


def kept(tokens: int) -> tuple[tuple[int, ...], ...]:
    return ((tokens,) * LAYERS,)


def test_next_turn_is_sent_only_what_is_new() -> None:
    admission = make()
    answer = tuple(range(200, 207))
    first = run(admission, 1, PROMPT, answer)
    assert (first.cached_tokens, first.transfer.kept) == (0, ())
    second = reserve(admission, 2, (*PROMPT, *answer, 7))
    assert second.cached_tokens == 16
    assert second.transfer.kept == kept(16)
    assert second.blocks[:4] == first.blocks[:4]
    assert second.own_blocks == second.blocks[4:]
    admission.check_integrity()


def test_last_token_of_an_answer_was_never_written() -> None:
    """10 tokens of prompt and 2 of the answer fill 3 blocks, but the 12th is not in the cache."""
    admission = make()
    run(admission, 1, PROMPT, (1, 2))
    assert reserve(admission, 2, (*PROMPT, 1, 2, 3)).cached_tokens == 8
    run(admission, 3, PROMPT, (5, 6, 7))
    assert reserve(admission, 4, (*PROMPT, 5, 6, 7)).cached_tokens == 12


def test_an_answer_is_forgotten_where_prompts_alone_are_kept() -> None:
    admission = make(prompts_only=True)
    run(admission, 1, PROMPT, tuple(range(200, 207)))
    again = reserve(admission, 2, (*PROMPT, *range(200, 207), 7))
    assert (again.cached_tokens, again.transfer.kept) == (8, kept(8))
    admission.check_integrity()


def test_nothing_is_to_be_sent_of_a_prompt_that_is_wholly_known() -> None:
    admission = make()
    run(admission, 1, PROMPT[:8], (1, 2))
    again = reserve(admission, 2, PROMPT[:8])
    assert again.transfer.kept == kept(8)
    assert len(again.own_blocks) == 1


def test_prompt_is_shared_as_soon_as_its_transfer_is_complete() -> None:
    admission = make()
    first = reserve(admission, 1, PROMPT)
    assert reserve(admission, 2, PROMPT).cached_tokens == 0
    admission.complete(first.transfer.transfer_id)
    third = reserve(admission, 3, PROMPT)
    assert third.blocks[:2] == first.blocks[:2]
    admission.end(1)
    admission.check_integrity()
    assert not set(reserve(admission, 4, range(4)).blocks) & set(third.blocks)


def test_transfer_that_was_not_completed_leaves_nothing_behind() -> None:
    admission = make()
    record = reserve(admission, 1, PROMPT)
    admission.end(1)
    admission.writer_closed(record.transfer.transfer_id, kept(8))
    assert admission.counts().cached == 0
    assert reserve(admission, 2, PROMPT).cached_tokens == 0


@pytest.mark.parametrize(
    ("reported", "expected"), [((), (8, 8)), (((3, 9),), (8, 9)), (kept(8), (8, 8))]
)
def test_shared_blocks_stay_kept_whatever_a_failed_transfer_reports(
    reported: tuple[tuple[int, ...], ...], expected: tuple[int, ...]
) -> None:
    admission = make()
    run(admission, 1, PROMPT, (1, 2))
    record = reserve(admission, 2, PROMPT)
    admission.writer_closed(record.transfer.transfer_id, reported)
    assert admission.regrant(2) is record
    assert record.transfer.kept == (expected,)


def test_blocks_that_no_writer_may_write_are_not_quarantined() -> None:
    admission = make()
    run(admission, 1, PROMPT, (1, 2))
    record = reserve(admission, 2, PROMPT)
    admission.end(2)
    counts = admission.counts()
    assert (counts.quarantined, counts.cached) == (len(record.own_blocks), 2)


@pytest.mark.parametrize("salts", [(b"one", b"two"), (b"", b"one")])
def test_salts_share_nothing(salts: tuple[bytes, bytes]) -> None:
    admission = make()
    run(admission, 1, PROMPT, (1, 2), salt=salts[0])
    assert reserve(admission, 2, PROMPT, salt=salts[1]).cached_tokens == 0
    assert reserve(admission, 3, PROMPT, salt=salts[0]).cached_tokens == 8


def test_prompt_that_is_not_said_is_neither_looked_up_nor_remembered() -> None:
    admission = make()
    run(admission, 1, PROMPT, (1, 2))
    silent = reserve(admission, 2, PROMPT, said=False)
    assert silent.transfer.kept == ()
    before = admission.counts().cached
    admission.complete(silent.transfer.transfer_id)
    admission.end(2)
    assert admission.counts().cached == before


def test_without_a_cache_everything_is_free_again() -> None:
    admission = make(caches=False)
    run(admission, 1, PROMPT, (1, 2))
    assert admission.counts().free == BLOCKS
    assert reserve(admission, 2, PROMPT).transfer.kept == ()


def test_idle_blocks_make_room_and_held_ones_do_not() -> None:
    admission = make(blocks=6)
    run(admission, 1, PROMPT, (1, 2))
    assert admission.counts().cached == 2
    holder = reserve(admission, 2, PROMPT)
    assert holder.cached_tokens == 8
    with pytest.raises(NoRoom) as refused:
        reserve(admission, 3, range(16))
    assert (refused.value.needed, refused.value.free) == (5, 3)
    admission.end(2)
    admission.writer_closed(holder.transfer.transfer_id)
    assert len(reserve(admission, 4, range(16)).blocks) == 5
    admission.check_integrity()


def reserve_local(admission: Admission, request_id: int, prompt: Sequence[int]) -> SequenceRecord:
    record = admission.reserve(
        Reservation(
            request_id=request_id,
            router_id="r",
            prompt_tokens=len(prompt),
            prompt_ids=prompt,
            sampling=SamplingParams(),
            stop=StopCriteria(max_new_tokens=2),
            ttl_s=10.0,
            is_local=True,
        )
    )
    assert admission.begin(request_id)
    return record


def test_prompt_that_is_computed_here_is_shared_as_soon_as_it_is() -> None:
    admission = make()
    first = reserve_local(admission, 1, PROMPT)
    assert (first.missing_tokens, first.transfer.over.done()) == (10, True)
    assert reserve_local(admission, 2, PROMPT).cached_tokens == 0
    assert admission.computed(1, 6).missing_tokens == 4
    assert reserve_local(admission, 4, PROMPT).cached_tokens == 4
    admission.computed(1, 4)
    assert reserve_local(admission, 3, PROMPT).cached_tokens == 8
    for request_id in (1, 2, 3, 4):
        admission.end(request_id)
        admission.check_integrity()
    assert admission.counts().available == BLOCKS


def test_prompt_that_has_waited_shares_what_was_computed_meanwhile() -> None:
    admission = make()
    first, second = (reserve_local(admission, request_id, PROMPT) for request_id in (1, 2))
    own = list(second.blocks)
    assert not admission.look_again(2)
    assert second.blocks == own
    admission.computed(1, 9)
    assert admission.look_again(2)
    assert not admission.look_again(2)
    assert (second.cached_tokens, second.missing_tokens) == (8, 2)
    assert (second.blocks[:2], len(second.blocks)) == (first.blocks[:2], len(own))
    assert second.own_blocks == second.blocks[2:]
    assert admission.counts().used == 2 * len(own) - 2
    admission.computed(2, 2)
    for request_id in (1, 2):
        admission.end(request_id)
        admission.check_integrity()
    assert admission.counts().available == BLOCKS


def test_part_of_a_prompt_that_was_computed_stays_known() -> None:
    admission = make()
    reserve_local(admission, 1, PROMPT)
    admission.computed(1, 5)
    admission.end(1)
    assert reserve_local(admission, 2, PROMPT).cached_tokens == 4
    admission.check_integrity()


def test_last_token_of_a_known_prompt_is_computed_for_its_logits() -> None:
    admission = make()
    run(admission, 1, PROMPT[:8], (1, 2))
    admission.end(1)
    assert reserve(admission, 2, PROMPT[:8]).cached_tokens == 8
    record = reserve_local(admission, 3, PROMPT[:8])
    assert (record.cached_tokens, record.missing_tokens) == (4, 4)


def test_nothing_may_be_sent_for_a_prompt_that_is_computed_here() -> None:
    admission = make()
    reserve_local(admission, 1, PROMPT)
    with pytest.raises(KeyError):
        admission.regrant(1)
    assert not admission.activate(1, 5)
    assert not admission.end_unless_running(1)
