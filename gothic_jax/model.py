"""The GPT: one definition of two standard architectures, for training and cached decoding.

`architecture="gemma"` is Gemma 1 (arXiv 2403.08295, as in Transformers' `GemmaForCausalLM`):
RMSNorm, rotary positions, gated GELU, embedding scaled by sqrt(n_embd), no biases.
`architecture="gpt2"` is GPT-2 (as in `GPT2LMHeadModel` and nanoGPT): LayerNorm, learned
positions, GELU, biases. Both are pre-norm decoders whose head is the token embedding.

Activations are kept as [batch * time, n_embd] around matrix products: the gradient of a weight
is then contracted over one axis, which XLA on a CPU runs 1.75 times faster than over two.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gothic_jax.attention import Implementation, KVCache, cached_attention, causal_attention
from gothic_jax.config import ModelConfig
from gothic_jax.products import matmul, matmul_transposed, streamed_product

Params = dict[Any, Any]
"""The parameters as a plain nested dict of f32 arrays, as `nnx.to_pure_dict` gives it."""


Cache = TypeVar("Cache", KVCache, None)
Attend = Callable[[Array, Array, Array], tuple[Array, Cache]]
"""(query, key, value) -> (context, the layer's new cache); all [batch, time, head, head_dim]."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
    table: Float[Array, "vocab embed"], tokens: Int[Array, " n"], dtype: Any
) -> Float[Array, "n embed"]:
    """Rows of `table`, in `dtype`. Off the CPU its gradient is a matrix product, not a scatter.

    XLA on a GPU turns a scatter-add with repeated rows into serial atomic updates. On a CPU the
    scatter is some 50 times faster than the product.
    """
    if table.dtype == jnp.bfloat16:
        # XLA on a CPU would make the whole table f32 to take bf16 rows from it; these are bits.
        bits = jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens]
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)
    return table[tokens].astype(dtype)


def _embed_forward(
    table: Float[Array, "vocab embed"], tokens: Int[Array, " n"], dtype: Any
) -> tuple[Float[Array, "n embed"], tuple[Array, int]]:
    return embed(table, tokens, dtype), (tokens, table.shape[0])


def _row_sums_by_scatter(
    gradient: Float[Array, "n embed"], tokens: Int[Array, " n"], vocab_size: int
) -> Float[Array, "vocab embed"]:
    zeros = jnp.zeros((vocab_size, gradient.shape[1]), jnp.float32)
    return zeros.at[tokens].add(gradient.astype(jnp.float32))


def _row_sums_by_product(
    gradient: Float[Array, "n embed"], tokens: Int[Array, " n"], vocab_size: int
) -> Float[Array, "vocab embed"]:
    one_hot = jax.nn.one_hot(tokens, vocab_size, dtype=gradient.dtype)
    return jnp.einsum("nv,ne->ve", one_hot, gradient, preferred_element_type=jnp.float32)


def _embed_backward(
    _: Any, saved: tuple[Array, int], gradient: Float[Array, "n embed"]
) -> tuple[Float[Array, "vocab embed"], None]:
    tokens, vocab_size = saved
    sums = jax.lax.platform_dependent(
        gradient,
        tokens,
        cpu=functools.partial(_row_sums_by_scatter, vocab_size=vocab_size),
        default=functools.partial(_row_sums_by_product, vocab_size=vocab_size),
    )
    return sums, None


embed.defvjp(_embed_forward, _embed_backward)


def rotate(
    x: Float[Array, "batch time head head_dim"], positions: Int[Array, " time"]
) -> Float[Array, "batch time head head_dim"]:
    """Rotary position embedding (arXiv 2104.09864), halves paired, base 10,000."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Linear(nnx.Module):
    """x W, and a bias if the architecture has them; added in f32, returned in `dtype`.

    With `streamed` the kernel is what `streamed_params` makes of it: W^T, in `dtype`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        std: float,
        config: ModelConfig,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        self.streamed = False
        self.kernel = nnx.Param(
            nnx.initializers.normal(std)(rngs.params(), (in_features, out_features), jnp.float32)
        )
        if config.architecture == "gpt2":
            zeros = nnx.initializers.zeros(rngs.params(), (out_features,), jnp.float32)
            self.bias = nnx.Param(zeros)

    def __call__(self, x: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
        """The layer's output for each row."""
        if self.streamed:
            y = streamed_product(x, self.kernel[...])
        else:
            y = matmul(x, self.kernel[...], self.dtype)
        if hasattr(self, "bias"):
            y = y + self.bias[...]
        return y.astype(self.dtype)


def _norm(config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    if config.architecture == "gemma":
        return nnx.RMSNorm(config.n_embd, epsilon=1e-6, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(
        config.n_embd, epsilon=1e-5, dtype=dtype, use_fast_variance=False, rngs=rngs
    )


INIT_STD = 0.02
"""Standard deviation of initial weights, as in GPT-2 and Transformers' Gemma."""


def _embedding_std(config: ModelConfig) -> float:
    """A new model's final state is mostly the embedding of the token that it has just read.

    Where that embedding is scaled by sqrt(n_embd) and is the head too, the token's own logit
    starts at std * n_embd: 10 for the default width and 0.02. At 4 it is one among 4,096.
    """
    return min(INIT_STD, 4 / config.n_embd) if config.architecture == "gemma" else INIT_STD


def _residual_std(config: ModelConfig) -> float:
    """GPT-2 scales what is added to the residual stream by 1/sqrt(number of additions)."""
    return INIT_STD / math.sqrt(2 * config.n_layer)


class Attention(nnx.Module):
    """Multi-head self-attention; `attend` says what a query may see."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        width = config.n_embd
        self.n_head = config.n_head
        self.rotary = config.architecture == "gemma"
        self.qkv = Linear(width, 3 * width, std=INIT_STD, config=config, dtype=dtype, rngs=rngs)
        self.out = Linear(
            width, width, std=_residual_std(config), config=config, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "n embed"], positions: Int[Array, " time"], attend: Attend[Cache]
    ) -> tuple[Float[Array, "n embed"], Cache]:
        """The attention's output for each token, and the layer's new cache if there is one."""
        shape = (-1, positions.size, self.n_head, x.shape[1] // self.n_head)
        query, key, value = (y.reshape(shape) for y in jnp.split(self.qkv(x), 3, axis=1))
        if self.rotary:
            query, key = rotate(query, positions), rotate(key, positions)
        context, cache = attend(query, key, value)
        return self.out(context.reshape(x.shape)), cache


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU by tanh (arXiv 1606.08415), reckoned in f32.

    Its gradient starts from `x` again: a second tanh costs less than to write the first one,
    f32 and as wide as the MLP, and read it back.
    """
    return nnx.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    def in_f32(x: Array) -> Array:
        return nnx.gelu(x, approximate=True)

    slope = jax.vjp(in_f32, x.astype(jnp.float32))[1](gradient.astype(jnp.float32))[0]
    return (slope.astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class MLP(nnx.Module):
    """Four times as wide inside; GELU, gated for Gemma (GEGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        width = config.n_embd
        self.gated = config.architecture == "gemma"
        inner = 4 * width * (2 if self.gated else 1)
        self.up = Linear(width, inner, std=INIT_STD, config=config, dtype=dtype, rngs=rngs)
        self.down = Linear(
            4 * width, width, std=_residual_std(config), config=config, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "n embed"]) -> Float[Array, "n embed"]:
        """The MLP's output for each token."""
        hidden = self.up(x)
        if self.gated:
            gate, hidden = jnp.split(hidden, 2, axis=-1)
            return self.down(gelu(gate) * hidden)
        return self.down(gelu(hidden))


class Block(nnx.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, dtype, rngs)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "n embed"],
        positions: Int[Array, " time"],
        attend: Attend[Cache],
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "n embed"], Cache]:
        """The residual stream after this block, and the layer's new cache if there is one."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        attended, cache = self.attention(self.attention_norm(x), positions, attend)
        x = x + self._drop(attended, keys[0])
        x = x + self._drop(self.mlp(self.mlp_norm(x)), keys[1])
        return x, cache

    def _drop(self, x: Array, key: PRNGKeyArray | None) -> Array:
        return self.dropout(x, deterministic=key is None, rngs=key)


class GPT(nnx.Module):
    """A decoder-only language model. Parameters are f32; `dtype` is what it computes in."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dtype
        self.streamed = False
        self.token_embedding = nnx.Param(
            nnx.initializers.normal(_embedding_std(config))(
                rngs.params(), (config.vocab_size, config.n_embd), jnp.float32
            )
        )
        if config.architecture == "gpt2":
            self.position_embedding = nnx.Param(
                nnx.initializers.normal(INIT_STD)(
                    rngs.params(), (config.block_size, config.n_embd), jnp.float32
                )
            )
        self.blocks = nnx.List([Block(config, dtype, rngs) for _ in range(config.n_layer)])
        self.final_norm = _norm(config, dtype, rngs)
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
        batch, time = tokens.shape
        x = self._embed(tokens)
        if self.config.architecture == "gpt2":
            positions = self.position_embedding[:time].astype(self.dtype)
            x = (x.reshape(batch, time, -1) + positions).reshape(x.shape)
        if dropout_key is not None:
            x = self.dropout(x, rngs=jax.random.fold_in(dropout_key, self.config.n_layer))

        def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
            return causal_attention(query, key, value, implementation=attention), None

        for layer, block in enumerate(self.blocks):
            block_key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer)
            x, _ = block(x, jnp.arange(time), attend, block_key)
        return self.logits(self.final_norm(x)).reshape(batch, time, -1)

    def extend(
        self,
        tokens: Int[Array, "batch time"],
        past: list[KVCache],
        start: Int[Array, ""] | int,
        recent: list[KVCache],
        offset: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch time embed"], list[KVCache]]:
        """Final hidden states of tokens that follow others, and what they add to the caches.

        The tokens stand at positions start + offset and on: after the first `start` positions of
        `past` and the first `offset` of `recent`. Returns `recent` with theirs written into it.
        """
        batch, time = tokens.shape
        positions = start + offset + jnp.arange(time)
        x = self._embed(tokens)
        if self.config.architecture == "gpt2":
            learned = jnp.take(self.position_embedding[...], positions, axis=0, mode="clip")
            x = (x.reshape(batch, time, -1) + learned.astype(self.dtype)).reshape(x.shape)
        added = []
        for block, before, latest in zip(self.blocks, past, recent, strict=True):

            def attend(
                query: Array,
                key: Array,
                value: Array,
                before: KVCache = before,
                latest: KVCache = latest,
            ) -> tuple[Array, KVCache]:
                own = KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2))
                latest = latest.write(own, offset)
                context = cached_attention(query, before, start, latest, offset)
                return context.astype(self.dtype), latest

            x, latest = block(x, positions, attend, None)
            added.append(latest)
        return self.final_norm(x).reshape(batch, time, -1), added

    def logits(self, hidden: Float[Array, "n embed"]) -> Float[Array, "n vocab"]:
        """The head: the token embedding, transposed; summed and returned in f32."""
        if self.streamed:
            return streamed_product(hidden, self.token_embedding[...])
        return matmul_transposed(hidden, self.token_embedding[...], self.dtype)

    def _embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "n embed"]:
        x = embed(self.token_embedding[...], tokens.reshape(-1), self.dtype)
        if self.config.architecture == "gemma":
            x = x * jnp.asarray(math.sqrt(self.config.n_embd), self.dtype)
        return x


def empty_caches(config: ModelConfig, batch: int, length: int, dtype: Any) -> list[KVCache]:
    """A cache of `length` positions for each layer, with nothing in it yet."""
    shape = (batch, config.n_head, length, config.n_embd // config.n_head)
    return [
        KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)
    ]


def graph(config: ModelConfig, dtype: Any, *, streamed: bool = False) -> "nnx.GraphDef[GPT]":
    """The model less its parameters, for `nnx.merge(graph, params)`; computes nothing.

    `streamed` is for decoding, where each weight is read for a few rows only: the model then
    takes what `streamed_params` gives.
    """
    model = nnx.eval_shape(lambda: GPT(config, dtype=dtype, rngs=nnx.Rngs(0)))
    model.set_attributes(streamed=streamed)
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

    @jax.jit
    def initialise() -> Params:
        model = GPT(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return initialise()


def abstract_params(config: ModelConfig) -> Params:
    """The shapes and types of `init_params`, without their values."""
    return jax.eval_shape(functools.partial(init_params, config, 0))


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
