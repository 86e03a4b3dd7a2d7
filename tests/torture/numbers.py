"""R7, R9, R10, R11: the figures themselves."""

import hashlib
import random

import jax
import jax.numpy as jnp
import numpy as np

from gothic_jax.checkpoints import checkpoint
from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.config import get_config
from gothic_jax.model.gpt import init_params
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.tokens import load_tokens
from gothic_jax.text.windows import batch_iterator, training_batches
from gothic_jax.training.optimizer import init_optimizer, make_optimizer
from gothic_jax.training.step import TrainState, make_train_step
from tests.common import SETTINGS as TINY_SETTINGS
from tests.common import Workplace
from tests.torture.world import Figure, Life, arrays, figures, in_lanes, points, whole_state


def not_finite(workplace: Workplace, steps: int, runs: int) -> Figure:
    """R7: weights that make loss or gradient overflow, in single steps and in whole runs."""
    config = get_config()
    for name, value in TINY_SETTINGS.items():
        config.update_from_flattened_dict({name: value})
    params = init_params(ModelConfig(**config.model), 0)
    optimizer = make_optimizer(config)
    step = jax.jit(make_train_step(config, "xla"))
    rng = random.Random(7)
    wrong: list[str] = []
    windows = np.random.default_rng(0).integers(320, size=(2, 2, 33), dtype=np.int32)
    leaves, tree = jax.tree.flatten(params)
    for trial in range(steps):
        bad = [np.array(leaf) for leaf in leaves]
        leaf = rng.choice([leaf for leaf in bad if leaf.ndim == 2])
        value = rng.choice([np.nan, np.inf, -np.inf, 3e38])
        leaf[0 if value == 3e38 else slice(None)] = value
        state = TrainState(jax.tree.unflatten(tree, bad), init_optimizer(optimizer, params))
        new, metrics = step(state, windows)
        finite = all(np.isfinite(float(metrics[name])) for name in ("loss", "gradient_norm"))
        changed = any(
            not np.array_equal(old, now, equal_nan=True)
            for old, now in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
            if jnp.issubdtype(now.dtype, jnp.floating)
        )
        if finite and not np.isfinite(value):
            wrong.append(f"step {trial}: {value} went unnoticed")
        if not finite and changed:
            wrong.append(f"step {trial}: {value} changed the state")

    def run(index: int) -> list[str]:
        rate = 10.0 ** random.Random(index).uniform(3, 37)
        out_dir = workplace.root / f"diverging-{index}"
        settings = {"max_iters": 40, "eval_interval": 4, "learning_rate": rate, "max_skipped": 5}
        life = Life(workplace.arguments(out_dir=out_dir, **settings), workplace.root)
        code = life.end()
        found = [
            f"rate {rate:.0e}: {out_dir.name}/{iteration} is not finite"
            for iteration in checkpoint.iterations(out_dir)
            for array in arrays(Checkpoint.open(out_dir, iteration))
            if not np.isfinite(array).all()
        ]
        if code not in (0, 2) or (code == 2 and "diverged" not in life.error):
            found.append(f"rate {rate:.0e}: code {code}: {life.error[-300:]}")
        skipped = life.out.count("skipped:")
        told = max(
            (value for name, _, value in points(out_dir / "logs") if name == "train/skipped"),
            default=0,
        )
        if skipped != told:
            found.append(f"rate {rate:.0e}: {skipped} skipped, TensorBoard has {told}")
        return found

    wrong += in_lanes(run, runs)
    return Figure(
        "R7", "NaN and Inf: a changed state, a kept checkpoint that is not finite, a wrong count",
        steps + runs, wrong, f"{steps} single steps, {runs} diverging runs",
    )  # fmt: skip


def twice(workplace: Workplace, count: int) -> Figure:
    """R9: the same command again and again: parameters, optimizer and printed figures."""
    hashes: dict[int, str] = {}

    def run(index: int) -> list[str]:
        out_dir = workplace.root / f"again-{index}"
        settings = {"max_iters": 40, "eval_interval": 20, "compute_dtype": "bfloat16"}
        life = Life(workplace.arguments(out_dir=out_dir, **settings), workplace.root)
        if life.end():
            return [f"run {index}: {life.error[-300:]}"]
        digest = hashlib.sha256(repr(sorted(figures(life.out).items())).encode())
        for array in whole_state(out_dir):
            digest.update(array.tobytes())
        hashes[index] = digest.hexdigest()
        return []

    wrong = in_lanes(run, count)
    wrong += [f"run {n}: another hash" for n in hashes if hashes[n] != hashes[min(hashes)]]
    return Figure(
        "R9", "the same command: the same hash", count, wrong, f"{len({*hashes.values()})} hash"
    )


def devices(workplace: Workplace) -> Figure:
    """R10: 1, 2 and 4 devices over 40 iterations: losses as TensorBoard has them, in f32."""
    losses: dict[int, list[float]] = {}

    def run(index: int) -> list[str]:
        count = 2**index
        out_dir = workplace.root / f"devices-{count}"
        settings = {"max_iters": 40, "eval_interval": 40, "batch_size": 4, "model.dropout": 0.0}
        life = Life(
            workplace.arguments(out_dir=out_dir, **settings),
            workplace.root,
            XLA_FLAGS=f"--xla_force_host_platform_device_count={count}",
        )
        if life.end():
            return [life.error]
        losses[count] = [v for name, _, v in points(out_dir / "logs") if name == "train/loss"]
        return []

    if broken := in_lanes(run, 3):
        raise RuntimeError(broken)
    worst = 0.0
    wrong = []
    for count in (2, 4):
        differences = [abs(a - b) / a for a, b in zip(losses[1], losses[count], strict=True)]
        worst = max(worst, *differences)
        wrong += [
            f"{count} devices, iteration {n + 1}: {difference:.1e}"
            for n, difference in enumerate(differences)
            if difference > 1e-6
        ]
    return Figure(
        "R10", "1, 2, 4 devices: losses further apart than 1e-6", 80, wrong,
        f"largest relative difference {worst:.1e}",
    )  # fmt: skip


def data_positions(workplace: Workplace, steps: int) -> Figure:
    """R11: resumed at any iteration, the batches that remain are those that would have come."""
    text = load_tokens(
        workplace.root / "mixed_train.txt", Tokenizer.load(workplace.root / "tokenizer.json")
    )
    batches = training_batches(text, shape=(2, 2), block_size=32, voice_dropout=0.1, seed=3)
    iterator = batch_iterator(batches, 0)
    whole = [next(iterator) for _ in range(steps)]
    wrong = []
    for first in range(steps):
        resumed = batch_iterator(batches, first)
        if any(not np.array_equal(next(resumed), batch) for batch in whole[first:]):
            wrong.append(f"from {first}")
    return Figure("R11", "batches after a resume at each iteration", steps, wrong)
