"""One training iteration as a pure function of state and windows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from gothic_jax.model.attention import Implementation
from gothic_jax.model.gpt import GPT, Params, graph
from gothic_jax.model.ops import NOTHING, token_losses
from gothic_jax.model.shape import ModelConfig
from gothic_jax.training.optimizer import apply_gradient_sum, learning_rate_schedule, make_optimizer


class TrainState(NamedTuple):
    """What training changes. The iteration is the optimizer's `gradient_step`."""

    params: Params
    optimizer: optax.MultiStepsState


Metrics = dict[str, Array]
"""`loss` (nats per token), `gradient_norm` (before clipping) and `learning_rate`."""

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def make_train_step(config: ConfigDict, attention: Implementation) -> TrainStep:
    """One iteration, not yet jitted: (state, windows [micro, batch, time + 1]) -> new state.

    Every token counts the same; NOTHING, which fills a window up, is not predicted.
    Where the loss or the gradient's norm is not finite, no weight and no moment changes.
    """
    shape = ModelConfig(**config.model)
    dtype = jnp.dtype(config.compute_dtype)
    optimizer = make_optimizer(config)
    schedule = learning_rate_schedule(config)
    micro_steps = config.gradient_accumulation_steps

    def loss(
        params: Params,
        windows: Int[Array, "batch window"],
        counted: Float[Array, ""],
        key: Array | None,
    ) -> Float[Array, ""]:
        model: GPT = nnx.merge(graph(shape, dtype), params)
        # No token sees those after it, so any token may take the place of NOTHING.
        tokens = jnp.maximum(windows, 0)
        logits = model(tokens[:, :-1], attention=attention, dropout_key=key)
        losses = token_losses(logits, tokens[:, 1:])
        return jnp.sum(losses, where=windows[:, 1:] != NOTHING) / counted

    def train_step(
        state: TrainState, windows: Int[Array, "micro batch window"]
    ) -> tuple[TrainState, Metrics]:
        iteration = state.optimizer.gradient_step
        # A function of the iteration alone, so that a resumed run drops what it would have.
        key = jax.random.fold_in(jax.random.key(config.seed), iteration)
        # Tokens to predict in a micro-batch, on average over the iteration.
        counted = jnp.sum(windows[..., 1:] != NOTHING) / micro_steps

        def micro_step(
            index: Array | int, batch: Int[Array, "batch window"]
        ) -> tuple[Array, Params]:
            dropout_key = jax.random.fold_in(key, index) if shape.dropout else None
            return jax.value_and_grad(loss)(state.params, batch, counted, dropout_key)

        def add_micro_step(
            total: tuple[Array, Params], inputs: tuple[Array, Array]
        ) -> tuple[tuple[Array, Params], None]:
            return jax.tree.map(jnp.add, total, micro_step(*inputs)), None

        if micro_steps == 1:  # nothing to add up: no pass over gradients of zeros
            loss_sum, gradients = micro_step(0, windows[0])
        else:
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            total, _ = jax.lax.scan(add_micro_step, zero, (jnp.arange(micro_steps), windows))
            loss_sum, gradients = total
        params, optimizer_state = apply_gradient_sum(
            optimizer, micro_steps, gradients, state.optimizer, state.params
        )
        mean_gradient = jax.tree.map(lambda leaf: leaf / micro_steps, gradients)
        metrics = {
            "loss": loss_sum / micro_steps,
            "gradient_norm": optax.tree.norm(mean_gradient),
            "learning_rate": schedule(iteration),
        }
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])

        def unless_skipped(new: Array, old: Array) -> Array:
            # Counters go on: learning rate and dropout keys belong to the iteration.
            is_counter = jnp.issubdtype(new.dtype, jnp.integer)
            return new if is_counter else jnp.where(finite, new, old)

        new = TrainState(params, optimizer_state)
        return jax.tree.map(unless_skipped, new, state), metrics

    return train_step


@jax.jit
def all_finite(state: TrainState) -> Bool[Array, ""]:
    """Whether no parameter and no moment is infinite or NaN."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


def divided(mesh: Mesh, leaf: Any) -> NamedSharding:
    """A parameter or moment cut into a part for each device, along its longest axis that can be.

    One without such an axis, and a vector (of a norm, a bias), which is small, is copied.
    """
    axes: list[str | None] = [None] * leaf.ndim
    fitting = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
    if leaf.ndim >= 2 and fitting:
        axes[max(fitting, key=lambda axis: leaf.shape[axis])] = "data"
    return NamedSharding(mesh, PartitionSpec(*axes))


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of one axis, `data`, over which each micro-batch is divided."""
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
    )
