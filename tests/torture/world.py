"""What the tortures share: figures with their bounds, the real process, what it left behind."""

import dataclasses
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gothic_jax.checkpoints import checkpoint
from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.config import get_config
from gothic_jax.model.gpt import init_params
from gothic_jax.training.optimizer import init_optimizer, make_optimizer
from tests.common import Workplace, process

LANES = 2
"""Processes at a time."""


@dataclasses.dataclass
class Figure:
    """A measured promise."""

    number: str
    what: str
    trials: int
    failures: list[str]
    notes: str = ""

    def __str__(self) -> str:
        count, n = len(self.failures), self.trials
        return (
            f"| {self.number} | {self.what} | {count} in {n:,} | {bound(count, n):.2g} "
            f"| {self.notes} |"
        )


def bound(failures: int, trials: int) -> float:
    """The one-sided 95% upper bound of the failure rate (Clopper-Pearson), by bisection.

    Without a failure it is 1 - 0.05^(1/n), about 3/n.
    """

    def at_most(rate: float) -> float:
        return sum(
            math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(failures + 1)
        )

    low, high = 0.0, 1.0
    if failures >= trials:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(middle) > 0.05 else (low, middle)
    return high


def in_lanes(work: Callable[[int], list[str]], count: int) -> list[str]:
    """What `work(0)` ... `work(count - 1)` find wrong, several at a time."""

    def guarded(number: int) -> list[str]:
        try:
            return work(number)
        except Exception as error:  # one trial that breaks is a failure, not the end
            return [f"trial {number}: {type(error).__name__}: {error}"]

    with ThreadPoolExecutor(LANES) as lanes:
        return [failure for found in lanes.map(guarded, range(count)) for failure in found]


class Life:
    """One `gothic-train`, from its start to its end by whatever cause.

    It takes compiled programs from JAX's cache and adds none, unless nothing is to disturb it:
    JAX writes them in place, and a kill could leave half of one.
    """

    def __init__(
        self, arguments: list[str], cwd: Path, *, disturbed: bool = True, **environment: str
    ) -> None:
        if disturbed:
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e6"
        self.process = process("train", arguments, cwd, PYTHONUNBUFFERED="1", **environment)
        self.lines: list[str] = []
        self.error = ""
        self._readers = [
            threading.Thread(target=self._read_out, daemon=True),
            threading.Thread(target=self._read_err, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def _read_err(self) -> None:
        assert self.process.stderr is not None
        self.error = self.process.stderr.read()

    def wait_until(self, happened: Callable[[], object], timeout: float = 60) -> bool:
        """Whether it happened before the process ended."""
        until = time.monotonic() + timeout
        while self.process.poll() is None:
            if happened():
                return True
            if time.monotonic() > until:
                raise TimeoutError(f"nothing happened in {timeout} s:\n{''.join(self.lines)}")
            time.sleep(0.001)
        return False

    def said(self, part: str) -> bool:
        """Whether a line so far holds `part`."""
        return any(part in line for line in list(self.lines))

    def end(self, timeout: float = 120) -> int:
        """Waits for the end; the exit code, negative for a signal."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        for reader in self._readers:
            reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    @property
    def out(self) -> str:
        """All that it printed."""
        return "".join(self.lines)

    @property
    def done(self) -> int:
        """Iterations that it said it had done."""
        return max((int(n) for n in re.findall(r"^(\d+)/\d+  ", self.out, re.MULTILINE)), default=0)


def figures(out: str) -> dict[str, str]:
    """Losses and validation figures as printed, by iteration and kind."""
    found = re.findall(r"^(\d+)/\d+  (loss [\d.]+|validation: .*?\))", out, re.MULTILINE)
    return {f"{step} {what.split()[0]}": what for step, what in found}


def whole_state(out_dir: Path, name: str = "latest") -> list[np.ndarray]:
    """What a checkpoint holds of a run: how it went (iteration, scores, best so far, patience,
    skipped iterations, hashes of the data) as JSON, then parameters and optimizer state."""
    found = checkpoint.locate(str(out_dir / name))
    meta = dataclasses.asdict(found.meta)
    course = {name: meta[name] for name in meta.keys() - {"config", "environment"}}
    content = json.dumps(course, sort_keys=True).encode()
    return [np.frombuffer(content, np.uint8), *arrays(found)]


def arrays(found: Checkpoint) -> list[np.ndarray]:
    """Parameters and optimizer state of one checkpoint."""
    here = SingleDeviceSharding(jax.devices()[0])
    config = get_config()
    config.update(found.meta.config)
    like = jax.eval_shape(
        lambda: init_optimizer(make_optimizer(config), init_params(found.meta.model_config, 0))
    )
    return [
        *map(np.asarray, jax.tree.leaves(found.params(here))),
        *map(np.asarray, jax.tree.leaves(found.optimizer(like, here))),
    ]


def same(one: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> bool:
    """Whether two states are equal bit for bit."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


Point = tuple[str, int, float | str]
"""Of TensorBoard: name, step, and a number or a text."""


def points(logs: Path) -> Iterator[Point]:
    """All that TensorBoard shows.

    A session's start at a step voids what earlier files hold from that step on.
    """
    kept: list[Point] = []
    for file in sorted(logs.glob("events.out.tfevents.*")):
        for event in _events(file):
            if event.session_log.status == SessionLog.START:
                kept = [point for point in kept if point[1] < event.step]
            kept += [
                (
                    value.tag,
                    event.step,
                    value.simple_value
                    if value.HasField("simple_value")
                    else value.tensor.string_val[0].decode(),
                )
                for value in event.summary.value
            ]
    yield from kept


def _events(file: Path) -> Iterator[Event]:
    content = file.read_bytes()
    position = 0
    while position + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        record = content[position + 12 : position + 12 + length]
        if len(record) < length:
            return  # cut off by a kill
        yield Event.FromString(record)
        position += 16 + length


def curves(out_dir: Path) -> list[Point]:
    """All points of a run but those of time and memory, its samples among them, in order."""
    return sorted(
        point
        for point in points(out_dir / "logs")
        if not point[0].startswith(("speed/", "device/"))
    )


def steps_of(out_dir: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    return {
        str(path.relative_to(out_dir)): path.read_bytes()
        for step in checkpoint.iterations(out_dir)
        for path in (out_dir / str(step)).rglob("*")
        if path.is_file()
    }


def finished_run(workplace: Workplace, name: str, **settings: object) -> tuple[Path, str]:
    """A run that nothing disturbed: its folder, and what it printed."""
    out_dir = workplace.root / name
    arguments = workplace.arguments(out_dir=out_dir, **settings)
    life = Life(arguments, workplace.root, disturbed=False)
    if life.end():
        raise RuntimeError(f"the undisturbed run failed:\n{life.out}{life.error}")
    return out_dir, life.out


def run_with_all_checkpoints(workplace: Workplace, name: str, **settings: object) -> Path:
    """A finished run of which every checkpoint is still there."""
    out_dir = workplace.root / name
    program = (
        "import sys\nfrom gothic_jax.checkpoints import saver\n"
        "from gothic_jax.commands import train\n"
        "saver.KEPT = 100\nsys.exit(train.main(sys.argv[1:]))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    subprocess.run(
        [sys.executable, "-c", program, *workplace.arguments(out_dir=out_dir, **settings)],
        cwd=workplace.root, env=environment, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return out_dir


def limited(limit: str, value: int, command: list[str]) -> list[str]:
    """The command under a limit of `resource`, set without forking a process of many threads."""
    program = (
        "import os, resource, sys\nvalue = int(sys.argv[2])\n"
        "resource.setrlimit(getattr(resource, sys.argv[1]), (value, value))\n"
        "os.execv(sys.argv[3], sys.argv[3:])"
    )
    return [sys.executable, "-c", program, limit, str(value), *command]


def fresh_copy(source: Path, target: Path) -> Path:
    """A copy of a run's folder, in place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def faults_library(folder: Path) -> Path | None:
    """faults.c, compiled into `folder`; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library
