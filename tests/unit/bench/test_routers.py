"""The pure parts of the router's benchmark: spreads, stamps, paces, rows."""

import random

import pytest
from twinpool.v1 import common_pb2, inference_pb2

from bench.routers.decision import Cluster, decisions_s
from bench.routers.http_mocks import DONE
from bench.routers.load import Grpc, Http
from bench.routers.mocks import assets
from bench.routers.overload import overload_rows
from bench.routers.pace import AsTheyArrive, Paces, Steady
from bench.routers.peer import row_beside
from bench.routers.scaling import scaling_rows
from bench.routers.spread import Spread
from bench.routers.stamps import FIRST_ID, IDS, Stamps
from bench.routers.streams import half_load_rows
from text import Tokenizer


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def window(**changed: float) -> dict[str, float]:
    figures = {
        "tokens_per_s": 7500.0,
        "finished_per_s": 50.0,
        "on_way_p50_s": 0.001,
        "on_way_p99_s": 0.004,
        "router_cpu": 0.5,
        "grown_bytes": 40e6,
    }
    return figures | changed


def test_percentiles_are_right_to_a_percent_and_spreads_can_be_merged() -> None:
    low, high = Spread(), Spread()
    for step in range(1, 51):
        low.add(step / 1000)
    for step in range(51, 101):
        high.add(step / 1000)
    low.merge(high)
    assert len(low) == 100
    assert low.percentile(50) == pytest.approx(0.050, rel=0.011)
    assert low.percentile(99) == pytest.approx(0.099, rel=0.011)
    assert high.percentile(0) == pytest.approx(0.051, rel=0.011)
    low.add(0.0, times=1000)
    assert low.percentile(50) == pytest.approx(1e-6, rel=0.011)


def test_a_spread_of_nothing_has_no_percentile() -> None:
    with pytest.raises(ValueError, match="no value"):
        Spread().percentile(50)


def test_a_token_is_as_old_as_its_step_and_the_last_of_a_step_is_told() -> None:
    clock, told = Clock(), []
    stamps = Stamps(clock)
    first = stamps.open(2, lambda: told.append("first"))
    stamps.sent(first)
    clock.now += 1
    second = stamps.open(1)
    stamps.sent(second)
    assert stamps.arrived(first, 102.5) == 2.5
    assert stamps.arrived(second, 102.5) == 1.5
    assert told == []
    assert stamps.arrived(first, 103.0) == 3.0
    assert told == ["first"]


def test_tokens_of_no_step_have_no_age_and_ids_are_used_again() -> None:
    stamps = Stamps(Clock())
    assert stamps.arrived(FIRST_ID - 1, 0.0) is None
    ids = [stamps.open(1) for _ in range(IDS + 1)]
    assert ids[0] == ids[-1] == FIRST_ID
    assert len(set(ids)) == IDS


async def test_a_steady_pace_makes_up_for_no_late_step() -> None:
    clock = Clock()
    pace = Steady(0.001, clock)
    await pace.next()
    clock.now += 60.0
    await pace.next()
    assert pace.due == clock.now


async def test_a_pace_by_arrivals_lets_two_steps_be_on_their_way() -> None:
    pace = AsTheyArrive(2)
    await pace.next()
    await pace.next()
    assert pace.is_full
    pace.arrived()
    assert not pace.is_full


def test_batches_have_phases_and_speeds_of_their_own() -> None:
    paces = Paces(0.1, Clock(), random.Random(0))
    made = [paces() for _ in range(4)]
    steady = [pace for pace in made if isinstance(pace, Steady)]
    assert len({pace.due for pace in steady}) == 4
    assert all(100.0 - 0.1 <= pace.due <= 100.0 + 0.1 for pace in steady)
    assert isinstance(Paces(None, Clock(), random.Random(0))(), AsTheyArrive)


def test_every_step_has_a_word_of_its_own() -> None:
    tokenizer = Tokenizer(assets())
    words = {tokenizer.piece(token_id) for token_id in range(FIRST_ID, FIRST_ID + IDS)}
    assert len(words) == IDS
    assert None not in words
    assert len(tokenizer.encode("plain text")) == 10


def test_both_dialects_say_and_read_the_same() -> None:
    asked = inference_pb2.GenerateRequest.FromString(Grpc().request(7, "prompt"))
    assert (asked.stop.max_new_tokens, asked.prompt.text) == (7, "prompt")
    said = inference_pb2.GenerateResponse(
        token_ids=[300, 301], finish_reason=common_pb2.FINISH_REASON_LENGTH
    )
    token_ids, is_last = Grpc().read(said.SerializeToString())
    assert (list(token_ids), is_last) == ([300, 301], True)
    assert b'"max_new_tokens": 7' in Http().request(7, "prompt")
    assert Http().read(b'{"text":" 12c~","output_ids":[300]}') == ((300,), False)
    assert Http().read(DONE) == ((), True)


@pytest.mark.parametrize("caches", [False, True])
def test_decisions_leave_as_many_requests_running_as_there_were(caches: bool) -> None:
    cluster = Cluster(8, 40, caches=caches)
    assert len(decisions_s(cluster, 20)) == 20
    assert sum(view.sequences for view in cluster.ledger.decodes()) == 40


def test_prompts_go_where_their_beginning_is_known() -> None:
    cluster = Cluster(16, 0, caches=True)
    waiting = cluster.waiting()
    known = {view.key: waiting.cached_tokens(view.key) for view in cluster.ledger.prefills()}
    assert max(known.values()) == 16 * 32
    cluster.place(waiting)
    [chosen] = [view.key for view in cluster.ledger.prefills() if view.outstanding_requests]
    assert known[chosen] == 16 * 32


def test_one_minute_has_no_first_and_last() -> None:
    rows = {row.row: row for row in half_load_rows("s", [window()], [window(on_way_p99_s=0.003)])}
    assert (rows["s, added p99"].ours, rows["s, added p99"].limit) == (4.0, 3.0)
    assert rows["s, memory grown"].ours == 40.0
    assert rows["s, router's core"].ours == 50.0
    assert not any("minute" in name for name in rows)


def test_of_many_minutes_the_worst_and_the_growth_show() -> None:
    minutes = [
        window(),
        window(on_way_p99_s=0.02, grown_bytes=43e6),
        window(on_way_p99_s=0.005, grown_bytes=41e6),
    ]
    rows = {row.row: row.ours for row in half_load_rows("s", minutes, [window()])}
    assert rows["s, added p99"] == 5.0
    assert rows["s, added p99, worst minute"] == 20.0
    assert rows["s, added p99, last of 3"] == 5.0
    assert rows["s, memory grown"] == 43.0
    assert rows["s, memory grown after the first minute"] == 1.0


def test_goodput_under_overload_is_a_part_of_its_peak() -> None:
    found = window(finished_per_s=48.0, refused_p50_s=0.001, refused_p99_s=0.003)
    rows = {row.row: row for row in overload_rows("o", 50.0, found)}
    assert (rows["o, goodput"].ours, rows["o, goodput"].limit) == (48.0, 50.0)
    assert rows["o, goodput kept"].ours == pytest.approx(96.0)
    assert rows["o, time to a refusal, p99"].ours == pytest.approx(3.0)


def test_a_token_costs_the_time_of_all_routers_together() -> None:
    speed, cost = scaling_rows("x", [window(tokens_per_s=10_000.0)] * 3)
    assert (speed.ours, speed.unit) == (10_000.0, "tokens/s")
    assert cost.ours == pytest.approx(50.0)


def test_a_peer_stands_beside_ours_where_it_was_run() -> None:
    ours, theirs = [window()] * 2, [window(on_way_p99_s=0.002)] * 2
    row = row_beside("r", "on_way_p99_s", "ms", 1e3, ours, theirs)
    assert (row.ours, row.peer, row.peer_name) == (4.0, 2.0, "sglang-router")
    assert not row.higher_is_better
    alone = row_beside("r", "finished_per_s", "requests/s", 1.0, ours, [])
    assert (alone.peer, alone.peer_name, alone.higher_is_better) == (None, None, True)
