"""gothic-serve beside llama.cpp's server, on the model of the repository, by requests over HTTP.

Both get the same requests at the same moment, 1, 8 or 32 of them, as OpenAI's clients send them;
the servers take turns. llama.cpp serves the model as 16-bit GGUF with as many slots. Beside that
stands what the sampler writes as one batch, without a server.
"""

import asyncio
import contextlib
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

REQUESTS = (1, 8, 32)
TOKENS = 200
PROMPT = "The old house on the hill"
OURS, LLAMA, SAMPLER = "gothic-serve", "llama.cpp's server", "sampler, one batch"

Figure = tuple[str, str, float, str]
"""Who, what, how much, in which unit."""


def measure(device: str, rounds: int) -> Iterator[tuple[int, list[Figure]]]:
    """For each number of requests: tokens a second, and the wait of one more; medians."""
    environment = os.environ | {"JAX_PLATFORMS": device}
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        has_llama = _export(gguf)
        for requests in REQUESTS:
            yield requests, _compare(requests, rounds, environment, gguf if has_llama else None)


def _compare(
    requests: int, rounds: int, environment: Mapping[str, str], gguf: Path | None
) -> list[Figure]:
    slots = max(requests, 8)
    ours = ["-m", "gothic_jax.commands.serve", "--port", "0", "--slots", str(slots)]
    theirs = ["-m", "benchmarks.serving", str(gguf), str(requests)]
    speeds: dict[str, list[float]] = {}
    waits: list[float] = []
    with contextlib.ExitStack() as stack:
        servers = {OURS: stack.enter_context(_server(ours, environment))}
        if gguf is not None:
            servers[LLAMA] = stack.enter_context(_server(theirs, environment))
        batch = _batch(requests)
        for turn in range(rounds + 1):
            figures = {
                name: asyncio.run(_ask(address, requests, seed=turn))
                for name, address in servers.items()
            } | {SAMPLER: batch(turn)}
            wait = asyncio.run(_wait(servers[OURS], requests)) if requests > 1 else 0.0
            if turn:  # the first one compiles
                waits.append(wait)
                for name, speed in figures.items():
                    speeds.setdefault(name, []).append(speed)
    result = [(name, "speed", statistics.median(all_), "tokens/s") for name, all_ in speeds.items()]
    if requests > 1:
        result.append((OURS, "first text of one more", 1000 * statistics.median(waits), "ms"))
    return result


def _body(seed: int, tokens: int = TOKENS) -> dict[str, Any]:
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 1.0, "min_p": 0.0, "seed": seed}
    return {"prompt": PROMPT, "max_tokens": tokens, "cache_prompt": False} | sampling


async def _ask(address: str, requests: int, *, seed: int) -> float:
    """Tokens a second over all of some requests that are sent at once."""
    async with httpx.AsyncClient(timeout=600) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(
                client.post(f"{address}/v1/completions", json=_body(1000 * seed + number))
                for number in range(requests)
            )
        )
        seconds = time.perf_counter() - start
    return sum(answer.json()["usage"]["completion_tokens"] for answer in answers) / seconds


async def _wait(address: str, requests: int) -> float:
    """Seconds to the first text of a request that comes while all slots but one are taken."""
    async with httpx.AsyncClient(timeout=600) as client:
        busy = [
            asyncio.ensure_future(client.post(f"{address}/v1/completions", json=_body(number)))
            for number in range(requests - 1)
        ]
        await asyncio.sleep(0.5)
        start = time.perf_counter()
        stream = client.stream(
            "POST", f"{address}/v1/completions", json=_body(7, 32) | {"stream": True}
        )
        async with stream as answer:
            # The first event has the receipt, and no text yet.
            events = (line async for line in answer.aiter_lines() if line.startswith("data: "))
            await anext(events)
            await anext(events)
            seconds = time.perf_counter() - start
        await asyncio.gather(*busy)
    return seconds


def _batch(requests: int) -> Any:
    """A function of a seed: tokens a second of the sampler's own batch."""
    from gothic_jax.checkpoints.checkpoint import locate
    from gothic_jax.checkpoints.release import GOTHIC_DANDY
    from gothic_jax.machine.device import select_device
    from gothic_jax.writing.settings import Sampling, Settings
    from gothic_jax.writing.writer import Writer

    writer = Writer.load(locate(str(GOTHIC_DANDY)), select_device("auto"))
    settings = Settings(Sampling(top_p=1.0), TOKENS, {}, 0)
    prompt = writer.encode(PROMPT)

    def run(seed: int) -> float:
        start = time.perf_counter()
        samples = writer.write(prompt, settings, requests, seed)
        seconds = time.perf_counter() - start
        return sum(len(writer.tokenizer.encode(sample.text)) for sample in samples) / seconds

    return run


@contextlib.contextmanager
def _server(arguments: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    """A server's process; gives the address that it prints."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        try:
            yield next(word for word in words if word.startswith("http")).rstrip("/")
        finally:
            process.kill()


def _export(path: Path) -> bool:
    """Writes the model for llama.cpp; False where that is not installed."""
    from gothic_jax.checkpoints.checkpoint import locate
    from gothic_jax.checkpoints.release import GOTHIC_DANDY
    from gothic_jax.errors import UserError
    from gothic_jax.model.layouts import to_gguf
    from gothic_jax.shipping import llama

    checkpoint = locate(str(GOTHIC_DANDY))
    try:
        llama.load_package("xllamacpp")
        config = checkpoint.meta.model_config
        tensors = to_gguf(checkpoint.named_params(), config)
        llama.write(path, tensors, config, checkpoint.tokenizer, "model", "f16")
    except UserError as error:
        print(f"llama.cpp's server is left out: {error}", file=sys.stderr)
        return False
    return True


def _serve_llama(path: str, slots: int) -> None:
    """Serves a GGUF file until the process is killed."""
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.verbosity = 0
    params.n_parallel = slots
    params.n_ctx = slots * 256
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    time.sleep(1e9)


if __name__ == "__main__":
    _serve_llama(sys.argv[1], int(sys.argv[2]))
