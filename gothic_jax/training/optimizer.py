"""AdamW or Muon with warmup, cosine decay and clipping, under MultiSteps accumulation."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gothic_jax.model.gpt import Params

MUON_MOMENTUM = 0.95
"""Share of the gradients' mean that an iteration keeps; optax's and Jordan's own value."""


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


def _kind(params: Params) -> Params:
    """`kernel` for the matrices between hidden states; the embedding, also the head, is none."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" if path[-1].key == "kernel" else "other", params
    )


def make_optimizer(config: ConfigDict) -> optax.MultiSteps:
    """The optimizer; clipping and all else see the mean gradient of the whole iteration.

    It is AdamW (arXiv 1711.05101), or Muon (Jordan 2024) for the kernels and AdamW for all else.
    Muon's update is the momentum of the gradient, made orthogonal, times 0.2 sqrt(the kernel's
    larger dimension). That makes it as large as AdamW's, so that learning rate and decay mean the
    same for both (arXiv 2502.16982).
    """
    schedule, decay = learning_rate_schedule(config), config.weight_decay
    update = optax.adamw(
        schedule, b1=config.beta1, b2=config.beta2, weight_decay=decay, mask=_is_matrix
    )
    if config.optimizer == "muon":
        muon = optax.contrib.muon(
            schedule, beta=MUON_MOMENTUM, weight_decay=decay, consistent_rms=0.2
        )
        update = optax.partition({"kernel": muon, "other": update}, _kind)
    inner = optax.chain(optax.clip_by_global_norm(config.grad_clip), update)
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

    MultiSteps would run the optimizer after every micro-batch and throw all but the last away. So
    the caller adds up, and MultiSteps is handed the sum as its last micro-step's gradient, with
    nothing gathered before it: of that it takes the mean, 0 + (sum - 0) / micro_steps. Between
    iterations nothing is gathered, and no room is kept for it.
    """
    nothing = jax.tree.map(jnp.zeros_like, gradients)
    last = state._replace(mini_step=jnp.asarray(micro_steps - 1, jnp.int32), acc_grads=nothing)
    updates, state = optimizer.update(gradients, last, params)
    return optax.apply_updates(params, updates), state._replace(acc_grads=())
