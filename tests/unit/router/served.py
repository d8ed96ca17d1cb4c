"""What the scripted instances serve: a model of no weights, and a tokenizer of bytes for it."""

import json
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from twinpool.v1 import kv_pb2, worker_pb2

from text import TextAssets, Tokenizer


def byte_level_assets(*, template: bool = True) -> TextAssets:
    """Token ids 0 to 255 are the bytes in the order of the byte-level alphabet; 256 ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|end|>"}).encode(),
    }
    if template:
        files["chat_template.jinja"] = b"{% for m in messages %}{{ m.content }}{% endfor %}"
    return TextAssets(files)


ASSETS = byte_level_assets()
TOKENIZER = Tokenizer(ASSETS)
VOCAB_SIZE = 257
END = 256


def model(**changes: Any) -> worker_pb2.ModelDescription:
    fields: dict[str, Any] = {
        "name": "echo",
        "fingerprint": "f00d",
        "architecture": "Qwen3ForCausalLM",
        "dtype": "float32",
        "max_model_len": 4096,
        "vocab_size": VOCAB_SIZE,
        "eos_token_ids": [END],
        "assets_digest": ASSETS.digest,
    }
    return worker_pb2.ModelDescription(**(fields | changes))


def layout(
    *, layers: int = 2, kv_heads: int = 2, head_size: int = 8, dtype: str = "float32"
) -> kv_pb2.KvLayout:
    return kv_pb2.KvLayout(
        shape=kv_pb2.KvShape(layers=layers, kv_heads=kv_heads, head_size=head_size, dtype=dtype),
        block_size=16,
        shards=[
            kv_pb2.KvShard(
                layers=kv_pb2.Range(end=layers),
                heads=kv_pb2.Range(end=kv_heads),
                cp_size=1,
                data_host="127.0.0.1",
                data_port=1,
            )
        ],
        cp_order=kv_pb2.CP_ORDER_CONTIGUOUS,
    )
