"""The default run: both voices, 35.7M parameters, meant for an RTX 4080.

gothic-train --config=configs/gothic.py
"""

from gothic_jax.config import get_config

__all__ = ["get_config"]
