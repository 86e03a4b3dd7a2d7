"""The rooms of the package: which may know which, and what each brings in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gothic_jax"
FLOORS = (
    {"errors"},
    {"machine", "model"},
    {"text"},
    {"measuring", "config"},
    {"checkpoints"},
    {"writing"},
    {"training", "shipping", "serving"},
    {"commands"},
    {"train"},
)
"""Rooms and modules of the package. Imports go from a floor to a lower one, or stay in a room."""
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def test_imports_go_down_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gothic_jax."):
                other = (node.module or "").split(".")[1]
                assert other == room or FLOOR[other] < FLOOR[room], f"{path} imports {node.module}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("gothic_jax") for name in names), path


@pytest.mark.parametrize(
    ("module", "kept_out"),
    [
        ("errors", {"argparse", "jax", "numpy"}),
        ("model.shape", {"absl", "jax", "numpy"}),
        (
            "model.gpt",
            {"gothic_jax.config", "gothic_jax.text", "gothic_jax.machine", "ml_collections"}
            | {"grain", "tokenizers", "orbax", "tensorboardX"},
        ),
        (
            "training.step",
            {"gothic_jax.config", "gothic_jax.text", "gothic_jax.commands"}
            | {"ml_collections.config_flags", "grain", "tokenizers", "orbax", "tensorboardX"},
        ),
        ("commands.chat", {"jax", "numpy", "tokenizers", "rich"}),
        ("commands.evaluate", {"jax", "numpy", "tokenizers", "rich"}),
        ("commands.index", {"jax", "numpy", "tokenizers", "rich"}),
        ("commands.serve", {"jax", "numpy", "tokenizers", "rich", "starlette"}),
        ("commands.tokenize", {"jax", "numpy", "tokenizers", "rich"}),
        ("commands.train", {"jax", "flax", "tokenizers", "rich"}),
    ],
)
def test_a_module_does_not_bring_in(module: str, kept_out: set[str]) -> None:
    # absl.flags comes with flax.nnx itself, through Optax's logging.
    program = f"import sys, gothic_jax.{module}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not kept_out & set(done.stdout.split())
