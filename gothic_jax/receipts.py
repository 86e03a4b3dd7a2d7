"""Receipts of what was written: all that it takes to write the same text again.

They stand in `samples.jsonl` beside a run's checkpoints, one JSON object a line.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from gothic_jax import manifest, seal
from gothic_jax.checkpoint import Location
from gothic_jax.cli import UserError
from gothic_jax.files import UNSOUND, parse_json
from gothic_jax.sampler import Sampling
from gothic_jax.texts import MAX_WEIGHT

NAME = "samples.jsonl"


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
    seal: str
    """The checkpoint's: `manifest.verify` gives it."""
    environment: dict[str, str]
    """`seal.environment` of the process that wrote it."""

    def differences(self, location: Location) -> list[str]:
        """What is not as it was when the sample was written."""
        before = {"checkpoint": self.seal} | self.environment
        now = {"checkpoint": manifest.seal(location.path)} | seal.environment()
        return seal.differences(before, now)


def append(run: Path, receipts: list[Receipt]) -> None:
    """Adds receipts to those of a run; raises UserError where that cannot be."""
    content = "".join(f"{json.dumps(_as_dict(receipt))}\n" for receipt in receipts).encode()
    try:
        # One write at the end of the file: no other chat's lines come between.
        descriptor = os.open(run / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{run / NAME} cannot be written: {error.strerror}") from error


def _as_dict(receipt: Receipt) -> dict[str, Any]:
    return dataclasses.asdict(receipt) | {"sampling": receipt.sampling._asdict()}


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
            f"{path} cannot be read: {error.strerror}; gothic-chat writes receipts to RUN/{NAME}"
        ) from error
    if not lines or (number or 0) > len(lines):
        raise UserError(f"{path} has {len(lines)} receipts; give FILE:N with N from 1 on")
    number = number or len(lines)
    try:
        return path, _checked(parse_json(lines[number - 1]))
    except UNSOUND as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}:{number} is no receipt of gothic-chat's ({reason}); give another line"
        ) from error


def _checked(value: Any) -> Receipt:
    """A receipt from JSON of whatever origin; raises one of UNSOUND."""
    if value.keys() != {field.name for field in dataclasses.fields(Receipt)}:
        raise ValueError("it has other parts")
    for name, kind in (("text", str), ("prompt", str), ("seal", str), ("environment", dict)):
        if not isinstance(value[name], kind):
            raise ValueError(f"its {name} is {value[name]!r}")
    for name in ("max_tokens", "seed", "sample", "samples", "iteration"):
        if type(value[name]) is not int or not 0 <= value[name] < 2**32:
            raise ValueError(f"its {name} is {value[name]!r}")
    if not 1 <= value["sample"] <= value["samples"]:
        raise ValueError("its sample is none of its samples")
    for voice, weight in value["blend"].items():
        if not isinstance(weight, int | float) or not abs(weight) <= MAX_WEIGHT:
            raise ValueError(f"its weight of {voice} is {weight!r}")
    kinds = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float)}
    if value["sampling"].keys() != kinds.keys():
        raise ValueError("its sampling has other parts")
    for name, allowed in kinds.items():
        if type(value["sampling"][name]) not in allowed:
            raise ValueError(f"its {name} is {value['sampling'][name]!r}")
    if not all(isinstance(fact, str) for fact in value["environment"].values()):
        raise ValueError("its environment is no list of facts")
    return Receipt(**value | {"sampling": Sampling(**value["sampling"])})
