"""A model in a folder of Hugging Face's transformers: GPT-2's shape, or Gemma 1's.

Nothing in such a folder is trusted: weights are read from safetensors only, whose header is
compared with the configuration first; no code in it is run.
"""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - gives NumPy bfloat16, which safetensors asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from gothic_jax.checkpoints.arrays import WEIGHTS
from gothic_jax.errors import UserError
from gothic_jax.machine.files import UNSOUND, file_sha256, parse_json, read_regular, sha256
from gothic_jax.model.layouts import from_huggingface, huggingface_shapes
from gothic_jax.model.shape import MLP_FACTOR, NORM_EPS, ROPE_BASE, ModelConfig
from gothic_jax.text.voices import ANY, voice_token
from gothic_jax.text.works import END_OF_TEXT

CONFIG = "config.json"
NOT_READ = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json")
"""Pickles and divided weights."""
_GPT2_PREFIX = "transformer."

_NEEDED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (NORM_EPS["gpt2"],),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    "gemma": {
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "hidden_act": ("gelu_pytorch_tanh",),
        "rms_norm_eps": (NORM_EPS["gemma"],),
        "rope_theta": (ROPE_BASE,),
        "rope_scaling": (None,),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
    },
}
"""What these settings must be, or be left out, for the model to be one of ours."""


_NUMBERS = (
    *("n_ctx", "n_positions", "vocab_size", "n_layer", "n_head", "n_embd", "n_inner"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"),
    *("hidden_size", "intermediate_size", "max_position_embeddings"),
)
"""Settings that are whole numbers where they are given."""


class Foreign(NamedTuple):
    """Such a folder, looked through."""

    folder: Path
    shape: ModelConfig
    tokenizer_json: bytes
    """In the form that the project's own has, with `<|any|>` added where it is missing."""
    added: int
    """Tokens that were added: the embedding has no rows for them."""
    seal: str
    """A SHA-256 of its configuration, tokenizer and weights."""

    def params(self, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The parameters in float32, by the project's own names; raises ValueError or OSError.

        What was added to the vocabulary begins as `<|endoftext|>`, after which such a model begins.
        """
        shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
        rows, width = shapes["token_embedding"]
        shapes["token_embedding"] = (rows - self.added, width)
        shape = ModelConfig(**vars(self.shape) | {"vocab_size": rows - self.added})
        theirs = huggingface_shapes(shape, shapes)
        params = from_huggingface(self._tensors(theirs), shape)
        vocabulary = parse_json(self.tokenizer_json)["model"]["vocab"]
        first = params["token_embedding"][vocabulary[END_OF_TEXT]]
        params["token_embedding"] = np.concatenate(
            [params["token_embedding"], *[first[None]] * self.added]
        )
        return params

    def _tensors(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        try:
            with safe_open((self.folder / WEIGHTS).resolve(), framework="numpy") as file:
                stored = set(file.keys())
                # Old files of GPT-2 name the tensors of its inner model.
                names = {
                    name: name if name in stored else name.removeprefix(_GPT2_PREFIX)
                    for name in wanted
                }
                for name, shape in wanted.items():
                    if names[name] not in stored:
                        raise ValueError(f"{name} is missing in {WEIGHTS}")
                    there = file.get_slice(names[name])
                    if tuple(there.get_shape()) != shape or there.get_dtype() not in (
                        "F32",
                        "F16",
                        "BF16",
                    ):
                        raise ValueError(f"{name} is {there.get_dtype()}{there.get_shape()}")
                return {name: _finite(name, file.get_tensor(names[name])) for name in wanted}
        except SafetensorError as error:
            raise ValueError(f"{WEIGHTS}: {error}") from error


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array in float32; raises ValueError where it would make every text NaN."""
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a number that is not finite")
    return array


def is_foreign(folder: Path) -> bool:
    """Whether a folder looks like one of transformers."""
    return (folder / CONFIG).is_file()


def open_foreign(folder: Path) -> Foreign:
    """Looks through a folder. Raises UserError, which names what cannot be used here."""
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            f"{folder} has no tokenizer.json; save the tokenizer there: transformers'"
            " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if not (folder / WEIGHTS).is_file():
        others = [name for name in NOT_READ if (folder / name).exists()]
        found = f"; {others[0]} is not read" if others else ""
        raise UserError(f"{folder} has no {WEIGHTS}{found}: save the model as one such file")
    try:
        config = read_regular((folder / CONFIG).resolve())
        tokenizer, added = _tokenizer(read_regular((folder / "tokenizer.json").resolve()))
        shape = _shape(parse_json(config))
        shape = ModelConfig(**vars(shape) | {"vocab_size": shape.vocab_size + added})
        shape.validate()
        seal = sha256(config + tokenizer + file_sha256(folder / WEIGHTS).encode())
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    except (RuntimeError, *UNSOUND) as error:  # RuntimeError: links in a circle
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        reason = textwrap.shorten(reason, 160)  # it may quote the file at any length
        raise UserError(f"{folder} cannot be used here: {reason}") from error
    return Foreign(folder, shape, tokenizer, added, seal)


def _shape(config: Any) -> ModelConfig:
    """The shape that a configuration describes; raises one of UNSOUND where it is none of ours."""
    kind = config["model_type"]
    if kind not in _NEEDED:
        raise ValueError(f"it is a model of type {kind!r}; gpt2 and gemma can be used")
    for name, value in config.items():
        if name in _NUMBERS and value is not None and type(value) is not int:
            raise TypeError(f"its {name} is {value!r}, which must be a whole number")
    for name, values in _NEEDED[kind].items():
        if name in config and config[name] not in values:
            raise ValueError(f"its {name} is {config[name]!r}, which must be {values[0]!r}")
    if kind == "gpt2":
        if config.get("n_inner") not in (None, MLP_FACTOR * config["n_embd"]):
            raise ValueError(f"its n_inner is {config['n_inner']}, not {MLP_FACTOR} times n_embd")
        return ModelConfig(
            architecture="gpt2",
            block_size=config.get("n_positions") or config["n_ctx"],
            vocab_size=config["vocab_size"],
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
            dropout=0.0,
        )
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config.get("num_key_value_heads", heads) != heads:
        raise ValueError(f"its {heads} heads share {config['num_key_value_heads']} keys and values")
    if config.get("head_dim", 256) * heads != width:
        raise ValueError("its heads are not hidden_size / num_attention_heads wide")
    if config["intermediate_size"] != MLP_FACTOR * width:
        raise ValueError(f"its intermediate_size is not {MLP_FACTOR} times hidden_size")
    rope = config.get("rope_parameters") or {}
    rotation = (rope.get("rope_type", "default"), rope.get("rope_theta", ROPE_BASE))
    if rotation != ("default", ROPE_BASE):
        raise ValueError(f"its rope_parameters are {rope}")
    return ModelConfig(
        architecture="gemma",
        block_size=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        n_layer=config["num_hidden_layers"],
        n_head=heads,
        n_embd=width,
        dropout=0.0,
    )


def _tokenizer(content: bytes) -> tuple[bytes, int]:
    """The tokenizer's JSON with an `<|any|>` token, and how many tokens were added."""
    value = parse_json(content)
    vocabulary, token = value["model"]["vocab"], voice_token(ANY)
    if not isinstance(vocabulary, dict) or token in vocabulary:
        return content, 0  # a list is another kind of tokenizer, which Tokenizer.parse names
    vocabulary[token] = len(vocabulary)
    value["added_tokens"].append({"id": vocabulary[token], "content": token, "special": True})
    return json.dumps(value).encode(), 1
