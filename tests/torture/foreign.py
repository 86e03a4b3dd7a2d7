"""S1, S3: folders of other programs, whose files are changed."""

import contextlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from gothic_jax.checkpoints.checkpoint import locate
from gothic_jax.commands import chat, export
from gothic_jax.errors import UserError
from tests.common import Workplace
from tests.torture.inputs import HOSTILE, PROBE, comes_back, mutated
from tests.torture.world import Figure, fresh_copy

NUMBERS = {"tokenizer.json": "S1", "config.json": "S3", "model.safetensors": "S3"}
"""The files that are read, and the rows they are counted in."""
ROOM = 64 << 20
"""Bytes that opening a folder of 120 KB may ask for, and may use."""
SECONDS = 20
"""Of CPU time: on a busy machine, the clock says nothing. What waits for ever hits a timeout."""
EVERY = 20
"""Of the folders that open, `gothic-chat` writes with one in so many; it gets all others."""
_DTYPES = ["F64", "F32", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "F4", "?"]
_SHAPES = [[], [0], [1], [-1], [2**62, 4], [2**32, 2**32], [10**30], [1.5], "32", [[32]]]
_OFFSETS = [[0, 0], [0, 2**62], [2**62, 2**63], [-1, 4], [4, 0], [0], [0, 1, 2], ["0", "4"]]


def folders(workplace: Workplace, name: str, count: int) -> Figure:
    """`name`, in folders for transformers, changed so many times: opened soundly, or refused.

    What opens has finite weights of the shape that its configuration states, and a tokenizer
    without loss. Whether it opens or not, nothing is written, and little memory is taken.
    """
    for architecture in ("gemma", "gpt2"):
        run = workplace.root / f"foreign-{architecture}"
        if run.exists():
            continue
        settings = {"max_iters": 2, "eval_interval": 2, "model.architecture": architecture}
        flags = ["--checkpoint", str(run), "--output", f"{run}-hf", "--to", "hf", "--no-verify"]
        with contextlib.redirect_stdout(io.StringIO()):
            if workplace.train(out_dir=run, **settings) or export.main(flags):
                raise RuntimeError("there is no folder to change")
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()
    most = first = 0
    while first < count:
        call = f"_try_folders({str(workplace.root)!r}, {name!r}, {first}, {count})"
        code = f"from tests.torture.foreign import _try_folders; {call}"
        try:
            result = subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                timeout=120 + count,
            )
            out, ended = result.stdout, result.returncode == 0
            reason = f"code {result.returncode}: {result.stderr[-300:]}"
        except subprocess.TimeoutExpired as error:
            out, reason, ended = (error.stdout or b"").decode(), "it hangs", False
        lines = out.splitlines()
        wrong += [line for line in lines if line.startswith("wrong")]
        outcomes.update(line for line in lines if line in ("opened", "refused"))
        most = max(most, *(int(line.split()[1]) for line in lines if line.startswith("took")), 0)
        if ended:
            break
        begun = [line for line in lines if line.startswith("trial")]
        first = int(begun[-1].split()[1]) + 1 if begun else count
        wrong.append(f"{begun[-1:] or name}: {reason}")
    return Figure(
        NUMBERS[name],
        f"{name} of a Hugging Face folder, mutated: neither opened soundly nor refused in a line",
        count,
        wrong,
        f"{outcomes['opened']} open, {outcomes['refused']} are refused; at most"
        f" {most / 2**20:.0f} MB of memory",
    )


def _try_folders(root: str, name: str, first: int, last: int) -> None:
    """In a process of its own: says the number of each trial before it begins."""
    written: list[str] = []
    watched = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not watched:
            return
        changes = event.startswith(("os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink"))
        # The third argument of "open" is its flags.
        if changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            written.append(f"{event} {arguments[0]}")

    sys.addaudithook(audit)
    # A first time, with whatever Python and JAX load only when they are needed.
    for architecture in ("gemma", "gpt2"):
        locate(f"{root}/foreign-{architecture}-hf").named_params()
    for number in range(first, last):
        print(f"trial {number}", flush=True)
        rng = random.Random(number)
        source = Path(root) / f"foreign-{rng.choice(['gemma', 'gpt2'])}-hf"
        folder = fresh_copy(source, Path(root) / "mutated" / "hf")
        content = (folder / name).read_bytes()
        changed = _weights(content, rng) if name.endswith("safetensors") else mutated(content, rng)
        (folder / name).write_bytes(changed)
        before = _names(Path(root))
        started, told = time.process_time(), ""
        used = _reset_peak()
        limit = _status("VmData") + ROOM
        watched = True
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
        try:
            _open(folder)
        except UserError as error:
            told = str(error)
        except Exception as error:  # a traceback, or memory beyond the limit
            told = "wrong"
            print(f"wrong {number}: {type(error).__name__}: {error!s:.300}", flush=True)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
            watched = False
        took = _status("VmHWM") - used
        print(f"took {took}", flush=True)
        if took > ROOM:
            print(f"wrong {number}: {took:,} bytes of memory", flush=True)
        if told != "wrong":
            print("refused" if told else "opened", flush=True)
            if told or number % EVERY == 0:
                _chat(number, folder, refused=bool(told))
        if written or _names(Path(root)) != before:
            print(f"wrong {number}: written: {written[:3]}", flush=True)
            written.clear()
        if time.process_time() - started > SECONDS:
            print(f"wrong {number}: it takes {time.process_time() - started:.0f} s", flush=True)


def _open(folder: Path) -> None:
    """Reads all of it; raises UserError where it is refused, AssertionError where it is wrong."""
    opened = locate(str(folder))
    params = opened.named_params()
    tokenizer = opened.tokenizer
    assert all(np.isfinite(array).all() for array in params.values()), "weights are not finite"
    rows = params["token_embedding"].shape[0]
    assert rows == tokenizer.vocab_size, "tokens without a row"
    assert comes_back(PROBE, tokenizer), "text comes back as another"


def _chat(number: int, folder: Path, *, refused: bool) -> None:
    """What `gothic-chat` says of it: a text, or one line and code 2."""
    out, err = io.StringIO(), io.StringIO()
    command = ["--checkpoint", str(folder), "--max-tokens", "4", "--seed", "1"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = chat.main(command)
    except Exception as error:
        print(f"wrong {number}: gothic-chat: {type(error).__name__}: {error!s:.300}", flush=True)
        return
    line = err.getvalue()
    sound = line.count("\n") == 1 and len(line) < 600 if refused else out.getvalue().strip()
    if code != (2 if refused else 0) or not sound:
        print(f"wrong {number}: gothic-chat: code {code}: {line!r:.700}", flush=True)


def _weights(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a safetensors file, changed in its length, header, numbers or end."""
    size = int.from_bytes(content[:8], "little")
    header, numbers = content[8 : 8 + size], bytearray(content[8 + size :])
    match rng.randrange(6):
        case 0:  # of the header's length
            return rng.randbytes(rng.randint(1, 8)).ljust(8, b"\0") + content[8:]
        case 1:  # anywhere
            return mutated(content, rng)
        case 2:
            header = mutated(header, rng)
        case 3:  # fields that the format knows
            value = json.loads(header)
            for _ in range(rng.randint(1, 3)):
                tensor = value[rng.choice([*value])]
                field, values = rng.choice(
                    [("dtype", _DTYPES), ("shape", _SHAPES), ("data_offsets", _OFFSETS)]
                )
                tensor[field] = rng.choice(values if rng.random() < 0.8 else HOSTILE)
            header = json.dumps(value).encode()
        case 4:  # numbers: NaN, infinite, huge, or of random bits
            for _ in range(rng.randint(1, 3)):
                at = 4 * rng.randrange(len(numbers) // 4)
                bits = rng.choice([0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, None])
                numbers[at : at + 4] = (
                    rng.randbytes(4) if bits is None else bits.to_bytes(4, "little")
                )
        case _:
            del numbers[rng.randrange(len(numbers)) :]
    return len(header).to_bytes(8, "little") + header + bytes(numbers)


def _names(root: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in root.rglob("*")}


def _status(name: str) -> int:
    """Bytes, as Linux has them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _reset_peak() -> int:
    """Begins a new peak of this process's memory, and returns what it begins at."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")
