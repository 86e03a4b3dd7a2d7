"""S5 to S9: gothic-serve before other sites, broken requests, slow clients, and without its key."""

import base64
import contextlib
import json
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gothic_jax.serving.server import HEADER_SECONDS, STALL_SECONDS
from gothic_jax.writing.settings import RECEIPTS
from tests.common import WITTY, Workplace, process, run, text_of, wait_for
from tests.torture.inputs import mutated
from tests.torture.world import Figure, finished_run, in_lanes

SECONDS = 10.0
"""A request that is not answered by then hangs."""
PROMPT_SECONDS = 2.0
"""In which a small request is answered, whatever other clients do."""
GROWTH = 20
"""MB that many requests may add to the memory."""
FRIEND = "https://friend.example"
PLAIN = {"prompt": "There are doors", "max_tokens": 6, "seed": 7}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "served", "prompt": "Said the duchess", "max_tokens": 3, "temperature": 0.7,
        "top_p": 0.9, "top_k": 5, "n": 2, "best_of": 3, "stop": ["zz", "qq"], "logprobs": 2,
        "echo": True, "seed": 5, "stream_options": {"include_usage": True}, "raw_prompt": True,
        "blend": {"wilde": 0.5, "lovecraft": 0.5}, "copy_guard": 8,
    },
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "wilde"},
            {"role": "user", "content": [{"type": "text", "text": "Said the duchess"}]},
        ],
        "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "stream": True,
        "stream_options": {"include_usage": True}, "user": "a writer",
    },
    "/gothic/alternatives": {
        "prompt": "There are", "blends": ["", "wilde=0.5", {"lovecraft": 1}], "n": 3,
    },
    "/gothic/measure": {"text": WITTY, "voices": ["wilde", "lovecraft"]},
}  # fmt: skip
"""A request for each address that takes any, with as many fields as go together."""
SHOWN = (
    "/", "/page.css", "/page.js", "/health", "/v1/models", "/v1/models/served", "/gothic/model",
)  # fmt: skip
"""Addresses that need no body."""

Headers = Sequence[tuple[str, str | bytes]]


class Answer(NamedTuple):
    """A response."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def get(self, name: str) -> str:
        """A header."""
        return next((value for key, value in self.headers if key == name), "")


def fault(answer: Answer | None, *, head: bool = False) -> str | None:
    """What is wrong with a response, whatever the request was: it is neither whole nor an error as
    OpenAI's endpoint has it."""
    if answer is None:
        return "no answer"
    try:
        if 200 <= answer.status < 300:
            if "event-stream" in answer.get("content-type") and not head:
                *events, done = answer.body.decode().removesuffix("\n\n").split("\n\n")
                for event in events:
                    json.loads(event.removeprefix("data: "))
                return None if done == "data: [DONE]" else f"the stream ends with {done!r:.100}"
            if "json" in answer.get("content-type") and not head:
                json.loads(answer.body)
            return None
        late = answer.status == 503 and answer.get("retry-after")
        if not 400 <= answer.status < 500 and not late:
            return f"{answer.status}: {answer.body!r:.200}"
        if not head:
            error = json.loads(answer.body)["error"]
            if sorted(error) != ["code", "message", "param", "type"] or not error["message"]:
                return f"no error of OpenAI's form: {answer.body!r:.200}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{answer.status}: {type(error).__name__}: {answer.body!r:.200}"
    return None


def request(path: str, body: bytes | None, headers: Headers, method: str | None = None) -> bytes:
    """A request's bytes; a body has its length before it."""
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1".encode()]
    if body is not None:
        headers = [*headers, ("content-length", str(len(body)))]
    for name, value in headers:
        content = value if isinstance(value, bytes) else value.encode()
        lines.append(name.encode() + b": " + content)
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


class Line:
    """A connection to the server."""

    def __init__(self, port: int, *, buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(SECONDS)
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect(("127.0.0.1", port))
        self._reader = self.socket.makefile("rb")

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self.socket.close()

    def send(self, content: bytes) -> None:
        """Sends it, as far as the server takes it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(content)

    def answer(self, *, head: bool = False) -> Answer | None:
        """The next response; None if the server closes the connection. Raises TimeoutError."""
        try:
            status = 100
            while status < 200:
                if not (first := self._reader.readline()):
                    return None
                status = int(first.split()[1])
                headers = []
                while (line := self._reader.readline().strip()) != b"":
                    name, _, value = line.decode("latin-1").partition(":")
                    headers.append((name.lower(), value.strip()))
            body = b""
            answer = Answer(status, headers, body)
            if head or status in (204, 304):
                return answer
            if answer.get("transfer-encoding") == "chunked":
                while size := int(self._reader.readline(), 16):
                    body += self._reader.read(size)
                    self._reader.readline()
                self._reader.readline()
            elif length := answer.get("content-length"):
                body = self._reader.read(int(length))
            else:
                body = self._reader.read()
            return answer._replace(body=body)
        except ConnectionError:
            return None

    def first_words(self) -> None:
        """Reads until the first event of a stream has come."""
        while line := self._reader.readline():
            if line.startswith(b"data: "):
                return
        raise ConnectionError("the stream has no event")

    def rest(self) -> bytes:
        """All that still comes before the connection ends."""
        content = b""
        with contextlib.suppress(ConnectionError):
            while piece := self._reader.read1():
                content += piece
        return content

    def leave(self, *, rudely: bool) -> None:
        """Closes the connection; rudely: by a reset."""
        if rudely:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.__exit__()


@dataclass
class Served:
    """A `gothic-serve`."""

    port: int
    pid: int
    stderr: list[str]

    @property
    def host(self) -> tuple[str, str]:
        """The header that it wants."""
        return ("host", f"127.0.0.1:{self.port}")

    def bytes_of(self, path: str, body: object = None, *headers: tuple[str, str]) -> bytes:
        """A sound request."""
        sent = None if body is None else json.dumps(body).encode()
        kind = [] if body is None else [("content-type", "application/json")]
        return request(path, sent, [self.host, *kind, *headers])

    def ask(self, path: str, body: object = None, *headers: tuple[str, str]) -> Answer | None:
        """The answer to a sound request."""
        return self.raw(self.bytes_of(path, body, *headers))

    def raw(self, content: bytes) -> Answer | None:
        """The answer to these bytes."""
        with Line(self.port) as line:
            line.send(content)
            return line.answer(head=content.startswith(b"HEAD "))

    def text(self) -> str:
        """What it writes for the same request as ever."""
        answer = self.ask("/v1/completions", PLAIN)
        if answer is None or answer.status != 200:
            raise RuntimeError(f"a plain request is not answered: {answer!r:.300}")
        return json.loads(answer.body)["choices"][0]["text"]

    def prompt_fault(self) -> tuple[float, str | None]:
        """How long a plain request takes, and what is wrong with its answer."""
        started = time.monotonic()
        answer = self.ask("/v1/completions", PLAIN)
        took = time.monotonic() - started
        wrong = fault(answer) or (None if answer and answer.status == 200 else f"{answer!r:.200}")
        return took, wrong or (f"it took {took:.1f} s" if took > PROMPT_SECONDS else None)

    def busy(self) -> str | None:
        """What it still has to do, by its own account."""
        answer = self.ask("/health")
        health = json.loads(answer.body) if answer else {"status": "gone"}
        idle = health["status"] == "ok" and health["free"] == health["slots"]
        return None if idle and not health["waiting"] else f"{health}"

    def files(self) -> int:
        """Open files and connections."""
        return len([*Path(f"/proc/{self.pid}/fd").iterdir()])

    def megabytes(self, field: str = "VmRSS") -> float:
        """Resident memory; of `VmHWM`, the most there was."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    def errors(self) -> list[str]:
        """Errors of its own that it has told."""
        return [f"stderr: {line.rstrip()}" for line in self.stderr if not line[:1].isspace()][:5]


def settled(served: Served, files: int, seconds: float) -> list[str]:
    """What is left over of earlier requests after so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.1)
        open_files, busy = served.files(), served.busy()
        if busy is None and open_files <= files:
            return []
        found = f"{open_files} open files, {busy or 'nothing to do'}"
    return [f"left over after {seconds} s: {found}, {files} files before"]


@contextlib.contextmanager
def serving(workplace: Workplace, *arguments: str) -> Iterator[Served]:
    """A server of a tiny model with an index of its training text."""
    if not (workplace.root / "served").exists():
        finished_run(workplace, "served")
        (workplace.root / "held_out.txt").write_text(text_of(9))
        texts = ["--file", "mixed_train.txt", "--held-out", "held_out.txt"]
        indexed = run("index", texts, workplace.root)
        if indexed.returncode:
            raise RuntimeError(f"gothic-index: {indexed.stderr}")
    places = ["--checkpoint", "served/latest", "--train-file", "mixed_train.txt", "--port", "0"]
    started = process("serve", [*places, *arguments], workplace.root)
    stderr: list[str] = []
    reader = None
    try:
        address = wait_for(" writes at http://", started)[-1].partition("http://")[2]
        port = int(address.partition("/")[0].rpartition(":")[2])
        reader = threading.Thread(target=lambda: stderr.extend(started.stderr or []), daemon=True)
        reader.start()
        served = Served(port, started.pid, stderr)
        with Line(port) as line:
            line.socket.settimeout(120)  # it compiles
            line.send(served.bytes_of("/v1/completions", PLAIN))
            line.answer()
        yield served
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        if reader is not None:
            reader.join()
        for stream in (started.stdout, started.stderr):
            assert stream is not None
            stream.close()


# ---- S5: other sites ----


def _hosts(port: int) -> Iterator[tuple[str, list[str | bytes]]]:
    own = f"127.0.0.1:{port}"
    yield "absent", []
    yield "doubled", [own, "evil.example"]
    yield "doubled", ["evil.example", own]
    for value in (
        "evil.example", f"evil.example:{port}", "EVIL.EXAMPLE", "localhost.evil.example",
        "evil-localhost", "xlocalhost", "localhostx", f"127.0.0.1.evil.example:{port}",
        f"user@{own}", "evil.example@localhost", f"evil.example:80@{own}", f"{own}@evil.example",
        f"@{own}", "localhost.", f"localhost.:{port}", "127.0.0.1.", "localhost:80:80",
        "localhost:999999", "localhost:-1", "localhost:abc", f"{own}.evil.example",
        f"localhost:{port}evil.example", "[::1", "::1", f"::1:{port}", "[::1]evil.example",
        "evil.example[::1]", "[::ffff:127.0.0.1]", "[::1%25lo]", "[::1%evil.example]", "[::]",
        "[localhost]", "[127.0.0.1]", "[v1.localhost]", "0.0.0.0", "0", "127.1", "2130706433",
        "0x7f.0.0.1", "127.0.0.2", "127.0.0.1.nip.io", "localhost/evil.example",
        "localhost?evil.example", "localhost#evil.example", "localhost\\evil.example",
        "localhost%00.evil.example", "localhost%2eevil.example", "local%68ost", "localhost,x",
        "localhost evil.example", "localhost;evil", "", "*", "null", "file://", "http://localhost",
        "//localhost", "l\u043ecalhost", "\u24dbocalhost", "localhost\u3002", "localhost\u00ad",
        "\uff4cocalhost", b"localhost\xff", b"\xfflocalhost", "a" * 5000,
    ):  # fmt: skip
        yield f"{value!r:.60}", [value]


def _origins(port: int) -> Iterator[list[str | bytes]]:
    own = f"http://127.0.0.1:{port}"
    yield from (
        [own, "https://evil.example"], ["https://evil.example", own], [own, own], [FRIEND, own],
        [FRIEND, "https://evil.example"], ["https://evil.example", FRIEND], [FRIEND, FRIEND],
    )  # fmt: skip
    for value in (
        "null", "https://evil.example", "http://evil.example", f"http://evil.example:{port}",
        f"{own}.evil.example", f"http://evil.example/{own}", f"http://evil.example#{own}",
        own.replace("http", "https"), "http://127.0.0.1", f"http://127.0.0.1:{port + 1}",
        f"{own}0", own[:-1], f"{own}/", f"{own}/x", f"http://localhost:{port}", f"http://u@127.0.0.1:{port}",
        f"http://[::1]:{port}", own.upper(), own[7:], f"//{own[7:]}", "file://", "", "*",
        "about:blank", "chrome-extension://abcdefghijklmnop", f"{own}, https://evil.example",
        f"{own} https://evil.example", f"{FRIEND}.evil.example", f"{FRIEND}:444", f"{FRIEND}/",
        "http://friend.example", "https://FRIEND.example", "https://evil-friend.example",
        "https://evil.friend.example", f"{FRIEND}%00", b"\xff\xfe", b"https://friend.exampl\xe9",
    ):  # fmt: skip
        yield [value]


TYPES = (
    [], ["text/plain"], ["text/plain;charset=UTF-8"], ["application/x-www-form-urlencoded"],
    ["multipart/form-data; boundary=x"], [""], ["application"], ["application/jsonp"],
    ["application/xjson"], ["text/json"], ["text/plain; application/json"], ["*/*"],
    ["text/plain, application/json"], ["application/json, text/plain"], ["application/json x"],
    ["text/plain", "application/json"], ["application/json", "text/plain"], ["application /json"],
    [b"application/json\xff"], ["application/csp-report"], ["application/octet-stream"],
)  # fmt: skip
ENCODINGS = ("gzip", "br", "deflate", "zstd", "compress", "GZIP", "identity", "", "gzip, gzip", "x")


def _strangers(port: int) -> list[tuple[str, bytes]]:
    """Requests, each sound but for one thing."""
    found: list[tuple[str, bytes]] = []
    host, json_type = ("host", f"127.0.0.1:{port}"), ("content-type", "application/json")
    for path in VALID:
        body = json.dumps({"prompt": "A", "max_tokens": 1} | VALID[path]).encode()
        for name, hosts in _hosts(port):
            headers = [*(("host", one) for one in hosts), json_type]
            found.append((f"host {name}", request(path, body, headers)))
            if name == "absent":
                old = request(path, body, headers).replace(b"HTTP/1.1", b"HTTP/1.0")
                found.append(("host absent, HTTP/1.0", old))
        for origins in _origins(port):
            named = [host, json_type, *(("origin", one) for one in origins)]
            found.append((f"origin {origins!r:.80}", request(path, body, named)))
            asked = [*named, ("access-control-request-method", "POST")]
            found.append((f"preflight {origins!r:.80}", request(path, None, asked, "OPTIONS")))
        found.append(("preflight of nobody", request(path, None, [host], "OPTIONS")))
        for kinds in TYPES:
            typed = [host, *(("content-type", one) for one in kinds)]
            found.append((f"type {kinds!r:.80}", request(path, body, typed)))
        for encoding in ENCODINGS:
            packed = [host, json_type, ("content-encoding", encoding)]
            found.append((f"encoding {encoding!r}", request(path, body, packed)))
    for path in SHOWN:
        found.append((f"{path} at evil.example", request(path, None, [("host", "evil.example")])))
        named = [host, ("origin", "https://evil.example")]
        found.append((f"{path} from evil.example", request(path, None, named)))
    # Every kind at some address, before any kind at a second one.
    random.Random(5).shuffle(found)
    seen: Counter[str] = Counter()
    turns = []
    for one in found:
        seen[one[0]] += 1
        turns.append(seen[one[0]])
    return [found[i] for i in sorted(range(len(found)), key=turns.__getitem__)]


def _own_hosts(port: int) -> tuple[str, ...]:
    named = f"127.0.0.1:{port}", f"LocalHost:{port}", f"[::1]:{port}"
    return (*named, "127.0.0.1", "localhost", "[::1]", "localhost:1")


def _friends(served: Served) -> list[tuple[str, bytes, int, bool]]:
    """Sound requests: name, bytes, status, whether a text is written."""
    path, body = "/v1/completions", json.dumps(PLAIN).encode()
    json_type = ("content-type", "application/json")
    found = [
        (host, request(path, body, [("host", host), json_type]), 200, True)
        for host in _own_hosts(served.port)
    ]
    for name, headers in (
        ("own origin", [json_type, ("origin", f"http://127.0.0.1:{served.port}")]),
        (FRIEND, [json_type, ("origin", FRIEND)]),
        ("charset", [("content-type", "Application/JSON; charset=utf-8")]),
    ):
        found.append((name, request(path, body, [served.host, *headers]), 200, True))
    asked = [served.host, ("origin", FRIEND), ("access-control-request-method", "POST")]
    found.append((f"preflight {FRIEND}", request(path, None, asked, "OPTIONS"), 204, False))
    return found


def strangers(workplace: Workplace, count: int) -> Figure:
    """S5: other names of this machine, other sites' pages, bodies that a form could send."""
    receipts = workplace.root / "served" / RECEIPTS
    with serving(workplace, "--keep-receipts", "--allow-origin", FRIEND) as served:
        receipts.unlink(missing_ok=True)
        trials = _strangers(served.port)[:count]

        def stranger(number: int) -> list[str]:
            name, content = trials[number]
            answer = served.raw(content)
            wrong = fault(answer)
            if wrong is None and answer is not None:
                if not 400 <= answer.status < 500:
                    wrong = f"{answer.status}"
                elif any(key.startswith("access-control") for key, _ in answer.headers):
                    wrong = "it has CORS headers"
            return [f"{name}: {wrong}"] if wrong else []

        failures = in_lanes(stranger, len(trials))
        friends = _friends(served)
        for name, content, status, _ in friends:
            answer = served.raw(content)
            if fault(answer) or answer is None or answer.status != status:
                failures.append(f"{name}: {answer!r:.200}")
            elif FRIEND in name and answer.get("access-control-allow-origin") != FRIEND:
                failures.append(f"{name}: no CORS headers")
        written = sum(writes for *_, writes in friends)
        kept = len(receipts.read_text().splitlines())
        if kept != written:
            failures.append(f"{kept} texts were written, and {written} asked for")
        failures += served.errors()
        receipts.unlink()
    return Figure(
        "S5", "hostile hosts, origins, content types and preflights that are not refused",
        len(trials), failures, f"{len(friends)} sound ones between them pass",
    )  # fmt: skip


# ---- S6: broken requests ----

_RAW = {
    "@inf@": b"1e999",
    "@-inf@": b"-1e999",
    "@digits@": b"9" * 5000,
    "@deep@": b"[" * 50_000 + b"]" * 50_000,
    "@objects@": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "@invalid@": b'"\xff\xfe"',
    "@surrogate bytes@": b'"\xed\xa0\x80"',
}
"""What Python's json does not write."""
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, -0.0, 0.5, 1e-320, 2**31, 2**32, 2**63, -(2**63), 10**30, 1e308,
    -1e308, float("nan"), float("inf"), float("-inf"), "", "\0", " ", "\ud800", "\udfff\ud800",
    "\U0001f3a9", "<|wilde|>", "<|endoftext|>", "{{7*7}}", "../../etc/passwd", "wilde", "any=1",
    "wilde=1e999", "wilde=nan", "wilde=-1", "\u202e", "a\r\nb: c", "%s%n", "7" * 300, [], {}, [[]],
    [None], [True], [0], [-1], [10**9], [[0]], [""], ["", 1], [{}], ["\ud800"], {"\ud800": 1},
    {"wilde": float("nan")}, {"wilde": 10**400}, {"wilde": True}, {"__proto__": 1}, {"": 0},
    {"wilde": 1e-320, "lovecraft": 1e308}, {"role": "user", "content": "\ud800"}, list(range(300)),
    ["a"] * 65, "word " * 2000, *_RAW,
]  # fmt: skip
HUGE: list[Any] = ["a" * 200_000, "word " * 40_000, [0] * 100_000, ["a"] * 100_000, "\0" * 100_000]
NAMES = (
    "\ud800",
    "\0",
    "",
    "a" * 10_000,
    "__proto__",
    "min_p",
    "tools",
    "prompt\0",
    "\u202e",
    "n ",
)
METHODS = (
    "GET",
    "HEAD",
    "PUT",
    "DELETE",
    "PATCH",
    "OPTIONS",
    "TRACE",
    "PRI",
    "post",
    "X" * 50,
    "!#$",
)
PATHS = (
    "/", "//", "/..", "/../../etc/passwd", "/page.js/", "/page.js/..", "/./page.js", "/%2e%2e/etc",
    "/page%00.js", "/PAGE.JS", "/v1", "/v1/", "/v1/models/", "/v1/models/served:", "/v1/models/%ff",
    "/v1/models/..%2f..", "/v1/models/served%3Awilde", "/v1/completions/", "/v1//completions",
    "//evil.example/", "//evil.example/v1/completions/", "/\\evil.example/", "/v1/completions?a=b",
    "/health?" + "a" * 5000, "/health?%00%ff", "*", "http://evil.example/", "/v1/models/%61",
    "/.git/config", "/v1/completions;x", "/v1/completions%20", "/gothic", "/gothic/model/", "/%",
    "/v1/models/%F0%9F%8E%A9", "/page.html", "/serving/page.js", "/favicon.ico",
)  # fmt: skip


class Trial(NamedTuple):
    """A request of S6."""

    name: str
    content: bytes
    sound: bool = False
    """Nothing is wrong with it."""
    whole: bool = True
    """It ends where it says, and another one can follow."""


def _trial(number: int, served: Served) -> Trial:
    rng = random.Random(number)
    path = rng.choice([*VALID])
    needed = ("prompt", "messages", "blends", "max_tokens", "max_completion_tokens")
    fields = {
        name: value for name, value in VALID[path].items() if name in needed or rng.random() < 0.8
    }
    body = json.dumps(fields).encode()
    sent = [served.host, ("content-type", "application/json")]
    kind = rng.random()
    if kind < 0.05:
        return Trial(f"sound {path}", request(path, body, sent), sound=True)
    if kind < 0.80:
        if rng.random() < 0.1:
            body = json.dumps(json.loads(body) | {rng.choice(NAMES): rng.choice(HOSTILE)}).encode()
        hostile = HUGE if rng.random() < 0.01 else HOSTILE
        body = mutated(body, rng, hostile)
        if path == "/gothic/measure" and 20_000 < len(body) < 200_000:
            body = body[:20_000]  # what is measured in full takes longer than a request may
        for name, content in _RAW.items():
            body = body.replace(f'"{name}"'.encode(), content)
        return Trial(f"body of {path}", request(path, body, sent))
    if kind < 0.84:
        method = rng.choice(METHODS)
        return Trial(f"{method} {path}", request(rng.choice([path, *SHOWN]), body, sent, method))
    if kind < 0.89:
        path = rng.choice(PATHS)
        method = rng.choice(["GET", "POST", "HEAD"])
        return Trial(f"{method} {path:.60}", request(path, body, sent, method))
    if kind < 0.92:
        odd = rng.choice(
            [
                ("x" * rng.choice([10, 10_000]), "1"), ("x", "y" * 20_000), ("cookie", "\0"),
                ("x", b"\xff\x80"), ("accept", "*/*;q=nan"), ("range", "bytes=0-1,2-3,4-"),
                ("upgrade", "websocket"), ("connection", "upgrade, close"), ("te", "trailers"),
                ("expect", "100-continue"), ("expect", "x"), ("authorization", "Basic \xe9"),
                ("content-length", "5"), ("x-forwarded-for", "evil"), ("if-none-match", "*"),
                ("x y", "1"), ("", "1"), ("x\r\ny", "1"), ("forwarded", "host=evil.example"),
                ("accept-encoding", "gzip"), ("via", "\u202e"), ("connection", "close"),
            ]
        )  # fmt: skip
        return Trial(f"header {odd!r:.60}", request(path, body, [*sent, odd]), whole=False)
    if kind < 0.96:
        return Trial(f"framing of {path}", _framing(rng, path, body, sent), whole=False)
    whole = bytearray(request(path, body, sent))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(whole))
        match rng.randrange(3):
            case 0:
                whole[at] ^= 1 << rng.randrange(8)
            case 1:
                del whole[at : at + rng.randint(1, 40)]
            case _:
                whole[at:at] = rng.choice([rng.randbytes(9), b"\r\n", b"\n", b"\0", b" ", b"\r"])
    if rng.random() < 0.2:
        whole = bytearray(rng.randbytes(rng.randint(1, 2000)))
    return Trial("bytes", bytes(whole), whole=False)


def _framing(rng: random.Random, path: str, body: bytes, sent: Headers) -> bytes:
    """A request whose body does not end where it says, or does not say where it ends."""
    start = request(path, None, sent, "POST")[:-2]
    lengths = ("-1", "0", "1", "5 5", "0x10", "1e3", "9" * 19, "9" * 40, "", "+5", "5, 5", "5, 6")
    chunks = (
        b"zz\r\n", b"-1\r\n", b"f" * 19 + b"\r\n", b"5\r\nabc", b"5;x=y\r\nabcde\r\n0\r\n\r\n",
        b"\r\n\r\n", b"5\nabcde\n0\n\n", b"0\r\nx: y\r\n\r\n", b"0" * 30_000, b"1;" + b"a" * 70_000,
        b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n",
    )  # fmt: skip
    match rng.randrange(4):
        case 0:
            return start + b"content-length: " + rng.choice(lengths).encode() + b"\r\n\r\n" + body
        case 1:
            return start + b"transfer-encoding: chunked\r\n\r\n" + rng.choice(chunks)
        case 2:
            odd = rng.choice(["gzip", "chunked, chunked", "xchunked", "identity", "chunked\0", ""])
            length = f"content-length: {len(body)}\r\n" if rng.random() < 0.5 else ""
            return start + f"transfer-encoding: {odd}\r\n{length}\r\n".encode() + body
        case _:
            both = f"content-length: {len(body)}\r\ntransfer-encoding: chunked\r\n\r\n"
            return start + both.encode() + rng.choice([body, *chunks])


def _alone(served: Served, trial: Trial) -> str | None:
    """What is wrong with the answer to bytes that may be no whole request."""
    head = trial.content.startswith(b"HEAD ")
    with Line(served.port) as line:
        line.send(trial.content)
        if not select.select([line.socket], [], [], 0.3)[0]:
            # The server may wait for more, and then be told that no more will come.
            with contextlib.suppress(OSError):
                line.socket.shutdown(socket.SHUT_WR)
            answer = line.answer(head=head)
            return fault(answer, head=head) if answer else None
        answer = line.answer(head=head)
        return fault(answer, head=head)


def _flood(served: Served, chunked: bool) -> str | None:
    """64 MB in one body, all of it, whatever the server says meanwhile."""
    megabyte = b" " * 2**20
    framing = ("transfer-encoding", "chunked") if chunked else ("content-length", str(64 * 2**20))
    sent = [served.host, ("content-type", "application/json"), framing]
    with Line(served.port) as line:
        line.send(request("/v1/completions", None, sent, "POST"))
        for _ in range(64):
            line.send(b"100000\r\n" + megabyte + b"\r\n" if chunked else megabyte)
        answer = line.answer()
        if wrong := fault(answer):
            return wrong
        return None if answer and answer.status == 413 else f"{answer!r:.200}"


def _unfinished(served: Served, number: int) -> str | None:
    """A header or a body that does not end: answered when its time is over."""
    content = served.bytes_of("/v1/completions", PLAIN)
    with Line(served.port) as line:
        line.socket.settimeout(2 * SECONDS)
        line.send(content[: -1 - number % len(content)])
        answer = line.answer()
        if wrong := fault(answer):
            return wrong
        return None if answer and answer.status == 408 else f"{answer!r:.200}"


PIPELINE = 8
"""Requests that are sent at once."""


def _pipelined(served: Served, trials: list[Trial]) -> list[str]:
    failures = []
    while trials:
        sent = trials[:PIPELINE]
        while len(sent) > 1 and sum(len(one.content) for one in sent) > 50_000:
            sent.pop()
        with Line(served.port) as line:
            line.send(b"".join(one.content for one in sent))
            for number, trial in enumerate(sent):
                try:
                    head = trial.content.startswith(b"HEAD ")
                    answer = line.answer(head=head)
                    if answer is None and number:
                        break  # closed after the one before
                    wrong = fault(answer, head=head)
                    if wrong is None and trial.sound and answer and answer.status != 200:
                        wrong = f"{answer!r:.200}"
                except TimeoutError:
                    wrong = "it hangs"
                trials = trials[1:]
                if wrong:
                    failures.append(f"{trial.name}: {wrong}; {trial.content[-200:]!r}")
                    break
    return failures


def broken_requests(workplace: Workplace, count: int) -> Figure:
    """S6: mutated JSON, bytes, framing, methods and addresses."""
    with serving(workplace) as served:
        before, files = served.text(), served.files()
        trials = [_trial(number, served) for number in range(count)]
        whole = [one for one in trials if one.whole]
        apart = [one for one in trials if not one.whole]
        lots = [whole[start : start + 40] for start in range(0, len(whole), 40)]
        failures = in_lanes(lambda lot: _pipelined(served, lots[lot]), len(lots))

        def alone(number: int) -> list[str]:
            wrong = _alone(served, apart[number])
            return (
                [f"{apart[number].name}: {wrong}; {apart[number].content!r:.300}"] if wrong else []
            )

        failures += in_lanes(alone, len(apart))
        floods = max(2, count // 1000)
        for number in range(floods):
            if wrong := _flood(served, chunked=number % 2 == 1):
                failures.append(f"64 MB: {wrong}")
        slow = max(2, count // 500)
        waiting = [
            threading.Thread(
                target=lambda n=n: failures.extend(filter(None, [_unfinished(served, 17 * n)]))
            )
            for n in range(slow)
        ]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        failures += settled(served, files, SECONDS)
        if (after := served.text()) != before:
            failures.append(f"the text is another: {before!r}, {after!r}")
        failures += served.errors()
        peak = served.megabytes("VmHWM")
    return Figure(
        "S6", "mutated requests with neither a sound answer nor an error in OpenAI's form",
        count + floods + slow, failures,
        f"{floods} bodies of 64 MB, {slow} that do not end; at most {peak:.0f} MB of memory;"
        " the text after them is the same",
    )  # fmt: skip


# ---- S7: slow clients ----


def _stalled(served: Served, kind: int) -> Line:
    """A connection that holds a header or a body back, or does not read a long stream."""
    long = {**PLAIN, "prompt": "word " * 10_000, "n": 16, "echo": True, "stream": True}
    content = served.bytes_of("/v1/completions", long)
    if kind == 2:
        line = Line(served.port, buffer=4096)
        line.send(content)
        return line
    line = Line(served.port)
    line.send(content[:-20] if kind else content[:60])
    return line


def slow_clients(workplace: Workplace, count: int) -> Figure:
    """S7: clients that stall, and clients that leave in mid-stream, with others beside them."""
    failures: list[str] = []
    slowest = 0.0
    asked = 0

    def ask() -> None:
        nonlocal slowest, asked
        took, wrong = served.prompt_fault()
        slowest, asked = max(slowest, took), asked + 1
        if wrong:
            failures.append(f"beside the others: {wrong}")

    with serving(workplace) as served:
        files = served.files()
        lines = []
        for number in range(count):
            lines.append(_stalled(served, number % 3))
            if number % 5 == 0:
                ask()
        most = served.files() - files
        until = time.monotonic() + HEADER_SECONDS
        while time.monotonic() < until:
            ask()
            for line in lines[0 : len(lines) : 6]:  # some headers come, but never to an end
                with contextlib.suppress(OSError):
                    line.socket.send(b"x")
            time.sleep(0.2)
        time.sleep(2)
        for number, line in enumerate(lines):
            if number % 3 == 2:
                continue
            try:
                answer = line.answer()
                # A late byte of the client's can make its system forget the answer.
                if answer is not None and (fault(answer) or answer.status != 408):
                    failures.append(f"stalled {number}: {answer!r:.200}")
            except TimeoutError:
                failures.append(f"stalled {number}: it is not cut off")
        while time.monotonic() < until + STALL_SECONDS and served.files() > files:
            ask()
            time.sleep(0.5)
        failures += settled(served, files, 5)
        for line in lines[2::3]:
            if b"[DONE]" in line.rest():
                failures.append("a stream that was not read has come to its end")
        for line in lines:
            line.__exit__()
        for number in range(count):
            stream, n = number % 4 != 3, 4 if number % 4 == 2 else 1
            line = Line(served.port)
            body = {**PLAIN, "max_tokens": 4096, "stream": stream, "n": n, "temperature": 1.5}
            line.send(served.bytes_of("/v1/completions", body))
            if stream:
                line.first_words()
            else:
                time.sleep(0.02)
            line.leave(rudely=number % 2 == 1)
            if number % 5 == 0:
                ask()
        failures += settled(served, files, PROMPT_SECONDS)
        failures += served.errors()
    return Figure(
        "S7", "clients that stall, or leave in mid-stream: something of theirs is kept, or another"
        f" client waits for {PROMPT_SECONDS:.0f} s", 2 * count, failures,
        f"at most {most} connections at a time; {asked} requests beside them took at most"
        f" {slowest:.2f} s",
    )  # fmt: skip


def many_requests(workplace: Workplace, count: int) -> Figure:
    """S7: memory after many requests of all kinds."""
    with serving(workplace) as served:

        def lot(number: int) -> list[str]:
            rng = random.Random(number)
            requests = []
            for _ in range(20):
                words = " ".join(rng.choices(WITTY.split(), k=rng.randint(1, 60)))
                path = rng.choice([*VALID, "/v1/completions", "/v1/models", "/health", "/"])
                body: dict[str, Any] | None = dict(VALID[path]) if path in VALID else None
                if body is not None and "messages" in body:
                    body["messages"] = [{"role": "user", "content": words}]
                elif body is not None:
                    body["text" if "text" in body else "prompt"] = words
                if path == "/v1/completions" and rng.random() < 0.7:
                    body = {"prompt": words, "max_tokens": rng.randint(1, 8)}
                requests.append(served.bytes_of(path, body))
            failures = []
            with Line(served.port) as line:
                line.send(b"".join(requests))
                for content in requests:
                    answer = line.answer()
                    if fault(answer) or answer is None or answer.status != 200:
                        failures.append(f"{content[:300]!r}: {answer!r:.200}")
            return failures

        failures = in_lanes(lot, 25)
        before = served.megabytes()
        failures += in_lanes(lot, max(count // 20, 1))
        grown = served.megabytes() - before
        if grown > GROWTH:
            failures.append(f"the memory has grown by {grown:.1f} MB")
        failures += served.errors()
    return Figure(
        "S7", f"sound requests that are refused, or together take {GROWTH} MB of memory",
        count, failures, f"{grown:+.1f} MB after 500 to warm up, of {before:.0f}",
    )  # fmt: skip


# ---- S8: HTML and script in texts ----

_RUN = "console.error('ran')"
_IMG = f"<img src=x onerror={_RUN}>"
PAYLOADS = (
    f"<script>{_RUN}</script>", _IMG, f"<svg onload={_RUN}>",
    f"<svg><script>{_RUN}</script></svg>",
    f"<iframe srcdoc=\"<script>parent.{_RUN}</script>\">",
    f"<body onload={_RUN}>", f"<details open ontoggle={_RUN}>",
    f"<input autofocus onfocus={_RUN}>",
    f"<video><source onerror={_RUN}></video>",
    f"<a href=\"javascript:{_RUN}\">x</a>",
    f"<object data=\"javascript:{_RUN}\">", f"<math><mtext>{_IMG}</mtext></math>",
    f"</textarea><script>{_RUN}</script>", f"</title>{_IMG}",
    f"</option></select>{_IMG}", f"\">{_IMG}",
    f"'>{_IMG}", f"-->{_IMG}", f"]]>{_IMG}",
    f"<noscript><p title=\"</noscript>{_IMG}\">", f"<img src=x onerror={_RUN}//",
    f"<template><script>{_RUN}</script></template>", f"<style>@import 'javascript:{_RUN}';</style>",
    f"<meta http-equiv=refresh content=\"0;url=javascript:{_RUN}\">",
    f"${{{_RUN}}}", f"{{{{{_RUN}}}}}",
    f"<base href=//evil.example/><script src=page.js></script>{_IMG}",
    f"[x](javascript:{_RUN})", f"![x](x\" onerror=\"{_RUN})", f"\u202e{_IMG}",
    f"javascript:{_RUN}", "<link rel=stylesheet href=//evil.example/x.css>",
)  # fmt: skip


_ELEMENTS = "img, iframe, object, embed, video, form, math, base, body script"
"""That the page has not by itself."""


def scripts(workplace: Workplace, count: int) -> Figure:
    """S8: a prompt, an output, an uploaded file that is HTML or script, in a browser."""
    what = "HTML and script in prompt, output, next words or an opened file that the browser reads"
    try:
        from tests import test_page
    except (ImportError, pytest.skip.Exception) as error:
        return Figure("S8", what, 0, [], f"not measured: {error}")
    failures: list[str] = []
    payloads = PAYLOADS[:count]
    with (
        serving(workplace) as served,
        test_page.playwright.sync_playwright() as started,
        contextlib.closing(
            started.chromium.launch(executable_path=test_page.CHROMIUM, args=["--no-sandbox"])
        ) as browser,
    ):
        for payload in payloads:
            try:
                with test_page.desk_in(browser, f"http://127.0.0.1:{served.port}/") as desk:
                    _write_hostile(desk, payload, test_page.fake_stream)
                    assert desk.page.locator(_ELEMENTS).count() == 0, "it is in the page"
            except (AssertionError, test_page.playwright.Error) as error:
                failures.append(f"{payload}: {error!r:.300}")
    return Figure(
        "S8", what, 4 * len(payloads), failures,
        f"{len(payloads)} texts at 4 places; the browser's console stays empty",
    )  # fmt: skip


def _write_hostile(desk: Any, payload: str, fake_stream: Callable[..., None]) -> None:
    """One text as the prompt, the output, a next word and a file with receipts."""
    page = desk.page
    page.route("**/v1/completions", lambda route: fake_stream(route, f" {payload}"))
    words = {"alternatives": [[{"text": f" {payload}", "probability": 0.5}]] * 3}
    page.route("**/gothic/alternatives", lambda route: route.fulfill(json=words))
    desk.text.fill(f"{payload} ")
    desk.press("Control+End")
    desk.continues()
    desk.press("Control+.")
    page.locator("#choices-columns button").first.click()
    piece = {"text": payload, "kind": "written", "blend": {payload: 1}, "receipt": {}}
    hostile = {"version": 1, "mix": {payload: 1}, "pieces": [piece]}
    block = f"```gothic-receipts\n{json.dumps(hostile)}\n```\n"
    desk.open_file(f"{payload}.md".replace("/", ""), f"{payload}\n\n{block}")
    desk.says("is open")
    desk.open()


# ---- S9: the key ----

KEY = "Sesame-0123456789abcdef"


def basic(text: str | bytes) -> str:
    """A header as browsers send it."""
    content = text if isinstance(text, bytes) else text.encode()
    return f"Basic {base64.b64encode(content).decode()}"


def _wrong_keys() -> list[list[str | bytes]]:
    right = f"Bearer {KEY}"
    return [
        [], [""], [KEY], ["Bearer"], ["Bearer "], [f"Bearer{KEY}"], [f"Digest {KEY}"],
        [f"Bearer {KEY[:-1]}"], [f"Bearer {KEY[1:]}"], [f"Bearer {KEY}x"], [f"Bearer x{KEY}"],
        [f"Bearer {KEY.lower()}"], [f"Bearer {KEY.upper()}"], [f"Bearer {KEY[::-1]}"],
        [f"Bearer {KEY} {KEY}"], [f"Bearer Bearer {KEY}"], [f"Bearer {KEY},"], [f'Bearer "{KEY}"'],
        [f"Bearer {'x' * len(KEY)}"], [f"Bearer {KEY[0]}"], ["Bearer *"], ["Bearer null"],
        ["Bearer " + "a" * 30_000], [f"Bearer {KEY}" + "a" * 30_000], ["Bearer clef\u00e9"],
        [f"Bearer {KEY}\u00e9"], [f"Bearer {KEY}".encode() + b"\xff"], [b"Bearer \xff\xfe\xfd"],
        [f"Bearer {KEY}\u200b"], ["Bearer \uff33esame-0123456789abcdef"], [b"\xff\xfe"],
        [right, "Bearer wrong"], ["Bearer wrong", right], [right, right], ["", right], [right, ""],
        [f"Bearer wrong, {right}"], [f"{right}, Bearer wrong"], [f"bearer\t{KEY}"],
        ["Basic"], ["Basic "], [basic("")], [basic(":")], [basic(KEY)], [basic(f"{KEY}:")],
        [basic(f":{KEY[:-1]}")], [basic(f":{KEY}x")], [basic(f"user:{KEY.lower()}")],
        [basic(f"user:x:{KEY}")], [basic(b":\xff\xfe")], [basic(f":{KEY}\0")],
        [f"Basic :{KEY}"], ["Basic \u00e9"], [b"Basic \xff"], ["Basic ===="], ["Basic a"],
        ["Basic " + "A" * 30_001], [basic(f":{KEY}"), "Bearer x"], [f"Bearer {basic(f':{KEY}')}"],
    ]  # fmt: skip


def keys(workplace: Workplace, count: int) -> Figure:
    """S9: requests with no key or a wrong one, and servers that would need one and have none."""
    file = workplace.root / "key.txt"
    file.write_text(f"{KEY}\n")
    places = [*(path for path in SHOWN if path != "/health"), *VALID, "/nowhere"]
    wrong_keys = _wrong_keys()
    with serving(workplace, "--api-key-file", str(file)) as served:

        def trial(number: int) -> list[str]:
            # Every wrong key in turn, and every address with each in the end.
            given = wrong_keys[number % len(wrong_keys)]
            path = places[(number + number // len(wrong_keys)) % len(places)]
            body = json.dumps(VALID[path]).encode() if path in VALID else None
            sent = [served.host, ("content-type", "application/json")]
            sent += [("authorization", one) for one in given]  # type: ignore[misc]
            answer = served.raw(request(path, body, sent))
            wrong = fault(answer)
            refused = answer and answer.status == 401 and answer.get("www-authenticate")
            if not wrong and not refused:
                wrong = f"{answer!r:.200}"
            return [f"{path} with {given!r:.80}: {wrong}"] if wrong else []

        failures = in_lanes(trial, count)
        for given in (f"Bearer {KEY}", f"bearer {KEY}", basic(f":{KEY}"), basic(f"user:{KEY}")):
            for path in places[:-1]:
                answer = served.ask(path, VALID.get(path), ("authorization", given))
                if fault(answer) or answer is None or answer.status != 200:
                    failures.append(f"{path} with the key: {answer!r:.200}")
        health = served.ask("/health")
        if health is None or health.status != 200:
            failures.append(f"/health without a key: {health!r:.200}")
        failures += served.errors()
    open_hosts = [
        "0.0.0.0",
        "::",
        "",
        "0",
        "127.0.0.2",
        "192.0.2.1",
        "writer.example",
        socket.gethostname(),
    ]

    def start(number: int) -> list[str]:
        host = open_hosts[number]
        arguments = ["--checkpoint", "served/latest", "--port", "0", "--host", host]
        result = run("serve", arguments, workplace.root)
        if result.returncode != 2 or result.stderr.count("\n") != 1 or "key" not in result.stderr:
            return [
                f"--host {host!r} without a key: code {result.returncode}: {result.stderr[-200:]}"
            ]
        return []

    failures += in_lanes(start, len(open_hosts))
    with serving(workplace, "--host", "0.0.0.0", "--no-key") as served:
        if wrong := served.prompt_fault()[1]:
            failures.append(f"--no-key: {wrong}")
    return Figure(
        "S9", "requests with no or a wrong key, and hosts without one, that are not refused",
        count + len(open_hosts), failures, f"{len(open_hosts)} starts, which end with code 2",
    )  # fmt: skip
