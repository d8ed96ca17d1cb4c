"""Draws what came of runs; needs matplotlib, which only contributors have. Owns no figures."""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from bench.goodputs.metrics import attainment_at_scales
from bench.goodputs.records import Record
from bench.goodputs.search import wilson
from bench.goodputs.slo import Slo

_SIZE = (6.4, 4.0)
_SCALES = np.geomspace(0.1, 10, 81)
_ALL = "all limits"


def missing() -> str:
    """Return what to do before anything can be drawn; empty where it can."""
    if importlib.util.find_spec("matplotlib") is not None:
        return ""
    return (
        "--plots: needs matplotlib, which is not installed; pip install matplotlib, or give"
        " --no-plots"
    )


def by_rate(records: Iterable[Record]) -> dict[float, list[Record]]:
    """Return the records of windows, of all runs of each rate, by rate."""
    found: dict[float, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.rate):
        if record.part == "window":
            found.setdefault(record.rate, []).append(record)
    return found


def draw(
    of_all: Iterable[Record], slo: Slo, attainment: float, confidence: float
) -> dict[str, Any]:
    """Return matplotlib's figures by name; those of limits only where there are any."""
    records = by_rate(of_all)
    found = {"times": _times(records, slo)}
    if slo.each():
        rate = at_limit(records, slo, attainment)
        found["attainment-by-slo-scale"] = _by_scale(rate, records[rate], slo, attainment)
        if len(records) > 1:
            found["attainment-by-rate"] = _by_rate(records, slo, attainment, confidence)
    return found


def compare(systems: Mapping[str, Iterable[Record]], slo: Slo, attainment: float) -> Any:
    """Attainment of all limits against rate, a curve for each system."""
    figure, axis = _figure("requests/s", "attainment (%)")
    for name, records in systems.items():
        found = by_rate(records)
        shares = [100 * _share(each, slo) for each in found.values()]
        axis.plot(list(found), shares, marker="o", label=name)
    axis.set_xlim(left=0)
    _finish(axis, attainment)
    return figure


def save(figure: Any, folder: Path, name: str) -> str:
    """Write a figure as PNG and SVG; return the SVG without its XML head."""
    figure.savefig(folder / f"{name}.png", dpi=150)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    (folder / f"{name}.svg").write_text(text.getvalue())
    return text.getvalue()[text.getvalue().index("<svg") :]


def at_limit(records: Mapping[float, Sequence[Record]], slo: Slo, attainment: float) -> float:
    """Return the highest rate that attained enough, else the lowest one."""
    passed = [rate for rate, found in records.items() if _share(found, slo) >= attainment]
    return max(passed, default=min(records))


def _share(records: Sequence[Record], slo: Slo) -> float:
    return _met(records, slo) / len(records)


def _met(records: Sequence[Record], slo: Slo) -> int:
    return sum(map(slo.met_by, records))


def _figure(x: str, y: str) -> tuple[Any, Any]:
    # Apart from pyplot, which would keep them, and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    return figure, axis


def _by_rate(
    records: Mapping[float, Sequence[Record]], slo: Slo, attainment: float, confidence: float
) -> Any:
    """Attainment against rate, all limits together and each alone; as DistServe (OSDI'24)."""
    figure, axis = _figure("requests/s", "attainment (%)")
    rates, of_rates = list(records), list(records.values())
    shares = np.array([_share(found, slo) for found in of_rates])
    ends = np.array([wilson(_met(found, slo), len(found), confidence) for found in of_rates])
    errors = np.abs(ends.transpose() - shares)
    axis.errorbar(rates, 100 * shares, yerr=100 * errors, marker="o", capsize=3, label=_ALL)
    for name, one in slo.each().items():
        axis.plot(rates, [100 * _share(found, one) for found in of_rates], "--", label=name)
    axis.set_xlim(left=0)
    _finish(axis, attainment)
    return figure


def _by_scale(rate: float, records: Sequence[Record], slo: Slo, attainment: float) -> Any:
    """Attainment against limits that are so many times as long, at one rate; as DistServe."""
    figure, axis = _figure(f"SLO scale, at {rate:.3g} requests/s", "attainment (%)")
    for name, limits in {_ALL: slo, **slo.each()}.items():
        shares = attainment_at_scales(records, limits, _SCALES.tolist())
        style = "-" if name == _ALL else "--"
        axis.plot(_SCALES, 100 * np.array(shares), style, label=name)
    axis.set_xscale("log")
    # The tighter, the further to the right.
    axis.invert_xaxis()
    axis.axvline(1.0, color="grey", linewidth=0.8)
    _finish(axis, attainment)
    return figure


def _times(records: Mapping[float, Sequence[Record]], slo: Slo) -> Any:
    """How TTFT and TPOT are spread at each rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * _SIZE[0], _SIZE[1]), layout="constrained")
    for axis, name, limit in zip(
        figure.subplots(1, 2), ("ttft_s", "tpot_s"), (slo.ttft_s, slo.tpot_s), strict=True
    ):
        for rate, found in records.items():
            values = np.sort([1e3 * getattr(each, name) for each in found if each.is_finished])
            shares = 100 * np.arange(1, len(values) + 1) / len(found)
            axis.step(values, shares, where="post", label=f"{rate:.3g}/s")
        if limit is not None:
            axis.axvline(1e3 * limit, color="grey", linewidth=0.8)
        axis.set_xlabel(f"{name.removesuffix('_s').upper()} (ms)")
        axis.set_ylabel("submitted requests (%)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _finish(axis: Any, attainment: float) -> None:
    axis.axhline(100 * attainment, color="grey", linestyle=":")
    axis.set_ylim(-2, 102)
    axis.legend()
