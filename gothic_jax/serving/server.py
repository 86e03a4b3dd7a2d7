"""The server's process: connections with deadlines, and an end by signal."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gothic_jax.serving.gate import raw_error
from gothic_jax.serving.requests import RequestError

MAX_CONNECTIONS = 512
HEADER_SECONDS = 10.0
"""A connection must have sent a request's header by then."""
STALL_SECONDS = 20.0
"""A client that reads nothing for so long is cut off."""
PROBE_SECONDS = 0.25
"""Between two looks whether a client that sends no more is still there."""
LINGER_SECONDS = 2.0
"""So long a client may go on sending what is no request, before it must have read that."""
GRACE_SECONDS = 3
"""At the end, what is under way may take so long, and is then cut off."""


class Server(uvicorn.Server):
    """Ends at SIGINT or SIGTERM, and notes which it was; at once at a second one."""

    received: int | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles the signals within the block."""

        def note(number: int, _: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True
            self.received = self.received or number

        numbers = [
            n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN
        ]
        previous = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Protocol(H11Protocol):
    """A connection that cannot be held open by sending, or reading, nothing."""

    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _probe: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for a request, unless there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.write(raw_error(RequestError("too many connections", status=503)))
            transport.close()
            return
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._stall, self._probe):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Reads a part of a request."""
        if not self._refused:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open, though the client sends no more.

        It has left, or it waits for the answer to a request that it has sent wholly.
        """
        waits = self.cycle is not None and not (
            self._refused or self.cycle.more_body or self.cycle.response_started
        )
        # A client of HTTP/1.0 could not be probed.
        if not waits or self.scope["http_version"] != "1.1":
            return False
        self.cycle.keep_alive = False
        self._see_whether_it_is_there()
        return True

    def _see_whether_it_is_there(self) -> None:
        """Ends the connection within two calls if the client has left.

        That shows only by its answer to something that is sent; a response that any client
        passes over does no harm to one that waits.
        """
        if not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._probe = self.loop.call_later(PROBE_SECONDS, self._see_whether_it_is_there)

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        super().on_response_complete()
        self._expect_request()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP request."""
        cause = sys.exception()
        error = RequestError(f"this is not a request: {msg}")
        if isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == 431:
            error = RequestError("the request's header is too long", status=431)
        self.transport.write(raw_error(error))
        # To close at once would, where more has come meanwhile, take the answer away, too.
        self.transport.write_eof()
        self._refused = True
        if self.cycle is not None:  # the body was at fault: nobody waits for another answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._due(LINGER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _expect_request(self) -> None:
        self._due(HEADER_SECONDS, self._too_late)

    def _due(self, seconds: float, end: Callable[[], None]) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, end)

    def _too_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            if not self.transport.is_closing():
                self.transport.write(
                    raw_error(RequestError("the request did not come in time", status=408))
                )
            self.transport.close()
            # Closing waits until the client has read, which it may never do.
            self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)


def serve(app: ASGIApp, listening: socket.socket) -> int:
    """Serves an application until a signal comes, and returns that signal's number."""
    options: dict[str, Any] = {
        "http": Protocol,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "log_level": "error",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": GRACE_SECONDS,
    }
    server = Server(uvicorn.Config(app, **options))
    server.run(sockets=[listening])
    return server.received or signal.SIGTERM
