"""gothic_jax itself: the step of gothic-train and the sampler of gothic-chat, as they are."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.cases import Case, Decode, Model, Prepared, Train, Unable
from gothic_jax.config import get_config
from gothic_jax.machine.device import memory_peak, select_device
from gothic_jax.model.attention import choose
from gothic_jax.model.gpt import init_params
from gothic_jax.model.shape import ModelConfig
from gothic_jax.training.optimizer import init_optimizer, make_optimizer
from gothic_jax.training.step import TrainState, make_train_step
from gothic_jax.writing.sampler import Sampler
from gothic_jax.writing.settings import Sampling

_SEED = 0


def prepare(case: Case, *, device: str) -> Prepared:
    """A case that is compiled and warm on "cpu" or "cuda". Raises Unable."""
    if case.dtype == "float16":
        raise Unable("gothic_jax computes in float32 or bfloat16")
    chosen = select_device(device)
    if isinstance(case, Train):
        run, facts = _trainer(case, chosen)
    else:
        run, facts = _writer(case), {}
    started = time.perf_counter()
    run()
    facts["first_call"] = facts.get("compile", 0.0) + time.perf_counter() - started
    return Prepared(run, facts)


def peak_bytes() -> int:
    """Peak memory of the device, or of this process on a CPU."""
    return memory_peak(jax.devices()[0])


def settings(case: Train) -> ConfigDict:
    """The settings of gothic-train for a case."""
    config = get_config()
    config.model.update({**dataclasses.asdict(case.model), "dropout": 0.0})
    config.batch_size = case.batch
    config.gradient_accumulation_steps = case.micro_batches
    config.compute_dtype = case.dtype
    return config


def _trainer(
    case: Train, device: jax.Device
) -> tuple[Callable[[], dict[str, float]], dict[str, float]]:
    config = settings(case)
    params = init_params(ModelConfig(**config.model), _SEED)
    state = TrainState(params, init_optimizer(make_optimizer(config), params))
    shape = (case.micro_batches, case.batch, case.model.block_size + 1)
    windows = jax.device_put(
        np.random.default_rng(_SEED).integers(case.model.vocab_size, size=shape, dtype=np.int32)
    )
    head_dim = case.model.n_embd // case.model.n_head
    attention, _ = choose(device, head_dim, jnp.dtype(case.dtype))
    started = time.perf_counter()
    step = jax.jit(make_train_step(config, attention), donate_argnums=0)
    compiled: Any = step.lower(state, windows).compile()
    facts = {"compile": time.perf_counter() - started}

    def run() -> dict[str, float]:
        nonlocal state
        started = time.perf_counter()
        for _ in range(case.iterations):
            state, metrics = compiled(state, windows)
        jax.block_until_ready((state, metrics))
        queued = time.perf_counter() - started
        if device.platform == "cpu":
            return {"run": queued}
        # The same again, each iteration waited for: the difference is what the queue hides.
        started = time.perf_counter()
        for _ in range(case.iterations):
            state, metrics = jax.block_until_ready(compiled(state, windows))
        return {"run": queued, "waited": time.perf_counter() - started}

    return run, facts


def _model(shape: Model) -> ModelConfig:
    return ModelConfig(**dataclasses.asdict(shape), dropout=0.0)


def _writer(case: Decode) -> Callable[[], dict[str, float]]:
    if case.prompt + case.new_tokens > case.model.block_size:
        raise Unable("longer than the block size")
    config = _model(case.model)
    params = init_params(config, _SEED)
    sampler = Sampler(config, dtype=jnp.dtype(case.dtype))
    prompt = np.random.default_rng(_SEED).integers(
        case.model.vocab_size, size=(case.streams, case.prompt), dtype=np.int32
    )

    def run() -> dict[str, float]:
        started = time.perf_counter()
        first, written = 0.0, 0
        for chunk in sampler.stream(
            params,
            prompt,
            max_tokens=case.new_tokens,
            sampling=Sampling(temperature=0.8, top_k=40, top_p=1.0),
            seed=_SEED,
        ):
            first = first or time.perf_counter() - started
            written += chunk.shape[1]
        seconds = time.perf_counter() - started
        if written != case.new_tokens:
            raise RuntimeError(f"{written} tokens written, not {case.new_tokens}")
        return {"run": seconds, "first_token": first}

    return run
