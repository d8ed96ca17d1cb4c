"""What makes lateness as bad as it can be, and what takes a lane's protection away."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvtransfer import receive_lanes
from kvtransfer.loopback import LoopbackStream
from kvtransfer.memory import KVMemory
from kvtransfer.settings import Lane
from kvtransfer.shared import MappedRegion
from kvtransfer.slots import ReceiveSlot, ReceiveSlots, SlotState
from tests.unit.kvtransfer.late import Stage


def worst_moments(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    """Let late messages land between a slot's check and its scatter, and hold up mapped reads."""
    become = ReceiveSlot.become

    def landing(slot: ReceiveSlot, state: SlotState) -> None:
        become(slot, state)
        if state is SlotState.VERIFIED:
            stage.plug.land_everything()

    monkeypatch.setattr(ReceiveSlot, "become", landing)
    for name in ("copy_from", "pack"):
        monkeypatch.setattr(KVMemory, name, _held_up(getattr(KVMemory, name), stage))


def _held_up(read: Callable[..., Any], stage: Stage) -> Callable[..., Any]:
    def reading(memory: KVMemory, *args: Any) -> Any:
        if threading.current_thread().name.startswith("kv-receive"):
            stage.reading()
        return read(memory, *args)

    return reading


def _share_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every connection the same buffers, whether or not something can still land in them."""
    buffers: dict[int, Any] = {}

    class Shared(ReceiveSlots):
        def __init__(self, count: int, slot_bytes: int) -> None:
            super().__init__(count, slot_bytes)
            for slot in self:
                slot.buffer = buffers.setdefault(slot.index, slot.buffer)

    monkeypatch.setattr(receive_lanes, "ReceiveSlots", Shared)


def _divert_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopbackStream, "divert", lambda stream, key: None)


def _believe_every_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappedRegion, "stands", lambda region, lease: True)


# What takes a lane's protection away.
UNPROTECTED: dict[Lane, Callable[[pytest.MonkeyPatch], None]] = {
    "ucx": _share_slots,
    "stream": _divert_nothing,
    "mapped": _believe_every_read,
}
