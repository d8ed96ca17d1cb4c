"""Owns the making of one answer's text out of its tokens: characters, stop strings, the end.

Knows nothing of pools. What it has given out is never taken back.
"""

from router.request import AnswerPart, Finish, PositionLogprobs, Stop, Tokens
from text import Detokenizer, StopStrings, Tokenizer

# Enough for any character that a prompt leaves half spelled.
_PROMPT_TAIL = 8


class Answer:
    """One request's answer as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: tuple[int, ...], stop: Stop) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids[-_PROMPT_TAIL:])
        self._stops = StopStrings(stop.strings)
        self._min_new_tokens = stop.min_new_tokens
        self._tokens = 0

    @property
    def completion_tokens(self) -> int:
        return self._tokens

    def push(self, tokens: Tokens) -> AnswerPart:
        """Takes new tokens and returns what the client gets for them.

        A stop string ends the answer: its text and all after it is dropped, while the tokens of
        this step stay in the answer and in its usage, since they were generated.
        """
        parts: list[str] = []
        stopped = False
        for index, token_id in enumerate(tokens.token_ids):
            self._tokens += 1
            # The token that ends an answer is no part of its text, whatever it spells.
            ends_it = tokens.finish is Finish.STOP and index == len(tokens.token_ids) - 1
            text = "" if ends_it else self._detokenizer.push((token_id,))
            if self._tokens < self._min_new_tokens or stopped:
                parts.append("" if stopped else text)
                continue
            emit, stopped = self._stops.push(text)
            parts.append(emit)
        if tokens.finish is not None and not stopped:
            emit, stopped = self._stops.push(self._detokenizer.flush())
            parts.append(emit if stopped else emit + self._stops.flush())
        return self._part(
            "".join(parts),
            tokens.token_ids,
            tokens.logprobs,
            Finish.STOP if stopped else tokens.finish,
        )

    def _part(
        self,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[PositionLogprobs, ...],
        finish: Finish | None,
    ) -> AnswerPart:
        return AnswerPart(
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish=finish,
            completion_tokens=self._tokens,
        )
