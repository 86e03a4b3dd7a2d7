"""A GPU computes what a CPU does, and a run on it resumes bit for bit.

Each test is also run on a CPU, so that on a GPU it cannot fail because of a mistake of its own.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gothic_jax.model.attention import choose
from gothic_jax.training.step import make_train_step
from tests.common import Workplace, process, run
from tests.test_train import new_state, tiny_config, windows

ROOT = Path(__file__).parents[1]
HEADS_OF_64 = {"model.n_embd": 128, "model.block_size": 128}
"""With heads of this size and in bf16, cuDNN's attention is taken."""


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_bf16_step_is_close_to_the_f32_one_of_a_cpu(platform: str) -> None:
    figures = []
    for place, dtype in (("cpu", "float32"), (platform, "bfloat16")):
        config = tiny_config(compute_dtype=dtype, **HEADS_OF_64)
        device = jax.devices(place)[0]
        attention, _ = choose(device, 64, jnp.dtype(dtype))
        with jax.default_device(device):
            step = jax.jit(make_train_step(config, attention))
            state, metrics = step(new_state(config), jnp.asarray(windows(config)))
            # The second step has what the first one's gradients made of the weights.
            _, after = step(state, jnp.asarray(windows(config, seed=1)))
        assert metrics["loss"].devices() == {device}
        figures.append([float(m[name]) for m in (metrics, after) for name in LIKE])
    np.testing.assert_allclose(figures[1], figures[0], rtol=0.02)


LIKE = ("loss", "gradient_norm")


@pytest.mark.parametrize(
    "platform",
    [pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_the_model_of_the_repository_scores_as_on_a_cpu(platform: str) -> None:
    reports = []
    for device in ("cpu", platform):
        files = ["--checkpoint", "checkpoints/gothic-dandy", "--file", "data/sample/mixed_val.txt"]
        done = run("evaluate", [*files, "--json", "--device", device], ROOT)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout)["voices"])
    for voice in ("wilde", "lovecraft"):
        scores = [report[voice]["bits_per_byte"] for report in reports]
        assert scores[1] == pytest.approx(scores[0], rel=0.005)


@pytest.mark.parametrize(
    ("platform", "flags"),
    [
        pytest.param("cpu", "", marks=pytest.mark.long),
        pytest.param("cuda", "", marks=pytest.mark.gpu),
        # If only this one passes, the flag is what a user needs for it.
        pytest.param("cuda", "--xla_gpu_deterministic_ops=true", marks=pytest.mark.gpu),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    workplace: Workplace, platform: str, flags: str
) -> None:
    def train(*arguments: str) -> str:
        with process("train", [*arguments], workplace.root, XLA_FLAGS=flags) as started:
            out, error = started.communicate(timeout=500)
        assert started.returncode == 0, error
        return out

    settings = {"compute_dtype": "bfloat16", **HEADS_OF_64}
    out = train(*workplace.arguments(**settings))
    assert ("attention: cudnn" in out) == (platform == "cuda")
    parted = workplace.root / "parted"
    shutil.copytree(workplace.out_dir / "3", parted / "3")
    assert "resuming at iteration 3" in train("--resume", "--out-dir", str(parted))
    pairs = zip(workplace.params(), workplace.params(out_dir=parted), strict=True)
    furthest = max(float(np.abs(one - other).max()) for one, other in pairs)
    assert furthest == 0
