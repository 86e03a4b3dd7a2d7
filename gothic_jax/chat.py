"""gothic-chat: writes on from a prompt, once or in a conversation."""

import argparse
import codecs
import readline  # noqa: F401  (gives input() line editing and history)
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Int
from tokenizers import Tokenizer

from gothic_jax import checkpoint, novelty, receipts, seal, style
from gothic_jax.blend import Blend, complete
from gothic_jax.blend import describe as describe_blend
from gothic_jax.cli import ArgumentParser, command
from gothic_jax.device import out_of_memory_told, select_device
from gothic_jax.errors import UserError
from gothic_jax.model import Params
from gothic_jax.receipts import Receipt
from gothic_jax.sampler import Sampler, Sampling
from gothic_jax.scoring import LossFunction, losses_on
from gothic_jax.texts import ANY, parse_weights
from gothic_jax.tokenizer import any_voice_id, encode, end_of_text_id, token_bytes, voices

DEFAULT_PROMPT = "In the shadow of"
MAX_SEED = 2**32


class Settings(NamedTuple):
    """What a person may change between two replies."""

    sampling: Sampling
    max_tokens: int
    blend: Blend
    """The voices and their weights; empty: no voice in particular."""
    seed: int | None
    """None: a new one for each reply."""


class Writer:
    """A checkpoint that writes text: tokenizer, parameters and sampler together."""

    def __init__(
        self, params: Params, sampler: Sampler, tokenizer: Tokenizer, losses: LossFunction
    ) -> None:
        self.tokenizer = tokenizer
        self.voices = voices(tokenizer)
        self._openers = self.voices | {ANY: any_voice_id(tokenizer)}
        self._params = params
        self._sampler = sampler
        self._losses = losses
        self._end = end_of_text_id(tokenizer)
        self._bytes = token_bytes(tokenizer)

    @property
    def block_size(self) -> int:
        """The longest context, in tokens."""
        return self._sampler.config.block_size

    @cached_property
    def meter(self) -> style.Meter:
        """What tells the style of a text. Raises UserError for a model of fewer than two voices."""
        return style.Meter(self._losses, self._params, self.tokenizer, self.voices, self.block_size)

    def encode(self, prompt: str) -> Int[np.ndarray, " time"]:
        """The prompt's tokens; raises UserError where it is empty."""
        if not prompt.strip():
            raise UserError("the prompt is empty; give some words to go on from")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError("the prompt is not valid Unicode; leave out lone surrogates") from error
        return encode(self.tokenizer, prompt).astype(np.int32)

    def write(
        self, prompt: Int[np.ndarray, " time"], settings: Settings, samples: int, seed: int
    ) -> Iterator[list[str]]:
        """Yields, for each sample, what it adds next; a sample ends where its work does.

        Bytes are held back until their character is whole; bytes that make none are left out.
        """
        weights = complete(settings.blend, self.voices)
        openers = np.array([[self._openers[voice]] for voice in weights], np.int32)
        rows = np.concatenate([openers, np.tile(prompt, (len(weights), 1))], axis=1)
        decoders = [codecs.getincrementaldecoder("utf-8")("ignore") for _ in range(samples)]
        ended = [False] * samples
        chunks = self._sampler.stream(
            self._params,
            np.tile(rows, (samples, 1)),
            max_tokens=settings.max_tokens,
            sampling=settings.sampling,
            seed=seed,
            weights=[*weights.values()],
        )
        for chunk in chunks:
            texts = [""] * samples
            for i, row in enumerate(chunk):
                for token in row:
                    ended[i] = ended[i] or token == self._end
                    if not ended[i]:
                        texts[i] += decoders[i].decode(self._bytes[token])
            yield texts
            if all(ended):
                break


def load_writer(
    location: checkpoint.Location,
    meta: checkpoint.Meta,
    tokenizer_path: Path | None,
    device: jax.Device,
) -> Writer:
    """The writer of a checkpoint; raises UserError where checkpoint or tokenizer do not serve."""
    config = meta.model_config
    changed = seal.differences(meta.environment, seal.environment(), seal.WRITING)
    if changed:
        print(
            f"warning: {location} was made with other versions ({'; '.join(changed)}): a seed may"
            " give another text than there",
            file=sys.stderr,
        )
    if tokenizer_path is None:
        tokenizer = checkpoint.load_tokenizer_copy(location, meta)
    else:
        tokenizer = checkpoint.load_same_tokenizer(tokenizer_path, location, meta)
    params = checkpoint.load_params(location, config, SingleDeviceSharding(device))
    losses = losses_on(device, config, meta.config["compute_dtype"])
    return Writer(params, Sampler(config), tokenizer, losses)


class Chat:
    """Replies to prompts, shown as a person has asked to see them, with a receipt of each."""

    def __init__(
        self,
        writer: Writer,
        location: checkpoint.Location,
        *,
        samples: int = 1,
        best_of: bool = False,
        index: novelty.Loaded | None = None,
    ) -> None:
        """Of a reply's `samples` all are shown, or only the best. With an index each is shown
        when it is done, with what it copied highlighted and its figures."""
        if best_of and index is None:
            raise ValueError("the best is told by the index")
        self.writer = writer
        self._location = location
        self._samples = samples
        self._best_of = best_of
        self._index = index
        self._circumstances: dict[str, str] | None = receipts.circumstances(location)
        self._last: tuple[str, str] | None = None

    def reply(self, prompt: str, settings: Settings) -> None:
        """Prints the prompt and what follows it, a single sample as it is written."""
        ids = self.writer.encode(prompt)
        if len(ids) >= self.writer.block_size:
            print(
                f"the prompt has {len(ids)} tokens; the model reads the last"
                f" {self.writer.block_size - 1}",
                file=sys.stderr,
            )
        seed = secrets.randbelow(MAX_SEED) if settings.seed is None else settings.seed
        print(f"seed {seed}", file=sys.stderr)
        pieces = self.writer.write(ids, settings, self._samples, seed)
        if self._samples == 1 and self._index is None:
            texts, shown = [self._stream(prompt, pieces)], [0]
        else:
            texts = ["".join(parts) for parts in zip(*pieces, strict=True)]
            shown = [*range(len(texts))]
            if self._best_of:
                shown = self._ranked(prompt, texts, settings.blend)[:1]
            for number in shown:
                self._show(prompt, texts[number], number)
        self._last = prompt, texts[shown[-1]]
        self._write_receipts(prompt, settings, seed, {n: texts[n] for n in shown})

    def _stream(self, prompt: str, pieces: Iterator[list[str]]) -> str:
        written = ""
        print(prompt, end="", flush=True)
        for (text,) in pieces:
            written += text
            self._last = prompt, written  # what a person who stops it has seen
            print(text, end="", flush=True)
        print()
        return written

    def _show(self, prompt: str, text: str, number: int) -> None:
        if self._samples > 1:
            print(f"--- {number + 1} of {self._samples} ---")
        if self._index is None:
            print(f"{prompt}{text}")
            return
        # What the person wrote is no work of the model.
        measured = self._index.words.measure(text)
        on, off = ("\x1b[7m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
        print(prompt + novelty.highlighted(measured, text, on, off))
        for line in novelty.describe(measured, text, self._index.baseline):
            print(f"    {line}")

    def _ranked(self, prompt: str, texts: list[str], blend: Blend) -> list[int]:
        """The samples from the best on, told in a table: least copied, then nearest in style."""
        assert self._index is not None
        measured = [self._index.words.measure(text) for text in texts]
        meter = self.writer.meter if len(self.writer.voices) > 1 else None
        sentences = [meter.sentences(text, prompt) if meter else [] for text in texts]
        towards = [
            style.together(leans, text).towards(blend) if leans else 0.0
            for text, leans in zip(texts, sentences, strict=True)
        ]

        order = rank(measured, towards)
        print("  sample  words  copied  longest span  style")
        for number in order:
            longest = measured[number].longest
            print(
                f"{number + 1:>8}{measured[number].words:>7}{measured[number].copied:>8.1%}"
                f"{0 if longest is None else longest.words:>14}{towards[number]:>+7.2f}"
            )
        return order

    def show_style(self) -> None:
        """Prints, for each sentence of the last reply, which voice it leans to."""
        if self._last is None:
            raise UserError("nothing has been written yet whose style could be told")
        prompt, text = self._last
        print(style.table(self.writer.meter.sentences(text, prompt)))

    def _write_receipts(
        self, prompt: str, settings: Settings, seed: int, shown: dict[int, str]
    ) -> None:
        if self._circumstances is None:
            return
        written = [
            Receipt(
                text=text,
                prompt=prompt,
                blend=dict(settings.blend),
                sampling=settings.sampling,
                max_tokens=settings.max_tokens,
                seed=seed,
                sample=number + 1,
                samples=self._samples,
                iteration=self._location.iteration,
                circumstances=self._circumstances,
            )
            for number, text in shown.items()
        ]
        try:
            receipts.append(self._location.run, written)
        except UserError as error:
            self._circumstances = None
            print(f"warning: no receipts are kept: {error}", file=sys.stderr)


def rank(measured: Sequence[novelty.Novelty], towards: Sequence[float]) -> list[int]:
    """Samples from the best on: those that copy least, among them the nearest in style."""

    def key(number: int) -> tuple[bool, float, float]:
        # A text that ended before it began copies nothing, and is the last one wanted.
        return measured[number].words == 0, measured[number].copied, -towards[number]

    return sorted(range(len(measured)), key=key)


def replay(writer: Writer, location: checkpoint.Location, receipt: Receipt) -> int:
    """Writes a receipt's sample once more; 0 if it is the same text, 1 if not."""
    settings = Settings(receipt.sampling, receipt.max_tokens, receipt.blend, receipt.seed)
    check(settings)
    differing = seal.differences(receipt.circumstances, receipts.circumstances(location))
    ids = writer.encode(receipt.prompt)
    pieces = writer.write(ids, settings, receipt.samples, receipt.seed)
    text = "".join(parts[receipt.sample - 1] for parts in pieces)
    print(receipt.prompt + text)
    if text == receipt.text:
        print("the same text as in the receipt", file=sys.stderr)
        return 0
    print(
        "not the text of the receipt: "
        + (
            f"{'; '.join(differing)}"
            if differing
            else "yet nothing differs that the receipt knows of; was it changed?"
        ),
        file=sys.stderr,
    )
    return 1


HELP = """Type the beginning of a text; the model goes on. Ctrl-C stops a reply.
/temp X    temperature, 0 for the likeliest words only    /topk N   0 turns it off
/topp X    in (0, 1]                                      /max N    tokens in a reply
/voice V   a voice, or none                               /seed N   or random
/blend B   of voices, as wilde=0.3,lovecraft=0.7          /style    of the last reply
/retry     the last beginning once more                   /help     /quit"""


def _of_voice(name: str) -> Blend:
    return {} if name == "none" else {name: 1.0}


def change(settings: Settings, name: str, value: str, writer: Writer) -> Settings:
    """The settings after a line `/name value`; raises UserError where that cannot be."""
    sampling = settings.sampling
    try:
        match name:
            case "temp":
                sampling = sampling._replace(temperature=float(value))
            case "topk":
                sampling = sampling._replace(top_k=int(value))
            case "topp":
                sampling = sampling._replace(top_p=float(value))
            case "max":
                settings = settings._replace(max_tokens=int(value))
            case "seed":
                settings = settings._replace(seed=None if value == "random" else int(value))
            case "voice":
                settings = settings._replace(blend=_of_voice(value))
            case "blend":
                blend = parse_weights(value, name="/blend", known=writer.voices)
                settings = settings._replace(blend=blend)
            case _:
                raise UserError(f"unknown command /{name}; /help lists them")
    except ValueError as error:
        raise UserError(f"/{name} needs a number, not {value!r}") from error
    settings = settings._replace(sampling=sampling)
    check(settings)
    complete(settings.blend, writer.voices)
    return settings


def check(settings: Settings) -> None:
    """Raises UserError where a setting is out of its range."""
    settings.sampling.validate()
    if settings.max_tokens < 1:
        raise UserError(f"max-tokens must be at least 1, not {settings.max_tokens}")
    if settings.seed is not None and not 0 <= settings.seed < MAX_SEED:
        raise UserError(f"seed must be at least 0 and below 2**32, not {settings.seed}")


def describe(settings: Settings) -> str:
    """The settings in a line."""
    temperature, top_k, top_p = settings.sampling
    return (
        f"{describe_blend(settings.blend)}, temperature {temperature:g}, top-k {top_k},"
        f" top-p {top_p:g}, max {settings.max_tokens} tokens,"
        f" seed {'random' if settings.seed is None else settings.seed}"
    )


def converse(chat: Chat, settings: Settings, read_line: Callable[[str], str]) -> None:
    """Reads beginnings and commands until /quit or the end of input."""
    writer = chat.writer
    print(f"voices: {', '.join(writer.voices) or 'none'}\n{describe(settings)}\n{HELP}")
    last: str | None = None
    while True:
        try:
            line = read_line("\n> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line.startswith("/"):
                name, _, value = line[1:].partition(" ")
                if name == "quit":
                    return
                if name == "help":
                    print(HELP)
                    continue
                if name == "style":
                    chat.show_style()
                    continue
                if name != "retry":
                    settings = change(settings, name, value.strip(), writer)
                    print(describe(settings))
                    continue
                if last is None:
                    raise UserError("there is nothing to retry yet")
                line = last
            if not line.strip():
                continue
            last = line
            chat.reply(line, settings)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)")


@command("gothic-chat")
def main(argv: Sequence[str]) -> int:
    """Writes with a checkpoint."""
    defaults = Sampling()
    parser = ArgumentParser(prog="gothic-chat", description="Write with a trained model.")
    parser.add_argument("--checkpoint", help="RUN/best, RUN/latest or RUN/ITERATION")
    parser.add_argument("--tokenizer", type=Path, help="default: the checkpoint's own")
    parser.add_argument("--prompt", help=f"how the text begins (default: {DEFAULT_PROMPT})")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to write")
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0: likeliest words only"
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
        help="several voices and their weights, as wilde=0.3,lovecraft=0.7; beyond 0 to 1 more of"
        " a voice than it has itself",
    )
    parser.add_argument("--seed", type=int, help="default: random; always printed")
    parser.add_argument(
        "--novelty",
        action="store_true",
        help="highlight what stands in a training work, and tell how much is new",
    )
    parser.add_argument("--interactive", action="store_true", help="a conversation")
    parser.add_argument(
        "--replay",
        metavar="FILE[:N]",
        help=f"write the sample of a receipt again, the N-th of RUN/{receipts.NAME} or the last",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)

    device = select_device(arguments.device)
    if arguments.replay is not None:
        return _replay(argv, arguments, device)
    if arguments.checkpoint is None:
        raise UserError("--checkpoint is missing; name RUN/best, RUN/latest or RUN/ITERATION")
    samples = arguments.num_samples if arguments.best_of is None else arguments.best_of
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    blend = _of_voice(arguments.voice)
    settings = Settings(sampling, arguments.max_tokens, blend, arguments.seed)
    check(settings)
    if not 1 <= samples <= receipts.MAX_SAMPLES:
        name = "--num-samples" if arguments.best_of is None else "--best-of"
        raise UserError(f"{name} must be from 1 to {receipts.MAX_SAMPLES:,}, not {samples}")
    prompt = arguments.prompt
    if prompt is None and not arguments.interactive:
        prompt = DEFAULT_PROMPT
    location = checkpoint.locate(arguments.checkpoint)
    meta = checkpoint.load_meta(location)
    best_of = arguments.best_of is not None
    wanted = arguments.novelty or best_of
    index = novelty.load_for(meta.config, meta.train_sha256) if wanted else None
    with out_of_memory_told("lower --num-samples, or write with --device cpu"):
        writer = load_writer(location, meta, arguments.tokenizer, device)
        if arguments.blend is not None:
            blend = parse_weights(arguments.blend, name="--blend", known=writer.voices)
            settings = settings._replace(blend=blend)
        # A wrong voice is told before anything is compiled.
        complete(blend, writer.voices)
        chat = Chat(writer, location, samples=samples, best_of=best_of, index=index)
        if prompt is not None:
            chat.reply(prompt, settings)
        if arguments.interactive:
            converse(chat, settings, input)
    return 0


def _replay(argv: Sequence[str], arguments: argparse.Namespace, device: jax.Device) -> int:
    """`--replay`: what it does and returns is `replay`'s. Raises UserError."""
    for option in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if option not in ("--replay", "--checkpoint", "--device"):
            raise UserError(
                f"{option} cannot be given with --replay, whose receipt has all settings;"
                " leave it out"
            )
    path, receipt = receipts.load(arguments.replay)
    if arguments.checkpoint is None and receipt.iteration not in checkpoint.iterations(path.parent):
        raise UserError(
            f"{path.parent} does not hold checkpoint {receipt.iteration}, which wrote this sample;"
            " name it, or one to write it instead, with --checkpoint"
        )
    name = arguments.checkpoint or str(path.parent / str(receipt.iteration))
    location = checkpoint.locate(name)
    meta = checkpoint.load_meta(location)
    with out_of_memory_told("write with --device cpu"):
        return replay(load_writer(location, meta, None, device), location, receipt)


if __name__ == "__main__":
    sys.exit(main())
