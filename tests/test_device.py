"""Memory, compared before it is used where it is the machine's own; the type for writing."""

from unittest.mock import Mock

import jax
import pytest

from gothic_jax.errors import UserError
from gothic_jax.machine.device import decoding_dtype, refuse_beyond_memory


def test_only_what_lives_in_the_machines_memory_is_compared_with_it() -> None:
    with pytest.raises(UserError, match=r"a model needs .* GiB"):
        refuse_beyond_memory(Mock(spec=jax.Device, platform="cpu"), 2**60, "a model")
    refuse_beyond_memory(Mock(spec=jax.Device, platform="gpu"), 2**60, "a model")


@pytest.mark.parametrize(
    ("platform", "flags", "dtype"),
    [
        ("gpu", set(), "bfloat16"),
        ("cpu", {"avx512f", "avx512_bf16", "amx_bf16"}, "bfloat16"),
        ("cpu", {"avx512f", "avx512_bf16"}, "float32"),
        ("cpu", set(), "float32"),
    ],
)
def test_a_cpu_without_amx_writes_in_float32(
    monkeypatch: pytest.MonkeyPatch, platform: str, flags: set[str], dtype: str
) -> None:
    monkeypatch.setattr("gothic_jax.machine.device.cpu_flags", lambda: frozenset(flags))
    assert decoding_dtype(Mock(spec=jax.Device, platform=platform)) == dtype
