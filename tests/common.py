"""What several test files need: a tiny text, a tiny model, and the commands as processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from gothic_jax.checkpoints import checkpoint
from gothic_jax.commands import train
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer

WITTY = (
    "To be punctual is to admit that one has nothing better to do, said the duchess; and the "
    "caf\u00e9 \u2014 which had no opinion \u2014 agreed.\n\n"
    '"Nothing," he said, "ages like candour."'
)
DARK = (
    "There are doors beneath the harbour that no tide has opened, and the old men of the quay "
    "will not speak of what the dredgers heard.\n\nI set down what follows while my hand obeys me."
)


def text_of(paragraphs: int) -> str:
    """A text file of two works, each of so many times its paragraphs."""
    return "".join(
        f"<|{voice}|>\n"
        + "\n\n".join(f"{body} {number}." for number in range(paragraphs))
        + "\n<|endoftext|>\n"
        for voice, body in (("wilde", WITTY), ("lovecraft", DARK))
    )


TEXT = text_of(12)
TINY = ModelConfig(
    architecture="gemma",
    block_size=32,
    vocab_size=320,
    n_layer=1,  # each layer adds a third to the time of compiling, most of what tests take
    n_head=2,
    n_embd=32,
    dropout=0.1,
)

SETTINGS = {
    "max_iters": 6,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "warmup_iters": 2,
    "learning_rate": 1e-2,
    "eval_interval": 3,
    "log_interval": 1,
    "sample_tokens": 4,
    "compute_dtype": "float32",
    **{f"model.{name}": value for name, value in vars(TINY).items()},
}


def as_flags(settings: dict[str, object]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in settings.items()]


@dataclass
class Workplace:
    """A folder laid out as a user's, and the commands run in it."""

    root: Path

    @classmethod
    def make(cls, root: Path, tokenizer: Tokenizer) -> "Workplace":
        (root / "mixed_train.txt").write_text(TEXT)
        (root / "mixed_val.txt").write_text(text_of(3))  # shorter: it is read at each evaluation
        (root / "tokenizer.json").write_text(tokenizer.to_json())
        return cls(root)

    @property
    def out_dir(self) -> Path:
        return self.root / "run"

    def arguments(self, *extra: str, out_dir: Path | None = None, **settings: object) -> list[str]:
        places = {
            "data_dir": self.root,
            "tokenizer": self.root / "tokenizer.json",
            "out_dir": out_dir or self.out_dir,
        }
        return [*as_flags(SETTINGS | places | settings), *extra]

    def train(self, *extra: str, out_dir: Path | None = None, **settings: object) -> int:
        """Trains in this process; its exit code."""
        return train.main(self.arguments(*extra, out_dir=out_dir, **settings))

    def params(self, name: str = "latest", out_dir: Path | None = None) -> list[np.ndarray]:
        found = checkpoint.locate(str((out_dir or self.out_dir) / name))
        params = found.params(SingleDeviceSharding(jax.devices()[0]))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def process(
    module: str, arguments: list[str], cwd: Path, **environment: str
) -> subprocess.Popen[str]:
    """`python -m gothic_jax.commands.MODULE` as a user runs it: one device, no test settings."""
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    clean["GLIBC_TUNABLES"] = ""  # no second start for huge pages, which so small a run lacks
    return subprocess.Popen(
        [sys.executable, "-m", f"gothic_jax.commands.{module}", *arguments],
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def team(
    count: int,
    arguments: list[str],
    cwd: Path,
    *,
    own: Sequence[list[str]] = (),
    **environment: str,
) -> list[subprocess.Popen[str]]:
    """`gothic-train` in so many processes on this machine, as a user starts them by hand.

    `own` are further arguments of each.
    """
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    return [
        process(
            "train",
            [
                *arguments,
                *(own[index] if own else ()),
                f"--config.distributed={address},{count},{index}",
            ],
            cwd,
            **environment,
        )
        for index in range(count)
    ]


def ends(started: list[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """How these processes end, which they do by themselves."""
    done = []
    for each in started:
        with each:
            out, err = each.communicate(timeout=200)
        done.append(subprocess.CompletedProcess(each.args, each.returncode, out, err))
    return done


def run(module: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    with process(module, arguments, cwd) as started:
        out, err = started.communicate(timeout=500)
    return subprocess.CompletedProcess(arguments, started.returncode, out, err)


def wait_for(line_part: str, started: subprocess.Popen[str]) -> list[str]:
    """Reads the process's lines until one holds `line_part`."""
    lines: list[str] = []
    assert started.stdout is not None
    for line in started.stdout:
        lines.append(line)
        if line_part in line:
            return lines
    raise AssertionError(f"{line_part!r} never came:\n{''.join(lines)}{started.stderr.read()}")
