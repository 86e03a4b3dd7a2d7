"""Who may ask the server what: hosts, origins, the API key, the size and the time of a body.

A web page of another site can make a browser send requests to this machine, and, by changing its
own address (DNS rebinding), even read the answers. So a request must name a host that is known,
come from the server's own page or from nobody's, and be JSON, which no form can send.
"""

import asyncio
import base64
import hmac
import json
import re
from collections.abc import Coroutine, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gothic_jax.serving.requests import RequestError

T = TypeVar("T")

MAX_BODY = 2**20
BODY_SECONDS = 10.0
RETRY_SECONDS = "2"
"""After which a client that there was no room for may come again."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing but its own parts."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Allowed(NamedTuple):
    """Who may ask."""

    hosts: frozenset[str]
    """Names in a request's Host header, without port."""
    origins: frozenset[str]
    """Other sites' pages, as `https://example.org`."""
    key: str | None
    """The API key, if one is needed."""


class Gate:
    """ASGI middleware that turns away what is not allowed.

    Plain ASGI: Starlette's own base class hides from the application that a client has gone.
    """

    def __init__(self, app: ASGIApp, allowed: Allowed) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = _only(headers, "origin")
        shared = {
            "access-control-allow-origin": origin,
            "access-control-allow-headers": "authorization, content-type",
            "access-control-allow-methods": "GET, POST",
            "vary": "origin",
        }
        added = HEADERS | (shared if origin in self._allowed.origins else {})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(added)
            await send(message)

        answer = self._answer(scope, headers)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        """What is answered in place of the application; None where the request may pass."""
        try:
            self._check_host(headers)
            self._check_origin(headers)
            if scope["method"] == "OPTIONS" and "origin" in headers:
                return Response(status_code=204)
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST":
                _check_type(headers)
        except RequestError as error:
            return error_response(error, page=scope["path"] == "/")
        return None

    def _check_host(self, headers: Headers) -> None:
        if _name(_only(headers, "host")) not in self._allowed.hosts:
            raise RequestError(
                "this server does not answer under this host name; start it with --allow-host NAME",
                status=403,
                code="host_not_allowed",
            )

    def _check_origin(self, headers: Headers) -> None:
        own = f"http://{headers.get('host', '').lower()}"
        allowed = {own, *self._allowed.origins}
        if "origin" in headers and _only(headers, "origin") not in allowed:
            raise RequestError(
                "pages of other sites may not ask this server; start it with --allow-origin ORIGIN",
                status=403,
                code="origin_not_allowed",
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._allowed.key is None or path == "/health":
            return
        given = _key(_only(headers, "authorization"))
        # Compared in constant time: how long it takes does not tell how much was right.
        if not hmac.compare_digest(given.encode(), self._allowed.key.encode()):
            raise RequestError(
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )


def _only(headers: Headers, name: str) -> str:
    """A header that is there once; otherwise, what nothing is allowed to be."""
    values = headers.getlist(name)
    return values[0] if len(values) == 1 else ""


def _name(host: str) -> str | None:
    """The name in a Host header, without port; None where there is more in it."""
    if (found := re.fullmatch(r"(\[.*\]|[^:]*)(?::[0-9]{1,5})?", host)) is None:
        return None
    name = found[1].lower()
    return name[1:-1] if ":" in name else name


def _key(authorization: str) -> str:
    """The key of a header: as clients of the endpoint send it, or as a browser that has asked for a
    password does."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value).decode().partition(":")[2]
        except ValueError:
            return ""
    return value.strip() if scheme.lower() == "bearer" else ""


def _check_type(headers: Headers) -> None:
    if _only(headers, "content-type").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("the body must be sent as application/json", status=415)
    if "content-encoding" in headers:
        raise RequestError("the body must not be compressed", status=415)


def error_response(error: RequestError, *, page: bool = False) -> Response:
    """The response to a request that is refused; a `page` makes the browser ask for the key."""
    headers: Mapping[str, str] = {}
    if error.status in (429, 503):
        headers = {"retry-after": RETRY_SECONDS}
    elif error.status == 401:
        headers = {"www-authenticate": 'Basic realm="gothic-serve"' if page else "Bearer"}
    return JSONResponse(error.as_dict(), error.status, headers)


def raw_error(error: RequestError) -> bytes:
    """The same as the bytes of an HTTP/1.1 response, where no request could be read."""
    body = json.dumps(error.as_dict()).encode()
    phrase = HTTPStatus(error.status).phrase
    later = f"retry-after: {RETRY_SECONDS}\r\n" if error.status == 503 else ""
    return (
        f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n{later}\r\n"
    ).encode() + body


async def read_body(request: HttpRequest) -> bytes:
    """The body; raises RequestError where it is too long, or does not come in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise RequestError(f"the body is longer than {MAX_BODY:,} bytes", status=413)
    except TimeoutError as error:
        raise RequestError("the body did not come in time", status=408) from error
    except ClientDisconnect as error:
        raise RequestError("the client has gone", status=400) from error
    return bytes(body)


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which ends when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("the client has gone")
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)
