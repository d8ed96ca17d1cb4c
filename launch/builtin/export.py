"""Writes a trained network as a Hugging Face folder, and checks that it computes the same.

Owns the folder's layout. The weights are stored in bf16.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from launch.builtin.network import Network
from launch.builtin.tokenizer import ENDOFTEXT, IM_END, save_tokenizer


class ExportMismatchError(RuntimeError):
    """Hugging Face's model gives other logits than the network that was exported."""


def export(network: Network, folder: Path) -> None:
    """Write config, weights, tokenizer and generation settings to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(folder, network.config.max_position_embeddings)
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in (IM_END, ENDOFTEXT))
    token_ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    _write_json(folder / "config.json", network.config.to_hugging_face() | token_ids)
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    _write_json(folder / "generation_config.json", generation)
    tensors = {
        name: value.detach().to(torch.bfloat16)
        for name, value in network.hugging_face_tensors().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def check_export(network: Network, folder: Path, tolerance: float = 1e-4) -> float:
    """Compare the folder's logits in float32 with the network's; return the largest difference.

    The comparison rounds a copy of the network's weights to bf16, as the folder does.
    Raises ExportMismatchError where a logit differs by more than `tolerance`.
    """
    rounded = Network(network.config)
    rounded.load_state_dict(
        {name: value.to(torch.bfloat16).float() for name, value in network.state_dict().items()}
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, network.config.vocab_size, (2, 300), generator=generator)
    positions_BT = torch.arange(300).expand(2, -1)
    hidden, _ = rounded(tokens_BT, positions_BT)
    difference = (rounded.logits(hidden) - reference(tokens_BT).logits).abs().max().item()
    if not difference <= tolerance:
        raise ExportMismatchError(
            f"logits differ by {difference:.2e} (allowed {tolerance:.0e}); "
            f"the tensor names or the config in {folder} do not say what the network computes"
        )
    return float(difference)
