"""What surrounds the step: batches, checkpoints, the novelty of what was written."""

import dataclasses
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from benchmarks.cases import Model, Train
from benchmarks.gothic import prepare, settings
from gothic_jax.checkpoints import checkpoint
from gothic_jax.checkpoints.saver import Saver
from gothic_jax.commands import tokenize
from gothic_jax.machine import environment
from gothic_jax.machine.files import file_sha256
from gothic_jax.measuring import novelty
from gothic_jax.model.gpt import init_params
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.tokens import load_tokens
from gothic_jax.text.windows import batch_iterator, training_batches
from gothic_jax.training.optimizer import init_optimizer, make_optimizer

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"

Figure = tuple[str, float, str]
"""What, how much, in which unit."""


def measure(device: str, train: Train) -> list[Figure]:
    """All of it, for the model and the micro-batches of `train`, on the sample corpus."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        vocabulary = work / "tokenizer.json"
        if tokenize.main(
            [
                *("--files", str(SAMPLE / "mixed_train.txt"), "--vocab-size", "1024"),
                *("--output", str(vocabulary)),
            ]
        ):
            raise RuntimeError("gothic-tokenize failed")
        return [
            ("batches from Grain", _batches_per_second(vocabulary, train), "batches/s"),
            *_checkpoints(device, work / "run", vocabulary, train),
            *_novelty(),
        ]


def _batches_per_second(vocabulary: Path, train: Train, count: int = 300) -> float:
    text = load_tokens(SAMPLE / "mixed_train.txt", Tokenizer.load(vocabulary))
    shape = (train.micro_batches, train.batch)
    batches = batch_iterator(
        training_batches(
            text, shape=shape, block_size=train.model.block_size, voice_dropout=0.1, seed=0
        ),
        0,
    )
    for _ in range(20):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count / (time.perf_counter() - started)


def _checkpoints(
    device: str, run: Path, vocabulary: Path, train: Train, rounds: int = 10
) -> list[Figure]:
    config = settings(train)
    shape = ModelConfig(**config.model)
    params = init_params(shape, 0)
    optimizer = _trained(init_optimizer(make_optimizer(config), params))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, optimizer)))
    words = Tokenizer.load(vocabulary)
    meta = checkpoint.Meta(
        iteration=1,
        config=config.to_dict(),
        tokenizer_sha256=words.sha256,
        train_sha256="0" * 64,
        val_sha256="0" * 64,
        environment=environment.facts(),
    )
    run.mkdir()
    saver = Saver(run, [])
    waits: list[float] = []
    numbers = itertools.count(1)

    def save(hashes: bool) -> None:
        """Starts a save; without hashes the manifest is written all the same."""
        hashing.side_effect = None if hashes else (lambda _: "")
        started = time.perf_counter()
        saver.save(params, optimizer, dataclasses.replace(meta, iteration=next(numbers)), words)
        waits.append(time.perf_counter() - started)

    def saved(hashes: bool, beside: Callable[[], Any] = lambda: None) -> None:
        save(hashes)
        beside()
        saver.wait()

    def orbax_alone() -> None:
        tree = {"params": params, "optimizer": optimizer}
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            orbax.save(run.resolve() / "orbax", tree, force=True)

    with mock.patch("gothic_jax.machine.manifest.file_sha256", wraps=file_sha256) as hashing:
        until_on_disk = _in_turns(
            {
                "with hashes": lambda: saved(True),
                "without hashes": lambda: saved(False),
                "Orbax alone": orbax_alone,
            },
            rounds,
        )
        # What a run feels that saves as often as it can: the iterations that go on beside it.
        step = prepare(train, device=device)
        while_training = _in_turns(
            {
                "with hashes": lambda: saved(True, step.run),
                "without hashes": lambda: saved(False, step.run),
                "no save": step.run,
            },
            rounds,
        )
        save(True)
        saver.close()
    sharding = SingleDeviceSharding(jax.devices()[0])
    started = time.perf_counter()
    where = checkpoint.locate(f"{run}/latest")
    verified = time.perf_counter() - started
    started = time.perf_counter()
    restored = (
        where.params(sharding),
        where.optimizer(optimizer, sharding),
    )
    jax.block_until_ready(restored)
    return [
        ("checkpoint", size / 2**20, "MiB"),
        ("save: the run waits", statistics.median(waits), "s"),
        *((f"save: on disk after, {kind}", value, "s") for kind, value in until_on_disk.items()),
        *(
            (f"{train.iterations} iterations, {kind}", value, "s")
            for kind, value in while_training.items()
        ),
        ("check before a restore", verified, "s"),
        ("restore", time.perf_counter() - started, "s"),
    ]


def _in_turns(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median of each task's seconds, from so many turns in mixed order."""
    order = [*tasks] * rounds
    random.Random(0).shuffle(order)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for name in order:
        time.sleep(0.5)
        started = time.perf_counter()
        tasks[name]()
        seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _trained(state: Any) -> Any:
    """An optimizer's state without its zeros, which would take no room on the disk."""
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [
        leaf if leaf.ndim == 0 else 1e-4 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


def _novelty(lengths: Sequence[int] = (5_000, 50_000)) -> list[Figure]:
    """The speed of measuring texts that mix the words of an indexed text of 50,000 words."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{n}" for n in rng.integers(0, 2000, 50_000)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        path.write_text(" ".join(words))
        novelty.build(path, None)
        index = novelty.load(path, file_sha256(path)).words
    figures = []
    for length in lengths:
        text = " ".join(rng.permutation(words)[:length])
        started = time.perf_counter()
        index.measure(text)
        speed = length / (time.perf_counter() - started)
        figures.append((f"novelty of {length:,} words", speed, "words/s"))
    return figures


def default_case(model: Model, *, on_gpu: bool) -> Train:
    """The iterations that a pipeline must keep up with, and that go on beside a save."""
    return Train(model, 16, 4, "bfloat16", 20) if on_gpu else Train(model, 4, 1, "bfloat16", 5)
