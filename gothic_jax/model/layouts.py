"""The parameters' names and layouts in other programs: one table an architecture.

A kernel here is [in, out]. Hugging Face keeps GPT-2's so, and Gemma's as [out, in]; GGUF keeps all
as [out, in]. Where a row names several tensors, they are the parts of ours along its outputs.
Hugging Face's Gemma stores the scale of a norm less 1; GGUF stores it plain.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from gothic_jax.model.shape import ModelConfig

Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


class Row(NamedTuple):
    """A parameter under its name here and elsewhere; `*` stands for the number of the layer."""

    ours: str
    huggingface: tuple[str, ...]
    gguf: tuple[str, ...]


GEMMA = (
    Row("token_embedding", ("model.embed_tokens.weight",), ("token_embd.weight",)),
    Row(
        "blocks.*.attention_norm.scale",
        ("model.layers.*.input_layernorm.weight",),
        ("blk.*.attn_norm.weight",),
    ),
    Row(
        "blocks.*.attention.qkv.kernel",
        tuple(f"model.layers.*.self_attn.{part}_proj.weight" for part in "qkv"),
        tuple(f"blk.*.attn_{part}.weight" for part in "qkv"),
    ),
    Row(
        "blocks.*.attention.out.kernel",
        ("model.layers.*.self_attn.o_proj.weight",),
        ("blk.*.attn_output.weight",),
    ),
    Row(
        "blocks.*.mlp_norm.scale",
        ("model.layers.*.post_attention_layernorm.weight",),
        ("blk.*.ffn_norm.weight",),
    ),
    Row(
        "blocks.*.mlp.up.kernel",
        tuple(f"model.layers.*.mlp.{part}_proj.weight" for part in ("gate", "up")),
        tuple(f"blk.*.ffn_{part}.weight" for part in ("gate", "up")),
    ),
    Row(
        "blocks.*.mlp.down.kernel",
        ("model.layers.*.mlp.down_proj.weight",),
        ("blk.*.ffn_down.weight",),
    ),
    Row("final_norm.scale", ("model.norm.weight",), ("output_norm.weight",)),
)
_GPT2_LAYER = {
    "attention_norm": ("ln_1", "attn_norm"),
    "attention.qkv": ("attn.c_attn", "attn_qkv"),
    "attention.out": ("attn.c_proj", "attn_output"),
    "mlp_norm": ("ln_2", "ffn_norm"),
    "mlp.up": ("mlp.c_fc", "ffn_up"),
    "mlp.down": ("mlp.c_proj", "ffn_down"),
}
GPT2 = (
    Row("token_embedding", ("transformer.wte.weight",), ("token_embd.weight",)),
    Row("position_embedding", ("transformer.wpe.weight",), ("position_embd.weight",)),
    *(
        Row(
            f"blocks.*.{ours}.{'scale' if 'norm' in ours and kind == 'weight' else own}",
            (f"transformer.h.*.{huggingface}.{kind}",),
            (f"blk.*.{gguf}.{kind}",),
        )
        for ours, (huggingface, gguf) in _GPT2_LAYER.items()
        for kind, own in (("weight", "kernel"), ("bias", "bias"))
    ),
    Row("final_norm.scale", ("transformer.ln_f.weight",), ("output_norm.weight",)),
    Row("final_norm.bias", ("transformer.ln_f.bias",), ("output_norm.bias",)),
)
TABLES = {"gemma": GEMMA, "gpt2": GPT2}


def to_huggingface(params: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """The parameters, by name, as Transformers' `GemmaForCausalLM` or `GPT2LMHeadModel` has them.

    The head is left out: it is the embedding.
    """
    return _contiguous(_huggingface_views(params, config))


def _huggingface_views(params: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    gemma = config.architecture == "gemma"

    def laid_out(ours: str, array: np.ndarray) -> np.ndarray:
        if gemma and ours.endswith("scale"):
            return array - 1
        return array.T if gemma and ours.endswith("kernel") else array

    return _renamed(params, config, lambda row: row.huggingface, laid_out)


def huggingface_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shape of each tensor that `to_huggingface` gives, from those of the parameters."""
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    return {name: array.shape for name, array in _huggingface_views(empty, config).items()}


def from_huggingface(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """The parameters, by name, from Transformers' tensors: what `to_huggingface` was given."""
    gemma = config.architecture == "gemma"
    params = {}
    for row in _rows(config):
        array = np.concatenate([tensors[name] for name in row.huggingface])
        if gemma and row.ours.endswith("scale"):
            array = array + 1
        params[row.ours] = array.T if gemma and row.ours.endswith("kernel") else array
    return params


def to_gguf(params: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """The parameters, by name, as llama.cpp has them."""

    def laid_out(ours: str, array: np.ndarray) -> np.ndarray:
        return array.T if ours.endswith("kernel") else array

    return _contiguous(_renamed(params, config, lambda row: row.gguf, laid_out))


def _contiguous(tensors: Tensors) -> Tensors:
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _renamed(
    params: Mapping[str, np.ndarray],
    config: ModelConfig,
    theirs: Callable[[Row], tuple[str, ...]],
    laid_out: Callable[[str, np.ndarray], np.ndarray],
) -> Tensors:
    tensors: Tensors = {}
    for row in _rows(config):
        array = laid_out(row.ours, params[row.ours])
        # Several parts only where the outputs are the first axis.
        parts = np.split(array, len(theirs(row)))
        tensors |= dict(zip(theirs(row), parts, strict=True))
    return tensors


def _rows(config: ModelConfig) -> Iterator[Row]:
    """The table, with a row for each layer."""
    for row in TABLES[config.architecture]:
        for layer in range(config.n_layer) if "*" in row.ours else (0,):
            ours, huggingface, gguf = row
            yield Row(
                ours.replace("*", str(layer)),
                tuple(name.replace("*", str(layer)) for name in huggingface),
                tuple(name.replace("*", str(layer)) for name in gguf),
            )
