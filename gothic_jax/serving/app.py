"""The routes: OpenAI's endpoint, what the page asks besides, and the page itself."""

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gothic_jax.errors import UserError
from gothic_jax.measuring.novelty import COPIED_WORDS
from gothic_jax.serving.completions import complete
from gothic_jax.serving.gate import Allowed, Gate, error_response
from gothic_jax.serving.measures import alternatives, measure
from gothic_jax.serving.requests import MAX_SAMPLES, MAX_TOKENS, RequestError
from gothic_jax.serving.service import Service
from gothic_jax.writing.settings import Sampling

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def build(service: Service, allowed: Allowed) -> Starlette:
    """The application."""
    folder = Path(__file__).parent

    def page(path: str) -> Callable[[HttpRequest], Response]:
        name, kind = PAGE[path]
        content = (folder / name).read_bytes()
        return lambda _: Response(content, media_type=f"{kind}; charset=utf-8")

    def answered(
        answer: Callable[[Service, HttpRequest], Awaitable[Response]],
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def endpoint(request: HttpRequest) -> Response:
            try:
                return await answer(service, request)
            except RequestError as error:
                return error_response(error)
            except UserError as error:
                return error_response(RequestError(str(error)))

        return endpoint

    async def refused(_: HttpRequest, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        message = {
            404: "there is nothing at this address",
            405: "this address takes no such method",
        }
        response = error_response(
            RequestError(
                message.get(status, "an error of the server's; see its output"), status=status
            )
        )
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)  # with 405, the methods that are taken
        return response

    texts, chats = (functools.partial(complete, chat=chat) for chat in (False, True))
    app = Starlette(
        routes=[
            *(Route(path, page(path)) for path in PAGE),
            Route("/health", answered(_health)),
            Route("/v1/models", answered(_models)),
            Route("/v1/models/{name:path}", answered(_one_model)),
            Route("/v1/completions", answered(texts), methods=["POST"]),
            Route("/v1/chat/completions", answered(chats), methods=["POST"]),
            Route("/gothic/model", answered(_about)),
            Route("/gothic/alternatives", answered(alternatives), methods=["POST"]),
            Route("/gothic/measure", answered(measure), methods=["POST"]),
        ],
        middleware=[Middleware(Gate, allowed)],
        exception_handlers={HTTPException: refused, 500: refused},
    )
    app.router.redirect_slashes = False
    return app


async def _health(service: Service, _: HttpRequest) -> Response:
    engine, failed = service.thread.engine, service.thread.failed
    content = {
        "status": "error" if failed else "ok",
        "slots": service.slots,
        "free": engine.free,
        "waiting": engine.waiting,
    }
    return JSONResponse(content, 503 if failed else 200)


def _model_names(service: Service) -> list[str]:
    return [service.name, *(f"{service.name}:{voice}" for voice in service.writer.voices)]


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "gothic-jax"}


async def _models(service: Service, _: HttpRequest) -> Response:
    models = [_model_object(name) for name in _model_names(service)]
    return JSONResponse({"object": "list", "data": models})


async def _one_model(service: Service, request: HttpRequest) -> Response:
    name = request.path_params["name"]
    if name not in _model_names(service):
        raise RequestError(f"there is no model {name[:80]!r} here", status=404, param="model")
    return JSONResponse(_model_object(name))


async def _about(service: Service, _: HttpRequest) -> Response:
    copied = {"words": COPIED_WORDS, "held_out": service.index and service.index.baseline}
    return JSONResponse(
        {
            "name": service.name,
            "iteration": service.checkpoint.iteration,
            "seal": service.checkpoint.seal,
            "voices": service.writer.voices,
            "context": service.writer.block_size,
            "sampling": Sampling()._asdict(),
            "max_tokens": MAX_TOKENS,
            "max_n": MAX_SAMPLES,
            "copied": service.index and copied,
            "style": len(service.writer.voices) > 1,
            "copy_guard": service.copy_guard,
        }
    )
