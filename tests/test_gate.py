"""Who may ask the server what, and what it answers to those who may not; how long it waits."""

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from gothic_jax.commands.serve import main
from gothic_jax.serving import gate, server
from gothic_jax.serving.app import build
from gothic_jax.serving.gate import MAX_BODY, Allowed
from gothic_jax.serving.requests import RequestError, parse_object
from gothic_jax.serving.service import Service
from gothic_jax.text.tokenizer import Tokenizer
from tests.common import Workplace
from tests.torture import server as torture
from tests.torture.world import Figure

HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
FRIEND = "https://friend.example"
KEY = "Sesame-0123456789abcdef"
JSON = ("content-type", "application/json")
OWN = ("host", "localhost:8000")
Headers = tuple[tuple[str, str], ...]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


@dataclass
class Door:
    """A server without a model, asked without a network; it notes which bodies it has read."""

    key: str | None = None
    reached: list[str] = field(default_factory=list)

    def ask(
        self, *headers: tuple[str, str | bytes], path: str = "/v1/completions",
        method: str = "POST", body: tuple[bytes, ...] = (b"{}",),
    ) -> Answer:  # fmt: skip
        return asyncio.run(self._ask(headers, path, method, body))

    async def _ask(
        self, headers: tuple[tuple[str, str | bytes], ...], path: str, method: str,
        body: tuple[bytes, ...],
    ) -> Answer:  # fmt: skip
        encoded = [
            (name.encode(), value if isinstance(value, bytes) else value.encode())
            for name, value in headers
        ]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "headers": encoded,
            "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        messages = [
            {"type": "http.request", "body": part, "more_body": number < len(body)}
            for number, part in enumerate(body, 1)
        ]
        sent: list[Message] = []

        async def receive() -> Message:
            if len(messages) == 1:
                self.reached.append(path)
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        engine = SimpleNamespace(free=8, waiting=0)
        service = object.__new__(Service)
        service.name, service.slots = "run", 8
        service.thread = cast(Any, SimpleNamespace(engine=engine, failed=False))
        service.writer = cast(Any, SimpleNamespace(voices=["wilde", "lovecraft"]))
        app = build(service, Allowed(HOSTS, frozenset({FRIEND}), self.key))
        await app(scope, receive, send)
        start, *parts = sent
        given = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], given, b"".join(part.get("body", b"") for part in parts))


def refused(answer: Answer, status: int) -> None:
    """It is an error in OpenAI's form, which another site's page cannot read."""
    assert answer.status == status
    assert sorted(answer.error) == ["code", "message", "param", "type"]
    assert answer.error["message"]
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"]
)
def test_the_server_answers_under_its_own_names(host: str) -> None:
    answer = Door().ask(("host", host), path="/health", method="GET")
    assert answer.status == 200
    assert json.loads(answer.body) == {"status": "ok", "slots": 8, "free": 8, "waiting": 0}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "localhost.evil.example", "evil.example@localhost", "localhost@x",
        "localhost.", "localhost:80:80", "localhost:abc", "localhost:", "::1", "[::1",
        "[localhost]", "[::ffff:127.0.0.1]", "localhost/x", "localhost#x",
        "local%68ost", "0.0.0.0", "", "*",
        "\uff4cocalhost", "//localhost",
    ],
)  # fmt: skip
def test_other_names_of_this_machine_are_refused(host: str) -> None:
    door = Door()
    refused(door.ask(("host", host), JSON), 403)
    refused(door.ask(JSON), 403)
    refused(door.ask(OWN, ("host", host), JSON), 403)
    assert door.reached == []


@pytest.mark.parametrize(
    "origins",
    [
        ["null"], ["https://evil.example"], ["http://localhost:8000.evil.example"], [""],
        ["http://evil.example/http://localhost:8000"], ["https://localhost:8000"], ["*"],
        ["http://localhost"], ["http://localhost:80001"], ["http://localhost:8000/"],
        [f"{FRIEND}.evil.example"], [f"{FRIEND}:444"], ["http://friend.example"],
        ["http://localhost:8000", "https://evil.example"], [FRIEND, "https://evil.example"],
        [FRIEND, FRIEND],
    ],
)  # fmt: skip
def test_pages_of_other_sites_may_not_ask(origins: list[str]) -> None:
    door, named = Door(), tuple(("origin", origin) for origin in origins)
    refused(door.ask(OWN, JSON, *named), 403)
    refused(door.ask(OWN, *named, ("access-control-request-method", "POST"), method="OPTIONS"), 403)
    assert door.reached == []


def test_an_allowed_site_may_ask_and_read_the_answer() -> None:
    asked = Door().ask(OWN, ("origin", FRIEND), method="OPTIONS")
    assert (asked.status, asked.headers["access-control-allow-origin"]) == (204, FRIEND)
    answer = Door().ask(OWN, ("origin", FRIEND), path="/v1/models", method="GET")
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, FRIEND)
    answer = Door().ask(OWN, path="/v1/models", method="GET")
    assert "access-control-allow-origin" not in answer.headers
    refused(Door().ask(OWN, method="OPTIONS"), 405)


@pytest.mark.parametrize(
    "headers",
    [
        (), (("content-type", "text/plain"),), (("content-type", "multipart/form-data"),),
        (("content-type", "text/plain; application/json"),), (JSON, JSON),
        (("content-type", "application/x-www-form-urlencoded"),),
        (JSON, ("content-encoding", "gzip")),
    ],
)  # fmt: skip
def test_what_a_form_could_send_is_refused(headers: Headers) -> None:
    door = Door()
    for path in ("/v1/completions", "/v1/chat/completions", "/gothic/measure"):
        refused(door.ask(OWN, *headers, path=path), 415)
    assert door.reached == []


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1/completions/", "/page.js/", "//evil.example/", "/v1/models/none", "*"]
)
def test_addresses_that_are_not_there_are_errors_and_lead_nowhere_else(path: str) -> None:
    refused(Door().ask(OWN, path=path, method="GET"), 404)


def test_a_long_body_is_not_read_to_its_end() -> None:
    door = Door()
    refused(door.ask(OWN, JSON, body=(b" " * MAX_BODY, b" ", b"", b"")), 413)
    assert door.reached == []


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.05)

    async def never() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    request = gate.HttpRequest({"type": "http", "headers": []}, never)
    with pytest.raises(RequestError) as caught:
        asyncio.run(gate.read_body(request))
    assert caught.value.status == 408


def basic(text: bytes) -> str:
    return f"Basic {base64.b64encode(text).decode()}"


@pytest.mark.parametrize(
    "given",
    [
        [], [""], [KEY], ["Bearer"], [f"Bearer {KEY[:-1]}"], [f"Bearer {KEY}x"], [f"Token {KEY}"],
        [f"Bearer {KEY.lower()}"], ["Bearer clé"], [b"Bearer \xff\xfe"], ["Bearer " + "a" * 30_000],
        [f"Bearer {KEY}", "Bearer wrong"], ["Bearer wrong", f"Bearer {KEY}"], ["Basic é"],
        ["Basic a"], [basic(b":\xff")], [basic(KEY.encode())], [basic(f":{KEY}x".encode())],
    ],
)  # fmt: skip
def test_without_the_key_there_is_health_alone(given: list[str]) -> None:
    door = Door(KEY)
    keys = [("authorization", one) for one in given]
    for path in ("/", "/page.js", "/v1/models", "/gothic/model", "/nowhere"):
        refused(door.ask(OWN, *keys, path=path, method="GET"), 401)
    refused(door.ask(OWN, JSON, *keys), 401)
    assert door.ask(OWN, *keys, path="/health", method="GET").status == 200
    assert door.reached == []


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer {KEY}", basic(f"me:{KEY}".encode())])
def test_the_key_opens(given: str) -> None:
    answer = Door(KEY).ask(OWN, ("authorization", given), path="/v1/models", method="GET")
    assert answer.status == 200


def test_a_browser_is_asked_for_the_key_of_the_page() -> None:
    page = Door(KEY).ask(OWN, path="/", method="GET")
    assert page.headers["www-authenticate"].startswith("Basic")
    assert Door(KEY).ask(OWN, JSON).headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "127.0.0.2", "writer.example"])
def test_other_machines_need_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", host, "--port", "0"]) == 2
    assert "--api-key-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body", ['{"a": "\\ud800"}', '{"\\udfff": 1}', '{"a": {"b": ["\\ud800"]}}']
)
def test_lone_surrogates_are_refused_by_the_name_of_their_field(body: str) -> None:
    answer = Door().ask(OWN, JSON, path="/gothic/measure", body=(body.encode(),))
    refused(answer, 400)
    assert "lone surrogates" in answer.error["message"]
    assert answer.error["param"] in ("a", "?")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1e999", b"[" * 100_000, b'{"a":' * 9000, b"\xff", b"NaN"]
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_object(body)


# ---- Connections ----


async def _idle(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading the body."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    size = 2**24 if scope["path"] == "/long" else 2
    await send({"type": "http.response.body", "body": b"x" * size})


def connected(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
    app: ASGIApp = _idle,
) -> None:
    """Talks to the server's protocol, with its network, in this process."""

    async def both() -> None:
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(
            lambda: server.Protocol(config, state, {}), "127.0.0.1", 0
        )
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(10):
                await talk(reader, writer)
                while state.connections:
                    await asyncio.sleep(0.01)
        finally:
            writer.close()
            listening.close()

    asyncio.run(both())


def error_in(content: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = content.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("content", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nhost: a\r\nx: "])
def test_a_header_that_does_not_come_ends_the_connection(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.1)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        status, error = error_in(await reader.read())
        assert status == 408
        assert "in time" in error["message"]

    connected(talk)


def test_a_body_that_nobody_reads_does_not_hold_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.1)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\nab")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")

    connected(talk)


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.1)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /long HTTP/1.1\r\nhost: a\r\n\r\n")

    connected(talk)


def test_too_many_connections_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 0)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        content = await reader.read()
        assert error_in(content)[0] == 503
        assert b"retry-after: " in content

    connected(talk)


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx\0: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        # Longer than what the server reads, so that some of it comes when the answer is under way.
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 300_000,
    ],
)  # fmt: skip
def test_what_is_no_request_gets_an_error_of_the_same_form(content: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        status, error = error_in(await reader.read())
        assert status == (431 if len(content) > 100_000 else 400)
        assert sorted(error) == ["code", "message", "param", "type"]

    connected(talk)


# ---- The short layer of the torture ----


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Workplace:
    """One run for all of these."""
    return Workplace.make(tmp_path_factory.mktemp("served"), tokenizer)


def kept(figure: Figure, trials: int) -> None:
    assert figure.failures == []
    assert figure.trials >= trials


@pytest.mark.long
def test_strangers_are_refused_and_write_nothing(place: Workplace) -> None:
    kept(torture.strangers(place, 200), 200)


@pytest.mark.long
def test_broken_requests_are_answered(place: Workplace) -> None:
    kept(torture.broken_requests(place, 500), 500)


@pytest.mark.long
def test_no_address_but_health_is_open_without_the_key(place: Workplace) -> None:
    kept(torture.keys(place, 100), 100)
