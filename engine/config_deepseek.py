"""What DeepSeek's configurations say beyond others': latent attention, and how experts are chosen.

Owns reading and checking it. Knows nothing of weights or torch. Sources: DeepSeek-V2, arXiv
2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437, section 2.1.
"""

from dataclasses import dataclass

from engine.config_fields import Fields
from engine.rope import Rope


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Attention whose keys and values are made of one small vector a token, which is cached.

    Attributes:
        query_rank: Of the product that makes queries in two steps; None where it is one.
        rank: Elements of the latent.
        turned_size: Elements beside it that are turned by their position; the key of all heads.
        plain_size: Elements of a head's query and key that are not turned.
        value_size: Elements of a head's value.
        scale: What scores are multiplied by.
    """

    query_rank: int | None
    rank: int
    turned_size: int
    plain_size: int
    value_size: int
    scale: float

    @property
    def cell_size(self) -> int:
        """Elements that are cached of a token."""
        return self.rank + self.turned_size

    @property
    def query_size(self) -> int:
        """Elements of a head's query, before the latent's matrix is taken in."""
        return self.plain_size + self.turned_size

    def makes_keys(self, new: int, tokens: int) -> bool:
        """Whether the last `new` of so many tokens are faster with keys and values made first.

        Per head: a query and a token it sees take `query_size + value_size` multiplications then,
        and else as many as a cell and its latent have elements; to make a token's key and value
        takes as many as to take the matrices in for one query. A half of what is saved there goes
        for writing down what is made and reading it.
        """
        if self.value_size > self.query_size:
            return False
        pairs = new * tokens - new * new // 2
        saved = self.cell_size + self.rank - self.query_size - self.value_size
        made = self.rank * (self.plain_size + self.value_size)
        return pairs * saved > 2 * (tokens - new) * made


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How a token chooses its experts, where not by the greatest softmax of all scores.

    Experts lie in `groups` of like size, of which the best `chosen_groups` are chosen from first; a
    group is as good as its `best_of_group` best experts together.

    Attributes:
        sigmoid: Whether a score stands for itself; else it is the softmax of all.
        biased: Whether experts have something added to their scores for the choice alone.
        scale: What weights are multiplied by.
    """

    sigmoid: bool
    biased: bool
    groups: int
    chosen_groups: int
    best_of_group: int
    scale: float


def read_latent(fields: Fields, rope: Rope) -> LatentConfig:
    """Read the sizes of latent attention; raises ConfigError."""
    turned, plain = fields.integer("qk_rope_head_dim"), fields.integer("qk_nope_head_dim")
    if turned % 2:
        raise fields.error("qk_rope_head_dim", "even, as rotary embedding turns pairs of elements")
    query_rank = None if fields.get("q_lora_rank") is None else fields.integer("q_lora_rank")
    return LatentConfig(
        query_rank=query_rank,
        rank=fields.integer("kv_lora_rank"),
        turned_size=turned,
        plain_size=plain,
        value_size=fields.integer("v_head_dim"),
        scale=(plain + turned) ** -0.5 * rope.score_factor,
    )


def read_gate_v2(fields: Fields) -> Gate | None:
    """Read how DeepSeek-V2's experts are chosen, None for V2-Lite's: by a softmax, and no more.

    Raises ConfigError.
    """
    method = fields.get("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.error("topk_method", "greedy or group_limited_greedy")
    _expect(fields, "scoring_func", "softmax")
    if fields.flag("norm_topk_prob", default=False):
        raise fields.error("norm_topk_prob", "false")
    grouped = method == "group_limited_greedy"
    gate = _gate(fields, sigmoid=False, biased=False, grouped=grouped, best_of_group=1)
    return None if gate.groups == gate.scale == 1 else gate


def read_gate_v3(fields: Fields) -> Gate:
    """Read how DeepSeek-V3's experts are chosen; raises ConfigError."""
    _expect(fields, "topk_method", "noaux_tc")
    _expect(fields, "scoring_func", "sigmoid")
    return _gate(fields, sigmoid=True, biased=True, grouped=True, best_of_group=2)


def _gate(
    fields: Fields, *, sigmoid: bool, biased: bool, grouped: bool, best_of_group: int
) -> Gate:
    experts = fields.integer("n_routed_experts")
    groups = fields.integer("n_group", default=1) if grouped else 1
    chosen = fields.integer("topk_group", default=1) if grouped else 1
    if experts % groups or experts // groups < best_of_group:
        raise fields.error("n_group", f"a divisor of n_routed_experts, which is {experts}")
    if chosen > groups:
        raise fields.error("topk_group", f"at most n_group, which is {groups}")
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts // groups * chosen:
        raise fields.error("num_experts_per_tok", "at most the experts of the chosen groups")
    return Gate(
        sigmoid=sigmoid,
        biased=biased,
        groups=groups,
        chosen_groups=chosen,
        best_of_group=best_of_group,
        scale=fields.number("routed_scaling_factor", default=1.0),
    )


def _expect(fields: Fields, name: str, value: str) -> None:
    if fields.get(name) not in (None, value):
        raise fields.error(name, value)
