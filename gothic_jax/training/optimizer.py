"""AdamW with warmup, cosine decay and clipping, under MultiSteps accumulation."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gothic_jax.model.gpt import Params


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Linear warmup over `warmup_iters`, then cosine to `min_lr_ratio` of the peak at the end.

    The first iteration already learns, at 1/(warmup_iters + 1) of the peak.
    """
    peak = config.learning_rate
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=peak / (config.warmup_iters + 1),
        peak_value=peak,
        warmup_steps=config.warmup_iters,
        decay_steps=max(config.max_iters, config.warmup_iters + 1),
        end_value=peak * config.min_lr_ratio,
    )


def _is_matrix(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def make_optimizer(config: ConfigDict) -> optax.MultiSteps:
    """The optimizer; clipping and AdamW see the mean gradient of the whole iteration."""
    inner = optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )
    return optax.MultiSteps(inner, every_k_schedule=config.gradient_accumulation_steps)


def init_optimizer(optimizer: optax.MultiSteps, params: Params) -> optax.MultiStepsState:
    """The state before the first iteration, as `apply_gradient_sum` keeps it."""
    return optimizer.init(params)._replace(acc_grads=())


def apply_gradient_sum(
    optimizer: optax.MultiSteps,
    micro_steps: int,
    gradients: Params,
    state: optax.MultiStepsState,
    params: Params,
) -> tuple[Params, optax.MultiStepsState]:
    """The iteration's one update, given the sum of its `micro_steps` micro-batches' gradients.

    MultiSteps would run AdamW after every micro-batch and throw all but the last away. So the
    caller adds up, and MultiSteps is handed the sum as its last micro-step's gradient, with
    nothing gathered before it: of that it takes the mean, 0 + (sum - 0) / micro_steps. Between
    iterations nothing is gathered, and no room is kept for it.
    """
    nothing = jax.tree.map(jnp.zeros_like, gradients)
    last = state._replace(mini_step=jnp.asarray(micro_steps - 1, jnp.int32), acc_grads=nothing)
    updates, state = optimizer.update(gradients, last, params)
    return optax.apply_updates(params, updates), state._replace(acc_grads=())
