"""Which placement policy serves best?

Slices of public traces are replayed through the router's own gate, ledger and policies, over pools
on a virtual clock: nothing is computed, no socket is opened, and the same run gives the same
figures. Eight instances, half of each role. Unless they are --alike, one of each role is slower
than the others, and one prefill instance has slow ways to decode. Arrivals are sped up until the
pools are about as busy as --load says. Of an answer's times, limits are twice the prompt's own and
a second to its first token, and twice an idle step for each token after it.

- attainment: answers that kept both limits
- TTFT: arrival to first token, p50 and p99
- hits: prompt tokens that prefill had in its cache
- fairness: Jain's index over four tenants' attainment, of which one sends as much as the others

    python -m bench.policies --traces FOLDER --json FILE --plot FILE.png
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from bench.options import Json, Quick, Rows
from bench.placement.figures import Figures, figures
from bench.placement.pools import Call, Cluster, Replay
from bench.placement.traces import TRACES, Arrival, read
from bench.report import Row, report
from router.ledger import Need
from router.policies import POLICIES, PolicyName
from service.step_fit import StepSpeed

QUESTION = "Which placement policy serves best? (pools on a virtual clock)"
_SHOWN = (
    ("attainment", "attainment", "%", 100.0, True),
    ("TTFT p50", "ttft_p50_s", "ms", 1e3, False),
    ("TTFT p99", "ttft_p99_s", "ms", 1e3, False),
    ("TPOT mean", "tpot_mean_s", "ms", 1e3, False),
    ("hits", "hits", "%", 100.0, True),
    ("fairness", "fairness", "Jain", 1.0, True),
)
_PREFILL = StepSpeed(base_s=0.005, sequence_s=0.0, token_s=1 / 20_000)
_DECODE = StepSpeed(base_s=0.02, sequence_s=2e-4, token_s=2e-8)
_SEQUENCES = 64
_FAST, _SLOW = 2e10, 1e9


def cluster_for(arrivals: list[Arrival], *, alike: bool = False) -> Cluster:
    """Return four instances of each role with room for what comes."""
    totals = [a.prompt_tokens + a.output_tokens for a in arrivals]
    slower = StepSpeed(base_s=0.01, sequence_s=0.0, token_s=2 * _PREFILL.token_s)
    ways = [[_FAST] * 4 for _ in range(4)]
    if not alike:
        ways[1] = [_SLOW] * 4
    slow_decode = replace(_DECODE, base_s=1.5 * _DECODE.base_s)
    return Cluster(
        prefills=(_PREFILL, _PREFILL, _PREFILL, _PREFILL if alike else slower),
        decodes=(_DECODE, _DECODE, _DECODE, _DECODE if alike else slow_decode),
        bytes_per_s=tuple(map(tuple, ways)),
        room_tokens=round(max(2 * max(totals), 0.7 * _SEQUENCES * fmean(totals))),
        max_sequences=_SEQUENCES,
    )


def calls_for(arrivals: list[Arrival], cluster: Cluster, load: float) -> list[Call]:
    """Return a trace's requests, at such a pace that neither role is busier than `load`."""
    span_s = arrivals[-1].at_s
    prompts = sum(a.prompt_tokens for a in arrivals)
    prefill_s = prompts / sum(1 / speed.token_s for speed in cluster.prefills)
    step_s = _DECODE.base_s + _SEQUENCES / 2 * _DECODE.sequence_s
    sequences = len(cluster.decodes) * _SEQUENCES
    held = sum((a.prompt_tokens + a.output_tokens) * a.output_tokens for a in arrivals)
    slots_s = sum(a.output_tokens for a in arrivals) * step_s / sequences
    room_s = held * step_s / (len(cluster.decodes) * cluster.room_tokens)
    pace = load * span_s / max(prefill_s, slots_s, room_s)
    return [
        Call(
            arrival=replace(a, at_s=a.at_s / pace),
            tenant=f"tenant-{max(0, number % 6 - 2)}",
            need=Need(
                prompt_tokens=a.prompt_tokens,
                max_new_tokens=a.output_tokens,
                ttft_s=1.0 + 2 * a.prompt_tokens * _PREFILL.token_s,
                tpot_s=2 * _DECODE.base_s,
            ),
        )
        for number, a in enumerate(arrivals)
    ]


def measure(
    arrivals: list[Arrival], policy: PolicyName, load: float, *, alike: bool = False
) -> Figures:
    """Return what a policy makes of a trace."""
    cluster = cluster_for(arrivals, alike=alike)
    calls = calls_for(arrivals, cluster, load)
    Replay(cluster, POLICIES[policy]()).run(calls)
    return figures(calls)


def rows_of(trace: str, policy: PolicyName, found: Figures) -> list[Row]:
    """Return the rows of one policy on one trace."""
    return [
        Row(
            row=f"{trace}, {policy}, {name}",
            ours=times * getattr(found, field),
            unit=unit,
            higher_is_better=better,
        )
        for name, field, unit, times, better in _SHOWN
    ]


def plot(found: dict[tuple[str, PolicyName], Figures], file: Path) -> None:
    """Draw each figure by trace and policy. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = list(dict.fromkeys(trace for trace, _ in found))
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7), layout="constrained")
    for axis, (name, field, unit, times, _) in zip(axes.flat, _SHOWN, strict=True):
        for place, policy in enumerate(POLICIES):
            heights = [times * getattr(found[trace, policy], field) for trace in traces]
            where = [number + (place - 1.5) * 0.2 for number in range(len(traces))]
            axis.bar(where, heights, width=0.2, label=policy)
        axis.set_xticks(range(len(traces)), traces, fontsize=8)
        axis.set_title(f"{name} ({unit})")
    axes.flat[0].legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(
    traces: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Traces' folder.")],
    json: Json = None,
    rows: Rows = "",
    quick: Quick = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw to this file.")] = None,
    load: Annotated[float, typer.Option(min=0.05, max=2.0, help="How busy pools are.")] = 0.6,
    alike: Annotated[bool, typer.Option(help="Have all instances of a role as fast.")] = False,
    requests: Annotated[int, typer.Option(min=10, help="Requests of each trace.")] = 1000,
) -> None:
    """Compare placement policies on slices of traces."""
    import re

    found: dict[tuple[str, PolicyName], Figures] = {}
    for trace in TRACES:
        arrivals = read(traces, trace, 60 if quick else requests)
        for policy in POLICIES:
            found[trace, policy] = measure(arrivals, policy, load, alike=alike)
            typer.echo(f"replayed {trace}, {policy}", err=True)
    shown = [row for (t, p), each in found.items() for row in rows_of(t, p, each)]
    report(QUESTION, [row for row in shown if re.search(rows, row.row)], json)
    if plot_file is not None:
        plot(found, plot_file)


if __name__ == "__main__":
    typer.run(main)
