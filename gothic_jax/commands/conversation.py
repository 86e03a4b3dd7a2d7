"""gothic-chat at the terminal: replies, the conversation and its commands, replays."""

import functools
import readline
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.errors import UserError
from gothic_jax.machine import environment
from gothic_jax.machine.process import catch_interrupts
from gothic_jax.machine.terminal import cells, edited, styled, wrapped
from gothic_jax.measuring import novelty, style
from gothic_jax.measuring.predictions import Prediction
from gothic_jax.model.shape import INTEGER_LIMIT
from gothic_jax.text.typography import fit_prompt
from gothic_jax.text.voices import Blend, complete, one_voice, parse_weights
from gothic_jax.text.works import END_OF_TEXT
from gothic_jax.writing import receipts
from gothic_jax.writing.draft import Draft, Origin, State
from gothic_jax.writing.guard import Guard
from gothic_jax.writing.ranking import ranked
from gothic_jax.writing.receipts import Receipt
from gothic_jax.writing.sample import Piece
from gothic_jax.writing.settings import Settings
from gothic_jax.writing.writer import Writer, whole

CUT = "\u2026"
"""Stands for text that is not shown again."""
MAX_SLOTS = 32
"""Samples that are kept from copying are written so many at a time, or their voices."""
ALTERNATIVES = 10
"""So many tokens of each voice are shown."""


class CopyGuard(NamedTuple):
    """What keeps replies from copying."""

    training: novelty.Index
    words: int
    """Of the shortest span that counts."""


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
        copy_guard: CopyGuard | None = None,
        raw_prompt: bool = False,
    ) -> None:
        """Of a reply's `samples` all are shown, or only the best, for which an index is needed.
        With `raw_prompt` a prompt is read as it is given.

        With an index each is shown when it is complete, with what it copied highlighted and
        measured. With a copy guard none copies a span.
        """
        if best_of and index is None:
            raise ValueError("the best sample is found with an index")
        self.writer = writer
        self.draft = Draft()
        """The texts so far."""
        self._checkpoint = checkpoint
        self._samples = samples
        self._best_of = best_of
        self._index = index
        self._copy_guard = copy_guard
        self._raw_prompt = raw_prompt
        # A receipt names a numbered checkpoint, and another program's folder is not ours to fill.
        self._keeps_receipts = not checkpoint.is_foreign

    def reply(self, given: str, settings: Settings) -> None:
        """Begins a new text, and prints it with what follows it, a single sample as it is written.

        Raises UserError where the beginning is empty or not text.
        """
        prompt = self._read(given)
        length = len(self.writer.encode(prompt))
        if length >= self.writer.block_size:
            print(
                f"the prompt has {length} tokens; the model reads the last"
                f" {self.writer.block_size - 1}",
                file=sys.stderr,
            )
        self._write(self.draft.begin(prompt), settings, given)

    def more(self, settings: Settings) -> None:
        """Prints what follows the text so far. Raises UserError where there is none."""
        if self.draft.current is None:
            raise UserError("there is no text yet; type the beginning of one")
        self._write(self.draft.current, settings)

    def retry(self, settings: Settings) -> None:
        """Writes the last reply anew, as another branch. Raises UserError where there is none."""
        self._write(self.draft.take_back(), settings)

    def edit(self) -> None:
        """Lets the person edit the text so far. Raises UserError where that fails."""
        before = "" if self.draft.current is None else self.draft.current.text
        with edited(before) as text:
            if text == before:
                print("the text is as it was")
                return
            self.draft.edit(self._read(text))
        self.show_place()

    def show_place(self) -> None:
        """Prints the number of the current text, and its end."""
        if self.draft.current is not None:
            print(f"--- text {self.draft.current.number} ---")
            _print_wrapped(end_of(self.draft.current.text, 300))

    def _read(self, given: str) -> str:
        """A person's text as the model reads it. Raises UserError where it cannot."""
        text = given if self._raw_prompt else fit_prompt(given, self.writer.tokenizer.knows)
        self.writer.encode(text)
        if text != given:
            print(
                "the prompt is read in the typography of the training text, without blanks at its"
                " end; --raw-prompt leaves it as it is",
                file=sys.stderr,
            )
        return text

    def _write(self, state: State, settings: Settings, given: str | None = None) -> None:
        """Continues a text, prints how, and goes to what has come of it.

        A beginning is printed with it. `given` is what the person has typed, if it is another text.
        """
        prompt = state.text
        shown = prompt if state.origin is Origin.BEGINNING else CUT
        ids = self.writer.encode(prompt)
        seed = secrets.randbelow(INTEGER_LIMIT) if settings.seed is None else settings.seed
        print(f"seed {seed}", file=sys.stderr)
        if self._samples == 1 and self._index is None:
            texts, numbers = [self._stream(state, shown, ids, settings, seed)], [0]
        else:
            texts = [sample.text for sample in self._whole(prompt, ids, settings, seed)]
            numbers = [*range(len(texts))]
            if self._best_of:
                numbers = self._ranked(prompt, texts, settings.blend)[:1]
            for number in numbers:
                self._show(shown, texts[number], number)
                self._keep(state, texts[number])
        self._write_receipts(
            prompt, given or prompt, settings, seed, {n: texts[n] for n in numbers}
        )

    def _stream(
        self,
        state: State,
        shown: str,
        ids: Int[np.ndarray, " time"],
        settings: Settings,
        seed: int,
    ) -> str:
        text = ""
        try:
            with wrapped(sys.stdout) as write:
                write(shown)
                for (piece,) in self._pieces(state.text, ids, settings, seed):
                    text += piece.text
                    write(piece.text)
        finally:
            self._keep(state, text)  # also what a person who stops it has seen
        print()
        return text

    def _whole(
        self, prompt: str, ids: Int[np.ndarray, " time"], settings: Settings, seed: int
    ) -> list[Piece]:
        if self._copy_guard is None:
            return self.writer.write(ids, settings, self._samples, seed)
        return whole(self._pieces(prompt, ids, settings, seed))

    def _pieces(
        self, prompt: str, ids: Int[np.ndarray, " time"], settings: Settings, seed: int
    ) -> Iterator[list[Piece]]:
        if self._copy_guard is None:
            return self.writer.stream(ids, settings, self._samples, seed)
        return self.writer.stream_in_slots(
            ids,
            settings,
            range(self._samples),
            seed,
            self._slots(settings),
            guard=functools.partial(Guard, *self._copy_guard, prompt),
        )

    def _slots(self, settings: Settings) -> int:
        voices = len(complete(settings.blend, self.writer.voices))
        return max(voices, min(voices * self._samples, MAX_SLOTS))

    def _keep(self, state: State, written: str) -> None:
        if written:
            self.draft.reply(state, written)

    def _show(self, shown: str, text: str, number: int) -> None:
        if self._samples > 1:
            print(f"--- {number + 1} of {self._samples} ---")
        if self._index is None:
            _print_wrapped(shown + text)
            return
        # The prompt is the person's own: it is not measured.
        measured = self._index.words.measure(text)
        on, off = ("\x1b[7m", "\x1b[0m") if styled(sys.stdout) else ("[[", "]]")
        _print_wrapped(shown + novelty.highlighted(measured, text, on, off))
        for line in novelty.describe(measured, text, self._index.baseline):
            print(f"    {line}")

    def _ranked(self, prompt: str, texts: list[str], blend: Blend) -> list[int]:
        """The samples, best first, shown as a table: least copied, then nearest in style."""
        assert self._index is not None
        order = ranked(self.writer, self._index.words, prompt, texts, blend)
        print("  sample  words  copied  longest span  style")
        for number, measured, towards in order:
            longest = measured.longest
            print(
                f"{number + 1:>8}{measured.words:>7}{measured.copied:>8.1%}"
                f"{0 if longest is None else longest.words:>14}{towards:>+7.2f}"
            )
        return [sample.number for sample in order]

    def show_style(self) -> None:
        """Prints, for each sentence of the last reply, which voice it leans to."""
        reply = self.draft.last_reply
        if reply is None or not reply.added.strip():
            raise UserError("nothing has been written yet whose style could be measured")
        print(style.table(self.writer.meter.sentences(reply.added, reply.prompt)))

    def show_alternatives(self, names: Sequence[str], blend: Blend) -> None:
        """Prints what voices expect next, side by side; by default those of `compared`.

        Raises UserError where the model does not know a voice.
        """
        text = "" if self.draft.current is None else self.draft.current.text
        columns = {name: one_voice(name) for name in names} or compared(blend, self.writer.voices)
        predictions = self.writer.predictions.next_tokens(text, [*columns.values()], ALTERNATIVES)
        print(f"after {end_of(text, 60)!r}" if text else "at the beginning of a text")
        print(side_by_side(dict(zip(columns, predictions, strict=True))))

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
                slots=self._slots(settings) if self._copy_guard else None,
                copy_guard=self._copy_guard and self._copy_guard.words,
                dtype=self.writer.dtype,
            )
            for number, text in shown.items()
        ]
        try:
            receipts.append(self._checkpoint.run, written)
        except UserError as error:
            self._keeps_receipts = False
            print(f"warning: no receipts are kept: {error}", file=sys.stderr)


def end_of(text: str, length: int) -> str:
    """The last characters of a text, from the beginning of a word on, marked where it is cut."""
    if len(text) <= length:
        return text
    _, _, words = text[-length:].partition(" ")
    return CUT + (words or text[-length:])


def tree(draft: Draft) -> str:
    """The branches of a text, a line each: number, first words; the current one has a star."""
    branches = draft.branches()
    if not branches:
        raise UserError("there is no text yet; type the beginning of one")
    width = len(str(max(state.number for _, state in branches)))
    return "\n".join(
        f"{'*' if state is draft.current else ' '} {state.number:>{width}} {'  ' * depth}"
        f"{_first_words(state)}"
        for depth, state in branches
    )


def _first_words(state: State) -> str:
    # An edit that only takes the end away adds nothing.
    words = " ".join(state.added.split()) or end_of(" ".join(state.text.split()), 50)
    kind = "edited: " if state.origin is Origin.EDIT else ""
    return kind + (words if len(words) <= 60 else f"{words[:58].rstrip()} {CUT}")


def compared(blend: Blend, voices: Sequence[str]) -> dict[str, Blend]:
    """Blends worth a comparison, by name: a blend of several voices, and each of these.

    For a single voice or none, it and others of the model's voices, four at most.
    """
    if len(blend) > 1:
        return {"(blend)": blend} | {voice: one_voice(voice) for voice in blend}
    return {
        voice: one_voice(voice) for voice in [*dict.fromkeys([*blend, *voices])][:4] or ["none"]
    }


def side_by_side(columns: Mapping[str, Sequence[Prediction]]) -> str:
    """A table of predictions: a column for each name, the likeliest first."""
    shown = [
        [
            name,
            *(f"{prediction.probability:6.1%} {_quoted(prediction.text)}" for prediction in each),
        ]
        for name, each in columns.items()
    ]
    widths = [max(map(cells, column)) for column in shown]
    return "\n".join(
        "   ".join(
            cell + " " * (width - cells(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in zip(*shown, strict=True)
    )


def _quoted(token: str) -> str:
    """A token in quotes, since many begin with a blank."""
    return "(the end)" if token == END_OF_TEXT else repr(token)


def _print_wrapped(text: str) -> None:
    with wrapped(sys.stdout) as write:
        write(text)
    print()


def replay(
    writer: Writer, checkpoint: Checkpoint, receipt: Receipt, index: novelty.Index | None
) -> int:
    """Writes a receipt's sample again; 0 if it is the same text, 1 if not.

    The index of the training text is needed where the sample was kept from copying.
    """
    settings = Settings(receipt.sampling, receipt.max_tokens, receipt.blend, receipt.seed)
    settings.validate()
    ids = writer.encode(receipt.prompt)
    if receipt.slots is None:
        samples = writer.write(ids, settings, receipt.samples, receipt.seed, receipt.stop)
        text = samples[receipt.sample - 1].text
    else:
        guard = None
        if receipt.copy_guard is not None and index is not None:
            guard = functools.partial(Guard, index, receipt.copy_guard, receipt.prompt)
        pieces = writer.stream_in_slots(
            ids, settings, [receipt.sample - 1], receipt.seed, receipt.slots, receipt.stop, guard
        )
        ((text, _),) = whole(pieces)
    same = text == receipt.text
    if receipt.text and text.startswith(receipt.text) and receipt.slots is not None:
        same, text = True, receipt.text  # it was stopped there
    _print_wrapped(receipt.prompt + text)
    if same:
        print("the same text as in the receipt", file=sys.stderr)
        return 0
    differing = environment.differences(receipt.circumstances, receipts.circumstances(checkpoint))
    reason = "; ".join(differing) or "nothing that the receipt records differs; has it been edited?"
    print(f"not the text of the receipt: {reason}", file=sys.stderr)
    return 1


HELP = """Type the beginning of a new text; the model continues it. Ctrl-C stops a reply.
/more      goes on with the text        /retry      writes the last reply anew
/edit      opens the text in an editor  /undo       the text before the last reply or edit
/branch    lists the text's branches    /branch N   goes to one of them
/alternatives V,W   what voices would say next; without V,W those of the blend
/style     of the last reply, a voice for each sentence
/voice V   a voice, or none             /blend B    of voices: wilde=0.3,lovecraft=0.7
/temp X    temperature, 0 for the likeliest words only
/topk N    0 turns it off               /topp X     in (0, 1]
/max N     tokens in a reply            /seed N     or random
/help                                   /quit
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
    value = value.strip()
    match name:
        case "help":
            print(HELP)
        case "more":
            chat.more(settings)
        case "retry":
            chat.retry(settings)
        case "edit":
            chat.edit()
        case "undo":
            chat.draft.undo()
            chat.show_place()
        case "branch" if value:
            chat.draft.go(_number(name, value))
            chat.show_place()
        case "branch":
            print(tree(chat.draft))
        case "style":
            chat.show_style()
        case "alternatives":
            names = [part.strip() for part in value.split(",")] if value else []
            chat.show_alternatives(names, settings.blend)
        case _:
            settings = change(settings, name, value, chat.writer)
            print(settings)
    return settings


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"/{name} needs a number, not {value!r}") from error
