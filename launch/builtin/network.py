"""Qwen3-MoE for training on a CPU: the forward pass and the Hugging Face tensor names.

Owns the weights while they are trained. Whole sequences only: no cache, no sampling; the
serving engine and Hugging Face's model read the exported folder instead.

Shape suffixes: B rows, T tokens, M tokens of all rows, D hidden size, N query heads, G
key-value heads, H head size, E experts, K experts for each token, I expert's inner size,
V vocabulary. Everything is float32 on the CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The sizes of the built-in model; the names are those of Hugging Face's config."""

    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    max_position_embeddings: int = 8192
    rope_theta: float = 1e7
    rms_norm_eps: float = 1e-6

    def to_hugging_face(self) -> dict[str, object]:
        """Return the fields of these sizes in a Qwen3-MoE `config.json`."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **self.__dict__,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
        }


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), start))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_angles(config: NetworkConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines, [B, 1, T, H], in Hugging Face's half-split layout."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = positions_BT[:, None, :, None].float() * config.rope_theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos + torch.cat((-second, first), dim=-1) * sin


def _linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    return layer


class Attention(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query_groups = config.num_attention_heads // config.num_key_value_heads
        kv_size = config.num_key_value_heads * config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        self.q_proj = _linear(config.hidden_size, q_size)
        self.k_proj = _linear(config.hidden_size, kv_size)
        self.v_proj = _linear(config.hidden_size, kv_size)
        self.o_proj = _linear(q_size, config.hidden_size, gain=0.3)
        # Above one, so that attention can be sharp before the weights have grown.
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, start=1.5)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, start=1.5)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BNTH = self.q_norm(self.q_proj(x_BTD).view(shape)).transpose(1, 2)
        k_BGTH = self.k_norm(self.k_proj(x_BTD).view(shape)).transpose(1, 2)
        v_BGTH = self.v_proj(x_BTD).view(shape).transpose(1, 2)
        k_BNTH = rotate(k_BGTH, cos, sin).repeat_interleave(self.query_groups, dim=1)
        v_BNTH = v_BGTH.repeat_interleave(self.query_groups, dim=1)
        q_BNTH = rotate(q_BNTH, cos, sin)
        mixed = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class SparseExperts(nn.Module):
    """A router and its experts; each token goes to the K experts with the highest scores."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        experts, inner, hidden = (
            config.num_experts,
            config.moe_intermediate_size,
            config.hidden_size,
        )
        self.gate = _linear(hidden, experts)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * 0.3 * inner**-0.5)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts' sum and the load-balancing loss (1 when loads are even)."""
        x_MD = x_BTD.flatten(0, 1)
        probs_ME = self.gate(x_MD).softmax(dim=-1)
        weights_MK, experts_MK = probs_ME.topk(self.experts_per_token, dim=-1)
        weights_MK = weights_MK / weights_MK.sum(dim=-1, keepdim=True)

        order = experts_MK.flatten().argsort(stable=True)
        tokens = order // self.experts_per_token
        loads_E = experts_MK.flatten().bincount(minlength=probs_ME.shape[1])
        groups = torch.split(x_MD[tokens], loads_E.tolist())
        outputs = []
        for index, group in enumerate(groups):
            gate, up = F.linear(group, self.gate_up_proj[index]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, self.down_proj[index]))
        weighted = torch.cat(outputs) * weights_MK.flatten()[order, None]
        y_MD = torch.zeros_like(weighted[: len(x_MD)]).index_add_(0, tokens, weighted)

        share_E = loads_E / loads_E.sum()
        balance = len(loads_E) * (share_E * probs_ME.mean(dim=0)).sum()
        return y_MD.view_as(x_BTD), balance


class DecoderLayer(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseExperts(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin)
        y_BTD, balance = self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD + y_BTD, balance


class Network(nn.Module):
    """The model, its embedding tied to its output."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised hidden states, [B, T, D], and the mean balancing loss."""
        cos, sin = rotary_angles(self.config, positions_BT)
        x_BTD = self.embed_tokens(tokens_BT)
        balances = []
        for layer in self.layers:
            x_BTD, balance = layer(x_BTD, cos, sin)
            balances.append(balance)
        return self.norm(x_BTD), torch.stack(balances).mean()

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)

    def hugging_face_tensors(self) -> dict[str, Tensor]:
        """Return the weights under the names of a published Qwen3-MoE checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            if name.endswith("mlp.gate_up_proj"):
                for index, expert in enumerate(value):
                    prefix = f"model.{name.removesuffix('gate_up_proj')}experts.{index}"
                    gate, up = expert.chunk(2)
                    tensors[f"{prefix}.gate_proj.weight"] = gate.contiguous()
                    tensors[f"{prefix}.up_proj.weight"] = up.contiguous()
            elif name.endswith("mlp.down_proj"):
                for index, expert in enumerate(value):
                    prefix = f"model.{name.removesuffix('down_proj')}experts.{index}"
                    tensors[f"{prefix}.down_proj.weight"] = expert.contiguous()
            else:
                tensors[f"model.{name}"] = value
        return tensors
