"""Arrays of a checkpoint from its files, which may be a stranger's.

Each reader compares names, shapes and types with what is wanted before it reads any array.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives NumPy bfloat16, which safetensors asks it for
import numpy as np
import tensorstore
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"


def read_orbax(folder: Path, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that Orbax wrote to `folder`, by name; raises ValueError or OSError.

    Read with the library that Orbax reads with: to import Orbax takes longer than to read a small
    model. What is stored must have the shapes and types of `wanted`, and no chunks larger than
    them: reading allocates whole chunks, so a small file could ask for any amount of memory.
    """
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    keys = tensorstore.KvStore.open(database).result().list().result()
    _refuse_other_names({key.decode().rpartition("/")[0] for key in keys}, wanted)
    opened = {
        name: tensorstore.open(
            {"driver": "zarr", "kvstore": database | {"path": f"{name}/"}}, open=True, read=True
        )
        for name in wanted
    }
    for name, leaf in wanted.items():
        there = opened[name].result()
        chunk = there.chunk_layout.read_chunk.shape or ()  # None for a scalar
        if (there.shape, there.dtype.name) != (leaf.shape, leaf.dtype.name):
            raise ValueError(f"{name} is {there.dtype.name}{list(there.shape)}")
        if len(chunk) != leaf.ndim or any(n > m for n, m in zip(chunk, leaf.shape, strict=True)):
            raise ValueError(f"{name} is cut into chunks of {list(chunk)}")
    read = {name: store.result().read() for name, store in opened.items()}
    return {name: array.result() for name, array in read.items()}


def read_safetensors(folder: Path, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `folder`'s WEIGHTS by name; raises ValueError or OSError.

    The file has them in bfloat16; they are given in the type that is wanted.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            _refuse_other_names(set(file.keys()), wanted)
            for name, leaf in wanted.items():
                there = file.get_slice(name)
                if (tuple(there.get_shape()), there.get_dtype()) != (leaf.shape, "BF16"):
                    raise ValueError(f"{name} is {there.get_dtype()}{there.get_shape()}")
            return {name: file.get_tensor(name).astype(leaf.dtype) for name, leaf in wanted.items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _refuse_other_names(stored: set[str], wanted: Mapping[str, Any]) -> None:
    if odd := stored ^ wanted.keys():
        raise ValueError(f"{min(odd)} is {'not expected' if min(odd) in stored else 'missing'}")
