"""The server's process: connections with deadlines, and an end by signal."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

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
        for timer in (self._deadline, self._stall):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        super().on_response_complete()
        self._expect_request()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP request."""
        self.transport.write(raw_error(RequestError(f"this is not a request: {msg}")))
        self.transport.close()

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
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._too_late)

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
