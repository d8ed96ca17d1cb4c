"""Kills and stops either side of a KV transfer at random moments, on every lane.

How often each is done is set by TWINPOOL_TRANSFER_KILLS; the seed is printed and can be set by
TWINPOOL_TEST_SEED. Detection times go to a table, and to TWINPOOL_REPORT_DIR as JSON.
"""

import json
import os
import random
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.kvtransfer.processes import RankProcess, begin, join, transfer

KILLS = int(os.environ.get("TWINPOOL_TRANSFER_KILLS", "100"))
SEED = int(os.environ.get("TWINPOOL_TEST_SEED", str(random.SystemRandom().randrange(1 << 30))))
TOKENS, LAYERS = 40_000, 4
LANES: dict[str, dict[str, Any]] = {
    "mapped": {"lane": "mapped"},
    "stream": {"lane": "stream"},
    "ucx, shared memory": {"lane": "ucx", "tls": None},
    "ucx, tcp": {"lane": "ucx", "tls": "tcp"},
}
# Within which a loss must be told; the product's own limits are 1 and 3 seconds. The kernel frees
# the memory of a killed process before it closes its sockets, and cores here are few.
LIMITS_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: 4.0}

_found: dict[str, list[float]] = defaultdict(list)


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print what was found when all is over."""
    print(f"\nTWINPOOL_TEST_SEED={SEED}")
    yield
    rows: list[dict[str, Any]] = [
        {
            "row": row,
            "count": len(times),
            "median_ms": 1e3 * statistics.median(times),
            "max_ms": 1e3 * max(times),
        }
        for row, times in _found.items()
    ]
    for each in rows:
        figures = f"{each['count']:4d} {each['median_ms']:8.0f} {each['max_ms']:8.0f} ms"
        print(f"{each['row']:45s} {figures}")
    if folder := os.environ.get("TWINPOOL_REPORT_DIR"):
        Path(folder, "detection.json").write_text(json.dumps(rows, indent=1) + "\n")


@pytest.mark.parametrize("sort", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["send", "receive"])
@pytest.mark.parametrize("lane", LANES)
def test_a_peer_lost_in_mid_transfer_is_noticed_and_harms_nobody(
    lane: str, victim: str, sort: signal.Signals
) -> None:
    rng = random.Random(f"{SEED} {lane} {victim} {sort}")
    stays = {"send": "receive", "receive": "send"}[victim]
    config = {"tokens": TOKENS, "layers": LAYERS, "heartbeat_s": 1.0, **LANES[lane]}
    survivor = RankProcess(stays, **config)
    following = RankProcess(victim, epoch=100, **config)
    _open(survivor)
    try:
        for number in range(KILLS):
            doomed = following
            # Starting takes longest: the next one comes up while this one dies.
            following = RankProcess(victim, epoch=101 + number, **config)
            _open(doomed)
            sender, receiver = (doomed, survivor) if victim == "send" else (survivor, doomed)
            join(sender, receiver)
            begin(sender, receiver, 2 * number + 1)
            sender.do("ready", id=2 * number + 1, layers=[0, LAYERS])
            time.sleep(rng.uniform(0.0, 0.03))
            lost_s = _lose(doomed, survivor, sort, 2 * number + 1)
            _found[f"{lane}: {victim}er {sort.name}"].append(lost_s)
            doomed.close()
            if stays == "receive":
                assert survivor.ask("check")["others"]
        _open(following)
        sender, receiver = (following, survivor) if victim == "send" else (survivor, following)
        join(sender, receiver)
        transfer(sender, receiver, 2 * KILLS + 1)
        if stays == "receive":
            survivor.slots_become(**({"granted": 6} if lane.startswith("ucx") else {}))
    finally:
        survivor.close()
        following.close()
    assert max(_found[f"{lane}: {victim}er {sort.name}"]) < LIMITS_S[sort]


def _open(rank: RankProcess) -> None:
    _ = rank.bound if rank.role == "receive" else rank.ask("start")


def _lose(doomed: RankProcess, survivor: RankProcess, sort: signal.Signals, transfer: int) -> float:
    """Signal one side; return after how long the other said so."""
    began = time.monotonic()
    if sort is signal.SIGKILL:
        doomed.kill()
    else:
        doomed.signal(sort)
    # A transfer that was complete by then is as good an end as one that failed.
    said = survivor.wait_any(
        {"event": "Failed", "id": transfer}, {"event": "Completed", "id": transfer}
    )
    while said["event"] != "PeerDown":
        said = survivor.wait_any({"event": "PeerDown"})
    lost_s = time.monotonic() - began
    if sort is not signal.SIGKILL:
        doomed.signal(signal.SIGCONT)
        time.sleep(0.2)
    return lost_s
