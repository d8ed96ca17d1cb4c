"""Decoding passes that are recorded once and played again with other inputs: CUDA graphs.

A pass of a few sequences is hundreds of small kernels, and to launch them one by one takes a GPU
longer than to run them. Owns the memory that recorded passes find their inputs in, and the choice
of the recorded pass that another one is played by. Rows that a recorded pass has too many are of no
sequence: they have no keys, and nothing of them is written to the cache.

Legend: S sequences of a pass, R rows of a recorded one, X cells of a token, B blocks of a table, H
head size, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from engine.batch import Batch
from engine.decode_rows import DecodeRows
from engine.kvcache import KVCache
from engine.layers.rotary import Angles
from engine.weights import Progress

# A pass: logits of its rows, [R, V], as they lie in it.
Run = Callable[[Batch, Angles], Tensor]
# Records what a function launches; returns what plays that, and the function's result, which is
# then of that playing.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]

_FIRST_ROWS = (1, 2, 4, 8)
_ROWS_STEP = 16
_LEAST_KEYS = 1024
_KEYS_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class _RecordedRows(DecodeRows):
    """Rows whose tables and lengths are filled in before each playing; see DecodeRows."""

    filled: tuple[Tensor, Tensor]

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor]:
        """See DecodeRows."""
        return self.filled


class StepGraphs:
    """Recorded passes of up to `max_sequences` sequences of up to `max_tokens` tokens."""

    def __init__(
        self,
        run: Run,
        cache: KVCache,
        *,
        head_size: int,
        max_sequences: int,
        max_tokens: int,
        capture: Capture,
        progress: Progress | None = None,
    ) -> None:
        """Records all of them, the largest first: the others find its memory free again.

        `progress` is told how many are recorded, and of how many.
        """
        self._cache = cache
        device = cache.tensor.device
        blocks = -(-max_tokens // cache.block_size)
        self._token_ids_R = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._slots_RX = torch.full(
            (max_sequences, cache.planes * cache.num_heads), -1, device=device
        )
        self._cos_R1H = torch.ones(max_sequences, 1, head_size, device=device)
        self._sin_R1H = torch.zeros(max_sequences, 1, head_size, device=device)
        self._tables_RB = torch.zeros(max_sequences, blocks, dtype=torch.int32, device=device)
        self._lengths_R = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self._rows = row_sizes(max_sequences)
        self._keys = key_sizes(max_tokens)
        sizes = [(rows, keys) for rows in reversed(self._rows) for keys in reversed(self._keys)]
        self._recorded = {}
        for rows, keys in sizes:
            self._recorded[rows, keys] = capture(self._pass_of(run, rows, keys))
            if progress is not None:
                progress(len(self._recorded), len(sizes))

    def __len__(self) -> int:
        return len(self._recorded)

    def play(self, batch: Batch, angles: Angles) -> Tensor | None:
        """Run a pass of decoding sequences alone; None where none that is recorded is as large.

        Returns the logits after each of the batch's chunks, [S, V], when they are under way.
        """
        sequences, longest = len(batch.decode), batch.decode.lengths[0]
        if sequences > self._rows[-1] or longest > self._keys[-1]:
            return None
        rows = self._rows[bisect_left(self._rows, sequences)]
        keys = self._keys[bisect_left(self._keys, longest)]
        tables_SB, lengths_S = batch.decode.on_device
        self._token_ids_R[:sequences] = batch.token_ids_T
        self._slots_RX[:sequences] = batch.slot_mapping_TX
        self._cos_R1H[:sequences] = angles.cos_T1H
        self._sin_R1H[:sequences] = angles.sin_T1H
        self._tables_RB[:sequences, : tables_SB.shape[1]] = tables_SB
        self._lengths_R[:sequences] = lengths_S
        self._lengths_R[sequences:rows] = 0
        self._slots_RX[sequences:rows] = -1
        replay, logits_RV = self._recorded[rows, keys]
        replay()
        return logits_RV[batch.last_rows_S]

    def _pass_of(self, run: Run, rows: int, keys: int) -> Callable[[], Tensor]:
        decode = _RecordedRows(
            lengths=[keys] * rows,
            tables=(),
            cache=self._cache,
            filled=(self._tables_RB[:rows], self._lengths_R[:rows]),
        )
        batch = Batch(
            token_ids_T=self._token_ids_R[:rows],
            positions_T=self._lengths_R[:rows],
            end=keys,
            slot_mapping_TX=self._slots_RX[:rows],
            decode=decode,
            prefill=(),
            rows_of=(),
            last_rows_S=torch.arange(rows, device=self._token_ids_R.device),
            last=None,
        )
        angles = Angles(self._cos_R1H[:rows], self._sin_R1H[:rows])
        return lambda: run(batch, angles)


def row_sizes(most: int) -> Sequence[int]:
    """Return how many rows recorded passes have, so that any up to `most` fits one closely."""
    first = [rows for rows in _FIRST_ROWS if rows < most]
    return [*first, *range(_ROWS_STEP, most, _ROWS_STEP), most]


def key_sizes(most: int) -> Sequence[int]:
    """Return for how many keys recorded passes are laid out."""
    sizes, keys = [], _LEAST_KEYS
    while keys < most:
        sizes.append(keys)
        keys *= _KEYS_FACTOR
    return [*sizes, most]


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a pass as a CUDA graph; see `Capture`."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()  # what is compiled or looked up the first time is, before anything is recorded
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        result = run()
    return graph.replay, result


@cache
def _pool() -> Any:
    """Return the memory that all graphs of the process share: one is played at a time."""
    return torch.cuda.graph_pool_handle()
