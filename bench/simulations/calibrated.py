"""Makes a simulation's setup of what was measured of a running system. Pure."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import chain

from bench.simulations.probes import Answer, Probed
from planner.simulator.setup import Beside, Decodes, Prefills, Setup, Shared
from planner.simulator.speeds import SpeedCosts
from service.step_fit import StepFit, StepSpeed


def calibrated(probed: Probed, *, kv_tokens: int) -> Setup:
    """Return one prefill and one decode instance as fast as those that were probed."""
    prefill, decode = _prefill_speed(probed.alone), _decode_speed(probed.batches)
    costs = SpeedCosts(prefill=prefill, decode=decode)
    way_s = statistics.median(answer.way_s for answer in probed.beside)
    return Setup(
        prefills=Prefills(costs=costs, instances=1, kv_tokens=kv_tokens),
        decodes=Decodes(costs=costs, instances=1, kv_tokens=kv_tokens),
        beside=Beside(
            request_s=way_s / 2,
            answer_s=way_s / 2,
            hand_over_s=_hand_over_s(probed.alone, costs),
        ),
        shared=Shared(
            prefill=max(1.0, _slower_prefill(probed.beside, prefill)),
            decode=max(1.0, _slower_decode(probed)),
        ),
    )


def _prefill_speed(alone: Sequence[Answer]) -> StepSpeed:
    fit = StepFit(has_base=False)
    for answer in alone:
        fit.observe(1, answer.prompt_tokens, answer.stats.prefill_s)
    assert fit.speed is not None
    return fit.speed


def _decode_speed(batches: Sequence[Sequence[Answer]]) -> StepSpeed:
    fit = StepFit()
    for answers in batches:
        # While all of them are under way and nothing else is.
        begin_s = max(answer.came_s[1] for answer in answers)
        end_s = min(answer.came_s[-1] for answer in answers)
        steps = [gap for gap in answers[0].gaps() if gap[0] >= begin_s and sum(gap[:2]) <= end_s]
        if steps:
            tokens = statistics.fmean(step[2] for step in steps) * len(answers)
            mean_s = statistics.fmean(step[1] for step in steps)
            for _ in steps:
                fit.observe(len(answers), round(tokens), mean_s)
    assert fit.speed is not None
    return fit.speed


def _hand_over_s(alone: Sequence[Answer], costs: SpeedCosts) -> float:
    """Return what comes to the first step of decode, from the first token on."""
    beyond_s = [
        answer.came_s[1] - answer.came_s[0] - costs.decode_step_s(1, answer.prompt_tokens)
        for answer in alone
    ]
    return max(0.0, statistics.median(beyond_s))


def _slower_prefill(beside: Sequence[Answer], alone: StepSpeed) -> float:
    measured_s = sum(answer.stats.prefill_s for answer in beside)
    tokens = sum(answer.prompt_tokens for answer in beside)
    return measured_s / (len(beside) * alone.sequence_s + tokens * alone.token_s)


def _slower_decode(probed: Probed) -> float:
    """Return a step's time while prompts are computed, in steps while none is."""
    during, apart = [], []
    for when_s, seconds, _ in chain.from_iterable(map(_gaps, probed.background)):
        shares = [_overlap(when_s, when_s + seconds, *each.prefilled) for each in probed.beside]
        if sum(shares) == seconds:
            during.append(seconds)
        elif not sum(shares):
            apart.append(seconds)
    return statistics.fmean(during) / statistics.fmean(apart) if during and apart else 1.0


def _gaps(answers: Sequence[Answer]) -> Iterator[tuple[float, float, int]]:
    last_s = min(answer.came_s[-1] for answer in answers)
    for answer in answers:
        yield from (gap for gap in answer.gaps() if gap[0] < last_s)


def _overlap(begin_s: float, end_s: float, other_begin_s: float, other_end_s: float) -> float:
    return max(0.0, min(end_s, other_end_s) - max(begin_s, other_begin_s))
