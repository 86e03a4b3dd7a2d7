"""Responses in OpenAI's shapes: choices, events of a stream, log-probabilities."""

import json
from collections.abc import Sequence
from typing import Any

from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.writing.engine import ScoredToken
from gothic_jax.writing.sample import Ending

FINISH = {Ending.END: "stop", Ending.STOP: "stop", Ending.LENGTH: "length"}
DONE = b"data: [DONE]\n\n"


def choice(
    index: int, text: str, *, chat: bool, finish: str | None, logprobs: Any, first: bool = False
) -> dict[str, Any]:
    """A choice of a stream's chunk; for a chat's first one, with its role."""
    if not chat:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
    delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def whole_choice(
    index: int, text: str, *, chat: bool, finish: str | None, logprobs: Any
) -> dict[str, Any]:
    """A choice of a response in one piece."""
    if not chat:
        return choice(index, text, chat=False, finish=finish, logprobs=logprobs)
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


class LogProbs:
    """Log-probabilities of a text's tokens, in the shape of completions or of chat."""

    def __init__(self, tokenizer: Tokenizer, *, chat: bool) -> None:
        self._bytes = tokenizer.token_bytes
        self._special = {index: text for text, index in tokenizer.special_tokens.items()}
        self._chat = chat
        self._before = b""

    def add(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """Those of further tokens."""
        return self._as_chat(tokens) if self._chat else self._as_completion(tokens)

    def _as_chat(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        def one(token: int, log_probability: float) -> dict[str, Any]:
            text, content = self._text(token), [*self._bytes[token]]
            return {"token": text, "logprob": log_probability, "bytes": content}

        return {
            "content": [
                one(scored.token, scored.log_probability)
                | {"top_logprobs": [one(*other) for other in scored.likeliest]}
                for scored in tokens
            ],
            "refusal": None,
        }

    def _as_completion(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        offsets = []
        for scored in tokens:
            offsets.append(len(self._before.decode(errors="ignore")))
            self._before += self._bytes[scored.token]
        return {
            "tokens": [self._text(scored.token) for scored in tokens],
            "token_logprobs": [scored.log_probability for scored in tokens],
            "top_logprobs": [
                # Parts of characters share a name: the likeliest of them is the last, and stays.
                {self._text(token): value for token, value in reversed(scored.likeliest)}
                for scored in tokens
            ],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._special.get(token) or self._bytes[token].decode(errors="replace")
