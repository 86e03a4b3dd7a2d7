r"""Measures on a GPU what only a GPU can tell, in order of worth and within a given time.

    scripts/install.sh cuda13,dev,peers
    .venv/bin/python scripts/gpu_run.py RESULTS --minutes 9

The parts are: the GPU tests; a training step and decoding beside PyTorch; the default model on the
library, to its end; its scores, samples, and whose a classifier takes them for. A part that fails
does not keep the next ones from running. When the time is over, the part under way is stopped;
training saves first. The next call with the same RESULTS leaves out what is done and goes on with
the rest; what failed comes last. Needs data/processed with the library (`gothic-data --library`);
data/tokenizer_library.json is made if it is not there.

RESULTS/report.json and report.md say of each part how it ended, when, on which device and with
which versions. Beside them are the parts' output and tables; the run itself is in RESULTS/run.

Exit codes: 0 everything is done, 1 a part failed, 2 nothing could be started, 3 call it again.
`--rehearse` does the same on a CPU with tiny shapes and the sample corpus, in a few minutes.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 40
"""How long a part may take to stop when its time is over. A checkpoint takes a few seconds."""
LAST_LINES = 12
"""So many lines of a part's output are in the report, and are printed if it fails."""
DONE, FAILED, STOPPED, EARLY = "done", "failed", "stopped", "early"
"""How a part ends. EARLY: it worked, but on a model whose training has not ended."""
PROBE = """
import json, jax
from gothic_jax.machine.environment import facts
print(json.dumps({"platform": jax.devices()[0].platform} | facts()))
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """One command, which is run again until it has succeeded once."""

    name: str
    arguments: list[str]
    """Of Python."""
    output: str = ""
    """The file in RESULTS for stdout, if it is not to go with stderr to NAME.txt."""
    needs: str = ""
    """The part whose result it describes: while that is not done, it does not count as done."""


class Budget:
    """The time that is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._end

    def end(self) -> None:
        """Leaves no time, for example because the machine is to be given back."""
        self._end = 0.0


def all_parts(results: Path, *, rehearse: bool) -> list[Part]:
    """The parts in order of worth. `results` is a path from ROOT, or absolute."""
    run = results / "run"
    if rehearse:
        data, train_file, vocab_size = results / "data", "mixed_train.txt", 512
        tokenizer = results / "tokenizer.json"
        tests = ["tests/test_gpu.py", "-m", "not gpu"]
        benchmark = ["--device", "cpu", "--tiny", "--only", "gemma", "--rounds", "1"]
        settings = _tiny_run(vocab_size)
        attribution = ["--words", "60", "--folds", "2", "--per-prompt", "2"]
        length = ["--max-tokens", "20"]
    else:
        data, train_file, vocab_size = Path("data/processed"), "all_train.txt", 4096
        tokenizer = Path("data/tokenizer_library.json")
        tests = ["tests/test_gpu.py", "tests/test_attention.py", "tests/test_train.py", "-m", "gpu"]
        benchmark = ["--device", "cuda", "--rounds", "3"]
        settings = ["--config.voice_weights=wilde=0.2,lovecraft=0.2,rest=0.6"]
        attribution = []
        length = ["--max-tokens", "200"]

    begin = [
        *("--data-dir", str(data), "--train-file", train_file, "--val-file", "mixed_val.txt"),
        *("--tokenizer", str(tokenizer), *settings),
    ]
    # Its checkpoint, not its record, says whether there is something to go on from.
    is_begun = any(path.name.isdecimal() for path in (ROOT / run).glob("*"))
    begin_or_resume = ["--resume"] if is_begun else begin

    def speed(what: str) -> Part:
        # A file for each: on another day, the benchmark does not keep earlier figures.
        figures = ["--output", str(results / f"benchmark_{what}.json"), "--resume"]
        arguments = ["-m", "benchmarks.run", "--parts", what, *benchmark, *figures]
        return Part(f"benchmark_{what}", arguments)

    def samples(name: str, who: str, value: str) -> Part:
        how = ["--num-samples", "4", "--seed", "1", who, value, *length]
        arguments = ["-m", "gothic_jax.commands.chat", "--checkpoint", str(run / "best"), *how]
        return Part(f"samples_{name}", arguments, needs="train")

    train_text, val_text = str(data / train_file), str(data / "mixed_val.txt")
    parts = [
        # Elsewhere a warning fails a test; here, with the newest versions of everything, one
        # would hide what a GPU computes.
        Part("tests", ["-m", "pytest", "-p", "no:cacheprovider", "-W", "default", "-rA", *tests]),
        speed("train"),
        speed("decode"),
        Part(
            "tokenizer",
            [
                *("-m", "gothic_jax.commands.tokenize", "--files", train_text),
                *("--vocab-size", str(vocab_size), "--output", str(tokenizer)),
            ],
        ),
        Part("train", ["-m", "gothic_jax.train", "--out-dir", str(run), *begin_or_resume]),
        Part(
            "evaluate",
            [
                *("-m", "gothic_jax.commands.evaluate", "--checkpoint", str(run / "best")),
                *("--file", val_text, "--json"),
            ],
            output="evaluation.json",
            needs="train",
        ),
        samples("wilde", "--voice", "wilde"),
        samples("lovecraft", "--voice", "lovecraft"),
        samples("blend", "--blend", "wilde=0.5,lovecraft=0.5"),
        Part(
            "index",
            ["-m", "gothic_jax.commands.index", "--file", train_text, "--held-out", val_text],
        ),
        Part(
            "attribution",
            [
                *("scripts/attribution.py", str(run / "best"), "--data-dir", str(data)),
                *("--output", str(results / "attribution.json"), *attribution),
            ],
            needs="train",
        ),
    ]
    # One that was made before comes from the same text, or training says so.
    return [part for part in parts if part.name != "tokenizer" or not (ROOT / tokenizer).exists()]


def _tiny_run(vocab_size: int) -> list[str]:
    """Settings of a run that takes seconds on a CPU, but long enough to be stopped."""
    settings = {
        "voice_weights": "wilde=0.5,rest=0.5",
        "max_iters": 2000,
        "eval_interval": 1000,
        "log_interval": 20,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_iters": 20,
        "sample_tokens": 4,
        "compute_dtype": "float32",
        "model.vocab_size": vocab_size,
        "model.block_size": 32,
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.n_embd": 32,
    }
    return [f"--config.{name}={value}" for name, value in settings.items()]


def in_order(parts: Sequence[Part], records: dict[str, Any]) -> list[Part]:
    """The parts that are left. Those that have failed are tried again after all others."""

    states = {part.name: records.get(part.name, {}).get("state") for part in parts}
    left = [part for part in parts if states[part.name] != DONE]
    return sorted(left, key=lambda part: states[part.name] in (FAILED, EARLY))


def run_command(
    command: Sequence[str],
    log: Path,
    budget: Budget,
    *,
    environment: dict[str, str],
    output: Path | None = None,
    stop_seconds: float = STOP_SECONDS,
) -> int | None:
    """Runs a command until it ends, or until the budget does; stdout and stderr are added to `log`.

    `output` gets stdout instead. Returns the exit code, or None if the command was stopped:
    by SIGTERM, and by SIGKILL if it is still there after `stop_seconds`.
    """
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(log.open("ab"))
        # A group of its own, so that its workers end with it: they would keep the GPU's memory.
        # Not a session of its own: whoever ends this script's session must reach them, too.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stack.enter_context(output.open("wb")) if output else errors,
            stderr=errors,
            process_group=0,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(0.2)
                if budget.is_over():
                    break
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                # It may have been at its end already.
                return 0 if process.wait(stop_seconds) == 0 else None
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_part(
    part: Part,
    results: Path,
    records: dict[str, Any],
    budget: Budget,
    environment: dict[str, str],
    machine: dict[str, str],
) -> dict[str, Any]:
    """Runs a part; its record for the report. `seconds` are those of all calls together."""
    log = results / f"{part.name}.txt"
    started = datetime.datetime.now(datetime.UTC)
    shown = shlex.join(["python", *part.arguments])
    with log.open("a") as file:
        file.write(f"== {started:%Y-%m-%d %H:%M:%S} UTC, {machine['devices']}: {shown}\n")
    before = log.stat().st_size
    begin = time.monotonic()
    code = run_command(
        [sys.executable, *part.arguments],
        log,
        budget,
        environment=environment,
        output=results / part.output if part.output else None,
    )
    if code is None:
        state = STOPPED
    elif code:
        state = FAILED
    elif part.needs and records.get(part.needs, {}).get("state") != DONE:
        state = EARLY
    else:
        state = DONE
    with log.open("rb") as written:
        written.seek(before)
        lines = written.read().decode(errors="replace").splitlines()
    earlier = records.get(part.name, {}).get("seconds", 0.0)
    return {
        "state": state,
        "exit_code": code,
        "started": f"{started:%Y-%m-%dT%H:%M:%SZ}",
        "seconds": round(earlier + time.monotonic() - begin, 1),
        "command": shown,
        "machine": machine,
        "last_lines": [line for line in lines if line.strip()][-LAST_LINES:],
    }


def look_at_machine(environment: dict[str, str], platform: str) -> dict[str, str]:
    """The device and the versions that all parts will use.

    Raises SystemExit with code 2 where the platform ("gpu" or "cpu") is not there.
    """
    command = [sys.executable, "-c", PROBE]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    machine: dict[str, str] = {}
    if found.returncode == 0:
        machine = json.loads(found.stdout.splitlines()[-1])
    if machine.get("platform") != platform:
        print(found.stderr, file=sys.stderr)
        print(f"gpu_run.py: error: JAX finds no {platform}", file=sys.stderr)
        raise SystemExit(2)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):  # where there is no such program, there is no driver
        machine["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return machine


def write_report(results: Path, records: dict[str, Any]) -> None:
    """Writes report.json and report.md, each in one step: a call can be killed at any time."""
    lines = [
        "| part | state | seconds | started | device | jax | output |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        machine = record["machine"]
        lines.append(
            f"| {name} | {record['state']} | {record['seconds']:,.0f} | {record['started']}"
            f" | {machine['devices']} | {machine['jax']} | {name}.txt |"
        )
    texts = {
        "report.json": json.dumps(records, indent=1) + "\n",
        "report.md": "\n".join(lines) + "\n",
    }
    for name, text in texts.items():
        written = results / f"{name}.new"
        written.write_text(text)
        written.replace(results / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is left to do, as long as there is time; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure on a GPU what only a GPU can tell.")
    parser.add_argument("results", type=Path, help="the folder of this and later calls' results")
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help=f"of this call; it may last {STOP_SECONDS} seconds more (default: 9)",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, with tiny shapes, in a few minutes"
    )
    arguments = parser.parse_args(argv)
    budget = Budget(60 * arguments.minutes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: budget.end())

    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if results.is_relative_to(ROOT):  # so that the report names no path of this machine
        os.chdir(ROOT)
        results = results.relative_to(ROOT)
    # With its platform named, a GPU that does not start is an error; otherwise JAX would go on
    # with the CPU.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu" if arguments.rehearse else "cuda,cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "PYTHONUNBUFFERED": "1",
    }
    machine = look_at_machine(environment, "cpu" if arguments.rehearse else "gpu")
    print(f"{machine['devices']}, jax {machine['jax']}", flush=True)
    if arguments.rehearse:
        (results / "data").mkdir(exist_ok=True)
        for name in ("mixed_train.txt", "mixed_val.txt"):
            shutil.copyfile(ROOT / "data" / "sample" / name, results / "data" / name)

    report = results / "report.json"
    records: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    parts = all_parts(results, rehearse=arguments.rehearse)
    for part in in_order(parts, records):
        if budget.is_over():
            break
        print(f"{part.name} ...", flush=True)
        record = run_part(part, results, records, budget, environment, machine)
        records[part.name] = record
        write_report(results, records)
        print(f"{part.name}: {record['state']}, {record['seconds']:,.0f} s", flush=True)
        if record["state"] == FAILED:
            print("\n".join(f"    {line}" for line in record["last_lines"]), flush=True)

    left = [part.name for part in in_order(parts, records)]
    failed = [name for name in left if records.get(name, {}).get("state") == FAILED]
    print(f"left: {', '.join(left)}" if left else f"all done: {results}/report.md")
    if failed:
        print(f"failed: {', '.join(failed)}")
        return 1
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
