"""gothic-chat: continues a prompt, once or in a conversation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.errors import UserError
from gothic_jax.text.voices import complete, one_voice, parse_weights
from gothic_jax.writing.settings import (
    MAX_SAMPLES,
    RECEIPTS,
    Sampling,
    Settings,
    check_copy_guard,
)

DEFAULT_PROMPT = "In the shadow of"


def _parser() -> ArgumentParser:
    defaults = Sampling()
    parser = ArgumentParser(prog="gothic-chat", description="Write with a trained model.")
    parser.add_argument(
        "--checkpoint",
        help="RUN/best, RUN/latest or RUN/ITERATION (default: the model that comes with a clone)",
    )
    parser.add_argument("--tokenizer", type=Path, help="default: the checkpoint's own")
    parser.add_argument("--prompt", help=f"how the text begins (default: {DEFAULT_PROMPT})")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to write")
    parser.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="0: always the likeliest word",
    )
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="0: off")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="1: off")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--num-samples", type=int, default=1, help="samples, written as one batch")
    number.add_argument(
        "--best-of",
        type=int,
        metavar="N",
        help="write N samples and show the one that copies least, then the nearest in style",
    )
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--voice", default="none", help="a voice of the training texts")
    who.add_argument(
        "--blend",
        help="several voices and their weights, as wilde=0.3,lovecraft=0.7; a weight above 1"
        " exaggerates a voice, one below 0 avoids it",
    )
    parser.add_argument("--seed", type=int, help="default: random; always printed")
    parser.add_argument(
        "--novelty",
        action="store_true",
        help="highlight passages of the training works, and measure how much is new",
    )
    parser.add_argument(
        "--copy-guard",
        type=int,
        metavar="N",
        help="write no span of N words that a training work has",
    )
    parser.add_argument(
        "--train-file",
        help="for --novelty, --best-of, --copy-guard and --replay: where the training text is now",
    )
    parser.add_argument("--interactive", action="store_true", help="a conversation")
    parser.add_argument(
        "--replay",
        metavar="FILE[:N]",
        help=f"write the sample of a receipt again: line N of RUN/{RECEIPTS}, or its last line",
    )
    parser.add_argument(
        "--raw-prompt",
        action="store_true",
        help="read the prompt as it is, not in the typography of the training text",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


@command("gothic-chat")
def main(argv: Sequence[str]) -> int:
    """Writes with a checkpoint."""
    arguments = _parser().parse_args(argv)
    if arguments.replay is not None:
        return _replay(argv, arguments)
    best_of = arguments.best_of is not None
    samples = arguments.best_of if best_of else arguments.num_samples
    if not 1 <= samples <= MAX_SAMPLES:
        name = "--best-of" if best_of else "--num-samples"
        raise UserError(f"{name} must be from 1 to {MAX_SAMPLES:,}, not {samples}")
    measured = arguments.novelty or best_of
    guarded = check_copy_guard(arguments.copy_guard) is not None
    if arguments.train_file is not None and not (measured or guarded):
        raise UserError(
            "--train-file is for --novelty, --best-of and --copy-guard; give one of them"
        )
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    blend = one_voice(arguments.voice)
    settings = Settings(sampling, arguments.max_tokens, blend, arguments.seed)
    settings.validate()
    prompt = arguments.prompt
    if prompt is None and not arguments.interactive:
        prompt = DEFAULT_PROMPT

    from gothic_jax.checkpoints.checkpoint import locate
    from gothic_jax.checkpoints.release import gothic_dandy
    from gothic_jax.commands.conversation import Chat, CopyGuard, converse
    from gothic_jax.machine.compiled import cache_compiled_programs
    from gothic_jax.machine.device import out_of_memory_reported, select_device
    from gothic_jax.machine.environment import warn_of_other_versions
    from gothic_jax.measuring import novelty
    from gothic_jax.writing.writer import Writer

    cache_compiled_programs()
    device = select_device(arguments.device)
    checkpoint = locate(arguments.checkpoint) if arguments.checkpoint else gothic_dandy()
    meta = checkpoint.meta
    index = None
    if measured or guarded:
        index = novelty.load_for(meta.config, meta.train_sha256, arguments.train_file)
    with out_of_memory_reported("lower --num-samples, or write with --device cpu"):
        tokenizer = arguments.tokenizer and checkpoint.same_tokenizer(arguments.tokenizer)
        warn_of_other_versions(str(checkpoint), meta.environment)
        writer = Writer.load(checkpoint, device, tokenizer)
        if arguments.blend is not None:
            blend = parse_weights(arguments.blend, name="--blend", known=writer.voices)
            settings = settings._replace(blend=blend)
        # A wrong voice is reported before anything is compiled.
        complete(settings.blend, writer.voices)
        chat = Chat(
            writer,
            checkpoint,
            samples=samples,
            best_of=best_of,
            index=index if measured else None,
            copy_guard=CopyGuard(index.words, arguments.copy_guard) if index and guarded else None,
            raw_prompt=arguments.raw_prompt,
        )
        if prompt is not None:
            chat.reply(prompt, settings)
        if arguments.interactive:
            converse(chat, settings)
    return 0


def _replay(argv: Sequence[str], arguments: argparse.Namespace) -> int:
    """`--replay`: what it does and returns is `conversation.replay`'s. Raises UserError."""
    for option in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if option not in ("--replay", "--checkpoint", "--device", "--train-file"):
            raise UserError(
                f"{option} cannot be given with --replay, whose receipt has all settings;"
                " leave it out"
            )

    from gothic_jax.checkpoints.checkpoint import iterations, locate
    from gothic_jax.commands.conversation import replay
    from gothic_jax.machine.compiled import cache_compiled_programs
    from gothic_jax.machine.device import out_of_memory_reported, select_device
    from gothic_jax.measuring import novelty
    from gothic_jax.writing import receipts
    from gothic_jax.writing.writer import Writer

    cache_compiled_programs()
    device = select_device(arguments.device)
    path, receipt = receipts.load(arguments.replay)
    if arguments.checkpoint is None and receipt.iteration not in iterations(path.parent):
        raise UserError(
            f"{path.parent} does not hold checkpoint {receipt.iteration}, which wrote this sample;"
            " name it, or another one to write the sample with, with --checkpoint"
        )
    checkpoint = locate(arguments.checkpoint or str(path.parent / str(receipt.iteration)))
    index = None
    if receipt.copy_guard is not None:
        meta = checkpoint.meta
        loaded = novelty.load_for(meta.config, meta.train_sha256, arguments.train_file)
        index = loaded.words
    with out_of_memory_reported("write with --device cpu"):
        writer = Writer.load(checkpoint, device, dtype=receipt.dtype)
        return replay(writer, checkpoint, receipt, index)


if __name__ == "__main__":
    sys.exit(main())
