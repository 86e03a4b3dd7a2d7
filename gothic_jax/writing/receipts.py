"""Receipts of what was written: all that is needed to write the same text again.

A run has them in `samples.jsonl` beside its checkpoints, one JSON object a line.
"""

import dataclasses
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.errors import UserError
from gothic_jax.machine import environment
from gothic_jax.machine.device import default_device
from gothic_jax.machine.files import UNSOUND, parse_json
from gothic_jax.model.shape import INTEGER_LIMIT
from gothic_jax.text.voices import MAX_WEIGHT
from gothic_jax.writing.settings import MAX_GUARDED, MAX_SAMPLES, RECEIPTS, Sampling


@dataclasses.dataclass(frozen=True)
class Receipt:
    """One sample."""

    text: str
    """What the model wrote, without the prompt."""
    prompt: str
    blend: dict[str, float]
    sampling: Sampling
    max_tokens: int
    seed: int
    sample: int
    """Which of those that were written together, from 1 on."""
    samples: int
    iteration: int
    """Of the checkpoint."""
    circumstances: dict[str, str]
    """As `circumstances` gave them."""
    given_prompt: str | None = None
    """What the person gave, where `prompt` has another typography or fewer blanks at its end."""
    slots: int | None = None
    """Of the engine that wrote it; None where the sampler wrote all samples as one batch. The
    last bits of a text in bfloat16 depend on that."""
    copy_guard: int | None = None
    """Words of the shortest span that it was kept from copying."""
    stop: tuple[str, ...] = ()
    """The strings to stop at."""
    dtype: str = "bfloat16"
    """The type that it was computed in."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dataclasses.asdict(self) | {"sampling": self.sampling._asdict()}


def circumstances(checkpoint: Checkpoint) -> dict[str, str]:
    """All that a sample depends on besides its settings: checkpoint, device, environment."""
    device = default_device()
    return {
        "checkpoint": checkpoint.seal,
        "device": f"{device.platform} ({device.device_kind})",
        **environment.facts(),
    }


def append(run: Path, receipts: list[Receipt]) -> None:
    """Adds receipts to those of a run; raises UserError where that cannot be."""
    content = "".join(f"{json.dumps(receipt.as_dict())}\n" for receipt in receipts).encode()
    try:
        # One write at the end of the file: no other chat's lines come between.
        descriptor = os.open(run / RECEIPTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                content = b"\n" + content  # a full disk cut the last line off
            if os.write(descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{run / RECEIPTS} cannot be written: {error.strerror}") from error


def load(name: str) -> tuple[Path, Receipt]:
    """The receipt of a name, FILE or FILE:N for its N-th line, and the file.

    Without N it is the last one. Raises UserError where it is missing or does not parse.
    """
    found = re.fullmatch(r"(.*):([1-9][0-9]{0,8})", name, re.DOTALL)
    path, number = (Path(found[1]), int(found[2])) if found else (Path(name), None)
    try:
        with path.open("rb") as file:
            lines = [line for line in file if line.strip()]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; gothic-chat writes RUN/{RECEIPTS}"
        ) from error
    if not lines or (number or 0) > len(lines):
        raise UserError(f"{path} has {len(lines)} receipts; give FILE:N with N from 1 on")
    number = number or len(lines)
    try:
        return path, _checked(parse_json(lines[number - 1]))
    except UNSOUND as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}:{number} is not a receipt of gothic-chat ({reason}); give another line"
        ) from error


def _checked(value: Any) -> Receipt:
    """A receipt from JSON of any origin; raises one of UNSOUND."""
    for field in dataclasses.fields(Receipt):
        if field.default is not dataclasses.MISSING:
            value.setdefault(field.name, field.default)  # older receipts have none
    if value.keys() != {field.name for field in dataclasses.fields(Receipt)}:
        raise ValueError("it has other parts")
    for name in (
        "text",
        "prompt",
        *(["given_prompt"] if value["given_prompt"] is not None else []),
    ):
        if not isinstance(value[name], str):
            raise ValueError(f"its {name} is {value[name]!r}")
    for name in ("max_tokens", "seed", "sample", "samples", "iteration"):
        if type(value[name]) is not int or not 0 <= value[name] < INTEGER_LIMIT:
            raise ValueError(f"its {name} is {value[name]!r}")
    for name, most in (("slots", MAX_SAMPLES), ("copy_guard", MAX_GUARDED)):
        if value[name] is not None and (
            type(value[name]) is not int or not 1 <= value[name] <= most
        ):
            raise ValueError(f"its {name} is {value[name]!r}")
    if value["dtype"] not in ("bfloat16", "float32"):
        raise ValueError(f"its dtype is {value['dtype']!r}")
    if not all(isinstance(stop, str) and stop for stop in value["stop"]):
        raise ValueError(f"its stop is {value['stop']!r}")
    if not 1 <= value["sample"] <= value["samples"] <= MAX_SAMPLES:
        raise ValueError("its sample is not one of its samples")
    blend = {voice: _number(weight) for voice, weight in value["blend"].items()}
    if not all(abs(weight) <= MAX_WEIGHT for weight in blend.values()):
        raise ValueError(f"its blend is {blend}")
    top_k = value["sampling"]["top_k"]
    if value["sampling"].keys() != {*Sampling._fields} or type(top_k) is not int:
        raise ValueError("its sampling is not as gothic-chat writes it")
    temperature, top_p = (_number(value["sampling"][name]) for name in ("temperature", "top_p"))
    if not all(isinstance(fact, str) for fact in value["circumstances"].values()):
        raise ValueError("its circumstances are not a list of facts")
    sampling, stop = Sampling(temperature, top_k, top_p), tuple(value["stop"])
    return Receipt(**value | {"blend": blend, "sampling": sampling, "stop": stop})


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)
