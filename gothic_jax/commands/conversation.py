"""gothic-chat at the terminal: replies, the conversation and its commands, replays."""

import readline
import secrets
import sys
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.errors import UserError
from gothic_jax.machine import environment
from gothic_jax.machine.process import catch_interrupts
from gothic_jax.machine.terminal import styled, wrapped
from gothic_jax.measuring import novelty, style
from gothic_jax.model.shape import INTEGER_LIMIT
from gothic_jax.text.typography import fit_prompt
from gothic_jax.text.voices import Blend, complete, one_voice, parse_weights
from gothic_jax.writing import receipts
from gothic_jax.writing.receipts import Receipt
from gothic_jax.writing.settings import Settings
from gothic_jax.writing.writer import Writer


class Chat:
    """Replies to prompts, shown as a person has asked to see them, with a receipt of each."""

    def __init__(
        self,
        writer: Writer,
        checkpoint: Checkpoint,
        *,
        samples: int = 1,
        best_of: bool = False,
        index: novelty.Loaded | None = None,
        raw_prompt: bool = False,
    ) -> None:
        """Of a reply's `samples` all are shown, or only the best, for which an index is needed.
        With `raw_prompt` a prompt is read as it is given.

        With an index each is shown when it is complete, with what it copied highlighted and
        measured.
        """
        if best_of and index is None:
            raise ValueError("the best sample is found with an index")
        self.writer = writer
        self.last_prompt: str | None = None
        self._checkpoint = checkpoint
        self._samples = samples
        self._best_of = best_of
        self._index = index
        self._raw_prompt = raw_prompt
        self._last_text = ""
        # A receipt names a numbered checkpoint, and another program's folder is not ours to fill.
        self._keeps_receipts = not checkpoint.is_foreign

    def reply(self, prompt: str, settings: Settings) -> None:
        """Prints the prompt and what follows it, a single sample as it is written."""
        given = prompt
        if not self._raw_prompt:
            prompt = fit_prompt(given, self.writer.tokenizer.knows)
        ids = self.writer.encode(prompt)
        if prompt != given:
            print(
                "the prompt is read in the typography of the training text, without blanks at its"
                " end; --raw-prompt leaves it as it is",
                file=sys.stderr,
            )
        self.last_prompt, self._last_text = prompt, ""
        if len(ids) >= self.writer.block_size:
            print(
                f"the prompt has {len(ids)} tokens; the model reads the last"
                f" {self.writer.block_size - 1}",
                file=sys.stderr,
            )
        seed = secrets.randbelow(INTEGER_LIMIT) if settings.seed is None else settings.seed
        print(f"seed {seed}", file=sys.stderr)
        if self._samples == 1 and self._index is None:
            texts, shown = [self._stream(prompt, ids, settings, seed)], [0]
        else:
            samples = self.writer.write(ids, settings, self._samples, seed)
            texts = [sample.text for sample in samples]
            shown = [*range(len(texts))]
            if self._best_of:
                shown = self._ranked(prompt, texts, settings.blend)[:1]
            for number in shown:
                self._show(prompt, texts[number], number)
        self._last_text = texts[shown[-1]]
        self._write_receipts(prompt, given, settings, seed, {n: texts[n] for n in shown})

    def _stream(
        self, prompt: str, ids: Int[np.ndarray, " time"], settings: Settings, seed: int
    ) -> str:
        with wrapped(sys.stdout) as write:
            write(prompt)
            for (piece,) in self.writer.stream(ids, settings, 1, seed):
                self._last_text += piece.text  # what a person who stops it has seen
                write(piece.text)
        print()
        return self._last_text

    def _show(self, prompt: str, text: str, number: int) -> None:
        if self._samples > 1:
            print(f"--- {number + 1} of {self._samples} ---")
        if self._index is None:
            _print_wrapped(prompt + text)
            return
        # The prompt is the person's own: it is not measured.
        measured = self._index.words.measure(text)
        on, off = ("\x1b[7m", "\x1b[0m") if styled(sys.stdout) else ("[[", "]]")
        _print_wrapped(prompt + novelty.highlighted(measured, text, on, off))
        for line in novelty.describe(measured, text, self._index.baseline):
            print(f"    {line}")

    def _ranked(self, prompt: str, texts: list[str], blend: Blend) -> list[int]:
        """The samples, best first, shown as a table: least copied, then nearest in style."""
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
        if self.last_prompt is None or not self._last_text.strip():
            raise UserError("nothing has been written yet whose style could be measured")
        print(style.table(self.writer.meter.sentences(self._last_text, self.last_prompt)))

    def _write_receipts(
        self, prompt: str, given: str, settings: Settings, seed: int, shown: dict[int, str]
    ) -> None:
        if not self._keeps_receipts:
            return
        facts = receipts.circumstances(self._checkpoint)
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
                iteration=self._checkpoint.iteration,
                circumstances=facts,
                given_prompt=None if given == prompt else given,
            )
            for number, text in shown.items()
        ]
        try:
            receipts.append(self._checkpoint.run, written)
        except UserError as error:
            self._keeps_receipts = False
            print(f"warning: no receipts are kept: {error}", file=sys.stderr)


def _print_wrapped(text: str) -> None:
    with wrapped(sys.stdout) as write:
        write(text)
    print()


def rank(measured: Sequence[novelty.Novelty], towards: Sequence[float]) -> list[int]:
    """The samples, best first: those that copy least, and among them the nearest in style."""

    def key(number: int) -> tuple[bool, float, float]:
        # An empty text copies nothing, and is the worst.
        return measured[number].words == 0, measured[number].copied, -towards[number]

    return sorted(range(len(measured)), key=key)


def replay(writer: Writer, checkpoint: Checkpoint, receipt: Receipt) -> int:
    """Writes a receipt's sample again; 0 if it is the same text, 1 if not."""
    settings = Settings(receipt.sampling, receipt.max_tokens, receipt.blend, receipt.seed)
    settings.validate()
    ids = writer.encode(receipt.prompt)
    text = writer.write(ids, settings, receipt.samples, receipt.seed)[receipt.sample - 1].text
    _print_wrapped(receipt.prompt + text)
    if text == receipt.text:
        print("the same text as in the receipt", file=sys.stderr)
        return 0
    differing = environment.differences(receipt.circumstances, receipts.circumstances(checkpoint))
    reason = "; ".join(differing) or "nothing that the receipt records differs; has it been edited?"
    print(f"not the text of the receipt: {reason}", file=sys.stderr)
    return 1


HELP = """Type the beginning of a text; the model continues it. Ctrl-C stops a reply.
/temp X    temperature, 0 for the likeliest words only    /topk N   0 turns it off
/topp X    in (0, 1]                                      /max N    tokens in a reply
/voice V   a voice, or none                               /seed N   or random
/blend B   of voices, as wilde=0.3,lovecraft=0.7          /style    of the last reply
/retry     the last beginning again                       /help     /quit
//         a beginning whose first character is /"""


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
                settings = settings._replace(blend=one_voice(value))
            case "blend":
                blend = parse_weights(value, name="/blend", known=writer.voices)
                settings = settings._replace(blend=blend)
            case _:
                raise UserError(
                    f"unknown command /{name}; /help lists them, and // begins a text with /"
                )
    except ValueError as error:
        raise UserError(f"/{name} needs a number, not {value!r}") from error
    settings = settings._replace(sampling=sampling)
    settings.validate()
    complete(settings.blend, writer.voices)
    return settings


def read_line(prompt: str) -> str:
    """A line from the terminal or a pipe, without the marks that Windows puts into text files."""
    return input(prompt).removeprefix("\ufeff").rstrip("\r")


def converse(chat: Chat, settings: Settings, read_line: Callable[[str], str] = read_line) -> None:
    """Reads beginnings and commands until /quit or the end of input."""
    catch_interrupts()
    # What is pasted comes as one beginning, line ends and all.
    readline.parse_and_bind("set enable-bracketed-paste on")
    voices = ", ".join(chat.writer.voices) or "none"
    print(f"voices: {voices}\n{settings}\n{HELP}")
    while True:
        try:
            line = read_line("\n> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.split()[:1] == ["/quit"]:
            return
        try:
            settings = _answer(chat, settings, line)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)")


def _answer(chat: Chat, settings: Settings, line: str) -> Settings:
    """Does what a line asks for; the settings after it. Raises UserError."""
    if line.startswith("//") or not line.startswith("/"):
        if line.strip():
            chat.reply(line.removeprefix("/"), settings)
        return settings
    name, _, value = line[1:].partition(" ")
    match name:
        case "help":
            print(HELP)
        case "style":
            chat.show_style()
        case "retry":
            if chat.last_prompt is None:
                raise UserError("there is nothing to retry yet")
            chat.reply(chat.last_prompt, settings)
        case _:
            settings = change(settings, name, value.strip(), chat.writer)
            print(settings)
    return settings
