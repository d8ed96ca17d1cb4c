"""What one process holds: by its agent's and its transport's own lists, and by the kernel's.

Looks only. What is counted is named as it is shown to whoever reads of a growth.
"""

import ctypes
import gc
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtransfer import SharedRegion
from kvtransfer.network import NetworkTransport
from tests.flat.growth import Held

_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Live:
    """An agent with what it was made of; only a sender has a region."""

    agent: Any
    transport: NetworkTransport
    region: SharedRegion | None
    outcomes: Any


def probed(live: Live) -> bool:
    """Whether no new connection is being tried out any more; for the agent's thread."""
    if live.region is None:
        return True
    sessions = [route.session for route in live.agent._outbound]
    return all(session is not None and session.probe.over for session in sessions)


def at_rest(live: Live) -> bool:
    """Whether nothing is under way; for the agent's thread."""
    sending = live.region is not None and live.agent._outbound.slot_counts()["sending"]
    return not live.agent._transfers and not sending


def by_agent(live: Live) -> Held:
    """Return what the agent and its transport hold by their own lists; for the agent's thread."""
    agent, transport = live.agent, live.transport
    found: Held = {
        "transfers": len(agent._transfers),
        "links": len(transport._links),
        "watched sockets": len(transport._selector.get_map()),
        "ucx workers": len(transport._workers),
        "ucx endpoints": sum(worker._endpoint is not None for worker in transport._workers),
        "ucx requests": sum(len(worker._outstanding) for worker in transport._workers),
    }
    if live.region is not None:
        slots = agent._outbound.slot_counts()
        found["leases"] = live.region.leases
        found["lease words"] = int((live.region._words != 0).sum())
        found["turns"] = len(agent._turns)
    else:
        slots = agent._inbound.slot_counts()
        found["remembered transfers"] = len(agent._over)
        found["connections kept"] = len(agent._inbound._numbered)
        found["quarantined links"] = len(agent._inbound._quarantine)
    return found | {f"slots {state}": count for state, count in slots.items()}


def by_process() -> Held:
    """Return the product's objects by class, and what the process has of the kernel."""
    gc.collect()
    found = _objects()
    # What the allocator keeps in reserve is nobody's.
    _LIBC.malloc_trim(0)
    return found | _mappings() | _status()


def _objects() -> Held:
    count: Counter[str] = Counter()
    for each in gc.get_objects():
        kind = type(each)
        if str(kind.__module__).startswith("kvtransfer"):
            count[f"objects {kind.__name__}"] += 1
    return {**count, "python blocks": sys.getallocatedblocks()}


def _mappings() -> Held:
    """Shared mappings are ours and UCX's; private ones mostly the allocator's."""
    found: Counter[str] = Counter()
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, access = line.split(maxsplit=2)[:2]
        begin, end = (int(part, 16) for part in extent.split("-"))
        kind = "shared" if access.endswith("s") else "private"
        found[f"{kind} mappings"] += 1
        found[f"{kind} KiB"] += (end - begin) // 1024
    return dict(found)


def _status() -> Held:
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "resident KiB": int(status["VmRSS"].split()[0]),
    }
