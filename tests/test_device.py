"""Memory: compared before it is used, where it is the machine's own."""

from unittest.mock import Mock

import jax
import pytest

from gothic_jax.errors import UserError
from gothic_jax.machine.device import refuse_beyond_memory


def test_only_what_lives_in_the_machines_memory_is_compared_with_it() -> None:
    with pytest.raises(UserError, match=r"a model needs .* GiB"):
        refuse_beyond_memory(Mock(spec=jax.Device, platform="cpu"), 2**60, "a model")
    refuse_beyond_memory(Mock(spec=jax.Device, platform="gpu"), 2**60, "a model")
