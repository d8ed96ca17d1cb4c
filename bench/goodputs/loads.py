"""What systems are asked side by side: public traces made short, and the limits of each. Pure."""

from dataclasses import dataclass, replace

from bench.goodputs.slo import Slo


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of one kind.

    Attributes:
        trace: Name of the public trace whose lengths they have.
        length_scale: What these are multiplied with.
        start: Requests a second of the first run.
        limits: Pairs that the highest rate is looked for of, the tight one first.
    """

    name: str
    trace: str
    length_scale: float
    start: float
    limits: tuple[Slo, ...]


def _limits(*pairs: tuple[float, float]) -> tuple[Slo, ...]:
    return tuple(Slo(ttft_s=ttft_s, tpot_s=tpot_s) for ttft_s, tpot_s in pairs)


def loads(*, chat_scale: float, code_scale: float, slo_scale: float) -> tuple[Load, ...]:
    """Return chat, with long answers, and code, with long prompts and short answers.

    Scales multiply the lengths of their traces, and all limits.
    """
    chat = Load(
        name="chat",
        trace="azure-conv",
        length_scale=chat_scale,
        start=4.0,
        limits=_limits((1.0, 0.1), (2.0, 0.2)),
    )
    code = Load(
        name="code",
        trace="azure-code",
        length_scale=code_scale,
        start=2.0,
        limits=_limits((1.5, 0.1), (3.0, 0.2)),
    )
    return tuple(
        replace(load, limits=tuple(slo.scaled(slo_scale) for slo in load.limits))
        for load in (chat, code)
    )
