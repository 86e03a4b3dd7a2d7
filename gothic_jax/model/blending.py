"""The blend of several voices' expectations: the formula that writes and the one that measures."""

from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float

Numbers = TypeVar("Numbers", Array, np.ndarray)


def weighted_sum(
    log_probabilities: Float[Numbers, "*texts voice vocab"], weights: Float[Numbers, " voice"]
) -> Float[Numbers, "*texts vocab"]:
    """For each text the sum over its voices of weight times log-probability, up to a constant.

    With weights of 0 to 1 that add up to 1 it is the voices' geometric mean; beyond, the contrast
    of DExperts (arXiv 2105.03023). Of JAX's arrays or NumPy's.
    """
    return (weights[:, None] * log_probabilities).sum(axis=-2)
