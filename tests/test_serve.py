"""The endpoint as its clients see it: a real process, OpenAI's own client, plain requests."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gothic_jax.checkpoints.checkpoint import locate
from gothic_jax.commands import chat, index
from gothic_jax.commands.serve import main
from gothic_jax.machine.device import select_device
from gothic_jax.serving.app import build
from gothic_jax.serving.gate import Allowed
from gothic_jax.serving.service import Service
from gothic_jax.writing.receipts import RECEIPTS
from gothic_jax.writing.writer import Writer
from tests.common import Workplace, process

SLOTS = 4


@dataclass
class Served:
    workplace: Workplace
    url: str
    process: subprocess.Popen[str]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}v1", api_key="none", max_retries=0)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=fields, timeout=120)


@contextlib.contextmanager
def serving(workplace: Workplace, *extra: str) -> Iterator[Served]:
    """A server, which is killed at the end if it still runs."""
    arguments = ["--checkpoint", str(workplace.out_dir), "--port", "0", "--slots", str(SLOTS)]
    started = process("serve", [*arguments, *extra], workplace.root)
    assert started.stdout is not None
    line = started.stdout.readline()
    address = re.search(r"http://\S+", line)
    assert address, line + started.stderr.read()
    with started:
        try:
            yield Served(workplace, address[0], started)
        finally:
            started.kill()


@pytest.fixture(scope="module")
def served(trained_once: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    assert index.main(["--file", str(trained_once.root / "mixed_train.txt")]) == 0
    with serving(trained_once) as one:
        yield one
        one.process.send_signal(signal.SIGINT)
        assert one.process.wait(30) == 130


def test_the_official_client_completes_streamed_and_not(served: Served) -> None:
    client = served.client()
    asked = {"model": "run", "prompt": "There are doors", "max_tokens": 24, "seed": 7}
    whole = client.completions.create(**asked)
    assert whole.object == "text_completion"
    assert whole.choices[0].text
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    options = {"stream_options": {"include_usage": True}}
    chunks = [*client.completions.create(**asked, stream=True, **options)]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_the_official_client_chats_and_the_system_message_is_the_voice(served: Served) -> None:
    client = served.client()

    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(max_tokens=20, seed=3, **fields)

    user = {"role": "user", "content": "There are doors"}
    voice = {"role": "system", "content": "wilde"}
    by_message = ask(model="run", messages=[voice, user])
    by_name = ask(model="run:wilde", messages=[user])
    by_field = ask(model="run", messages=[user], extra_body={"voice": "wilde"})
    text = by_message.choices[0].message.content
    assert text == by_name.choices[0].message.content == by_field.choices[0].message.content
    assert by_message.choices[0].message.role == "assistant"
    plain = client.completions.create(
        model="run", prompt="There are doors", max_tokens=20, seed=3, extra_body={"voice": "wilde"}
    )
    assert plain.choices[0].text == text
    chunks = [*ask(model="run:wilde", messages=[user], stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    blended = ask(
        model="run",
        messages=[user],
        extra_body={"blend": {"wilde": 1.5, "lovecraft": -0.5}},
        logprobs=True,
        top_logprobs=3,
    )
    content = blended.choices[0].logprobs.content
    assert "".join(one.token for one in content).startswith(blended.choices[0].message.content[:5])
    assert all(len(one.top_logprobs) == 3 for one in content)


def test_many_at_once_by_the_asynchronous_client_are_what_each_is_alone(served: Served) -> None:
    def asked(number: int) -> dict[str, Any]:
        return {"model": "run", "prompt": f"The {number}", "seed": number, "max_tokens": 30}

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}v1", api_key="none") as client:

            async def one(number: int) -> str:
                if number % 2:
                    answer = await client.completions.create(**asked(number))
                    return answer.choices[0].text
                stream = await client.completions.create(**asked(number), stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(12)))

    client = served.client()
    alone = [client.completions.create(**asked(number)).choices[0].text for number in range(12)]
    assert asyncio.run(together()) == alone


def test_models_are_the_run_and_its_voices(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["run", "run:lovecraft", "run:wilde"]
    assert client.models.retrieve("run:wilde").id == "run:wilde"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")
    assert httpx.get(f"{served.url}health").json()["status"] == "ok"


def test_several_samples_and_prompts_and_the_usage_is_of_all(served: Served) -> None:
    answer = served.client().completions.create(
        model="run", prompt=["The tide", "The duchess"], n=3, seed=1, max_tokens=8
    )
    assert [choice.index for choice in answer.choices] == [*range(6)]
    assert len({choice.text for choice in answer.choices}) > 3
    alone = served.client().completions.create(
        model="run", prompt="The duchess", n=3, seed=1, max_tokens=8
    )
    assert [c.text for c in answer.choices[3:]] == [c.text for c in alone.choices]


def test_stop_strings_end_a_text_before_them(served: Served) -> None:
    client = served.client()
    asked = {"model": "run", "prompt": "The tide", "seed": 5, "max_tokens": 40}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:13]
    answer = client.completions.create(**asked, stop=[stop, "never in it"])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_echo_and_log_probabilities_have_the_legacy_shape(served: Served) -> None:
    answer = served.client().completions.create(
        model="run", prompt="The tide", echo=True, logprobs=2, max_tokens=6, seed=2
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The tide")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    assert choice.text.startswith("".join(logprobs.tokens)[:8])
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert "\ufffd" in token or choice.text[offset:].startswith(token) or not token
    assert {len(top) for top in logprobs.top_logprobs} == {2}
    scored = served.client().completions.create(
        model="run", prompt="The tide", echo=True, logprobs=0, max_tokens=0
    )
    assert scored.choices[0].text == "The tide"
    assert scored.choices[0].logprobs is not None
    alone = scored.choices[0].logprobs.token_logprobs
    assert alone is not None
    assert logprobs.token_logprobs is not None
    assert alone == logprobs.token_logprobs[: len(alone)]


def test_a_prompt_of_token_ids_is_read_as_it_is(served: Served) -> None:
    text = served.workplace
    ids = chat_tokenizer(text).encode("The tide").tolist()
    by_text = served.post("v1/completions", prompt="The tide", seed=4).json()["choices"][0]
    by_ids = served.post("v1/completions", prompt=ids, seed=4).json()["choices"][0]
    assert by_ids["text"] == by_text["text"]
    refused = served.post("v1/completions", prompt=[0], seed=4)  # ends a work: no text has it
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"


def chat_tokenizer(workplace: Workplace) -> Any:
    return locate(str(workplace.out_dir)).tokenizer


def test_a_prompt_is_fitted_and_its_last_blank_is_not_doubled(served: Served) -> None:
    plain = served.post("v1/completions", prompt='He said "no', seed=4, max_tokens=30).json()
    curly = served.post("v1/completions", prompt="He said “no ", seed=4, max_tokens=30).json()
    text, receipt = plain["choices"][0]["text"], curly["choices"][0]["receipt"]
    assert curly["choices"][0]["text"] == text.removeprefix(" ")
    assert (receipt["prompt"], receipt["given_prompt"]) == ('He said "no', "He said “no ")
    raw = served.post("v1/completions", prompt="He said “no ", seed=4, raw_prompt=True).json()
    assert raw["choices"][0]["receipt"]["prompt"] == "He said “no "
    assert raw["choices"][0]["receipt"]["text"] == raw["choices"][0]["text"]


def test_a_receipt_of_the_server_is_replayed_by_the_terminal(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"prompt": "The tide", "n": 2, "max_tokens": 40, "stop": ["q"], "copy_guard": 3}
    answer = served.post("v1/completions", **fields, blend={"wilde": 0.5, "lovecraft": 0.5}).json()
    file = tmp_path / RECEIPTS
    file.write_text("".join(json.dumps(c["receipt"]) + "\n" for c in answer["choices"]))
    for number, choice in enumerate(answer["choices"], start=1):
        checkpoint = ["--checkpoint", f"{served.workplace.out_dir}/best"]
        assert chat.main(["--replay", f"{file}:{number}", *checkpoint]) == 0
        assert capsys.readouterr().out == f"The tide{choice['text']}\n"


def test_what_such_clients_send_besides_is_ignored_and_said_and_the_rest_refused(
    served: Served,
) -> None:
    # The request of mikupad to a server of its kind "OpenAI", and SillyTavern's text completion.
    mikupad = {
        "model": "run", "prompt": "The tide", "temperature": 0.7, "top_p": 0.95, "max_tokens": 8,
        "frequency_penalty": 0, "presence_penalty": 0, "seed": -1, "stream": False, "logprobs": 10,
        "dynatemp_range": 0, "min_p": 0.05, "xtc_probability": 0, "stop": [],
    }  # fmt: skip
    silly = {
        "prompt": "The tide", "model": "run", "max_new_tokens": 8, "max_tokens": 8, "n": 1,
        "temperature": 1, "top_p": 1, "typical_p": 1, "typical": 1, "sampler_seed": -1, "seed": -1,
        "min_p": 0, "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0,
        "top_k": -1, "skew": 0, "min_tokens": 0, "add_bos_token": True, "smoothing_factor": 0,
        "smoothing_curve": 1, "dry_multiplier": 0, "dry_sequence_breakers": '["\\n"]',
        "truncation_length": 2048, "ban_eos_token": False, "skip_special_tokens": True,
        "include_reasoning": True, "top_a": 0, "tfs": 1, "mirostat_mode": 0, "stop": ["\nYou:"],
        "stopping_strings": ["\nYou:"], "stream": False, "logprobs": None, "grammar_string": "",
        "custom_token_bans": "", "json_schema": None, "speculative_ngram": False, "nsigma": 0,
    }  # fmt: skip
    for fields in (mikupad, silly):
        answer = served.post("v1/completions", **fields)
        assert answer.status_code == 200, answer.text
        assert "min_p has no effect here" in answer.json()["warnings"]
    unknown = served.post("v1/completions", prompt="x", temprature=1)
    assert unknown.status_code == 400
    assert unknown.json()["error"]["param"] == "temprature"
    talk = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "The"}]
    answer = served.post("v1/chat/completions", messages=talk, max_tokens=2).json()
    assert answer["warnings"] == ["a system message that names no voice is not read"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 4, "stream": True}, "best_of"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"seed": 2**40}, "seed"),
        ({"logprobs": 500}, "logprobs"),
        ({"voice": "poe"}, "voice"),
        ({"blend": {"poe": 1}}, "blend"),
        ({"blend": {"wilde": "1"}}, "blend"),
        ({"voice": "wilde", "blend": {"wilde": 1}}, "voice"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"copy_guard": 1}, "copy_guard"),
        ({"model": "../../etc/passwd"}, "model"),
    ],
)
def test_a_mistake_is_named_with_its_field(
    served: Served, fields: dict[str, Any], param: str
) -> None:
    answer = served.post("v1/completions", **{"prompt": "The tide"} | fields)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_an_empty_prompt_and_one_that_is_no_unicode_are_refused(served: Served) -> None:
    for prompt in ("", "  ", "\ud800"):
        body = json.dumps({"prompt": prompt})
        answer = httpx.post(
            f"{served.url}v1/completions",
            content=body,
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 400
        assert "prompt" in answer.json()["error"]["message"]


def test_the_best_of_several_is_one_of_them(served: Served) -> None:
    fields = {"prompt": "There are doors beneath", "seed": 1, "max_tokens": 30}
    several = served.post("v1/completions", **fields, n=6).json()["choices"]
    best = served.post("v1/completions", **fields, best_of=6).json()["choices"]
    assert len(best) == 1
    assert best[0]["text"] in [choice["text"] for choice in several]


def test_the_page_is_told_what_is_copied_and_read_and_whose_the_sentences_are(
    served: Served,
) -> None:
    text = "🜏 Nobody knew. There are doors beneath the harbour that no tide has opened! " * 3
    answer = served.post("gothic/measure", text=text, voices=["wilde", "lovecraft"]).json()
    units = text.encode("utf-16-le")

    def marked(place: dict[str, Any]) -> str:
        return units[2 * place["start"] : 2 * place["end"]].decode("utf-16-le")

    assert {marked(span) for span in answer["copied"]["spans"]} == {
        "There are doors beneath the harbour that no tide has opened"
    }
    assert {span["voice"] for span in answer["copied"]["spans"]} == {"lovecraft"}
    assert [marked(one) for one in answer["sentences"]][:2] == [
        "🜏 Nobody knew.",
        "There are doors beneath the harbour that no tide has opened!",
    ]
    assert {one["voice"] for one in answer["sentences"]} <= {"wilde", "lovecraft"}
    read = units[2 * answer["read_from"] :].decode("utf-16-le")
    assert answer["read_from"] > 0
    assert len(chat_tokenizer(served.workplace).encode(read)) == 31
    blends = [{"wilde": 1}, {"lovecraft": 1}, {}]
    predicted = served.post("gothic/alternatives", prompt="The", blends=blends, n=5).json()
    for each in predicted["alternatives"]:
        probabilities = [one["probability"] for one in each]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(each) == 5
    about = httpx.get(f"{served.url}gothic/model").json()
    assert about["voices"] == ["lovecraft", "wilde"]
    assert about["context"] == 32


def test_a_client_that_leaves_frees_its_slots(served: Served) -> None:
    fields = {
        "prompt": "The tide",
        "max_tokens": 4096,
        "n": 16,
        "stream": True,
        "temperature": 2,
    }
    for _ in range(30):
        with httpx.stream("POST", f"{served.url}v1/completions", json=fields) as answer:
            assert answer.status_code == 200  # with 429 there were texts that nobody waits for
            next(answer.iter_lines())
    # Written to their end, these would be 2 million tokens before the next request's.
    answer = served.post("v1/completions", prompt="The tide", max_tokens=4)
    assert answer.status_code == 200
    for _ in range(1000):
        if (health := httpx.get(f"{served.url}health").json())["free"] == SLOTS:
            break
    assert (health["free"], health["waiting"]) == (SLOTS, 0)


def raw_request(served: Served, fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {httpx.URL(served.url).netloc.decode()}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def connected(served: Served) -> socket.socket:
    url = httpx.URL(served.url)
    return socket.create_connection((url.host, url.port), timeout=60)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_a_client_that_has_ended_its_sending_side_gets_its_answer(served: Served) -> None:
    fields = {"prompt": "The tide", "max_tokens": 600, "seed": 3}
    expected = served.post("v1/completions", **fields).json()["choices"]
    with connected(served) as connection:
        connection.sendall(raw_request(served, fields))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    while answer.startswith(b"HTTP/1.1 100 "):  # by which the server looks whether it is there
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body)["choices"] == expected


def test_a_client_that_leaves_before_the_answer_begins_frees_its_slots(served: Served) -> None:
    # Written to their end, these would be 2 million tokens before the next request's.
    fields = {"prompt": "The tide", "max_tokens": 4096, "n": 16, "temperature": 2}
    for _ in range(30):
        with connected(served) as connection:
            connection.sendall(raw_request(served, fields))
        for _ in range(1000):
            if (health := httpx.get(f"{served.url}health").json())["free"] == SLOTS:
                break
        assert (health["free"], health["waiting"]) == (SLOTS, 0)


async def asked(app: Any, path: str, fields: dict[str, Any], gone: asyncio.Event) -> list[Any]:
    """What the application sends to a client that leaves when `gone` is set."""
    body, sent = json.dumps(fields).encode(), []
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("path", ["/gothic/measure", "/v1/completions"])
def test_measuring_ends_when_its_client_leaves_and_the_next_one_is_measured(
    trained_once: Workplace, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    checkpoint = locate(str(trained_once.out_dir))
    writer = Writer.load(checkpoint, select_device("cpu"))
    service = Service("run", checkpoint, writer, 2, None, None, keeps_receipts=False)
    app = build(service, Allowed(frozenset({"localhost"}), frozenset(), None))
    fields: dict[str, Any] = {"text": "The tide. " * 9_000}
    if path == "/v1/completions":
        fields = {"prompt": "The tide. " * 200, "max_tokens": 0, "echo": True, "logprobs": 0}
    name = "_losses" if path == "/gothic/measure" else "_distributions"
    read_window, windows, may_go_on = getattr(writer, name), [], threading.Event()

    async def main() -> None:
        loop, gone = asyncio.get_running_loop(), asyncio.Event()

        def read_slowly(*arguments: Any) -> Any:
            windows.append(1)
            loop.call_soon_threadsafe(gone.set)
            may_go_on.wait()
            return read_window(*arguments)

        monkeypatch.setattr(writer, name, read_slowly)
        leaving = asyncio.ensure_future(asked(app, path, fields, gone))
        await gone.wait()
        for _ in range(100):  # until the server has heard of it, which takes a few turns
            await asyncio.sleep(0)
        may_go_on.set()
        await leaving
        assert len(windows) == 1
        first, *_ = await asked(app, "/gothic/measure", {"text": "The tide."}, asyncio.Event())
        assert first["status"] == 200

    asyncio.run(asyncio.wait_for(main(), 120))


def test_the_parts_of_the_page_are_sent_and_nothing_else(served: Served) -> None:
    for path, kind in (("", "text/html"), ("page.css", "text/css"), ("page.js", "text/javascript")):
        answer = httpx.get(f"{served.url}{path}")
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path in ("page.py", "../app.py", "%2e%2e/app.py", "v1", "docs"):
        answer = httpx.get(f"{served.url}{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "there is nothing at this address"
    refused = httpx.get(f"{served.url}v1/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


@pytest.mark.long
def test_it_ends_by_sigterm_in_mid_stream_and_keeps_receipts_if_asked(trained: Workplace) -> None:
    with serving(trained, "--keep-receipts") as one:
        file = trained.out_dir / RECEIPTS
        before = file.read_text().splitlines() if file.exists() else []
        assert one.post("v1/completions", prompt="The tide", n=2, max_tokens=4).status_code == 200
        assert len(file.read_text().splitlines()) == len(before) + 2
        fields = {"prompt": "The tide", "max_tokens": 4096, "stream": True, "temperature": 2}
        with httpx.stream("POST", f"{one.url}v1/completions", json=fields) as answer:
            next(answer.iter_lines())
            one.process.send_signal(signal.SIGTERM)
            assert one.process.wait(30) == 143
        assert "Traceback" not in one.process.stderr.read()


@pytest.mark.long
def test_a_guarded_server_copies_no_span(trained: Workplace, tmp_path: Path) -> None:
    # Elsewhere, since other tests look for an index beside the text and must find none.
    train_file = str(shutil.copy(trained.root / "mixed_train.txt", tmp_path))
    assert index.main(["--file", train_file]) == 0
    with serving(trained, "--copy-guard", "3", "--train-file", train_file) as one:
        prompt = "There are doors beneath the harbour that no"
        for seed in range(10):
            fields = {"prompt": prompt, "seed": seed, "temperature": 0.2, "max_tokens": 60}
            text = one.post("v1/completions", **fields).json()["choices"][0]["text"]
            measured = one.post("gothic/measure", text=f"no{text}").json()
            assert measured["copied"]["longest"]["words"] < 3
        one.process.send_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--slots", "0"], "--slots must be from 1"),
        (["--copy-guard", "1"], "--copy-guard must be from 3"),
        (["--host", "0.0.0.0"], "--api-key-file, or --no-key"),
        (["--port", "70000"], "--port must be from 0"),
        (["--api-key-file", "nowhere"], "cannot be read"),
        (["--checkpoint", "nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(
    flags: list[str], cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert cure in error
    assert len(error.splitlines()) == 1


def test_a_port_in_use_and_a_short_key_are_told(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = served.url.rstrip("/").rpartition(":")[2]
    assert main(["--port", port]) == 2
    assert "another --port" in capsys.readouterr().err
    (tmp_path / "key").write_text("short\n")
    assert main(["--api-key-file", str(tmp_path / "key")]) == 2
    assert "openssl rand" in capsys.readouterr().err
