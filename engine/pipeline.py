"""The stages of a model whose layers are split over ranks (pipeline parallelism).

Owns the way of a pass from stage to stage: the residual stream to the next one, and the logits from
the last one to the first. A stage begins its next pass as soon as it has passed one on, so that as
many passes as there are stages are under way at once. All stages run the same passes in one order.

Legend: T rows of a pass on this rank, S sequences, D hidden size, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from engine.ring.comm import Pending, Wire


class Logits(Protocol):
    """The logits of a pass that may still be under way in other stages."""

    def wait(self) -> Tensor:
        """Return them, [S, V] in fp32, once they are there; raises CommError where they are lost.

        Only where an instance's first rank asks; on others they are [0, V] with several stages.
        """
        ...


class Stages(Protocol):
    """This rank's stage, and the way to the others."""

    def receive(self, rows: int) -> Tensor | None:
        """Begin a pass: return the stream from the stage before, [T, D]; None in the first one."""
        ...

    def pass_on(self, result: Tensor, sequences: int) -> Logits:
        """End a pass: hand over the stream or, from the last stage, the logits."""
        ...


class OneStage:
    """All layers are on one rank; see Stages."""

    def receive(self, rows: int) -> Tensor | None:
        """See Stages."""
        return None

    def pass_on(self, result: Tensor, sequences: int) -> Logits:
        """See Stages."""
        return _Here(result)


class Apart:
    """One of several stages that computes its part of nothing real, to be timed; see Stages."""

    def __init__(self, rank: int, *, width: int, device: torch.device) -> None:
        self._is_first = rank == 0
        self._width = width
        self._device = device

    def receive(self, rows: int) -> Tensor | None:
        """See Stages."""
        if self._is_first:
            return None
        return torch.zeros(rows, self._width, dtype=torch.float32, device=self._device)

    def pass_on(self, result: Tensor, sequences: int) -> Logits:
        """See Stages."""
        return _Here(result[:0])


class Pipeline:
    """One of several stages; see Stages.

    Args:
        wire: Between the ranks with the same part of other layers, in the order of the stages.
        width: Columns of the stream, D.
        vocab_size: Columns of the logits, V.
        leads: Whether this rank takes or gives logits: of a stage's ranks one does.
        keeps_logits: Whether they stay in the last stage, on all of its ranks.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        width: int,
        vocab_size: int,
        leads: bool,
        device: torch.device,
        keeps_logits: bool = False,
    ) -> None:
        self._wire = wire
        self._last = wire.size - 1
        self._width = width
        self._vocab_size = vocab_size
        self._leads = leads
        self._keeps_logits = keeps_logits
        self._device = device
        self._tags = range(0)
        self._leaving: tuple[Pending, Tensor] | None = None

    def receive(self, rows: int) -> Tensor | None:
        """See Stages."""
        wire = self._wire
        self._tags = wire.tags(wire.size)  # one for each message of the pass
        if wire.rank == 0:
            return None
        stream_TD = self._empty(rows, self._width)
        wire.receive(stream_TD, wire.rank - 1, self._tags[wire.rank - 1]).wait()
        return stream_TD

    def pass_on(self, result: Tensor, sequences: int) -> Logits:
        """See Stages."""
        wire = self._wire
        if wire.rank == self._last:
            if self._keeps_logits:
                return _Here(result)
            self._send(result if self._leads else result[:0], 0)
            return _Here(result[:0])
        self._send(result, wire.rank + 1)
        if wire.rank or self._keeps_logits:
            return _Here(self._empty(0, self._vocab_size))
        logits_SV = self._empty(sequences if self._leads else 0, self._vocab_size)
        return _Arriving(logits_SV, wire.receive(logits_SV, self._last, self._tags[self._last]))

    def _send(self, message: Tensor, to: int) -> None:
        if self._leaving is not None:
            self._leaving[0].wait()  # the next stage has begun the pass before: one waits at most
        message = message.contiguous()
        self._leaving = (self._wire.send(message, to, self._tags[self._wire.rank]), message)

    def _empty(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.float32, device=self._device)


class _Here:
    def __init__(self, logits_SV: Tensor) -> None:
        self._logits_SV = logits_SV

    def wait(self) -> Tensor:
        return self._logits_SV


class _Arriving:
    def __init__(self, logits_SV: Tensor, pending: Pending) -> None:
        self._logits_SV = logits_SV
        self._pending = pending

    def wait(self) -> Tensor:
        self._pending.wait()
        return self._logits_SV
