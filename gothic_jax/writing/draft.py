"""A text while it is written: a tree of its states, none of which is lost.

A state follows from another by a reply of the model or an edit of the person. What is written
from an earlier state again is a branch beside the first.
"""

import dataclasses
import enum
import itertools

from gothic_jax.errors import UserError


class Origin(enum.Enum):
    """What made a state of a text."""

    BEGINNING = "beginning"
    """The person began a new text."""
    REPLY = "reply"
    """The model continued the text before."""
    EDIT = "edit"
    """The person changed the text before."""


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """A text as it was at one time."""

    number: int
    """From 1 on, over all texts of a draft."""
    text: str
    """All of it."""
    origin: Origin
    before: "State | None" = dataclasses.field(repr=False)
    """What it was made from; of a beginning the text that was left for it, if there was one."""

    @property
    def prompt(self) -> str:
        """What the model has continued; of a person's own state all of the text."""
        if self.origin is Origin.REPLY and self.before is not None:
            return self.before.text
        return self.text

    @property
    def added(self) -> str:
        """A reply, a beginning, or an edited text from the word on in which it first differs."""
        if self.origin is Origin.BEGINNING or self.before is None:
            return self.text
        if self.origin is Origin.REPLY:
            return self.text[len(self.prompt) :]
        both = zip(self.before.text, self.text, strict=False)
        same = "".join(new for new, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
        return self.text[len(same) - len(same.split(" ")[-1]) :]


class Draft:
    """The texts of a conversation, and where in them the person is."""

    def __init__(self) -> None:
        self._states: list[State] = []
        self.current: State | None = None
        """None before the first text."""

    def begin(self, text: str) -> State:
        """Goes to a new text."""
        return self._go_to_new(text, Origin.BEGINNING, self.current)

    def reply(self, before: State, written: str) -> State:
        """Goes to the text that the model has made of another one by writing on."""
        return self._go_to_new(before.text + written, Origin.REPLY, before)

    def edit(self, text: str) -> State:
        """Goes to the text that the person has made of the current one; a new one if none is."""
        if self.current is None:
            return self.begin(text)
        return self._go_to_new(text, Origin.EDIT, self.current)

    def go(self, number: int) -> State:
        """Goes to a state; raises UserError where there is none of this number."""
        if not 1 <= number <= len(self._states):
            raise UserError(f"there is no text {number}; /branch lists those that there are")
        self.current = self._states[number - 1]
        return self.current

    def undo(self) -> State:
        """Goes back by a reply, an edit or a beginning; raises UserError where there is none."""
        if self.current is None or self.current.before is None:
            raise UserError("there is nothing to undo")
        self.current = self.current.before
        return self.current

    def take_back(self) -> State:
        """Goes to what the model shall continue again: before a reply, else where one is.

        Raises UserError before the first text.
        """
        if self.current is None:
            raise UserError("there is nothing to retry yet; type the beginning of a text")
        if self.current.origin is Origin.REPLY:
            return self.undo()
        return self.current

    @property
    def last_reply(self) -> State | None:
        """The last state of the current text that the model has written; None if none is."""
        state = self.current
        while state is not None and state.origin is not Origin.REPLY:
            state = None if state.origin is Origin.BEGINNING else state.before
        return state

    def branches(self) -> list[tuple[int, State]]:
        """The states of the current text, each before what was made of it, and their depths.

        Those that were made of one state are a level deeper than it if they are several.
        """
        if self.current is None:
            return []
        after: dict[State, list[State]] = {state: [] for state in self._states}
        for state in self._states:
            if state.before is not None and state.origin is not Origin.BEGINNING:
                after[state.before].append(state)
        found = []
        left = [(0, self._beginning(self.current))]
        while left:
            depth, state = left.pop()
            found.append((depth, state))
            deeper = depth + (len(after[state]) > 1)
            left += [(deeper, following) for following in reversed(after[state])]
        return found

    def _beginning(self, state: State) -> State:
        while state.origin is not Origin.BEGINNING and state.before is not None:
            state = state.before
        return state

    def _go_to_new(self, text: str, origin: Origin, before: State | None) -> State:
        self.current = State(len(self._states) + 1, text, origin, before)
        self._states.append(self.current)
        return self.current
