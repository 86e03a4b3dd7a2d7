"""Keeps copied passages out of what is written."""

import re

from gothic_jax.measuring.novelty import Index, find_words, is_complete, word_key

LONGEST_WORD = 64
"""Characters; of a prompt, so many for each word of a span are looked at."""


class Guard:
    """Watches one sample for spans of `words` words that a training work has.

    The words of the prompt count, too, but only spans that end in the sample are found: so the
    model does not complete a passage that a person has begun.
    """

    def __init__(self, index: Index, words: int, prompt: str) -> None:
        self._index = index
        self._words = words
        end = prompt[-LONGEST_WORD * words :]
        kept = find_words(end)[-words:]
        self._before = end[kept[0].start() :] if kept else ""
        self._passed: list[tuple[int, str]] = []
        """The complete words of prompt and sample, in order: where each ends, and its key."""

    def find_copy(self, text: str, *, ended: bool) -> int | None:
        """Where the last word of a copied span begins in the sample's text; None if there is none.

        A word that begins in the prompt begins at 0. Words that have passed are not looked at
        again.
        """
        own = len(self._before)
        for word in self._open(text):
            if not (ended or is_complete(word)):
                break
            key = word_key(word[0])
            span = [*(key for _, key in self._passed[len(self._passed) - self._words + 1 :]), key]
            if word.end() > own and len(span) == self._words and self._index.has(span):
                return max(word.start() - own, 0)
            self._passed.append((word.end(), key))
        return None

    def open_word(self, text: str) -> int:
        """Where the first word begins that has not passed; the text's length if there is none."""
        return next((max(w.start() - len(self._before), 0) for w in self._open(text)), len(text))

    def take_back(self, length: int) -> None:
        """The sample's text is now so long: what lay behind may become other words."""
        # The word before an apostrophe that was the last character may go on behind it.
        while self._passed and self._passed[-1][0] + 1 >= len(self._before) + length:
            self._passed.pop()

    def _open(self, text: str) -> list[re.Match[str]]:
        return find_words(self._before + text, self._passed[-1][0] if self._passed else 0)
