"""How fast a model's rotary embedding turns, also where its context was stretched after training.

Owns reading and checking it, and the arithmetic; knows nothing of torch. A scaling multiplies the
frequency of each pair of a head's elements by a number that never changes.

Sources: linear: Chen et al. 2023, arXiv 2306.15595. llama3: "The Llama 3 Herd of Models", arXiv
2407.21783, section 3.4.3 and the configurations published with it. yarn: Peng et al. 2023, arXiv
2309.00071, sections 3.2 to 3.4.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.config_fields import Fields


class Scaling(Protocol):
    """What becomes of frequencies where a context is longer than the one trained with."""

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by, each."""
        ...

    def max_tokens(self, trained: int) -> int:
        """Return how long a sequence may be where the configuration says `trained`."""
        ...

    def factor(self, pair: int, theta: float, head_size: int) -> float:
        """Return what the frequency of a pair of a head's elements is multiplied by."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The base of the frequencies, theta ** (-2 pair / head_size), and their scaling."""

    theta: float
    scaling: Scaling | None = None

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by, each."""
        return 1.0 if self.scaling is None else self.scaling.amplitude

    @property
    def score_factor(self) -> float:
        """What the scores of a model whose heads are turned in part only are multiplied by."""
        return self.scaling.score_factor if isinstance(self.scaling, Yarn) else 1.0

    def factors(self, head_size: int) -> Sequence[float]:
        """Return what each pair's frequency is multiplied by."""
        if self.scaling is None:
            return [1.0] * (head_size // 2)
        return [self.scaling.factor(i, self.theta, head_size) for i in range(head_size // 2)]

    def max_tokens(self, trained: int) -> int:
        """Return how long a sequence may be where the configuration says `trained`."""
        return trained if self.scaling is None else self.scaling.max_tokens(trained)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Positions divided by `stretch`."""

    stretch: float
    amplitude: float = 1.0

    def max_tokens(self, trained: int) -> int:
        """See `Scaling`. Most of these configurations give the stretched length."""
        return trained

    def factor(self, _pair: int, _theta: float, _head_size: int) -> float:
        """See `Scaling`."""
        return 1 / self.stretch


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Slow pairs slowed down by `stretch`, fast ones left alone.

    Those of fewer than `few` turns in `trained` tokens are slow, those of more than `many` fast;
    between them it goes over from one to the other.
    """

    stretch: float
    few: float
    many: float
    trained: int
    amplitude: float = 1.0

    def max_tokens(self, trained: int) -> int:
        """See `Scaling`. These configurations give the stretched length."""
        return trained

    def factor(self, pair: int, theta: float, head_size: int) -> float:
        """See `Scaling`."""
        turns = self.trained / (2 * math.pi) * math.pow(theta, -2 * pair / head_size)
        share = min(max((turns - self.few) / (self.many - self.few), 0.0), 1.0)
        return share + (1 - share) / self.stretch


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Slow pairs slowed down by `stretch`, fast ones left alone, by their place in the head.

    Between the pair of `many` turns in `trained` tokens and that of `few` it goes over linearly;
    with `whole_pairs` these two are rounded outwards. DeepSeek's models multiply their scores by
    `score_factor`, of which the amplitude is then no part.
    """

    stretch: float
    few: float
    many: float
    trained: int
    amplitude: float
    whole_pairs: bool
    score_factor: float = 1.0

    def max_tokens(self, trained: int) -> int:
        """See `Scaling`."""
        return max(trained, int(self.trained * self.stretch))

    def factor(self, pair: int, theta: float, head_size: int) -> float:
        """See `Scaling`."""

        def pair_of(turns: float) -> float:
            slowdown = self.trained / (turns * 2 * math.pi)
            return head_size * math.log(slowdown) / (2 * math.log(theta))

        first, last = pair_of(self.many), pair_of(self.few)
        if self.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_size - 1)
        share = min(max((pair - first) / max(last - first, 0.001), 0.0), 1.0)
        return 1 - share + share / self.stretch


def read_rope(config: Fields, default_theta: float | None = None) -> Rope:
    """Read `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (before).

    Raises ConfigError naming the file, the field, what was found and what to do.
    """
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise config.error(name, "an object")
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind not in _READ or rope.get("partial_rotary_factor", 1) != 1:
            kinds = ", ".join(_READ)
            raise config.error(name, f"of one of the types {kinds}, and over the whole head")
        fields = Fields(config.path, rope, name)
        theta = (fields if "rope_theta" in rope else config).number("rope_theta", default_theta)
        return Rope(theta=theta, scaling=_READ[kind](fields, config))
    return Rope(theta=config.number("rope_theta", default_theta))


def _linear(fields: Fields, _config: Fields) -> Linear:
    return Linear(stretch=_stretch(fields))


def _llama3(fields: Fields, config: Fields) -> Llama3:
    few, many = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if few >= many:
        raise fields.error("high_freq_factor", f"above low_freq_factor, which is {few}")
    return Llama3(stretch=_stretch(fields), few=few, many=many, trained=_trained(fields, config))


def _yarn(fields: Fields, config: Fields) -> Yarn:
    stretch = _stretch(fields)
    return Yarn(
        stretch=stretch,
        few=fields.number("beta_slow", default=1.0),
        many=fields.number("beta_fast", default=32.0),
        trained=_trained(fields, config),
        amplitude=_yarn_amplitude(fields, stretch),
        whole_pairs=fields.flag("truncate", default=True),
        score_factor=_grown(stretch, fields.number("mscale_all_dim")) ** 2
        if fields.get("mscale_all_dim")
        else 1.0,
    )


def _yarn_amplitude(fields: Fields, stretch: float) -> float:
    if fields.get("attention_factor") is not None:
        return fields.number("attention_factor")
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        of_turned, of_all = fields.number("mscale"), fields.number("mscale_all_dim")
        return _grown(stretch, of_turned) / _grown(stretch, of_all)
    return _grown(stretch, 1.0)


def _grown(stretch: float, by: float) -> float:
    return 0.1 * by * math.log(stretch) + 1 if stretch > 1 else 1.0


def _stretch(fields: Fields) -> float:
    stretch = fields.number("factor")
    if stretch < 1:
        raise fields.error("factor", "at least 1")
    return stretch


def _trained(fields: Fields, config: Fields) -> int:
    name = "original_max_position_embeddings"
    return (fields if fields.get(name) is not None else config).integer(
        name, default=config.integer("max_position_embeddings")
    )


_READ: Mapping[str, Callable[[Fields, Fields], Scaling | None]] = {
    "default": lambda _fields, _config: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
