"""Small, fixed weights and tokens on which two implementations of one model are compared.

Nothing but NumPy is needed, so the tests can make the very weights from which
`make_reference.py` computed its figures with Hugging Face Transformers. The names and the layouts
are those of the Transformers state dicts: GPT-2's `Conv1D` keeps its matrices as [in, out], Gemma's
`Linear` as [out, in]. The tied `lm_head.weight` is left out.
"""

import zlib

import numpy as np

CONFIG: dict[str, int] = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "block_size": 24,
}

_BATCH = 2
_STD = 0.1


def _gpt2_shapes() -> dict[str, tuple[int, ...]]:
    """Give the shape of each tensor of a `GPT2LMHeadModel`, by name."""
    width = CONFIG["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (CONFIG["vocab_size"], width),
        "transformer.wpe.weight": (CONFIG["block_size"], width),
    }
    for layer in range(CONFIG["n_layer"]):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}.{norm}.weight"] = (width,)
            shapes[f"{block}.{norm}.bias"] = (width,)
        for name, n_in, n_out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes[f"{block}.{name}.weight"] = (n_in, n_out)
            shapes[f"{block}.{name}.bias"] = (n_out,)
    shapes["transformer.ln_f.weight"] = (width,)
    shapes["transformer.ln_f.bias"] = (width,)
    return shapes


def _gemma_shapes() -> dict[str, tuple[int, ...]]:
    """Give the shape of each tensor of a `GemmaForCausalLM`, by name."""
    width = CONFIG["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], width),
    }
    for layer in range(CONFIG["n_layer"]):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{block}.self_attn.{name}.weight"] = (width, width)
        shapes[f"{block}.mlp.gate_proj.weight"] = (4 * width, width)
        shapes[f"{block}.mlp.up_proj.weight"] = (4 * width, width)
        shapes[f"{block}.mlp.down_proj.weight"] = (width, 4 * width)
        shapes[f"{block}.input_layernorm.weight"] = (width,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    return shapes


def reference_weights(architecture: str) -> dict[str, np.ndarray]:
    """Make the float32 weights of "gpt2" or "gemma", by their Transformers names.

    Each tensor is drawn from a generator seeded by the CRC-32 of its name, so that it depends on
    neither the order nor the number of the others. All are normal with a standard deviation of 0.1
    around 0, but for the LayerNorm weights of GPT-2, which lie around 1. (Gemma's RMSNorm weights
    are stored less 1, so theirs lie around 0.)
    """
    if architecture == "gpt2":
        shapes = _gpt2_shapes()
    elif architecture == "gemma":
        shapes = _gemma_shapes()
    else:
        raise ValueError(f"no such architecture: {architecture!r} (gpt2 or gemma)")
    weights: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode("ascii")))
        mean = 1.0 if ".ln_" in name and name.endswith(".weight") else 0.0
        weights[name] = (mean + _STD * rng.standard_normal(shape)).astype(np.float32)
    return weights


def reference_tokens() -> np.ndarray:
    """Make the int32 token ids, [2, block_size]; the first and the last id are among them."""
    rng = np.random.default_rng(zlib.crc32(b"tokens"))
    shape = (_BATCH, CONFIG["block_size"])
    tokens = rng.integers(0, CONFIG["vocab_size"], size=shape, dtype=np.int32)
    tokens[0, 5] = 0
    tokens[1, 7] = CONFIG["vocab_size"] - 1
    return tokens
