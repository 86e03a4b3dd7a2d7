"""What the page asks besides: what could come next, and what a text is made of."""

import functools
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gothic_jax.errors import UserError
from gothic_jax.measuring.novelty import Span, find_words
from gothic_jax.serving.gate import read_body, unless_gone
from gothic_jax.serving.requests import Fields, RequestError, checked_blend, parse_object
from gothic_jax.serving.service import MAX_MEASURED, Service, Tick

MAX_ALTERNATIVES, MAX_BLENDS = 50, 16


async def alternatives(service: Service, http: HttpRequest) -> Response:
    """The likeliest next tokens under each of some blends. Raises RequestError."""
    fields = Fields(parse_object(await read_body(http)), {"prompt", "blends", "n"})
    text, given = fields.text("prompt"), fields.get("blends")
    n = fields.integer("n", 10, 1, MAX_ALTERNATIVES)
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_BLENDS:
        raise RequestError(f"blends must be a list of 1 to {MAX_BLENDS} blends", param="blends")
    blends = [checked_blend(one, "blends", service.writer.voices) if one else {} for one in given]

    def predict(_: Tick) -> list[list[dict[str, Any]]]:
        predicted = service.writer.predictions.next_tokens(text, blends, n)
        return [[one._asdict() for one in each] for each in predicted]

    return JSONResponse({"alternatives": await unless_gone(http, service.measure(predict))})


async def measure(service: Service, http: HttpRequest) -> Response:
    """What a text copies, whose its sentences are, how much of it is read. Raises RequestError."""
    fields = Fields(parse_object(await read_body(http)), {"text", "voices"})
    text, voices = fields.text("text"), fields.get("voices")
    if len(text) > MAX_MEASURED:
        raise RequestError(f"text may have at most {MAX_MEASURED:,} characters", param="text")
    known = service.writer.voices
    voices = known[:2] if voices is None else voices
    if (
        not isinstance(voices, list)
        or len(voices) > MAX_BLENDS
        or not all(isinstance(voice, str) and voice in known for voice in voices)
    ):
        raise RequestError(f"voices must be names of voices: {', '.join(known)}", param="voices")
    measured = functools.partial(_measured, service, text, {*voices})
    return JSONResponse(await unless_gone(http, service.measure(measured)))


def _measured(service: Service, text: str, voices: set[str], tick: Tick) -> dict[str, Any]:
    """What the page shows beside a text. Places are in UTF-16 code units, as in JavaScript."""
    writer = service.writer
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise UserError("the text is not valid Unicode; leave out lone surrogates") from error
    units = np.concatenate([[0], np.cumsum([1 + (character > "\uffff") for character in text])])
    tokens = writer.tokenizer.encode(text)
    unread = tokens[: max(len(tokens) - writer.block_size + 1, 0)]
    bytes_unread = int(writer.tokenizer.byte_lengths[unread].sum())
    first_read = len(content[:bytes_unread].decode(errors="ignore"))
    words = find_words(text)

    def span_object(span: Span) -> dict[str, Any]:
        begin, end = words[span.start].start(), words[span.start + span.words - 1].end()
        return span._asdict() | {"start": int(units[begin]), "end": int(units[end])}

    copied = None
    if service.index is not None:
        found = service.index.words.measure(text, tick)
        copied = {
            "words": found.words,
            "share": found.copied,
            "longest": found.longest and span_object(found.longest),
            "spans": [span_object(span) for span in found.spans],
        }
    sentences = None
    if len(voices) > 1:
        order = [voice for voice in writer.voices if voice in voices]
        leans = writer.meter.sentences(text, voices=order, tick=tick) if tokens.size else []
        sentences = [
            {
                "start": int(units[lean.start]),
                "end": int(units[lean.end]),
                "voice": lean.voice,
                "strength": lean.strength,
            }
            for lean in leans
        ]
    return {
        "tokens": len(tokens),
        "read_from": int(units[first_read]),
        "copied": copied,
        "sentences": sentences,
    }
