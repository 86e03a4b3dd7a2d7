"""A stopped run goes on as if nothing had happened: the real process, real signals."""

import itertools
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gothic_jax.checkpoints import checkpoint
from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.config import get_config
from gothic_jax.measuring.scoring import Evaluator, LossFunction
from gothic_jax.model.gpt import Params, init_params
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.training.optimizer import init_optimizer, make_optimizer
from tests.common import Workplace, process, run, wait_for

# Muon has both kinds of state: its own, and AdamW's for what is not a kernel.
SETTINGS = {
    "max_iters": 24,
    "eval_interval": 4,
    "compute_dtype": "bfloat16",
    "optimizer": "muon",
}


def losses(out: str) -> dict[str, str]:
    """The figures printed of each iteration and evaluation, as printed."""
    found = re.findall(r"^(\d+/24)  (loss [\d.]+|validation: .*?\))", out, re.MULTILINE)
    return {f"{step} {what.split()[0]}": what for step, what in found}


def whole_state(out_dir: Path) -> list[np.ndarray]:
    """Parameters and optimizer state of a run's last checkpoint."""

    found = checkpoint.locate(str(out_dir / "latest"))
    meta = found.meta
    assert meta.iteration == 24
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    config = get_config()
    config.update(meta.config)
    like = jax.eval_shape(
        lambda: init_optimizer(make_optimizer(config), init_params(meta.model_config, 0))
    )
    leaves = [
        *jax.tree.leaves(found.params(here)),
        *jax.tree.leaves(found.optimizer(like, here)),
    ]
    return [np.asarray(leaf) for leaf in leaves]


@pytest.fixture(scope="module")
def uninterrupted_run(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> tuple[Workplace, str]:
    """A workplace with a finished run in it, and what that printed."""
    workplace = Workplace.make(tmp_path_factory.mktemp("whole"), tokenizer)
    whole = run("train", workplace.arguments(**SETTINGS), workplace.root)
    assert whole.returncode == 0, whole.stderr
    return workplace, whole.stdout


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.long),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(
    uninterrupted_run: tuple[Workplace, str], number: int, code: int
) -> None:
    workplace, whole_out = uninterrupted_run
    parted_dir = workplace.root / f"parted-{number}"
    arguments = workplace.arguments(out_dir=parted_dir, **SETTINGS)
    with process("train", arguments, workplace.root, PYTHONUNBUFFERED="1") as started:
        before = wait_for("10/24", started)
        os.kill(started.pid, number)
        rest, error = started.communicate(timeout=60)
    assert started.returncode == code, error
    stopped_at = checkpoint.iterations(parted_dir)[-1]
    assert stopped_at < 24
    if number != signal.SIGKILL:
        assert f"stopped at iteration {stopped_at}" in rest

    resumed = run("train", ["--resume", "--out-dir", str(parted_dir)], workplace.root)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming at iteration {stopped_at}" in resumed.stdout

    uninterrupted = losses(whole_out)
    assert len(uninterrupted) == 24 + 6
    # An iteration done again prints the same figures again.
    for figures in (losses("".join(before)), losses(rest), losses(resumed.stdout)):
        assert figures.items() <= uninterrupted.items()
    assert f"{stopped_at + 1}/24 loss" in losses(resumed.stdout)
    if number != signal.SIGKILL:  # which may lose printed lines, but no iterations
        parts = losses("".join(before)) | losses(rest) | losses(resumed.stdout)
        assert parts == uninterrupted

    for one, other in zip(whole_state(workplace.out_dir), whole_state(parted_dir), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("at", [pytest.param(3, marks=pytest.mark.long), 6])
def test_an_evaluation_that_a_signal_cuts_off_is_made_up_for(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    assert workplace.train(max_iters=6, eval_interval=3) == 0
    whole = {n: Checkpoint.open(workplace.out_dir, n).meta for n in (3, 6)}
    parted = workplace.root / "parted"
    scored = Evaluator.__call__
    evaluations = itertools.count(1)

    def interrupted(evaluator: Evaluator, losses: LossFunction, params: Params) -> Any:
        scores = scored(evaluator, losses, params)
        if next(evaluations) == 2 * at // 3:  # of two at a time: validation, and the compass
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # the handler runs before this is over
        return scores

    with monkeypatch.context() as context:
        context.setattr(Evaluator, "__call__", interrupted)
        assert workplace.train(out_dir=parted, max_iters=6, eval_interval=3) == 143
    stopped = Checkpoint.open(parted, at).meta
    assert stopped.scores is None
    assert workplace.train("--resume", out_dir=parted, max_iters=6, eval_interval=3) == 0
    for iteration, meta in whole.items():
        again = Checkpoint.open(parted, iteration).meta
        assert again.scores == meta.scores
        assert again.best_val_loss == meta.best_val_loss
    for one, other in zip(workplace.params(), workplace.params(out_dir=parted), strict=True):
        np.testing.assert_array_equal(one, other)


def test_best_and_patience_live_on_after_a_resume(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    # A learning rate this low changes no parameter: no evaluation is better than the first.
    idle = {"learning_rate": 1e-30, "warmup_iters": 0, "eval_interval": 2}
    assert workplace.train(max_iters=4, **idle) == 0
    best = checkpoint.locate(str(workplace.out_dir)).meta.best_val_loss
    assert workplace.train("--resume", max_iters=40, patience=3, **idle) == 0
    assert (
        "stopped at iteration 8: validation has not improved for 3 evaluations"
        in capsys.readouterr().out
    )
    latest = checkpoint.locate(f"{workplace.out_dir}/latest").meta
    assert latest.best_val_loss == best
