"""What a plan says, as figures for a file and as sentences for people. Pure.

The keys of `figures` are for programs: they are only added to.
"""

from dataclasses import asdict
from typing import Any

from planner.expected import Expected, expect
from planner.layout import Layout, Role
from planner.options import GIB, Option, Question
from planner.search import Plan, Split


def figures(plan: Plan) -> dict[str, Any]:
    """Return everything as plain values."""
    question, workload = plan.question, plan.question.workload
    return {
        "model": {
            "name": question.shape.name,
            "parameters": question.shape.parameters,
            "weight_bytes": question.shape.weight_bytes,
            "kv_bytes_per_token": question.shape.kv_token_bytes,
            "runs_here": question.shape.runs_here,
        },
        "device": question.device.model_dump(),
        "devices": question.devices,
        "calibration": question.calibration.model_dump(),
        "workload": {
            "requests_per_s": workload.rate_per_s,
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "gap_scv": workload.gap_scv,
            "longest_tokens": workload.longest,
        },
        "slo": {
            "ttft_s": question.slo.ttft_s,
            "tpot_s": question.slo.tpot_s,
            "attainment": question.slo.attainment,
        },
        "best": _split(plan, plan.best),
        "smallest": _split(plan, plan.smallest) if plan.smallest else None,
        "losers": [
            {**_option(loser), "reason": why_lost(plan, loser), "fits": loser.fits}
            for loser in plan.losers
        ],
    }


def _split(plan: Plan, split: Split) -> dict[str, Any]:
    return {
        "prefill": {**_option(split.prefill.option), "instances": split.prefill.count},
        "decode": {**_option(split.decode.option), "instances": split.decode.count},
        "devices": split.devices,
        "goodput_requests_per_s": split.goodput,
        "goodput_per_device": split.goodput_per_device,
        "bound_by": split.bound_by,
        "at_rate": asdict(expect(plan.question, split)),
    }


def _option(option: Option) -> dict[str, Any]:
    layout = option.layout
    return {
        "role": option.role.value,
        "layout": degrees(layout),
        "devices_per_instance": layout.ranks,
        "weight_bytes_per_device": option.memory.weights,
        "activation_bytes_per_device": option.memory.activations,
        "reserve_bytes_per_device": option.memory.reserve,
        "kv_bytes_per_device": max(0.0, option.memory.kv),
        "kv_tokens_per_instance": option.kv_tokens,
    }


def degrees(layout: Layout) -> dict[str, int]:
    """Return the degrees by their flags' names."""
    return {
        "cp": layout.cp,
        "tp": layout.tp,
        "pp": layout.pp,
        "ep": layout.ep,
        "dp": layout.dp,
    }


def question_lines(plan: Plan) -> list[str]:
    """Say what was asked."""
    question, workload = plan.question, plan.question.workload
    shape, slo = question.shape, question.slo
    model = (
        f"{shape.name}: {shape.parameters / 1e9:.3g}e9 parameters, "
        f"{shape.weight_bytes / GIB:.1f} GiB of weights, "
        f"{shape.kv_token_bytes / 1024:.0f} KiB of KV a token; {question.devices} x "
        f"{question.device.name}"
    )
    load = (
        f"{workload.rate_per_s:.3g} requests/s of {workload.prompt_tokens:,.0f} prompt and "
        f"{workload.output_tokens:,.0f} output tokens on average; {slo.attainment:.0%} within "
        f"TTFT {slo.ttft_s * 1e3:g} ms and TPOT {slo.tpot_s * 1e3:g} ms"
    )
    lines = [model, load, f"calibration: {question.calibration.source or 'of the given file'}"]
    if not shape.runs_here:
        lines.append(
            f"twinpool does not compute this architecture with weights of {shape.weight_bits:g} "
            "bits yet; the plan is arithmetic alone"
        )
    return lines


def outcome_lines(plan: Plan) -> list[str]:
    """Say what the best split gives."""
    rate, best = plan.question.workload.rate_per_s, plan.best
    expected = expect(plan.question, best)
    goodput = (
        f"goodput {best.goodput:.3g} requests/s, {best.goodput_per_device:.3g} a device, bound by "
        f"{best.bound_by}"
    )
    lines = [goodput, _at_rate_line(rate, expected), _transfer_line(plan, expected)]
    if plan.smallest is None:
        lines.append(
            f"NOT ENOUGH: {rate:.3g} requests/s want about {rate / best.goodput_per_device:.0f} "
            "devices of this sort"
        )
    elif plan.smallest.devices < best.devices:
        lines.append(f"{plan.smallest.devices} devices are enough: {split_name(plan.smallest)}")
    return lines


def _at_rate_line(rate: float, expected: Expected) -> str:
    wait_s = expected.prefill_mean_wait_s
    wait = "waits without end" if wait_s is None else f"a mean wait of {wait_s * 1e3:,.0f} ms"
    tpot = "no TPOT, as decode cannot keep up"
    if expected.tpot_s is not None:
        tpot = f"TPOT {expected.tpot_s * 1e3:.1f} ms at a batch of {expected.decode_batch:.2g}"
    return (
        f"at {rate:.3g} requests/s {expected.attainment:.1%} in time: prefill "
        f"{expected.prefill_median_s:.3f} s for the median prompt after {wait}, "
        f"{tpot}"
    )


def _transfer_line(plan: Plan, expected: Expected) -> str:
    each = max(
        expected.transfer_bytes_per_s_per_prefill_device,
        expected.transfer_bytes_per_s_per_decode_device,
    )
    return (
        f"KV transfer {expected.transfer_bytes_per_s / 1e9:.3g} GB/s in all, at most "
        f"{each / 1e9:.3g} GB/s a device of {plan.question.device.network_bytes_per_s / 1e9:.3g}"
    )


def split_name(split: Split) -> str:
    """Name a split's instances."""
    return (
        f"{split.prefill.count} x prefill {split.prefill.option.layout.name}, "
        f"{split.decode.count} x decode {split.decode.option.layout.name}"
    )


def command(question: Question, option: Option, model: str) -> str:
    """Return how an instance of a layout is started."""
    flags = {name: value for name, value in degrees(option.layout).items() if value > 1}
    if option.role is Role.PREFILL:
        flags["max-batched-tokens"] = question.pass_tokens
    else:
        flags["max-batch"] = question.max_batch
        flags["max-sequences"] = question.max_batch * option.layout.dp
    words = [f"--{name} {value}" for name, value in flags.items()]
    return " ".join(["twinpool", option.role.value, model, *words])


def why_lost(plan: Plan, loser: Option) -> str:
    """Say in a line why a layout is not in the best split."""
    if loser.reason is not None:
        return loser.reason
    own = plan.best_with.get((loser.role, loser.layout))
    if own is None:
        return "leaves too few devices to the other pool"
    best, rate = plan.best, plan.question.workload.rate_per_s
    if own.goodput < rate <= best.goodput:
        return f"sustains {own.goodput:.3g} requests/s at most, {rate:.3g} are wanted"
    if own.goodput_per_device >= best.goodput_per_device:
        return f"no better, with less room to spare: {split_name(own)}, bound by {own.bound_by}"
    return (
        f"{own.goodput_per_device:.3g} a device, not {best.goodput_per_device:.3g}, at best: "
        f"{split_name(own)}, bound by {own.bound_by}"
    )
