"""Text on both sides of a model: tokenizer, chat template, detokenizer, stop strings.

Knows nothing of requests, engines or gRPC; imports neither torch nor transformers.
"""

from text.assets import ASSET_FILES, TextAssets, load_assets
from text.detokenizer import Detokenizer
from text.errors import (
    AssetError,
    MessagesRefused,
    NoChatTemplate,
    PromptError,
    PromptTooLong,
    TemplateFailed,
    TextError,
)
from text.stops import StopStrings
from text.template import ChatTemplate
from text.tokenizer import Tokenizer

__all__ = [
    "ASSET_FILES",
    "AssetError",
    "ChatTemplate",
    "Detokenizer",
    "MessagesRefused",
    "NoChatTemplate",
    "PromptError",
    "PromptTooLong",
    "StopStrings",
    "TemplateFailed",
    "TextAssets",
    "TextError",
    "Tokenizer",
    "load_assets",
]
