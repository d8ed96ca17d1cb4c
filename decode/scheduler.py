"""Decides which sequences the next decode step works on, and on how much of their prompts.

Owns the running batch of each dp rank and the order in which sequences join it. Knows nothing of
tensors, threads or block ids: its caller says which sequences have no room for their next token.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice

Step = tuple[tuple[int, ...], ...]  # request ids, of each dp rank
# A prompt is about to be begun with; returns how many of its tokens are to be computed.
Enter = Callable[[int], int]

# How many times as much of prompts a step may have where there is nothing else in it.
_ALONE = 4


@dataclass(kw_only=True)
class _Share:
    """The sequences of one dp rank; those of steps under way are in `running` and not `idle`."""

    waiting: OrderedDict[int, None] = field(default_factory=OrderedDict)
    running: OrderedDict[int, None] = field(default_factory=OrderedDict)
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)


class Scheduler:
    """Sequences join when they are ready and there is room, and leave when they end.

    A sequence's next token needs the one before. So where several steps are under way at once,
    each has a part of the sequences: as equal as may be, and the same ones stay together.

    Prompts that are computed here have their places in the batch from the start. A step has a piece
    of them beside the tokens of the others: one pass for both takes less time than two, and that
    the pieces are short bounds how much longer the others' tokens take for it. The first of the
    prompts is first: nothing is gained by all of them being late.

    Where all prompts are computed here, a step has a bound as a whole, `step_tokens`: the sequences
    that decode come first, each with a token, and prompts get what is left.

    Args:
        max_batch: Sequences of one dp rank that are stepped with at most.
        dp: How many dp ranks there are; each sequence is one's.
        depth: How many steps may be under way at once.
        prompt_tokens: Of prompts, in a step of one dp rank at most; a few times as many where no
            sequence would get its token later for it.
        step_tokens: Of a step of one dp rank at most, whatever they are of; above `max_batch`, or
            prompts might wait for ever. Where it is given, `prompt_tokens` has no say.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        dp: int = 1,
        depth: int = 1,
        prompt_tokens: int = 1,
        step_tokens: int | None = None,
    ) -> None:
        assert step_tokens is None or step_tokens > max_batch
        self._max_batch = max_batch
        self._depth = depth
        self._prompt_tokens = prompt_tokens
        self._step_tokens = step_tokens
        self._shares = [_Share() for _ in range(dp)]
        self._dp_rank_of: dict[int, int] = {}
        # What is to be computed yet of prompts, and the pieces that are under way.
        self._missing: dict[int, int] = {}
        self._pieces: dict[int, int] = {}
        # Prompts that have had no piece yet.
        self._unbegun: set[int] = set()

    def add(self, request_id: int, dp_rank: int = 0, missing_tokens: int = 0) -> None:
        """A sequence may step: all of its KV but that of `missing_tokens` is here.

        Those are its prompt's last ones; where there are none its first token is known.
        """
        self._dp_rank_of[request_id] = dp_rank
        self._shares[dp_rank].waiting[request_id] = None
        if missing_tokens:
            self._missing[request_id] = missing_tokens
            self._unbegun.add(request_id)

    def remove(self, request_id: int) -> None:
        """A sequence has ended, wherever it is; not while a step with it is under way."""
        dp_rank = self._dp_rank_of.pop(request_id, None)
        if dp_rank is not None:
            share = self._shares[dp_rank]
            for group in (share.waiting, share.running, share.idle):
                group.pop(request_id, None)
            self._missing.pop(request_id, None)
            self._unbegun.discard(request_id)

    @property
    def running(self) -> int:
        """Sequences in the batches."""
        return sum(len(share.running) for share in self._shares)

    @property
    def waiting(self) -> int:
        """Sequences that are ready but find no room."""
        return sum(len(share.waiting) for share in self._shares)

    @property
    def idle(self) -> list[int]:
        """Sequences in the batches that are in no step under way."""
        return [request_id for share in self._shares for request_id in share.idle]

    def schedule(self, without: Collection[int] = (), enter: Enter | None = None) -> Step:
        """The next step, which is under way from here on; empty where nothing can step now.

        Of each dp rank, those whose latest step is longest ago, `without` those that have to wait.
        `enter` is asked about each prompt once, when its first piece is due: others may have
        computed some of it since it was added.
        """
        for share in self._shares:
            self._join(share)
        most = self._most_of_prompts()
        step = tuple(self._fill(share, without, most, enter) for share in self._shares)
        return step if any(step) else ()

    def piece(self, request_id: int) -> int:
        """Tokens of its prompt that a sequence's step under way computes; 0 where it decodes."""
        return self._pieces.get(request_id, 0)

    def finished(self, step: Step) -> None:
        """A step is over; its sequences may step again."""
        for share, request_ids in zip(self._shares, step, strict=True):
            for request_id in request_ids if self._pieces else ():
                self._note_computed(request_id)
            share.idle.update((r, None) for r in request_ids if r in share.running)

    def _note_computed(self, request_id: int) -> None:
        piece = self._pieces.pop(request_id, 0)
        if piece:
            self._missing[request_id] -= piece
            if not self._missing[request_id]:
                del self._missing[request_id]

    def _join(self, share: _Share) -> None:
        while share.waiting and len(share.running) < self._max_batch:
            request_id, _ = share.waiting.popitem(last=False)
            share.running[request_id] = share.idle[request_id] = None

    def _most_of_prompts(self) -> int:
        if self._step_tokens is not None:
            return self._step_tokens
        is_alone = self._missing and not any(self._decoding(share) for share in self._shares)
        return self._prompt_tokens * (_ALONE if is_alone else 1)

    def _fill(
        self, share: _Share, without: Collection[int], most: int, enter: Enter | None
    ) -> tuple[int, ...]:
        decoding = tuple(self._begin(share, without))
        room = most if self._step_tokens is None else most - len(decoding)
        return (*decoding, *self._begin_pieces(share, without, room, enter))

    def _begin(self, share: _Share, without: Collection[int]) -> Iterable[int]:
        most = -(-self._decoding(share) // self._depth)
        able = (r for r in share.idle if r not in without and r not in self._missing)
        for request_id in list(islice(able, most)):
            del share.idle[request_id]
            yield request_id

    def _decoding(self, share: _Share) -> int:
        running = share.running
        return len(running) - sum(request_id in running for request_id in self._missing)

    def _begin_pieces(
        self, share: _Share, without: Collection[int], room: int, enter: Enter | None
    ) -> Iterable[int]:
        for request_id in self._missing:
            if room and request_id in share.idle and request_id not in without:
                if request_id in self._unbegun:
                    self._unbegun.remove(request_id)
                    if enter is not None:
                        self._missing[request_id] = enter(request_id)
                piece = self._pieces[request_id] = min(room, self._missing[request_id])
                room -= piece
                del share.idle[request_id]
                yield request_id
