"""The GPT: one definition of two standard architectures, for training and cached decoding.

`architecture="gemma"` is Gemma 1 (arXiv 2403.08295, as in Transformers' `GemmaForCausalLM`):
RMSNorm, rotary positions, gated GELU, embedding scaled by sqrt(n_embd), no biases.
`architecture="gpt2"` is GPT-2 (as in `GPT2LMHeadModel` and nanoGPT): LayerNorm, learned
positions, GELU, biases. Both are pre-norm decoders whose head is the token embedding. The
constructors decide what differs between the two, and between training and decoding.

Activations are [batch * time, n_embd] around matrix products: the gradient of a weight is then
contracted over one axis, which XLA on a CPU runs 1.75 times faster than over two.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gothic_jax.model.attention import (
    Implementation,
    KVBlocks,
    KVCache,
    Rotation,
    blockwise_attention,
    cached_attention,
    causal_attention,
    rotate,
    rotation,
    unrotated,
)
from gothic_jax.model.ops import embed, gelu, matmul, matmul_transposed, streamed_product
from gothic_jax.model.shape import ModelConfig

Params = dict[Any, Any]
"""The parameters as a plain nested dict of f32 arrays, as `nnx.to_pure_dict` gives it."""

Past = KVCache | KVBlocks
"""A layer's keys and values of the tokens before those that are being read or written."""
Cache = TypeVar("Cache", tuple[Past, KVCache], None)
Attend = Callable[[Array, Array, Array, Cache], tuple[Array, Cache]]
"""(query, key, value, cache) -> (context, new cache): the first three and the context are
[batch, time, head, head_dim], the caches are the layer's, or None."""
Product = Callable[[Float[Array, "n inputs"], Array], Float[Array, "n outputs"]]
"""(rows, kernel) -> rows times kernel, in f32."""

Rngs = nnx.Rngs | None
"""What new parameters are drawn from; None where only their shapes are of interest."""

INIT_STD = 0.02
"""Standard deviation of initial weights, as in GPT-2 and Transformers' Gemma."""


class GPT(nnx.Module):
    """A decoder-only language model. Parameters are f32; `dtype` is what it computes in.

    With `rngs` None all matrices are zero, which is enough for their shapes.
    With `streamed` it is for decoding, where each weight is read for a few rows only: it then
    takes the parameters that `streamed_params` gives.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: Any, rngs: Rngs, streamed: bool = False
    ) -> None:
        shape = (config.vocab_size, config.n_embd)
        gemma = config.architecture == "gemma"
        self.dtype = dtype
        self.n_layer = config.n_layer
        self.head_dim = config.head_dim
        self.token_embedding = _param(normal(_embedding_std(config)), rngs, shape)
        self.embedding_scale = math.sqrt(config.n_embd) if gemma else 1.0
        self.position_embedding = (
            None if gemma else _param(normal(INIT_STD), rngs, (config.block_size, config.n_embd))
        )
        # One object for all layers, so that they are equal but for their parameters.
        product: Product = streamed_product if streamed else functools.partial(matmul, dtype=dtype)
        layer = {"product": product, "dtype": dtype, "rngs": rngs, "streamed": streamed}
        self.blocks = nnx.List([Block(config, **layer) for _ in range(config.n_layer)])
        self.final_norm = _norm(config, dtype, rngs)
        self.head = (
            streamed_product if streamed else functools.partial(matmul_transposed, dtype=dtype)
        )
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        attention: Implementation = "xla",
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch time vocab"]:
        """Logits (f32) of the token after each one. Without `dropout_key` nothing is dropped.

        `attention` is what `attention.choose` gave.
        """

        def attend(query: Array, key: Array, value: Array, _: None) -> tuple[Array, None]:
            return causal_attention(query, key, value, implementation=attention), None

        # Constants: XLA on a CPU would compute every angle's cosine again for each row and layer.
        with jax.ensure_compile_time_eval():
            positions = jnp.arange(tokens.shape[1])
            turn = rotation(positions, self.head_dim)
        caches = [None] * self.n_layer
        hidden, _ = self._hidden(tokens, positions, turn, attend, caches, dropout_key)
        return self.logits(hidden).reshape(*tokens.shape, -1)

    def extend(
        self,
        tokens: Int[Array, "batch time"],
        past: Sequence[Past],
        start: Int[Array, "*rows"] | int,
        recent: list[KVCache],
        offset: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch time embed"], list[KVCache]]:
        """Final hidden states of tokens that follow others, and what they add to the caches.

        The tokens have the positions from start + offset on: after the first `start` positions of
        `past`, a number for all rows or one for each (which blocks need), and the first `offset`
        of `recent`. Returns `recent` with theirs written into it.
        """

        def attend(
            query: Array, key: Array, value: Array, caches: tuple[Past, KVCache]
        ) -> tuple[Array, tuple[Past, KVCache]]:
            before, latest = caches
            own = KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2))
            latest = latest.write(own, offset)
            if isinstance(before, KVBlocks):
                context = blockwise_attention(query, before, jnp.asarray(start), latest, offset)
            else:
                context = cached_attention(query, before, start, latest, offset)
            return context.astype(self.dtype), (before, latest)

        positions = jnp.expand_dims(start + offset, -1) + jnp.arange(tokens.shape[1])
        turn = rotation(positions, self.head_dim)
        caches = [*zip(past, recent, strict=True)]
        hidden, caches = self._hidden(tokens, positions, turn, attend, caches, None)
        return hidden.reshape(*tokens.shape, -1), [latest for _, latest in caches]

    def _hidden(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "*rows time"],
        turn: Rotation,
        attend: Attend[Cache],
        caches: Sequence[Cache],
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "n embed"], list[Cache]]:
        """The one pass through the blocks: final hidden states, and each layer's new cache."""

        @functools.partial(jax.jit, static_argnums=0)
        def through(
            graphdef: Any, state: Any, x: Array, cache: Cache, key: PRNGKeyArray | None
        ) -> tuple[Array, Cache]:
            """Traced and lowered once for all layers, which are equal; XLA inlines it again."""
            block: Block = nnx.merge(graphdef, state)
            return block(x, turn, attend, cache, key)

        batch, time = tokens.shape
        x = embed(self.token_embedding[...], tokens.reshape(-1), self.dtype)
        x = x * jnp.asarray(self.embedding_scale, self.dtype)
        if (learned := self.position_embedding) is not None:
            # Padding may lie behind the last position; what it reads does not matter.
            within = jnp.minimum(positions, learned.shape[0] - 1)
            added = embed(learned[...], within.reshape(-1), self.dtype)
            x = (x.reshape(batch, time, -1) + added.reshape(-1, time, added.shape[1])).reshape(
                x.shape
            )
        keys: Sequence[PRNGKeyArray | None] = [None] * (self.n_layer + 1)
        if dropout_key is not None:
            keys = [jax.random.fold_in(dropout_key, layer) for layer in range(self.n_layer + 1)]
        x = _drop(self.dropout, x, keys[self.n_layer])
        new: list[Cache] = []
        for block, cache, key in zip(self.blocks, caches, keys[:-1], strict=True):
            x, cache = through(*nnx.split(block), x, cache, key)
            new.append(cache)
        return self.final_norm(x), new

    def logits(self, hidden: Float[Array, "n embed"]) -> Float[Array, "n vocab"]:
        """The head: the token embedding, transposed; summed and returned in f32."""
        return self.head(hidden, self.token_embedding[...])


class Block(nnx.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: Rngs, **layer: Any) -> None:
        self.attention_norm = _norm(config, dtype, rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs, **layer)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs, **layer)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "n embed"],
        turn: Rotation,
        attend: Attend[Cache],
        cache: Cache,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "n embed"], Cache]:
        """The residual stream after this block, and the layer's new cache if there is one."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        attended, cache = self.attention(self.attention_norm(x), turn, attend, cache)
        x = x + _drop(self.dropout, attended, keys[0])
        x = x + _drop(self.dropout, self.mlp(self.mlp_norm(x)), keys[1])
        return x, cache


class Attention(nnx.Module):
    """Multi-head self-attention; `attend` decides what a query may see."""

    def __init__(self, config: ModelConfig, **layer: Any) -> None:
        width, layer["biased"] = config.n_embd, config.architecture == "gpt2"
        self.heads = (config.n_head, config.head_dim)
        self.rotate = rotate if config.architecture == "gemma" else unrotated
        self.qkv = Linear(width, 3 * width, std=INIT_STD, **layer)
        self.out = Linear(width, width, std=_residual_std(config), **layer)

    def __call__(
        self,
        x: Float[Array, "n embed"],
        turn: Rotation,
        attend: Attend[Cache],
        cache: Cache,
    ) -> tuple[Float[Array, "n embed"], Cache]:
        """The attention's output for each token, and the layer's new cache if there is one."""
        shape = (-1, turn.cos.shape[-2], *self.heads)
        query, key, value = (y.reshape(shape) for y in jnp.split(self.qkv(x), 3, axis=1))
        query, key = self.rotate(query, turn), self.rotate(key, turn)
        context, cache = attend(query, key, value, cache)
        return self.out(context.reshape(x.shape)), cache


class MLP(nnx.Module):
    """Four times as wide inside; GELU, gated for Gemma (GEGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, **layer: Any) -> None:
        width, inner = config.n_embd, config.mlp_width
        layer["biased"] = config.architecture == "gpt2"
        gated = config.architecture == "gemma"
        self.activation = _gated_gelu if gated else gelu
        self.up = Linear(width, 2 * inner if gated else inner, std=INIT_STD, **layer)
        self.down = Linear(inner, width, std=_residual_std(config), **layer)

    def __call__(self, x: Float[Array, "n embed"]) -> Float[Array, "n embed"]:
        """The MLP's output for each token."""
        return self.down(self.activation(self.up(x)))


class Linear(nnx.Module):
    """x W, and a bias if `biased`; added in f32, returned in `dtype`.

    With `streamed` the kernel is W^T, in `dtype`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        std: float,
        biased: bool,
        product: Product,
        dtype: Any,
        rngs: Rngs,
        streamed: bool,
    ) -> None:
        self.dtype = dtype
        self.product = product
        shape = (out_features, in_features) if streamed else (in_features, out_features)
        self.kernel = _param(normal(std), rngs, shape)
        self.bias = _param(zeros, rngs, (out_features,)) if biased else None

    def __call__(self, x: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
        """The layer's output for each row."""
        y = self.product(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(self.dtype)


def _gated_gelu(hidden: Float[Array, "n twice"]) -> Float[Array, "n once"]:
    gate, value = jnp.split(hidden, 2, axis=-1)
    return gelu(gate) * value


def _drop(dropout: nnx.Dropout, x: Array, key: PRNGKeyArray | None) -> Array:
    return dropout(x, deterministic=key is None, rngs=key)


def _param(initial: Callable[..., Array], rngs: Rngs, shape: tuple[int, ...]) -> nnx.Param[Array]:
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, jnp.float32))
    return nnx.Param(initial(rngs.params(), shape, jnp.float32))


def _norm(config: ModelConfig, dtype: Any, rngs: Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    rngs = rngs or nnx.Rngs(0)  # the initial values of norms are not random
    if config.architecture == "gemma":
        return nnx.RMSNorm(config.n_embd, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(
        config.n_embd, epsilon=config.norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs
    )


def _embedding_std(config: ModelConfig) -> float:
    """A new model's final state is mostly the embedding of the token that it has just read.

    Where that embedding is scaled by sqrt(n_embd) and is the head too, the token's own logit
    starts at std * n_embd: 10 for the default width and 0.02. At 4 it is one among 4,096.
    """
    return min(INIT_STD, 4 / config.n_embd) if config.architecture == "gemma" else INIT_STD


def _residual_std(config: ModelConfig) -> float:
    """GPT-2 scales what is added to the residual stream by 1/sqrt(number of additions)."""
    return INIT_STD / math.sqrt(2 * config.n_layer)


def empty_caches(config: ModelConfig, batch: int, length: int, dtype: Any) -> list[KVCache]:
    """A cache of `length` positions for each layer, with nothing in it yet."""
    shape = (batch, config.n_head, length, config.head_dim)
    return [
        KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)
    ]


@functools.cache
def graph(config: ModelConfig, dtype: Any, *, streamed: bool = False) -> "nnx.GraphDef[GPT]":
    """The model less its parameters, for `nnx.merge(graph, params)`; computes nothing.

    `streamed` is as in GPT.
    """
    model = nnx.eval_shape(lambda: GPT(config, dtype=dtype, rngs=None, streamed=streamed))
    return nnx.split(model)[0]


@functools.partial(jax.jit, static_argnums=1)
def streamed_params(params: Params, dtype: Any) -> Params:
    """Parameters laid out for decoding: matrices in `dtype`, kernels [out, in]."""

    def laid_out(path: tuple[Any, ...], leaf: Array) -> Array:
        if leaf.ndim < 2:
            return leaf
        return (leaf.T if path[-1].key == "kernel" else leaf).astype(dtype)

    return jax.tree_util.tree_map_with_path(laid_out, params)


def init_params(config: ModelConfig, seed: int) -> Params:
    """New parameters, drawn from `seed`."""
    # Not jitted: layers share the programs of their shapes, and one program of all would take
    # longer to compile, and even to load from the cache.
    return _params_of(config, nnx.Rngs(seed))


def abstract_params(config: ModelConfig) -> Params:
    """The shapes and types of `init_params`, without their values."""
    return jax.eval_shape(lambda: _params_of(config, None))


def _params_of(config: ModelConfig, rngs: Rngs) -> Params:
    return nnx.to_pure_dict(nnx.state(GPT(config, dtype=jnp.float32, rngs=rngs), nnx.Param))


def parameter_count(params: Params) -> int:
    """Number of parameters; the tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig, params: Params) -> int:
    """Floating-point operations of a training step per token: 6 N + 12 L d T.

    PaLM's formula (arXiv 2204.02311, appendix B), which counts causal attention in full; N
    leaves out learned positions, which are not multiplied, and counts the tied head once.
    """
    n = parameter_count(params)
    if config.architecture == "gpt2":
        n -= config.block_size * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size
