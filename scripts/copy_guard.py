"""Measures the copy guard: what samples copy with and without it, and what it costs.

    .venv/bin/python scripts/copy_guard.py --output docs/results/copy-guard.json

Samples are written in batches, with and without the guard in turn, of the same seeds.
"""

import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gothic_jax.checkpoints.checkpoint import locate
from gothic_jax.checkpoints.release import GOTHIC_DANDY
from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.machine import environment
from gothic_jax.machine.compiled import cache_compiled_programs
from gothic_jax.machine.device import select_device
from gothic_jax.measuring import novelty
from gothic_jax.writing.guard import Guard
from gothic_jax.writing.settings import Sampling, Settings, check_copy_guard
from gothic_jax.writing.writer import Writer, whole

PROMPTS = ("The", "It was", "There is", "In the", "When I", "He had", "And so", "One evening")
BATCH = SLOTS = 32
TOKENS = 200


@command("copy_guard")
def main(argv: Sequence[str]) -> int:
    """Measures a checkpoint's samples."""
    parser = ArgumentParser(prog="copy_guard", description="Measure what the copy guard does.")
    parser.add_argument("checkpoint", nargs="?", default=str(GOTHIC_DANDY), help="RUN/ITERATION")
    parser.add_argument("--train-file", help="where the training text is now")
    parser.add_argument("--voices", default="wilde,lovecraft", help="in turn, batch by batch")
    parser.add_argument("--samples", type=int, default=1000, help="with the guard, and without")
    parser.add_argument("--words", type=int, default=8, help="of the shortest span that counts")
    parser.add_argument("--output", type=Path, help="a file for the figures, as JSON")
    arguments = parser.parse_args(argv)
    words = check_copy_guard(arguments.words)
    cache_compiled_programs()
    checkpoint = locate(arguments.checkpoint)
    meta = checkpoint.meta
    index = novelty.load_for(meta.config, meta.train_sha256, arguments.train_file).words
    writer = Writer.load(checkpoint, select_device("auto"))
    longest: dict[bool, list[int]] = {False: [], True: []}
    seconds: dict[bool, float] = {False: 0.0, True: 0.0}
    tokens: dict[bool, int] = {False: 0, True: 0}
    voices = arguments.voices.split(",")

    def write(seed: int, guarded: bool) -> None:
        prompt = PROMPTS[seed % len(PROMPTS)]
        blend = {voices[seed // len(PROMPTS) % len(voices)]: 1.0}
        settings = Settings(Sampling(), TOKENS, blend, seed)
        guard = functools.partial(Guard, index, words, prompt) if guarded else None
        start = time.perf_counter()
        pieces = writer.stream_in_slots(
            writer.encode(prompt), settings, range(BATCH), seed, SLOTS, guard=guard
        )
        texts = [prompt + piece.text for piece in whole(pieces)]
        seconds[guarded] += time.perf_counter() - start
        tokens[guarded] += sum(len(writer.tokenizer.encode(text)) for text in texts)
        spans = [index.measure(text).longest for text in texts]
        longest[guarded] += [span.words if span else 0 for span in spans]

    for guarded in (False, True):  # compile
        write(0, guarded)
    for figures in (longest, tokens, seconds):
        figures.update({guarded: type(figures[guarded])() for guarded in (False, True)})
    for seed in range(1, 1 + -(-arguments.samples // BATCH)):
        for guarded in (seed % 2 == 0, seed % 2 == 1):
            write(seed, guarded)
        print(f"{len(longest[True])} of {arguments.samples} samples", file=sys.stderr)
    report = {
        name: {
            "samples": len(longest[guarded]),
            "that copy": sum(span >= words for span in longest[guarded]),
            "longest span": max(longest[guarded]),
            "tokens": tokens[guarded],
            "seconds": round(seconds[guarded], 1),
        }
        for guarded, name in ((False, "without"), (True, "with"))
    }
    rates = {guarded: tokens[guarded] / seconds[guarded] for guarded in (False, True)}
    result = {
        "checkpoint": Path(arguments.checkpoint).name,
        "words": words,
        "tokens a sample": TOKENS,
        "slots": SLOTS,
        **report,
        "speed with to without": round(rates[True] / rates[False], 3),
        "environment": environment.facts(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
