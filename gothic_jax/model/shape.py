"""The shape of a model: the numbers that its parameters follow from, and their limits."""

import dataclasses

from gothic_jax.errors import UserError

ARCHITECTURES = ("gemma", "gpt2")
MAX_VOCABULARY = 2**16
"""Tokens are stored in 16 bits."""
INTEGER_LIMIT = 2**32
"""Whole numbers in settings and receipts are smaller, seeds among them."""
LIMITS = {
    "block_size": 2**17,
    "vocab_size": MAX_VOCABULARY,
    "n_layer": 2**7,
    "n_head": 2**7,
    "n_embd": 2**14,
}
"""Larger values are typing errors or hostile input."""
NORM_EPS = {"gemma": 1e-6, "gpt2": 1e-5}
"""What a norm adds to the variance, by architecture."""
ROPE_BASE = 10_000.0
"""Of Gemma's rotary positions."""
MLP_FACTOR = 4
"""Widths of the model in its MLP."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The defaults make 35.7M parameters."""

    architecture: str = "gemma"
    block_size: int = 384  # longest context, in tokens
    vocab_size: int = 4096
    n_layer: int = 8
    n_head: int = 8
    n_embd: int = 512
    dropout: float = 0.1  # after the embedding, each attention and each MLP

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the MLP inside."""
        return MLP_FACTOR * self.n_embd

    @property
    def norm_eps(self) -> float:
        """What a norm adds to the variance."""
        return NORM_EPS[self.architecture]

    def validate(self) -> None:
        """Raises UserError where no model has these numbers."""
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"model.architecture must be one of {', '.join(ARCHITECTURES)}, "
                f"not {self.architecture!r}"
            )
        for name, limit in LIMITS.items():
            if not 0 < getattr(self, name) <= limit:
                raise UserError(
                    f"model.{name} must be above 0 and at most {limit:,}, not {getattr(self, name)}"
                )
        if self.n_embd % self.n_head:
            raise UserError(
                f"model.n_embd ({self.n_embd}) must be a multiple of model.n_head ({self.n_head})"
            )
        if self.architecture == "gemma" and self.head_dim % 2:
            raise UserError("model.n_embd / model.n_head must be even for rotary positions")
