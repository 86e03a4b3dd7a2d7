"""What is measured: cases as plain values, which go to each system's process as JSON."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

Architecture = Literal["gpt2", "gemma"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of the model; the defaults are those of the package."""

    architecture: Architecture = "gpt2"
    block_size: int = 384
    vocab_size: int = 4096
    n_layer: int = 8
    n_head: int = 8
    n_embd: int = 512


@dataclasses.dataclass(frozen=True)
class Train:
    """Iterations of training: micro-batches, AdamW, nothing else. No dropout."""

    model: Model
    batch: int  # windows in a micro-batch
    micro_batches: int  # in an iteration
    dtype: Dtype  # of the products; parameters and optimizer are float32
    iterations: int  # timed together in one run; only the last one is waited for

    @property
    def tokens(self) -> int:
        """Tokens of a run."""
        return self.iterations * self.micro_batches * self.batch * self.model.block_size


@dataclasses.dataclass(frozen=True)
class Decode:
    """Writing from a KV cache, with temperature 0.8 and top-k 40."""

    model: Model
    streams: int
    prompt: int  # tokens
    new_tokens: int
    dtype: Dtype  # of weights and products

    @property
    def tokens(self) -> int:
        """Tokens that a run writes."""
        return self.streams * self.new_tokens


Case = Train | Decode


class Prepared(NamedTuple):
    """A case that a system is ready to run, compiled and warm."""

    run: Callable[[], dict[str, float]]
    """Runs once; gives seconds by name: `run` and, of a decoding case, `first_token`."""
    facts: dict[str, float]
    """What is measured once: `first_call` seconds, `peak_bytes` if the system knows them."""


class Unable(Exception):
    """A system cannot run this case; the message says why, for the table."""
