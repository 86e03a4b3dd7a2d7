"""AdamW or Muon with warmup, cosine decay and clipping, under MultiSteps accumulation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from gothic_jax.model.gpt import Params
from gothic_jax.model.ops import matmul, matmul_transposed, written_transposed

MUON_MOMENTUM = 0.95
"""Share of the gradients' mean that an iteration keeps; optax's and Jordan's own value."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients of X, (X X^T) X and (X X^T)^2 X, and his number of steps."""
NEWTON_SCHULZ_STEPS = 5


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
        muon = optax.chain(
            _orthogonal_momentum(),
            optax.stateless_with_tree_map(lambda x, _: 0.2 * math.sqrt(max(x.shape)) * x),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(schedule),
        )
        # The state has the tree of optax.contrib.muon, which has an Adam of its own for what is no
        # matrix, so that runs begun with it go on.
        muon = optax.partition(
            {"muon": muon, "adam": optax.adamw(schedule)},
            lambda params: jax.tree.map(lambda _: "muon", params),
        )
        update = optax.partition({"kernel": muon, "other": update}, _kind)
    inner = optax.chain(optax.clip_by_global_norm(config.grad_clip), update)
    return optax.MultiSteps(inner, every_k_schedule=config.gradient_accumulation_steps)


def _orthogonal_momentum() -> optax.GradientTransformation:
    """Nesterov's momentum of the gradient, made orthogonal: Muon without its scale and decay.

    The state and the momentum are those of `optax.contrib.scale_by_muon`, which would make it
    orthogonal in 3.5 times the time (`orthogonalized`).
    """
    state_of = optax.contrib.scale_by_muon(NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS).init

    def update(gradients: Params, state: Any, _: Params | None = None) -> tuple[Params, Any]:
        moment = optax.tree.update_moment(gradients, state.mu, MUON_MOMENTUM, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(moment, MUON_MOMENTUM, count + 1)
        now = optax.tree.bias_correction(gradients, MUON_MOMENTUM, count)
        moved = optax.tree.add_scale(optax.tree.scale(MUON_MOMENTUM, ahead), 1 - MUON_MOMENTUM, now)
        return jax.tree.map(orthogonalized, moved), state._replace(count=count, mu=moment)

    return optax.GradientTransformation(state_of, update)


def orthogonalized(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Five steps of Newton and Schulz towards the orthogonal U V^T of X = U S V^T (Jordan 2024).

    A step is X <- P X with P = a + b G + c G^2 and G = X X^T. All P and G are polynomials of the
    first G and commute, so the next G is P G P, and X is multiplied once, by the product of all P:
    the products in between are as small as the smaller dimension of X.
    """
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = written_transposed(x)
    x = x / (jnp.linalg.norm(x) + 1e-8)
    a, b, c = NEWTON_SCHULZ
    # Not TF32, which a GPU would take: G has the squares of singular values.
    with jax.default_matmul_precision("float32"):
        gram = matmul_transposed(x, x, x.dtype)
        total = identity = jnp.eye(len(gram), dtype=x.dtype)
        for step in range(NEWTON_SCHULZ_STEPS):
            factor = a * identity + b * gram + c * matmul(gram, gram, x.dtype)
            total = matmul(total, factor, x.dtype) if step else factor
            if step < NEWTON_SCHULZ_STEPS - 1:
                gram = matmul(matmul(gram, factor, x.dtype), factor, x.dtype)
        x = matmul(total, x, x.dtype)
    return written_transposed(x) if tall else x


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
