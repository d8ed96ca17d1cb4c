"""The ring by a GPU's kernels: interpreted, with ranks that are threads, where there is no GPU."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.table import PagedKernels
from engine.ring import AttentionShape, GatherKV, PassKV, PassQ, RingAttention, Wire, block, merge
from tests.unit.engine.ring.exact import attention, inputs
from tests.unit.engine.ring.passes import MadePass
from tests.unit.engine.ring.threads import LoopbackComm, on_ranks


@pytest.fixture
def launched(gpu: PagedKernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the ring compute by a GPU's kernels, wherever they are; the names of those launched."""
    names: list[str] = []
    lock = threading.Lock()  # the interpreter is not made for threads

    def noted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with lock:
                names.append(name)
                return kernel(*args, **options)

        return call

    of_ring = replace(gpu, block=noted("block", gpu.block), merge=noted("merge", gpu.merge))
    for module in (block, merge):
        monkeypatch.setattr(module, "paged", lambda _device: of_ring)
    return names


@given(
    seed=st.integers(0, 99),
    start=st.integers(0, 60),
    tokens=st.integers(1, 20),
    keys=st.sets(st.integers(0, 80), max_size=40),
    window=st.none() | st.integers(1, 50),
    kv_heads=st.sampled_from([1, 2, 4]),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_share_agrees_with_exact_attention_at_its_positions(
    launched: list[str],
    device: torch.device,
    seed: int,
    start: int,
    tokens: int,
    keys: set[int],
    window: int | None,
    kv_heads: int,
) -> None:
    at_L = np.array(sorted(keys), np.int64)
    q, kv = inputs(seed, tokens, len(at_L), 4, kv_heads, 8)
    at_T = np.arange(start, start + tokens)
    part = block.attend(q.to(device), at_T, kv.to(device), at_L, window)
    out, lse = attention(q, torch.from_numpy(at_T), kv, torch.from_numpy(at_L), window)
    torch.testing.assert_close(part.out_TNH.cpu().double(), out, rtol=0, atol=1e-5)
    torch.testing.assert_close(part.lse_TN.cpu().double(), lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("variant", [PassKV, PassQ, GatherKV])
@pytest.mark.parametrize(("ranks", "window", "planes"), [(2, None, 2), (3, 20, 2), (2, None, 1)])
def test_every_rank_has_what_one_rank_would_have(
    launched: list[str],
    device: torch.device,
    variant: Callable[[Wire], RingAttention],
    ranks: int,
    window: int | None,
    planes: int,
) -> None:
    shape = AttentionShape(
        heads=4, kv_heads=planes, head_size=8, element_bytes=4, window=window, planes=planes
    )
    made = MadePass(shape, [(0, 37), (25, 20), (3, 1)], ranks, seed=3, scatter=False)

    def run(comm: LoopbackComm) -> torch.Tensor:
        q, kv = (each(comm.rank).to(device) for each in (made.queries, made.keys))
        return variant(Wire(comm)).attend(q, kv, made.plan).cpu()

    for rank, out in enumerate(on_ranks(ranks, run)):
        torch.testing.assert_close(out.double(), made.expected(rank), rtol=0, atol=1e-5)
    assert {"block", "merge"} == set(launched)
