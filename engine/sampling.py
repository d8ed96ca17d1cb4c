"""Chooses the next token of each sequence from its logits.

Owns what a request may ask of sampling, and the choice. A token follows from the logits, the
request's seed and the token's position alone, so a sequence goes on the same way in any batch
and on any instance. One uniform number for each position picks from the filtered
distribution's cumulative sum in fp64, in the order of token ids: a rounding difference in the
logits changes the token only where the number falls next to a step.

Legend: S sequences of a batch, R rows that need random numbers, V vocabulary, C candidates.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import SamplingError
from engine.kernels import Draw, argmax_kernel, draw_kernel
from engine.philox import uniforms

_SEED_LIMIT = 1 << 64
_MIN_CANDIDATES = 256


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; the defaults are greedy.

    `top_k` 0 keeps all tokens. `logprobs` is how many of the most likely tokens to report with
    the chosen one, None for no report. Raises SamplingError naming the field out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN, which compares false with everything, is refused.
        checks = {
            "temperature": (0 <= self.temperature < float("inf"), "a finite number from 0"),
            "top_k": (self.top_k >= 0, "an integer from 0 (0 keeps all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty < float("inf"),
                "a finite number above 0",
            ),
            "presence_penalty": (isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (isfinite(self.frequency_penalty), "a finite number"),
            "seed": (0 <= self.seed < _SEED_LIMIT, "an integer from 0 to 2^64 - 1"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "an integer from 0"),
        }
        for field, (valid, expected) in checks.items():
            if not valid:
                raise SamplingError(field, getattr(self, field), expected)

    @property
    def penalises(self) -> bool:
        """Tell whether the choice depends on tokens that the sequence already has."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def needs_prompt(self) -> bool:
        """Tell whether the choice depends on the prompt's tokens."""
        return self.repetition_penalty != 1


class SequenceState:
    """What sampling knows of one sequence. Its owner appends each token that was chosen.

    `prompt_ids` matter only where `params.needs_prompt`; `prompt_len` always. `output_ids` were
    chosen before, maybe elsewhere: it goes on as if it had chosen them itself. Until
    `min_new_tokens` are there, `suppressed_ids` are not chosen.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_len: int,
        prompt_ids: Iterable[int] = (),
        output_ids: Iterable[int] = (),
        min_new_tokens: int = 0,
        suppressed_ids: Iterable[int] = (),
    ) -> None:
        output = list(output_ids)
        self.params = params
        self.output_len = len(output)
        self._prompt_len = prompt_len
        self._min_new_tokens = min_new_tokens
        self._suppressed_ids = sorted(suppressed_ids)
        # Made once: prompts are long.
        self._prompt_ids = torch.tensor(sorted(set(prompt_ids)) if params.needs_prompt else [])
        self._output_counts: Counter[int] = Counter(output if params.penalises else ())

    @property
    def position(self) -> int:
        """The position, from 0, of the token that is chosen next."""
        return self._prompt_len + self.output_len

    def append(self, token_id: int) -> None:
        """Note that `token_id` was chosen."""
        self.output_len += 1
        if self.params.penalises:
            self._output_counts[token_id] += 1

    @property
    def suppresses(self) -> bool:
        return bool(self._suppressed_ids) and self.output_len < self._min_new_tokens

    @property
    def is_plain(self) -> bool:
        """Tell whether the next token is the most likely one of the unmodified logits."""
        return not (self.params.temperature or self.params.penalises or self.suppresses)

    def adjust(self, logits_V: Tensor, first_id: int = 0) -> None:
        """Apply penalties and the suppression of end tokens in place.

        `logits_V` may be those of a part of the vocabulary, from token `first_id` on.
        """
        params = self.params
        if params.needs_prompt:
            # An id in both prompt and output gets the same value twice.
            seen = torch.cat((self._prompt_ids, torch.tensor(list(self._output_counts)))).long()
            seen, _ = _inside(seen - first_id, len(logits_V))
            seen = seen.to(logits_V.device)
            values = logits_V[seen]
            factor = params.repetition_penalty
            logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
        if self._output_counts and (params.presence_penalty or params.frequency_penalty):
            ids, inside = _inside(torch.tensor(list(self._output_counts)) - first_id, len(logits_V))
            counts = torch.tensor(list(self._output_counts.values()), dtype=logits_V.dtype)[inside]
            penalties = params.presence_penalty + params.frequency_penalty * counts
            logits_V[ids.to(logits_V.device)] -= penalties.to(logits_V.device)
        if self.suppresses:
            suppressed, _ = _inside(torch.tensor(self._suppressed_ids) - first_id, len(logits_V))
            logits_V[suppressed.to(logits_V.device)] = -torch.inf


def _inside(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return those of some ids that are from 0 to below `size`, and where they are among all."""
    inside = (ids >= 0) & (ids < size)
    return ids[inside], inside


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before any sampling parameter."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), the most likely first


class Sampled(NamedTuple):
    """The next token of one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@torch.inference_mode()
def sample(logits_SV: Tensor, states: Sequence[SequenceState]) -> list[Sampled]:
    """Choose one token for each row of fp32 logits. The states are read, not changed."""
    token_ids = _choose(logits_SV, states)
    logprobs = _logprobs(logits_SV, states, token_ids)
    return [
        Sampled(token_id=token_id, logprobs=logprobs.get(row))
        for row, token_id in enumerate(token_ids)
    ]


def sample_apart(
    choose: Callable[[Tensor, Sequence[SequenceState]], list[Sampled]],
    logits_SV: Tensor,
    states: Sequence[SequenceState],
) -> list[Sampled]:
    """Choose tokens as `choose` does, so that no bit depends on what else there is to choose.

    Exact choices are made together; the sums of a drawn one go by the shape of what they are in,
    and so do the reported probabilities.
    """
    exact = [
        row
        for row, state in enumerate(states)
        if not state.params.temperature and state.params.logprobs is None
    ]
    alone = [[row] for row in range(len(states)) if row not in set(exact)]
    found: dict[int, Sampled] = {}
    for rows in (exact, *alone):
        if rows:
            chosen = choose(logits_SV[rows], [states[row] for row in rows])
            found.update(zip(rows, chosen, strict=True))
    return [found[row] for row in range(len(states))]


def warm_up_sampling(logits_SV: Tensor, device: torch.device) -> None:
    """Have what chooses tokens on a device compiled; `logits_SV` are some, or none."""
    argmax_kernel(device)
    if len(logits_SV) and draw_kernel(device) is not None:
        drawn = SequenceState(SamplingParams(temperature=1.0), prompt_len=1)
        sample(logits_SV[:1], [drawn])


def _choose(logits_SV: Tensor, states: Sequence[SequenceState]) -> list[int]:
    adjusted = [row for row, state in enumerate(states) if not state.is_plain]
    if adjusted:
        logits_SV = logits_SV.clone()
        for row in adjusted:
            states[row].adjust(logits_SV[row])
    token_ids = argmax_kernel(logits_SV.device)(logits_SV)
    rows = [row for row, state in enumerate(states) if state.params.temperature]
    draw = draw_kernel(logits_SV.device)
    if rows and draw is not None:
        drawn = _draw_by(draw, logits_SV[rows], [states[row] for row in rows])
        for row, token_id in zip(rows, drawn, strict=True):
            token_ids[row] = token_id
        return token_ids
    filtered = [row for row in rows if states[row].params.top_k or states[row].params.top_p < 1]
    for chosen in (filtered, [row for row in rows if row not in set(filtered)]):
        if chosen:
            drawn = _draw(logits_SV[chosen], [states[row] for row in chosen], chosen is filtered)
            for row, token_id in zip(chosen, drawn, strict=True):
                token_ids[row] = token_id
    return token_ids


def _draw_by(draw: Draw, logits_RV: Tensor, states: Sequence[SequenceState]) -> list[int]:
    """Draw by a device's kernel, which does with each row what `_draw` and `pick` do."""
    params, device = [state.params for state in states], logits_RV.device
    numbers = uniforms([p.seed for p in params], [state.position for state in states])

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    found_R = draw(
        logits_RV,
        column([p.temperature for p in params]),
        column([p.top_k for p in params], torch.int32),
        column([p.top_p for p in params]),
        column([p.min_p for p in params]),
        torch.from_numpy(numbers).to(device),
    )
    return [int(token_id) for token_id in found_R.tolist()]


def _draw(logits_RV: Tensor, states: Sequence[SequenceState], filtered: bool) -> list[int]:
    params = [state.params for state in states]
    scaled_RV = logits_RV.double()
    # The largest becomes 0 first, so that nothing overflows at any temperature.
    scaled_RV -= scaled_RV.amax(-1, keepdim=True)
    scaled_RV /= _column(logits_RV, [p.temperature for p in params])
    if filtered:
        weights_RC, ids_RC = _candidates(scaled_RV, params)
    else:
        weights_RC, ids_RC = scaled_RV.exp(), None
    return pick(weights_RC, ids_RC, states)


def pick(weights_RC: Tensor, ids_RC: Tensor | None, states: Sequence[SequenceState]) -> list[int]:
    """Draw a token of each row by the candidates' weights, fp64, in the order of token ids.

    min_p is applied here. Without `ids_RC` the candidates are all tokens.
    """
    params = [state.params for state in states]
    min_p_R1 = _column(weights_RC, [p.min_p for p in params])
    weights_RC = weights_RC.where(weights_RC >= min_p_R1 * weights_RC.amax(-1, keepdim=True), 0)

    steps_RC = weights_RC.cumsum(-1)
    numbers = uniforms([p.seed for p in params], [state.position for state in states])
    targets_R1 = torch.from_numpy(numbers).to(steps_RC.device)[:, None] * steps_RC[:, -1:]
    # Right of equal steps: a token of weight 0 adds no step and is never hit. Rounding can put
    # the target on the last step, which belongs to the last token that has a weight.
    index_R1 = torch.searchsorted(steps_RC, targets_R1, right=True)
    last_R1 = torch.searchsorted(steps_RC, steps_RC[:, -1:].contiguous())
    # The clamp keeps one sequence's NaN from failing the whole batch.
    index_R1 = index_R1.minimum(last_R1).clamp_(max=steps_RC.shape[1] - 1)
    chosen_R1 = index_R1 if ids_RC is None else ids_RC.gather(-1, index_R1)
    return [int(token_id) for token_id in chosen_R1[:, 0].tolist()]


def _candidates(scaled_RV: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Apply top-k and top-p; return the survivors' weights, [R, C], and token ids, ascending.

    Of equal tokens the one with the lower id comes first. Looks at a few hundred of the
    likeliest tokens, and at all of them only where those do not settle the matter.
    """
    vocab = scaled_RV.shape[1]
    top_k_R1 = _column(scaled_RV, [p.top_k or vocab for p in params])
    top_p_R1 = _column(scaled_RV, [p.top_p for p in params])
    largest_k = max(p.top_k for p in params)
    for count in (max(_MIN_CANDIDATES, 2 * largest_k), vocab):
        values_RC, ids_RC = _likeliest(scaled_RV, min(count, vocab))
        weights_RC = values_RC.exp()
        ranks_C = torch.arange(weights_RC.shape[1], device=weights_RC.device)
        kept_RC = ranks_C < top_k_R1
        inside_RC = weights_RC.where(kept_RC, 0)
        # Over all tokens, not only the candidates, where no top-k bounds them.
        total_R1 = scaled_RV.exp().sum(-1, keepdim=True)
        total_R1 = total_R1.where(top_k_R1 >= vocab, inside_RC.sum(-1, keepdim=True))
        before_RC = inside_RC.cumsum(-1) - inside_RC
        kept_RC &= (before_RC < top_p_R1 * total_R1) | (top_p_R1 >= 1)
        kept_RC[:, 0] = True
        # Ties with the last candidate may go on outside: which ones were taken is arbitrary.
        settled = not bool((kept_RC & (values_RC == values_RC[:, -1:])).any())
        if settled or weights_RC.shape[1] == vocab:
            break
    ids_RC, by_id_RC = ids_RC.sort(-1)
    return weights_RC.where(kept_RC, 0).gather(-1, by_id_RC), ids_RC


def _likeliest(scaled_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values and their token ids: descending, then by id."""
    values_RC, ids_RC = scaled_RV.topk(count, sorted=False)
    ids_RC, by_id_RC = ids_RC.sort(-1)
    values_RC, by_value_RC = values_RC.gather(-1, by_id_RC).sort(
        dim=-1, descending=True, stable=True
    )
    return values_RC, ids_RC.gather(-1, by_value_RC)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _logprobs(
    logits_SV: Tensor, states: Sequence[SequenceState], token_ids: Sequence[int]
) -> dict[int, TokenLogprobs]:
    rows = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    if not rows:
        return {}
    logprobs_RV = logits_SV[rows].log_softmax(-1)
    most = min(max(states[row].params.logprobs or 0 for row in rows), logits_SV.shape[1])
    values, ids = logprobs_RV.topk(most, dim=-1)
    reports = {}
    for row, logprobs_V, top_values, top_ids in zip(
        rows, logprobs_RV, values.tolist(), ids.tolist(), strict=True
    ):
        top = list(zip(top_ids, top_values, strict=True))[: states[row].params.logprobs]
        reports[row] = TokenLogprobs(chosen=logprobs_V[token_ids[row]].item(), top=tuple(top))
    return reports
