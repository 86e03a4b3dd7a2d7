"""What can be exported, and what is to be."""

from collections.abc import Sequence
from typing import NamedTuple

FORMS = ("hf", "gguf", "ollama")
"""A folder for transformers, a file for llama.cpp, and such a file with Ollama's Modelfile."""
DTYPES = ("float32", "bfloat16")
"""Of the weights for transformers."""
TYPES = ("f32", "f16", "bf16", "q8_0")
"""Of the matrices for llama.cpp; vectors are f32 in every file."""


class Request(NamedTuple):
    """What to export."""

    forms: Sequence[str]
    """Some of FORMS; several have a folder each."""
    dtype: str
    """One of DTYPES."""
    kind: str
    """One of TYPES."""
    name: str
    """Of the model."""
