"""One of two ranks, on gloo: runs a prompt's chunks, then its messages alone.

A mode is one of the ring's, or another way to split the model over the two.
"""

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.prefills.ring import GRAIN, RANKS
from bench.prefills.works import BLOCK_SIZE
from bench.sides.answers import serve
from engine.collectives import GroupCollectives
from engine.config import ModelConfig, load_config
from engine.parallel import Layout
from engine.pipeline import Logits
from engine.ring import Comm, GroupComm, Wire
from engine.ring.comm import Pending
from engine.ring.passes import AUTO
from engine.runner import Chunk, ModelRunner
from engine.sampling import SamplingParams, SequenceState, sample
from service.malloc import keep_freed_memory

_TIMEOUT_S = 120.0


class Recorder:
    """A `Comm` that remembers what was begun and awaited, to do the same without the compute."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._log: list[Callable[[list[Pending], Tensor], None]] = []
        self._begun = self._largest = 0

    @property
    def rank(self) -> int:
        """See Comm."""
        return self._comm.rank

    @property
    def size(self) -> int:
        """See Comm."""
        return self._comm.size

    def send(self, message: Tensor, to: int, tag: int) -> Pending:
        """See Comm."""
        size = message.nbytes
        self._largest = max(self._largest, size)
        self._log.append(
            lambda pending, sent: pending.append(self._comm.send(sent[:size], to, tag))
        )
        return self._noted(self._comm.send(message, to, tag))

    def receive(self, into: Tensor, source: int, tag: int) -> Pending:
        """See Comm."""
        size = into.nbytes
        self._log.append(
            lambda pending, sent: pending.append(
                self._comm.receive(sent.new_empty(size), source, tag)
            )
        )
        return self._noted(self._comm.receive(into, source, tag))

    def forget(self) -> None:
        """Begin a new record."""
        self._log.clear()
        self._begun = self._largest = 0

    def repeat_s(self) -> float:
        """Return the seconds that the same messages take, begun and awaited in the same order."""
        sent = torch.ones(self._largest, dtype=torch.uint8)
        pending: list[Pending] = []
        dist.barrier()
        began = time.perf_counter()
        for step in self._log:
            step(pending, sent)
        return time.perf_counter() - began

    def _noted(self, pending: Pending) -> Pending:
        number = self._begun
        self._begun += 1
        return _Noted(pending, lambda: self._log.append(lambda begun, _: begun[number].wait()))


class _Noted:
    def __init__(self, pending: Pending, note: Callable[[], None]) -> None:
        self._pending = pending
        self._note = note

    def wait(self) -> None:
        self._note()
        self._pending.wait()


class Rank:
    """A runner for each mode of the ring; all ranks must be asked the same."""

    def open(self, *, model: str, rank: int, port: int, tokens: int) -> dict[str, Any]:
        """Meet the other rank; there is room for one prompt of `tokens`."""
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=_TIMEOUT_S),
        )
        assert dist.group.WORLD is not None
        self._recorder = Recorder(GroupComm(dist.group.WORLD, timeout_s=_TIMEOUT_S))
        self._folder, self._rank = Path(model), rank
        self._config: ModelConfig = load_config(self._folder)
        self._room = RANKS * GRAIN  # tokens of a block over cp ranks
        self._num_blocks = -(-tokens // self._room)
        self._runners: dict[str, tuple[ModelRunner, Wire]] = {}
        return {}

    def run(self, *, mode: str, start: int, token_ids: list[int], budget: int) -> dict[str, Any]:
        """Compute tokens from `start` on, in chunks of `budget`; answers with seconds and traffic.

        What is cached before them, and what the model makes of it, does not matter here.
        """
        runner, wire = self._runner(mode)
        self._recorder.forget()
        sent, waited = wire.traffic.bytes_sent, wire.traffic.wait_s
        dist.barrier()
        began = time.perf_counter()
        under_way = deque[Logits]()
        for begin in range(0, len(token_ids), budget):
            chunk = Chunk(
                token_ids=token_ids[begin : begin + budget],
                start=start + begin,
                block_table=range(self._num_blocks * self._room // runner.block_tokens),
            )
            under_way.append(runner.start([chunk]))
            if len(under_way) == runner.layout.pp:
                logits_SV = under_way.popleft().wait()
        while under_way:
            logits_SV = under_way.popleft().wait()
        if self._rank == 0:
            sample(logits_SV, [SequenceState(SamplingParams(), prompt_len=start + len(token_ids))])
        return {
            "seconds": time.perf_counter() - began,
            "sent": wire.traffic.bytes_sent - sent,
            "waited": wire.traffic.wait_s - waited,
        }

    def repeat(self) -> dict[str, Any]:
        """Answer with the seconds that the last run's messages take alone."""
        return {"seconds": self._recorder.repeat_s()}

    def _runner(self, mode: str) -> tuple[ModelRunner, Wire]:
        if mode not in self._runners:
            wire = Wire(self._recorder)
            layout = _layout(mode, self._rank)
            block_tokens = self._room if layout.cp > 1 else BLOCK_SIZE
            runner = ModelRunner(
                folder=self._folder,
                config=self._config,
                dtype=torch.bfloat16,
                device=torch.device("cpu"),
                num_blocks=self._num_blocks * self._room // block_tokens,
                block_size=BLOCK_SIZE,
                layout=layout,
                ranks=GroupCollectives() if layout.tp > 1 else None,
                ring=wire if layout.cp > 1 else None,
                ring_mode=mode if layout.cp > 1 else AUTO,
                stages=wire if layout.pp > 1 else None,
            )
            runner.warm_up()
            self._runners[mode] = runner, wire
        return self._runners[mode]


def _layout(mode: str, rank: int) -> Layout:
    match mode:
        case "tp" | "tp by rows":
            return Layout(tp=RANKS, tp_rank=rank, sequence_parallel=mode != "tp")
        case "pp":
            return Layout(pp=RANKS, pp_rank=rank)
    return Layout(cp=RANKS, cp_rank=rank, cp_grain=GRAIN)


if __name__ == "__main__":
    keep_freed_memory()
    side = Rank()
    serve({"open": side.open, "run": side.run, "repeat": side.repeat})
