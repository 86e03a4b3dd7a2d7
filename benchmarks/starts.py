"""How long the commands take from their start to the first thing that a person waits for.

Cold is with an empty cache of compiled programs, warm with what the cold start left there; the
files have been read before.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
COMMANDS = ("data", "tokenize", "train", "chat", "evaluate", "index")
PROMPT = "In the shadow of"
VOCABULARY = 1024

Figure = tuple[str, float, str]
"""What, how much, in which unit."""


def measure(device: str, rounds: int) -> list[Figure]:
    """Seconds of each start; medians of `rounds`, but a cold start is measured once.

    gothic-train starts the default model, gothic-chat writes with that of configs/laptop.py.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = os.environ | {"XDG_CACHE_HOME": str(work / "cache"), "JAX_PLATFORMS": device}
        vocabulary = work / "tokenizer.json"
        texts = ["--data-dir", str(SAMPLE), "--tokenizer", str(vocabulary)]
        model = [f"--config.model.vocab_size={VOCABULARY}", "--config.log_interval=1"]
        train = ["train", *texts, *model, "--overwrite", "--batch-size=1", "--grad-accum=1"]
        _run(
            [
                *("tokenize", "--files", str(SAMPLE / "mixed_train.txt")),
                *("--output", str(vocabulary), "--vocab-size", str(VOCABULARY)),
            ],
            environment,
        )
        _run(
            [
                *("train", *texts, *model, "--config", str(ROOT / "configs" / "laptop.py")),
                *("--max-iters", "1", "--batch-size=1", "--grad-accum=1"),
                *("--out-dir", str(work / "laptop")),
            ],
            environment,
        )
        helps = [_seconds([command, "--help"], environment, b"usage") for command in COMMANDS]
        chat = ["chat", "--checkpoint", str(work / "laptop"), "--prompt", PROMPT]
        chat += ["--max-tokens", "16"]
        waits = {
            "gothic-chat, first word": (chat, PROMPT.encode()),
            "gothic-train, first iteration": ([*train, "--out-dir", str(work / "run")], b"\n1/"),
        }
        figures = [("--help, slowest of the commands", max(helps), "s")]
        for name, (command, awaited) in waits.items():
            fresh = environment | {"XDG_CACHE_HOME": str(work / command[0])}
            figures.append((f"{name}, cold", _seconds(command, fresh, awaited), "s"))
            warm = [_seconds(command, fresh, awaited) for _ in range(rounds)]
            figures.append((f"{name}, warm", statistics.median(warm), "s"))
        return figures


def _arguments(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", f"gothic_jax.commands.{command[0]}", *command[1:]]


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    subprocess.run(
        _arguments(command), cwd=ROOT, env=environment, check=True, stdout=sys.stderr.fileno()
    )


def _seconds(command: Sequence[str], environment: Mapping[str, str], awaited: bytes) -> float:
    """From the start of a command until something follows `awaited` in its output; it is then
    killed."""
    started = time.perf_counter()
    with subprocess.Popen(
        _arguments(command), cwd=ROOT, env=environment, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        output = b""
        while not output.partition(awaited)[2]:
            part = process.stdout.read(4096)
            if not part:
                raise RuntimeError(f"{' '.join(command)} ended before {awaited!r}")
            output += part
        seconds = time.perf_counter() - started
        process.kill()
    return seconds
