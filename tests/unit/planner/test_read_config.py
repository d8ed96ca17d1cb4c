import json
from pathlib import Path

import pytest

from planner.errors import ShapeError
from planner.read_config import read_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**LLAMA, **changes}))
    return path


def test_a_model_without_kv_heads_has_one_for_every_head(tmp_path: Path) -> None:
    assert read_config(write(tmp_path)).kv_heads == 32


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, 16),
        ({"torch_dtype": "float32"}, 32),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, 4),
        ({"quantization_config": {"quant_method": "fp8"}}, 8),
    ],
)
def test_weights_are_as_wide_as_the_config_says(
    changes: dict[str, object], bits: int, tmp_path: Path
) -> None:
    assert read_config(write(tmp_path, **changes)).weight_bits == bits


def test_bits_that_are_given_go_before_what_the_config_says(tmp_path: Path) -> None:
    odd = write(tmp_path, quantization_config={"quant_method": "odd"})
    assert read_config(odd, weight_bits=3).weight_bits == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["T5"]},
            r"architectures is \['T5'\]; it must be one of LlamaForCausalLM",
        ),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a whole number"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5; it must divide"),
        (
            {"quantization_config": {"quant_method": "odd"}},
            "quantization_config has quant_method 'odd' and no bits",
        ),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ShapeError, match=rf"config\.json: {message}"):
        read_config(write(tmp_path, **changes))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_that_is_no_config_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ShapeError, match=r"it must hold an object|cannot be read as JSON"):
        read_config(path)
