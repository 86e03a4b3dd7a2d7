"""Gothic Dandy: a small GPT in JAX that writes like H.P. Lovecraft and Oscar Wilde."""

__version__ = "0.1.0"
