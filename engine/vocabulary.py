"""Chooses tokens where the ranks of tp each have the logits of a part of the vocabulary.

Owns what the ranks tell each other for that: of each sequence a rank's most likely tokens and how
much weight its part has in all. Whole rows of logits are exchanged only where those do not settle
the choice, and for log-probabilities. The rules are `engine.sampling`'s, and so are the tokens, but
where two sums in fp64 in another order fall on two sides of a number.

Legend: S sequences, R rows, V vocabulary, W this rank's part of it, N ranks, C candidates of a
rank, K those of all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.parallel import Collectives
from engine.philox import uniforms
from engine.sampling import Sampled, SequenceState, pick, sample

_MIN_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which tokens rank `rank` of `degree` has the logits of: `part` of `size`."""

    part: slice
    size: int
    rank: int
    degree: int
    ranks: Collectives

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's `x`, of one shape, in the order of the ranks: [ranks, ...]."""
        found = self.ranks.all_gather(x.reshape(1, -1), self.degree * x.numel())
        return found.view(self.degree, *x.shape)

    def whole(self, logits_RW: Tensor) -> Tensor:
        """Return the logits of all tokens, [R, V]."""
        return self.ranks.all_gather(logits_RW, self.size)


@torch.inference_mode()
def sample_part(
    logits_SW: Tensor, states: Sequence[SequenceState], vocabulary: Vocabulary
) -> list[Sampled]:
    """Choose one token for each row of fp32 logits, as `engine.sampling.sample` does.

    All ranks call it with the same sequences, and all get the tokens. States are read, not changed.
    """
    if vocabulary.degree == 1:
        return sample(logits_SW, states)
    chosen: dict[int, Sampled] = {}
    easy = [row for row, state in enumerate(states) if state.params.logprobs is None]
    if easy:
        found = _Choice(logits_SW[easy], [states[row] for row in easy], vocabulary).tokens()
        chosen = {
            row: Sampled(token_id=token_id)
            for row, token_id in zip(easy, found, strict=True)
            if token_id is not None
        }
    rest = [row for row in range(len(states)) if row not in chosen]
    if rest:
        whole = sample(vocabulary.whole(logits_SW[rest]), [states[row] for row in rest])
        chosen.update(zip(rest, whole, strict=True))
    return [chosen[row] for row in range(len(states))]


class _Choice:
    """The choice of one token for each of some rows, from what the ranks know together.

    Everything here that leads to an exchange follows from gathered values, so that all ranks come
    to the same exchanges.
    """

    def __init__(
        self, logits_SW: Tensor, states: Sequence[SequenceState], vocabulary: Vocabulary
    ) -> None:
        self._states = states
        self._vocabulary = vocabulary
        # In fp32 as for a single rank: fp64 would round penalties another way.
        if any(not state.is_plain for state in states):
            logits_SW = logits_SW.clone()
        for row, state in enumerate(states):
            if not state.is_plain:
                state.adjust(logits_SW[row], vocabulary.part.start)
        self._logits_SW = logits_SW.double()
        self._drawn = [row for row, state in enumerate(states) if state.params.temperature]

    def tokens(self) -> list[int | None]:
        """Return the rows' tokens; None where only whole rows can tell."""
        shared = self._exchange()
        tokens: list[int | None] = shared.best_S.tolist()
        unfiltered = []
        for row in self._drawn:
            params = self._states[row].params
            if params.top_k or params.top_p < 1 or params.min_p:
                tokens[row] = self._among_candidates(row, shared)
            else:
                unfiltered.append(row)
        if unfiltered:
            drawn = self._among_all(unfiltered, shared)
            for row, token_id in zip(unfiltered, drawn, strict=True):
                tokens[row] = token_id
        return tokens

    def _exchange(self) -> "_Shared":
        count = self._count()
        packed_SX = torch.cat((self._candidates(count), self._sums()), -1)
        found_NSX = self._vocabulary.gather(packed_SX)
        values_NSC, ids_NSC, lowest_NS1, sums_NS3 = torch.split(found_NSX, [count, count, 1, 3], -1)
        largest_NS, mass_NS, first_NS = sums_NS3.unbind(-1)
        # The first of equal ones has the lowest id: ranks are in the order of their parts.
        rank_1S = largest_NS.argmax(0, keepdim=True)
        top_S = largest_NS.gather(0, rank_1S)[0]
        temperature_S = _column(self._states)[:, 0]
        return _Shared(
            values_SK=values_NSC.transpose(0, 1).flatten(1) - top_S[:, None],
            ids_SK=ids_NSC.transpose(0, 1).flatten(1).long(),
            below_S=lowest_NS1[..., 0].amax(0) - top_S,
            mass_NS=mass_NS * ((largest_NS - top_S) / temperature_S).exp(),
            top_S=top_S,
            best_S=first_NS.gather(0, rank_1S)[0].long(),
        )

    def _count(self) -> int:
        """How many candidates each rank names; the same on all."""
        if not self._drawn:
            return 0
        most_k = max(self._states[row].params.top_k for row in self._drawn)
        part = -(-self._vocabulary.size // self._vocabulary.degree)
        return min(part, max(_MIN_CANDIDATES, 2 * most_k))

    def _candidates(self, count: int) -> Tensor:
        """Return this rank's candidates by id, and what others it has are not above: [S, 2C + 1].

        Where it has fewer, -inf stands in for the rest.
        """
        logits_SW = self._logits_SW
        rows, width = logits_SW.shape
        own = min(count, width)
        found_SX = logits_SW.new_full((rows, 2 * count + 1), -torch.inf)
        found_SX[:, count : 2 * count] = 0
        if own:
            values_SC, at_SC = logits_SW.topk(own)
            at_SC, by_id_SC = at_SC.sort(-1)
            found_SX[:, :own] = values_SC.gather(-1, by_id_SC)
            found_SX[:, count : count + own] = (at_SC + self._vocabulary.part.start).double()
            if own < width:
                found_SX[:, -1] = values_SC.amin(-1)
        return found_SX

    def _sums(self) -> Tensor:
        """Return the largest value of this rank's part, the part's weight relative to that, and the
        first token that has it: [S, 3].
        """
        logits_SW = self._logits_SW
        if not logits_SW.shape[1]:
            return logits_SW.new_tensor((-torch.inf, 0, 0)).expand(len(logits_SW), 3)
        largest_S1, at_S1 = logits_SW.amax(-1, keepdim=True), logits_SW.argmax(-1, keepdim=True)
        mass_S1 = torch.zeros_like(largest_S1)
        if rows := self._drawn:
            scaled_RW = (logits_SW[rows] - largest_S1[rows]) / _column(self._states)[rows]
            mass_S1[rows] = scaled_RW.exp().sum(-1, keepdim=True)
        first_S1 = (at_S1 + self._vocabulary.part.start).double()
        return torch.cat((largest_S1, mass_S1, first_S1), -1)

    def _among_candidates(self, row: int, shared: "_Shared") -> int | None:
        state = self._states[row]
        params = state.params
        # By value, then by id.
        values_K, order_K = shared.values_SK[row].sort(descending=True, stable=True)
        ids_K = shared.ids_SK[row][order_K]
        weights_K = (values_K / params.temperature).exp()
        inside_K = torch.arange(len(weights_K)) < (params.top_k or self._vocabulary.size)
        weights_K = weights_K.where(inside_K, 0)
        total = weights_K.sum() if params.top_k else shared.mass_NS[:, row].sum()
        before_K = weights_K.cumsum(0) - weights_K
        kept_K = inside_K & ((before_K < params.top_p * total) | (params.top_p >= 1))
        kept_K &= (weights_K >= params.min_p) & (values_K > -torch.inf)
        kept_K[0] = True
        if bool((kept_K & (values_K <= shared.below_S[row])).any()):
            return None  # others, that no rank has named, may belong to them
        ids_K, by_id_K = ids_K[kept_K].sort()
        [token_id] = pick(weights_K[kept_K][by_id_K][None], ids_K[None], [state])
        return token_id

    def _among_all(self, rows: list[int], shared: "_Shared") -> list[int]:
        """Draw from all tokens: the rank into whose part the number falls finds which one it is."""
        states = [self._states[row] for row in rows]
        numbers = uniforms([s.params.seed for s in states], [s.position for s in states])
        mass_NR = shared.mass_NS[:, rows]
        ends_NR = mass_NR.cumsum(0)
        targets_R = torch.from_numpy(numbers) * ends_NR[-1]
        # Rounding can put it past the last part that has any weight.
        last_R = (ends_NR < ends_NR[-1]).sum(0)
        owners_R = (ends_NR <= targets_R).sum(0).minimum(last_R)
        found_R = torch.full((len(rows),), -1.0, dtype=torch.float64)
        rank = self._vocabulary.rank
        for place, row in enumerate(rows):
            if int(owners_R[place]) == rank:
                target = targets_R[place] - (ends_NR[rank, place] - mass_NR[rank, place])
                found_R[place] = self._in_own_part(row, shared.top_S[row], target)
        return [int(token_id) for token_id in self._vocabulary.gather(found_R).amax(0).tolist()]

    def _in_own_part(self, row: int, top: Tensor, target: Tensor) -> int:
        temperature = self._states[row].params.temperature
        steps_W = ((self._logits_SW[row] - top) / temperature).exp().cumsum(0)
        index = torch.searchsorted(steps_W, target.reshape(1), right=True)
        last = torch.searchsorted(steps_W, steps_W[-1:])
        return int(self._vocabulary.part.start) + int(index.minimum(last))


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What all ranks know; values are relative to a row's largest.

    Attributes:
        values_SK: Of all ranks' candidates; `ids_SK` are their tokens, which ascend.
        below_S: A token that is above this is among the candidates.
        mass_NS: What each rank's part weighs.
        top_S: The largest values themselves.
        best_S: The first token that has it.
    """

    values_SK: Tensor
    ids_SK: Tensor
    below_S: Tensor
    mass_NS: Tensor
    top_S: Tensor
    best_S: Tensor


def _column(states: Sequence[SequenceState]) -> Tensor:
    """Return the temperatures, [S, 1]; 1 where there is none."""
    values = [state.params.temperature or 1.0 for state in states]
    return torch.tensor(values, dtype=torch.float64)[:, None]
