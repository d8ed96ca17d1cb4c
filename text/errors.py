"""The tree of errors of text: what is wrong with a model's files, and what with a prompt.

Messages of `PromptError` may quote the prompt: they are for the caller, not for logs.
"""


class TextError(Exception):
    """Anything that text refuses."""


class AssetError(TextError):
    """A model's tokenizer or template file is missing or unusable.

    `file` is its name, `found` what is wrong with it, `hint` what to do about it.
    """

    def __init__(self, file: str, found: str, hint: str) -> None:
        super().__init__(f"{file}: {found}; {hint}")
        self.file = file
        self.found = found
        self.hint = hint


class PromptError(TextError):
    """This prompt cannot be turned into tokens."""


class NoChatTemplate(PromptError):
    """Messages were given, and the model has no chat template."""


class MessagesRefused(PromptError):
    """The model's chat template itself refused the messages."""


class TemplateFailed(PromptError):
    """The model's chat template broke while it was rendering the messages."""


class PromptTooLong(PromptError):
    """The chat template's output is longer than the limit."""
