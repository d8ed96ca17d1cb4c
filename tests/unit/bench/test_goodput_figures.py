"""Figures, limits, the search for a rate, and what is drawn and written of them."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.goodputs import page, plots, rows
from bench.goodputs.metrics import Metrics, attainment_at_scales, metrics
from bench.goodputs.records import Record
from bench.goodputs.runner import Run
from bench.goodputs.search import Search, Wanted, wilson
from bench.goodputs.slo import MLPERF, Slo

# What `vllm bench serve` (0.32.0, calculate_metrics) makes of these answers in 7.5 s with limits
# of 400 ms, 50 ms and 700 ms: (answered, ttft, itl, prompt tokens, output tokens), in seconds.
ANSWERS: list[tuple[bool, float, list[float], int, int]] = [
    (True, 0.571, [0.042, 0.014, 0.076, 0.018, 0.057, 0.083], 224, 7),
    (True, 0.097, [0.043], 251, 2),
    (True, 0.353, [0.015, 0.055], 233, 3),
    (False, 0.367, [0.042], 231, 2),
    (True, 0.356, [0.021], 434, 2),
    (True, 0.129, [], 125, 1),
    (True, 0.358, [0.065, 0.018, 0.056], 197, 6),
    (True, 0.104, [0.067, 0.055, 0.06, 0.05, 0.053, 0.072], 481, 7),
    (False, 0.249, [0.03, 0.024, 0.072, 0.017, 0.034, 0.05, 0.037, 0.046], 628, 9),
    (True, 0.115, [0.043, 0.071], 160, 3),
    (True, 0.282, [0.087, 0.016, 0.055, 0.073, 0.075, 0.037, 0.038, 0.05], 821, 9),
    (True, 0.088, [0.017, 0.032, 0.066, 0.015, 0.068, 0.035, 0.056, 0.064], 461, 9),
]
VLLM = {
    "request_throughput": 1.3333333333333333,
    "request_goodput": 0.8,
    "output_throughput": 6.533333333333333,
    "total_token_throughput": 458.1333333333333,
}
VLLM_MS: dict[str, tuple[float, ...]] = {  # mean, median, std, p50, p90, p95, p99
    "ttft": (245.3, 205.5, 155.30231807671123, 205.5, 379.3, 475.15, 551.83),
    "tpot": (43.2925925925926, 44.125, 12.447646812940109, 44.125, 57.5, 58.5, 59.3),
    "itl": (49.13513513513514, 55.0, 21.235057910003402, 55.0, 73.8, 77.4, 85.56),
    "e2el": (427.1, 432.0, 221.20056509873564, 432.0, 727.8, 794.4, 847.68),
}
SLO = Slo(ttft_s=0.4, tpot_s=0.05, e2el_s=0.7)


def record(index: int = 0, **changed: Any) -> Record:
    fields: dict[str, Any] = {
        "run": 1,
        "rate": 2.0,
        "index": index,
        "part": "window",
        "outcome": "finished",
        "scheduled_s": float(index),
        "sent_s": float(index),
        "ended_s": index + 1.0,
        "ttft_s": 0.1,
        "itl_s": (0.02, 0.02),
        "prompt_tokens": 10,
        "asked_tokens": 3,
        "output_tokens": 3,
    }
    return Record(**fields | changed)


def run(number: int, rate: float, share: float) -> Run:
    """A run of 20 requests, of which a share keep 0.2 s."""
    records = tuple(
        record(index, run=number, rate=rate, ttft_s=0.1 if index < 20 * share else 0.5)
        for index in range(20)
    )
    slo = Slo(ttft_s=0.2)
    return Run(number=number, rate=rate, records=records, metrics=metrics(records, slo, began_s=0))


def golden() -> Metrics:
    records = [
        record(
            index,
            outcome="finished" if answered else "failed",
            ttft_s=ttft_s,
            itl_s=tuple(itl_s),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            asked_tokens=output_tokens,
            ended_s=9.5,
        )
        for index, (answered, ttft_s, itl_s, prompt_tokens, output_tokens) in enumerate(ANSWERS)
    ]
    return metrics(records, SLO, began_s=2.0)


def test_figures_are_those_of_vllm_bench_serve() -> None:
    found = golden()
    assert {name: getattr(found, name) for name in VLLM} == pytest.approx(VLLM)
    assert (found.completed, found.prompt_tokens, found.output_tokens) == (10, 3387, 49)
    for name, expected in VLLM_MS.items():
        times = getattr(found, name)
        ours = (times.mean_s, times.median_s, times.std_s, *times.percentiles_s.values())
        assert [1e3 * value for value in ours] == pytest.approx(expected)


def test_a_window_is_as_long_as_it_was_though_nobody_came_at_its_end() -> None:
    records = [record(ended_s=3.0), record(ended_s=4.0)]
    assert metrics(records, Slo(), began_s=2.0, until_s=12.0).duration_s == 10.0
    assert metrics(records, Slo(), began_s=2.0, until_s=3.5).duration_s == 2.0


def test_attainment_counts_whoever_was_not_answered_as_a_miss() -> None:
    found = golden()
    assert (found.submitted, found.met) == (12, 6)
    assert found.attainment == 0.5
    assert found.outcomes == {"finished": 10, "failed": 2}
    # Nobody who was refused keeps a limit, not even one that none was given for.
    refused = metrics([record(outcome="refused", ttft_s=0.0)], Slo(), began_s=0)
    assert (refused.met, refused.ttft.mean_s) == (0, 0.0)


def test_a_limit_that_is_met_exactly_is_kept_and_one_token_keeps_any_tpot() -> None:
    assert Slo(ttft_s=0.1).met_by(record())
    assert not Slo(ttft_s=0.0999).met_by(record())
    assert Slo(tpot_s=0.001).met_by(record(output_tokens=1, itl_s=()))
    assert Slo(tpot_s=0.001).missed(record()) == ("tpot_s",)


def test_limits_scale_together() -> None:
    records = [record(ttft_s=ttft_s, itl_s=(0.01, 0.01)) for ttft_s in (0.1, 0.2, 0.4)]
    slo = Slo(ttft_s=0.2, tpot_s=0.01)
    assert attainment_at_scales(records, slo, [0.5, 1.0, 2.0]) == [0.0, 2 / 3, 1.0]


def test_mlperfs_limits_are_there_by_name() -> None:
    assert MLPERF["llama2-70b-interactive"] == Slo(ttft_s=0.45, tpot_s=0.04)
    assert MLPERF["llama3.1-405b-server"] == Slo(ttft_s=6.0, tpot_s=0.175)
    assert MLPERF["llama3.1-8b-interactive"] == Slo(ttft_s=0.5, tpot_s=0.03)


@pytest.mark.parametrize(
    ("met", "submitted", "low", "high"),
    # Brown, Cai and DasGupta (2001) and R's prop.test(correct = FALSE).
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_intervals_are_wilsons(met: int, submitted: int, low: float, high: float) -> None:
    assert wilson(met, submitted, 0.95) == pytest.approx((low, high), abs=1e-4)


def searched(search: Search, attainment: Callable[[float], float], requests: int = 1000) -> None:
    for _ in range(100):
        rate = search.next()
        if rate is None:
            return
        search.add(rate, round(requests * attainment(rate)), requests)
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("limit", [0.3, 1.0, 7.7, 60.0])
@pytest.mark.parametrize("start", [0.5, 1.0, 16.0])
def test_the_search_comes_to_the_rate_within_its_precision(limit: float, start: float) -> None:
    search = Search(Wanted(precision=0.05), start=start, lowest=0.1, highest=100.0)
    searched(search, lambda rate: 0.99 if rate <= limit else 0.5)
    assert search.best is not None
    assert limit / 1.06 <= search.best.rate <= limit
    assert search.best.is_sure
    assert all(point.runs == 1 for point in search.points)


def test_a_rate_on_no_side_is_run_again_until_it_is_or_its_runs_are_spent() -> None:
    search = Search(Wanted(runs=3), start=2.0, lowest=0.1, highest=100.0)
    assert not search.add(2.0, 27, 30).is_sure
    assert search.next() == 2.0
    assert not search.add(2.0, 27, 30).is_settled
    last = search.add(2.0, 27, 30)
    assert (last.is_settled, last.is_sure, last.passes) == (True, False, True)
    assert "unsure" in str(last)
    assert search.next() == 4.0
    assert search.add(4.0, 10, 30).is_sure
    assert search.next() not in (2.0, 4.0)


def test_a_server_that_never_keeps_the_limits_has_no_rate() -> None:
    search = Search(Wanted(), start=2.0, lowest=0.5, highest=100.0)
    searched(search, lambda rate: 0.0)
    assert search.best is None
    assert [point.rate for point in search.points] == [0.5, 1.0, 2.0]


def test_one_that_always_keeps_them_has_the_highest() -> None:
    search = Search(Wanted(), start=2.0, lowest=0.5, highest=10.0)
    searched(search, lambda rate: 1.0)
    assert search.best is not None
    assert search.best.rate == 10.0


@pytest.mark.parametrize("seed", range(5))
def test_the_search_is_mostly_right_where_attainment_falls_slowly(seed: int) -> None:
    rng = random.Random(seed)

    def attained(rate: float) -> float:
        share = min(1.0, 1.1 - 0.02 * rate)  # 90% at 10
        return sum(rng.random() < share for _ in range(400)) / 400

    search = Search(Wanted(), start=1.0, lowest=0.1, highest=100.0)
    searched(search, attained, 400)
    assert search.best is not None
    assert 8.0 <= search.best.rate <= 12.0


def test_what_makes_figures_less_than_they_seem_is_said() -> None:
    late = record(sent_s=0.2, output_tokens=2, error="")
    lost = record(1, outcome="lost", error="no server")
    said = rows.warnings(metrics([late, lost], Slo(), began_s=0), 0.05)
    assert "sent 200 ms late" in said[0]
    assert "1 of 1 answers have fewer tokens" in said[1]
    assert "1 of 2 requests were not answered" in said[2]
    assert said[3] == "said 1 times: no server"
    assert rows.warnings(metrics([record()], Slo(), began_s=0), 0.05) == []


def test_rows_tell_attainment_and_all_times() -> None:
    found = {row.row: row for row in rows.run_rows(run(1, 2.0, 0.5))}
    assert (found["attainment"].ours, found["attainment"].unit) == (50.0, "%")
    assert found["TTFT p50"].ours == pytest.approx(300.0)
    assert not found["TPOT p99"].higher_is_better
    assert len(rows.sweep_rows([run(1, 2.0, 0.5), run(2, 4.0, 0.2)])) == 12


def test_curves_and_report_are_written_and_show_text_as_text(tmp_path: Path) -> None:
    runs = [run(1, 2.0, 1.0), run(2, 4.0, 0.95), run(3, 4.0, 0.95), run(4, 8.0, 0.2)]
    slo = Slo(ttft_s=0.2)
    window = [each for one in runs for each in one.records]
    records = plots.by_rate([*window, record(part="warm-up")])
    assert [len(found) for found in records.values()] == [20, 40, 20]
    assert plots.at_limit(records, slo, 0.9) == 4.0
    drawn = plots.draw(window, slo, 0.9, 0.95)
    drawn["systems"] = plots.compare({"ours": window, "theirs": window[:20]}, slo, 0.9)
    drawings = {name: plots.save(figure, tmp_path, name) for name, figure in drawn.items()}
    assert set(drawings) == {"times", "attainment-by-rate", "attainment-by-slo-scale", "systems"}
    page.write(
        tmp_path / "report.html",
        title="?",
        verdict=["4 requests/s"],
        served={"server": "<script>alert(1)</script>"},
        settings={"url": "127.0.0.1:9000"},
        tables={"run": rows.run_rows(runs[0])},
        warnings=["late"],
        drawings=drawings,
    )
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 4
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "src=" not in text
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_without_limits_only_times_are_drawn() -> None:
    assert set(plots.draw([record(), record(rate=4.0)], Slo(), 0.9, 0.95)) == {"times"}
