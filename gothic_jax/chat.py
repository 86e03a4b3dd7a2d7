"""gothic-chat: writes on from a prompt, once or in a conversation."""

import codecs
import readline  # noqa: F401  (gives input() line editing and history)
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Int
from tokenizers import Tokenizer

from gothic_jax import checkpoint, novelty, seal
from gothic_jax.cli import ArgumentParser, UserError, command
from gothic_jax.device import out_of_memory_told, select_device
from gothic_jax.model import Params
from gothic_jax.sampler import Sampler, Sampling, keep_window
from gothic_jax.tokenizer import encode, end_of_text_id, token_bytes, voices

DEFAULT_PROMPT = "In the shadow of"
MAX_SEED = 2**32


class Settings(NamedTuple):
    """What a person may change between two replies."""

    sampling: Sampling
    max_tokens: int
    voice: str | None
    seed: int | None
    """None: a new one for each reply."""


class Writer:
    """A checkpoint that writes text: tokenizer, parameters and sampler together."""

    def __init__(self, params: Params, sampler: Sampler, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.voices = voices(tokenizer)
        self._params = params
        self._sampler = sampler
        self._end = end_of_text_id(tokenizer)
        self._bytes = token_bytes(tokenizer)

    @property
    def block_size(self) -> int:
        """The longest context, in tokens."""
        return self._sampler.config.block_size

    def encode(self, prompt: str, voice: str | None) -> Int[np.ndarray, " time"]:
        """The prompt's tokens after the voice's opener; raises UserError where that is empty."""
        if not prompt.strip():
            raise UserError("the prompt is empty; give some words to go on from")
        if voice is not None and voice not in self.voices:
            known = ", ".join(self.voices) or "none"
            raise UserError(f"there is no voice {voice!r}; this model's voices: {known}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError("the prompt is not valid Unicode; leave out lone surrogates") from error
        ids = encode(self.tokenizer, prompt)
        opener = self._end if voice is None else self.voices[voice]
        return np.array([opener, *ids], np.int32)

    def write(
        self, prompt: Int[np.ndarray, " time"], settings: Settings, samples: int, seed: int
    ) -> Iterator[list[str]]:
        """Yields, for each sample, what it adds next; a sample ends where its work does.

        Bytes are held back until their character is whole; bytes that make none are left out.
        """
        decoders = [codecs.getincrementaldecoder("utf-8")("ignore") for _ in range(samples)]
        ended = [False] * samples
        chunks = self._sampler.stream(
            self._params,
            np.tile(prompt, (samples, 1)),
            max_tokens=settings.max_tokens,
            sampling=settings.sampling,
            seed=seed,
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
    return Writer(params, Sampler(config), tokenizer)


def _new_seed(settings: Settings) -> int:
    return secrets.randbelow(MAX_SEED) if settings.seed is None else settings.seed


def reply(
    writer: Writer,
    prompt: str,
    settings: Settings,
    samples: int,
    seed: int,
    index: novelty.Loaded | None = None,
) -> None:
    """Prints the prompt and what follows it, one sample as it is written, several when done.

    With an index each sample is shown when it is done, what it copied highlighted, and its figures.
    """
    ids = writer.encode(prompt, settings.voice)
    if len(ids) > writer.block_size:
        kept = keep_window(ids[None], writer.block_size)[0]
        print(
            f"the prompt has {len(ids) - 1} tokens; the model reads the last {len(kept) - 1}",
            file=sys.stderr,
        )
    print(f"seed {seed}", file=sys.stderr)
    pieces = writer.write(ids, settings, samples, seed)
    if samples == 1 and index is None:
        print(prompt, end="", flush=True)
        for (text,) in pieces:
            print(text, end="", flush=True)
        print()
        return
    texts = ["".join(parts) for parts in zip(*pieces, strict=True)]
    for number, text in enumerate(texts, start=1):
        if samples > 1:
            print(f"--- {number} of {samples} ---")
        if index is None:
            print(f"{prompt}{text}")
            continue
        # What the person wrote is no work of the model.
        measured = index.words.measure(text)
        on, off = ("\x1b[7m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
        print(prompt + novelty.highlighted(measured, text, on, off))
        for line in novelty.describe(measured, text, index.baseline):
            print(f"    {line}")


HELP = """Type the beginning of a text; the model goes on. Ctrl-C stops a reply.
/temp X    temperature, 0 for the likeliest words only    /topk N   0 turns it off
/topp X    in (0, 1]                                      /max N    tokens in a reply
/voice V   a voice, or none                               /seed N   or random
/retry     the last beginning once more                   /help     /quit"""


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
                voice = None if value == "none" else value
                writer.encode("-", voice)
                settings = settings._replace(voice=voice)
            case _:
                raise UserError(f"unknown command /{name}; /help lists them")
    except ValueError as error:
        raise UserError(f"/{name} needs a number, not {value!r}") from error
    settings = settings._replace(sampling=sampling)
    check(settings)
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
        f"voice {settings.voice or 'none'}, temperature {temperature:g}, top-k {top_k},"
        f" top-p {top_p:g}, max {settings.max_tokens} tokens,"
        f" seed {'random' if settings.seed is None else settings.seed}"
    )


def converse(
    writer: Writer,
    settings: Settings,
    samples: int,
    read_line: Callable[[str], str],
    index: novelty.Loaded | None = None,
) -> None:
    """Reads beginnings and commands until /quit or the end of input."""
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
            reply(writer, line, settings, samples, _new_seed(settings), index)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)")


@command("gothic-chat")
def main(argv: Sequence[str]) -> None:
    """Writes with a checkpoint."""
    defaults = Sampling()
    parser = ArgumentParser(prog="gothic-chat", description="Write with a trained model.")
    parser.add_argument("--checkpoint", required=True, help="RUN/best, RUN/latest or RUN/ITERATION")
    parser.add_argument("--tokenizer", type=Path, help="default: the checkpoint's own")
    parser.add_argument("--prompt", help=f"how the text begins (default: {DEFAULT_PROMPT})")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to write")
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0: likeliest words only"
    )
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="0: off")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="1: off")
    parser.add_argument("--num-samples", type=int, default=1, help="samples, written as one batch")
    parser.add_argument("--voice", help="a voice of the training texts (default: none)")
    parser.add_argument("--seed", type=int, help="default: random; always printed")
    parser.add_argument(
        "--novelty",
        action="store_true",
        help="highlight what stands in a training work, and tell how much is new",
    )
    parser.add_argument("--interactive", action="store_true", help="a conversation")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    settings = Settings(sampling, arguments.max_tokens, arguments.voice, arguments.seed)
    check(settings)
    if arguments.num_samples < 1:
        raise UserError(f"--num-samples must be at least 1, not {arguments.num_samples}")
    device = select_device(arguments.device)
    prompt = arguments.prompt
    if prompt is None and not arguments.interactive:
        prompt = DEFAULT_PROMPT
    location = checkpoint.locate(arguments.checkpoint)
    meta = checkpoint.load_meta(location)
    index = novelty.load_for(meta.config, meta.train_sha256) if arguments.novelty else None
    with out_of_memory_told("lower --num-samples, or write with --device cpu"):
        writer = load_writer(location, meta, arguments.tokenizer, device)
        # A wrong voice is told before anything is compiled.
        writer.encode(DEFAULT_PROMPT, arguments.voice)
        if prompt is not None:
            reply(writer, prompt, settings, arguments.num_samples, _new_seed(settings), index)
        if arguments.interactive:
            converse(writer, settings, arguments.num_samples, input, index)


if __name__ == "__main__":
    sys.exit(main())
