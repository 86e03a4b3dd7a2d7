"""A GGUF file, which llama.cpp loads, and what Ollama needs beside it."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gothic_jax.errors import UserError
from gothic_jax.model.layouts import Tensors
from gothic_jax.model.shape import ModelConfig
from gothic_jax.shipping.huggingface import chat_template
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import ANY
from gothic_jax.text.works import END_OF_TEXT
from gothic_jax.writing.settings import Sampling


def write(
    path: Path, tensors: Tensors, config: ModelConfig, tokenizer: Tokenizer, name: str, kind: str
) -> None:
    """Writes a GGUF file; `kind` is one of request.TYPES.

    Raises UserError without the package `gguf`.
    """
    gguf = load_package("gguf")
    writer = gguf.GGUFWriter(path, config.architecture)
    writer.add_name(name)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_head)
    if config.architecture == "gemma":
        writer.add_head_count_kv(config.n_head)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    _add_tokenizer(gguf, writer, tokenizer)
    quantized = gguf.GGMLQuantizationType[kind.upper()]
    for tensor, array in tensors.items():
        raw = gguf.GGMLQuantizationType.F32 if array.ndim < 2 else quantized
        writer.add_tensor(tensor, gguf.quantize(array.astype(np.float32), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer) -> None:
    tokens, merges = tokenizer.vocabulary()
    special = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [special if t in tokenizer.special_tokens else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.any_voice)
    writer.add_eos_token_id(tokenizer.end_of_text)
    # A prompt opens with its voice; where it has none, with that of no voice in particular. Before
    # a voice that opener does no harm.
    writer.add_add_bos_token(True)
    writer.add_chat_template(chat_template([*tokenizer.voices]))


def modelfile(gguf: str, config: ModelConfig, voices: Iterable[str]) -> str:
    """Ollama's description of a model in a GGUF file beside it.

    The text is that of `chat_template`: the opener of the last system message that is a voice's
    name, and all other messages as they are.
    """
    sampling = Sampling()
    known = " ".join(f'(eq .Content "{voice}")' for voice in (ANY, *voices))
    return (
        f"FROM ./{gguf}\n"
        f'TEMPLATE """{{{{ $voice := "{ANY}" }}}}'
        '{{ range .Messages }}{{ if eq .Role "system" }}'
        f"{{{{ if or {known} }}}}{{{{ $voice = .Content }}}}{{{{ end }}}}"
        "{{ end }}{{ end }}<|{{ $voice }}|>"
        '{{ range .Messages }}{{ if ne .Role "system" }}{{ .Content }}{{ end }}{{ end }}"""\n'
        f"PARAMETER num_ctx {config.block_size}\n"
        f'PARAMETER stop "{END_OF_TEXT}"\n'
        f"PARAMETER temperature {sampling.temperature}\n"
        f"PARAMETER top_k {sampling.top_k}\n"
        f"PARAMETER top_p {sampling.top_p}\n"
        "PARAMETER repeat_penalty 1.0\n"  # none; 1.1 where nothing is said
    )


def load_package(name: str) -> Any:
    """A package of the extra `ship`. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"the package {name} is missing: scripts/install.sh ship") from error
