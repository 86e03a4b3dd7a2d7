"""Answers to requests for completions: texts written by the engine, whole or as they come."""

import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gothic_jax.errors import UserError
from gothic_jax.model.shape import INTEGER_LIMIT
from gothic_jax.serving.gate import read_body, unless_gone
from gothic_jax.serving.requests import Request, RequestError, parse
from gothic_jax.serving.responses import (
    DONE,
    FINISH,
    LogProbs,
    choice,
    event,
    usage,
    whole_choice,
)
from gothic_jax.serving.service import Service, Tick
from gothic_jax.text.typography import fit_prompt
from gothic_jax.writing import receipts
from gothic_jax.writing.engine import ScoredToken, Text, Written
from gothic_jax.writing.guard import Guard
from gothic_jax.writing.ranking import ranked
from gothic_jax.writing.receipts import Receipt
from gothic_jax.writing.sample import Ending
from gothic_jax.writing.writer import Writer

MAX_WAITING = 256
"""Texts that wait for a slot; a request beyond them is told to come again."""
MAX_SCORED = 2048
"""Prompt tokens of a request whose log-probabilities are echoed: each has a whole distribution."""
MAX_RANKED = 10_000
"""Characters at the end of a prompt that ranking reads; the model reads fewer."""


@dataclass
class Choice:
    """A text of a response while it is written."""

    text: Text
    receipt: Receipt | None
    """Without its text; None where the prompt's tokens are not those of its text."""
    given: str
    """The prompt as it was given."""
    read: str
    """The prompt as it was read."""
    logprobs: LogProbs | None
    echo: list[ScoredToken] | None
    """The prompt's tokens, where they are asked for."""
    written: str = ""
    tokens: int = 0

    def take(self, written: Written) -> tuple[str, Any]:
        """What a chunk adds to the response: text and log-probabilities."""
        # The model's words begin with a blank. Where the prompt's own was cut off, this is that.
        text, is_first = written.piece.text, not self.written
        was_cut = self.given.endswith(" ") and not self.read.endswith(" ")
        self.written += text
        self.tokens += len(written.tokens)
        if is_first and text.startswith(" ") and was_cut:
            text = text[1:]
        return text, self.logprobs and self.logprobs.add(written.tokens)

    def signed(self) -> dict[str, Any] | None:
        """The receipt of what has been written so far."""
        if self.receipt is None:
            return None
        return replace(self.receipt, text=self.written).as_dict()


@dataclass
class _Answer:
    """What is answered to a request, but for the texts."""

    request: Request
    head: dict[str, Any]
    """The fields of every event, and of a response in one piece."""
    choices: Sequence[Choice]
    prompt_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written so far."""
        return usage(self.prompt_tokens, sum(one.tokens for one in self.choices))


class _Stream(StreamingResponse):
    """A stream of events whose texts are cancelled however it ends.

    Where the client has gone before it begins, the events are never asked for, and do not do that.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], texts: Sequence[Text]) -> None:
        super().__init__(events)
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for text in self._texts:
                text.cancelled = True


async def complete(service: Service, http: HttpRequest, *, chat: bool) -> Response:
    """The response to a request. Raises RequestError or UserError."""
    if service.thread.failed:
        raise RequestError("the engine has ended; restart the server", status=503)
    request = parse(await read_body(http), service.model, chat=chat)
    seed = request.settings.seed
    seed = secrets.randbelow(INTEGER_LIMIT) if seed is None else seed
    news: asyncio.Queue[tuple[int, Written]] = asyncio.Queue()
    choices, prompt_tokens = await unless_gone(http, _choices(service, request, seed, news))
    head: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": ("chat.completion.chunk" if request.stream else "chat.completion")
        if chat
        else "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "seed": seed,
    }
    if request.warnings:
        head["warnings"] = request.warnings
    texts = [one.text for one in choices] if request.settings.max_tokens else []
    if service.thread.engine.waiting + len(texts) > MAX_WAITING:
        raise RequestError("too many texts are waiting; try again in some seconds", status=429)
    service.thread.submit(*texts)
    answer = _Answer(request, head, choices, prompt_tokens)
    news_of_texts = _news(service, texts, news)
    if request.stream:
        return _Stream(_events(service, answer, news_of_texts), texts)
    return JSONResponse(await unless_gone(http, _whole(service, answer, news_of_texts)))


async def _choices(
    service: Service, request: Request, seed: int, news: asyncio.Queue[tuple[int, Written]]
) -> tuple[list[Choice], int]:
    """The texts to write, and how many tokens their prompts have. Raises UserError."""
    loop, writer = asyncio.get_running_loop(), service.writer
    choices: list[Choice] = []
    prompt_tokens = 0

    def deliver_as(place: int) -> Callable[[Written], None]:
        def deliver(written: Written) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(news.put_nowait, (place, written))

        return deliver

    for prompt in request.prompts:
        # A long one takes a second, in which the others go on.
        given, read, tokens, is_text = await asyncio.to_thread(
            _read_prompt, writer, prompt, raw=request.raw_prompt
        )
        prompt_tokens += len(tokens)
        if request.echo and request.likeliest is not None and prompt_tokens > MAX_SCORED:
            raise RequestError(
                f"log-probabilities of at most {MAX_SCORED:,} tokens of prompts are echoed",
                param="prompt",
            )
        echo = await _scored(service, request, tokens) if request.echo else None
        for number in range(request.best_of):
            guard = None
            if request.copy_guard is not None and service.index is not None:
                guard = Guard(service.index.words, request.copy_guard, read)
            text = Text(
                tokens[-writer.block_size :],
                request.settings,
                seed,
                deliver_as(len(choices)),
                number,
                request.stop,
                guard,
                request.likeliest or 0,
            )
            receipt = Receipt(
                text="",
                prompt=read,
                blend=dict(request.settings.blend),
                sampling=request.settings.sampling,
                max_tokens=request.settings.max_tokens,
                seed=seed,
                sample=number + 1,
                samples=request.best_of,
                iteration=service.checkpoint.iteration,
                circumstances=service.circumstances,
                given_prompt=None if given == read else given,
                slots=service.slots,
                copy_guard=request.copy_guard,
                stop=tuple(request.stop),
                dtype=writer.dtype,
            )
            logprobs = None
            if request.likeliest is not None:
                logprobs = LogProbs(writer.tokenizer, chat=request.chat)
            signs = is_text and request.settings.max_tokens > 0
            choices.append(Choice(text, receipt if signs else None, given, read, logprobs, echo))
    return choices, prompt_tokens


def _read_prompt(
    writer: Writer, prompt: str | list[int], *, raw: bool
) -> tuple[str, str, Int[np.ndarray, " time"], bool]:
    """A prompt as given, as read, as tokens, and whether these are the tokens of what is read."""
    if isinstance(prompt, str):
        read = prompt if raw else fit_prompt(prompt, writer.tokenizer.knows)
        return prompt, read, writer.encode(read), True
    if not prompt:
        raise UserError("the prompt is empty; give some tokens to continue from")
    text, tokens = writer.tokenizer.decode(prompt), np.array(prompt, np.int32)
    fitted = fit_prompt(text, writer.tokenizer.knows)
    again = writer.tokenizer.encode(fitted)
    return text, text if raw else fitted, tokens, bool(np.array_equal(again, tokens))


async def _scored(
    service: Service, request: Request, tokens: Int[np.ndarray, " time"]
) -> list[ScoredToken]:
    """The prompt's own tokens, with their log-probabilities if they are asked for."""
    if request.likeliest is None:
        return []
    most = request.likeliest

    def score(tick: Tick) -> list[ScoredToken]:
        rows = service.writer.predictions.log_probabilities(tokens, request.settings.blend, tick)
        order = np.argsort(-rows, axis=1, kind="stable")[:, :most]
        return [
            ScoredToken(token, float(row[token]), [(int(i), float(row[i])) for i in likeliest])
            for token, row, likeliest in zip(tokens.tolist(), rows, order, strict=True)
        ]

    return await service.measure(score)


async def _news(
    service: Service, texts: Sequence[Text], news: asyncio.Queue[tuple[int, Written]]
) -> AsyncGenerator[tuple[int, Written]]:
    """What is added to each text, until all have ended.

    They are cancelled when the response is given up.
    """
    left = len(texts)
    try:
        while left:
            try:
                async with asyncio.timeout(5):
                    place, written = await news.get()
            except TimeoutError:
                if service.thread.failed:
                    raise RuntimeError("the engine has ended") from None
                continue
            left -= written.piece.ending is not None
            yield place, written
    finally:
        for text in texts:
            text.cancelled = True


async def _events(
    service: Service, answer: _Answer, news: AsyncGenerator[tuple[int, Written]]
) -> AsyncIterator[bytes]:
    """The response, event by event."""
    request, head, choices = answer.request, answer.head, answer.choices
    async with contextlib.aclosing(news):
        for place, one in enumerate(choices):
            text, logprobs = _echoed(request, one)
            ended = None if request.settings.max_tokens else FINISH[Ending.LENGTH]
            first = choice(
                place, text, chat=request.chat, finish=ended, logprobs=logprobs, first=True
            )
            yield event(head | {"choices": [first | {"receipt": one.signed()}]})
        async for place, written in news:
            text, logprobs = choices[place].take(written)
            finish = written.piece.ending and FINISH[written.piece.ending]
            new = choice(place, text, chat=request.chat, finish=finish, logprobs=logprobs)
            if finish is not None:
                new["receipt"] = choices[place].signed()
                _keep(service, [choices[place]])
            yield event(head | {"choices": [new]})
        if request.include_usage:
            yield event(head | {"choices": [], "usage": answer.usage})
        yield DONE


async def _whole(
    service: Service, answer: _Answer, news: AsyncGenerator[tuple[int, Written]]
) -> dict[str, Any]:
    """The response in one piece."""
    request, choices = answer.request, answer.choices
    texts, finishes = [""] * len(choices), [FINISH[Ending.LENGTH]] * len(choices)
    logprobs: list[Any] = [None] * len(choices)
    for place, one in enumerate(choices):
        texts[place], logprobs[place] = _echoed(request, one)
    async with contextlib.aclosing(news):
        async for place, written in news:
            text, added = choices[place].take(written)
            texts[place] += text
            logprobs[place] = _joined(logprobs[place], added)
            if written.piece.ending is not None:
                finishes[place] = FINISH[written.piece.ending]
    shown = await _best(service, request, choices)
    _keep(service, [choices[place] for place in shown])
    return answer.head | {
        "choices": [
            whole_choice(
                number,
                texts[place],
                chat=request.chat,
                finish=finishes[place],
                logprobs=logprobs[place],
            )
            | {"receipt": choices[place].signed()}
            for number, place in enumerate(shown)
        ],
        "usage": answer.usage,
    }


def _echoed(request: Request, one: Choice) -> tuple[str, Any]:
    """What the response has before the text that is written."""
    if one.echo is None:
        return "", one.logprobs and one.logprobs.add([])
    if one.logprobs is None:
        return one.given, None
    return one.read, one.logprobs.add(one.echo)


def _joined(before: Any, after: Any) -> Any:
    """Log-probabilities of two pieces as those of one."""
    if before is None or after is None:
        return before or after
    return {
        name: value + after[name] if isinstance(value, list) else value
        for name, value in before.items()
    }


async def _best(service: Service, request: Request, choices: Sequence[Choice]) -> list[int]:
    """Which texts are shown: of each prompt's, the best `n`."""
    places = [*range(len(choices))]
    if request.best_of == request.n:
        return places
    assert service.index is not None  # as `parse` has checked
    index = service.index

    def best(tick: Tick) -> list[int]:
        shown = []
        for start in range(0, len(choices), request.best_of):
            group = choices[start : start + request.best_of]
            prompt, texts = group[0].given[-MAX_RANKED:], [one.written for one in group]
            blend = request.settings.blend
            order = ranked(service.writer, index.words, prompt, texts, blend, tick)
            shown += [start + one.number for one in order[: request.n]]
        return shown

    return await service.measure(best)


def _keep(service: Service, choices: Sequence[Choice]) -> None:
    """Adds receipts to those of the run, if that was asked for."""
    if not service.keeps_receipts:
        return
    signed = [replace(one.receipt, text=one.written) for one in choices if one.receipt is not None]
    try:
        receipts.append(service.checkpoint.run, signed)
    except UserError as error:
        service.keeps_receipts = False
        print(f"warning: no more receipts are kept: {error}", file=sys.stderr)
