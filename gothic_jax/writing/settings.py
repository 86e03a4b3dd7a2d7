"""How to write: the settings of a text, and their limits."""

from typing import NamedTuple

from gothic_jax.errors import UserError
from gothic_jax.model.shape import INTEGER_LIMIT
from gothic_jax.text.voices import Blend, describe

MAX_SAMPLES = 2**16
"""Written as one batch; more is a typing error."""
MIN_GUARDED, MAX_GUARDED = 3, 64
"""The fewest and most words that a copy guard's span may have; of fewer, much is shared by all."""
RECEIPTS = "samples.jsonl"
"""The file beside a run's checkpoints that has a receipt of each sample."""
MAX_TEMPERATURE = 1000
"""At larger ones all tokens are equally likely, and an f32 overflows at 1e38."""


def check_copy_guard(words: int | None) -> int | None:
    """The same number; raises UserError where a copy guard cannot have it."""
    if words is not None and not MIN_GUARDED <= words <= MAX_GUARDED:
        raise UserError(f"--copy-guard must be from {MIN_GUARDED} to {MAX_GUARDED}, not {words}")
    return words


class Sampling(NamedTuple):
    """How the next token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 40
    """Only the k likeliest tokens are drawn; 0 draws from all."""
    top_p: float = 0.9
    """Of these, only the fewest whose probabilities reach p together; 1 keeps all."""

    def validate(self) -> None:
        """Raises UserError where a number is out of its range."""
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise UserError(
                f"temperature must be from 0 to {MAX_TEMPERATURE:,}, not {self.temperature}"
            )
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (off) or above, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, not {self.top_p}")


class Settings(NamedTuple):
    """How to write: what a person may change between two texts."""

    sampling: Sampling
    max_tokens: int
    blend: Blend
    """The voices and their weights; empty: no voice in particular."""
    seed: int | None
    """None: another one for each text."""

    def validate(self) -> None:
        """Raises UserError where a setting is out of its range."""
        self.sampling.validate()
        if self.max_tokens < 1:
            raise UserError(f"max-tokens must be at least 1, not {self.max_tokens}")
        if self.seed is not None and not 0 <= self.seed < INTEGER_LIMIT:
            raise UserError(f"seed must be at least 0 and below {INTEGER_LIMIT}, not {self.seed}")

    def __str__(self) -> str:
        """The settings in a line."""
        temperature, top_k, top_p = self.sampling
        return (
            f"{describe(self.blend)}, temperature {temperature:g}, top-k {top_k},"
            f" top-p {top_p:g}, max {self.max_tokens} tokens,"
            f" seed {'random' if self.seed is None else self.seed}"
        )
