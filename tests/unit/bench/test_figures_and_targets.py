"""From seconds to rows and verdicts."""

from dataclasses import replace

import pytest

from bench.movers.figures import Figure, Measured, limit_message_bytes, rows
from bench.movers.targets import verdicts
from bench.movers.works import CARRIERS, KIB, WORKS, Carrier, Work

TCP, SHM = CARRIERS
WORK = {work.name: work for work in WORKS}
BLOCKS, LARGE, SMALL = WORK["256 x 64 KiB"], WORK["32 x 4 MiB"], WORK["2,048 x 8 KiB"]
SAME, RESHARD = WORK["4,096 tokens, same layout"], WORK["4,096 tokens, tp 1 to tp 2"]


def steady(name: str, gbps: float) -> Figure:
    return Figure(name=name, gbps=(gbps, gbps, gbps))


MEASURED = Measured(
    work=BLOCKS,
    carrier=TCP,
    memcpy=steady("memcpy", 10.0),
    perftest=steady("ucx_perftest", 4.0),
    peers=(steady("NIXL WRITE", 2.0), steady("NIXL READ", 2.5)),
    ours={"raw": steady("ours, raw", 3.0), "agent": steady("ours, agent", 2.0)},
)


def test_a_figure_is_bytes_over_seconds_of_the_middle_round() -> None:
    figure = Figure.of_seconds("x", BLOCKS, [0.01, 0.016777216, 0.02])
    assert figure.median == pytest.approx(1.0)
    assert figure.spread > 0


def test_each_mode_has_a_row_beside_the_best_peer() -> None:
    raw, agent = rows([MEASURED])
    assert (raw.row, agent.row) == ("256 x 64 KiB, tcp, raw", "256 x 64 KiB, tcp, agent")
    assert (raw.ours, raw.unit, raw.limit, raw.higher_is_better) == (3.0, "GB/s", 4.0, True)
    assert (raw.peer, raw.peer_name) == (2.5, "NIXL READ")


def test_without_a_peer_its_columns_are_null() -> None:
    (row, _) = rows([replace(MEASURED, peers=())])
    assert row.peer is None
    assert row.peer_name is None


def test_what_was_not_run_has_no_row_and_no_verdict() -> None:
    without = replace(MEASURED, ours={})
    assert rows([without]) == []
    assert verdicts([without]) == []


def test_a_request_is_given_in_time() -> None:
    (row,) = rows([replace(MEASURED, work=SAME, ours={"agent": steady("ours, agent", 2.0)})])
    assert (row.unit, row.higher_is_better) == ("ms", False)
    assert row.ours == pytest.approx(SAME.bytes / 2e6)
    assert row.limit == pytest.approx(SAME.bytes / 4e6)
    assert row.peer == pytest.approx(SAME.bytes / 2.5e6)


def test_small_slices_are_also_shown_beside_plain_messages() -> None:
    shown = rows([replace(MEASURED, work=SMALL, slices=steady("a message a slice", 1.0))])
    beside = [row for row in shown if row.peer_name == "a message a slice"]
    assert [(row.ours, row.peer) for row in beside] == [(3.0, 1.0)]


def test_memcpy_is_the_limit_of_large_slices_over_shared_memory_only() -> None:
    limits = {
        (work.name, carrier.name): replace(MEASURED, work=work, carrier=carrier).limit.name
        for work in (BLOCKS, LARGE)
        for carrier in CARRIERS
    }
    assert [key for key, name in limits.items() if name == "memcpy"] == [(LARGE.name, SHM.name)]


def test_the_limit_of_small_slices_is_that_of_messages_that_hold_several() -> None:
    assert limit_message_bytes(SMALL) == 64 * KIB
    assert limit_message_bytes(LARGE) == LARGE.slice_bytes


def test_raw_is_judged_by_the_limit_and_agent_by_raw_and_both_by_the_peer() -> None:
    found = {(one.row, one.against): one for one in verdicts([MEASURED])}
    raw, agent = (f"{MEASURED.name}, {mode}" for mode in ("raw", "agent"))
    assert found[raw, "ucx_perftest"].met
    assert found[raw, "NIXL READ"].met
    assert found[agent, "raw"].ratio == pytest.approx(2 / 3)
    assert not found[agent, "raw"].met
    assert not found[agent, "NIXL READ"].met
    assert len(found) == 4


@pytest.mark.parametrize(
    ("work", "carrier", "against", "bound"),
    [
        (BLOCKS, TCP, "ucx_perftest", 0.75),
        (BLOCKS, SHM, "ucx_perftest", 0.6),
        (LARGE, SHM, "memcpy", 0.9),
        (SMALL, TCP, "a message a slice", 2.5),
        (SMALL, SHM, "a message a slice", 1.4),
    ],
)
def test_raw_has_the_target_of_its_work_and_carrier(
    work: Work, carrier: Carrier, against: str, bound: float
) -> None:
    plain = steady("a message a slice", 1.0)
    one = replace(MEASURED, work=work, carrier=carrier, slices=plain, peers=())
    verdict, _ = verdicts([one])
    assert (verdict.against, verdict.bound) == (against, bound)


@pytest.mark.parametrize(("gbps", "met"), [(2.0, True), (1.6, True), (1.5, False)])
def test_a_reshard_may_take_at_most_1_3_times_as_long(gbps: float, met: bool) -> None:
    same = replace(MEASURED, work=SAME, peers=(), ours={"agent": steady("ours, agent", 2.0)})
    reshard = replace(same, work=RESHARD, ours={"agent": steady("ours, agent", gbps)})
    (verdict,) = verdicts([same, reshard])
    assert verdict.ratio == pytest.approx(2.0 / gbps)
    assert verdict.met == met


def test_a_reshard_alone_or_over_another_carrier_is_not_judged() -> None:
    reshard = replace(MEASURED, work=RESHARD, peers=(), ours={"agent": steady("ours, agent", 2.0)})
    elsewhere = replace(reshard, work=SAME, carrier=SHM)
    assert verdicts([reshard]) == []
    assert verdicts([reshard, elsewhere]) == []
