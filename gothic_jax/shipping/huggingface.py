"""A folder that Hugging Face's transformers loads, with no code of ours in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from gothic_jax.model.layouts import Tensors
from gothic_jax.model.shape import ROPE_BASE, ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import ANY, voice_token
from gothic_jax.text.works import END_OF_TEXT
from gothic_jax.writing.settings import Sampling


def write(
    folder: Path, tensors: Tensors, config: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> None:
    """Writes weights, configuration and tokenizer into a folder that is there.

    `dtype` is one of request.DTYPES. Raises OSError.
    """
    types = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    kept = {name: array.astype(types[dtype]) for name, array in tensors.items()}
    # Written here: the library's own writer makes a file that only its owner can read.
    (folder / "model.safetensors").write_bytes(save(kept, metadata={"format": "pt"}))
    specials = {
        "bos_token_id": tokenizer.any_voice,
        "eos_token_id": tokenizer.end_of_text,
        # Gemma's own default would be the token 0, which here ends a work.
        "pad_token_id": None,
    }
    _write_json(folder / "config.json", model_config(config) | specials | {"dtype": dtype})
    sampling = Sampling()
    _write_json(
        folder / "generation_config.json",
        specials
        | {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        },
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_json(pretty=True), encoding="utf-8")
    template = chat_template([*tokenizer.voices])
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            # The class that versions 4 and 5 both load as it is.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": voice_token(ANY),
            "eos_token": END_OF_TEXT,
            "model_max_length": config.block_size,
            "clean_up_tokenization_spaces": False,
            "chat_template": template,
        },
    )


def model_config(config: ModelConfig) -> dict[str, Any]:
    """What Transformers calls the model's configuration."""
    if config.architecture == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
            "resid_pdrop": config.dropout,
            "tie_word_embeddings": True,
        }
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": config.norm_eps,
        # The first is version 4's name, the second version 5's.
        "rope_theta": ROPE_BASE,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }


def chat_template(voices: Sequence[str]) -> str:
    """A Jinja template that opens the text in a voice, and lets it follow as it is.

    The voice is the argument `voice`, or the system message where that is a voice's name.
    """
    names = ", ".join(f"'{voice}'" for voice in voices)
    return (
        "{%- set ns = namespace(voice='" + ANY + "') -%}"
        "{%- set voices = [" + names + "] -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' and message['content'] | trim in voices -%}"
        "{%- set ns.voice = message['content'] | trim -%}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if voice is defined and voice in voices -%}{%- set ns.voice = voice -%}{%- endif -%}"
        "{{- '<|' + ns.voice + '|>' -}}"
        "{%- for message in messages if message['role'] != 'system' -%}"
        "{{- message['content'] -}}"
        "{%- endfor -%}"
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
