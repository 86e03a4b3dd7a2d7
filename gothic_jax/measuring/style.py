"""Which voice each sentence of a text leans to, by the model's own expectations.

The measure is the log-likelihood ratio: how much likelier, in nats a token, the words are after
one voice's token than after another's. It measures what the model takes for a voice, not who
wrote the text.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gothic_jax.errors import UserError
from gothic_jax.measuring.scoring import LossFunction, cut_windows
from gothic_jax.model.gpt import Params
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import Blend

_SENTENCE_END = re.compile(
    # "Mr." and its like end none, nor does an initial.
    r"(?:(?<!\bMr)(?<!\bDr)(?<!\bSt)(?<!\bMrs)(?<!\b[A-Z])\.|[!?])[.!?]*[\"'\u2019\u201d)\]]*(?=\s)"
    r"|\n\s*\n"
)


class Lean(NamedTuple):
    """How likely some words are under each voice."""

    text: str
    tokens: int
    log_likelihood: dict[str, float]
    """Nats a token, by voice."""
    start: int = 0
    """The first character, in the text measured."""
    end: int = 0
    """The one behind the last."""

    @property
    def voice(self) -> str:
        """The voice under which the words are likeliest."""
        return max(self.log_likelihood, key=self.log_likelihood.__getitem__)

    @property
    def strength(self) -> float:
        """Its lead over the next voice: the log-likelihood ratio, in nats a token."""
        first, second, *_ = sorted(self.log_likelihood.values(), reverse=True)
        return first - second

    def towards(self, blend: Blend) -> float:
        """How far the words lean to a blend of voices, in nats a token.

        The voices' log-likelihoods, summed by the blend's weights, above their mean; 0 for a
        blend that favours none.
        """
        voices = self.log_likelihood
        total = sum(blend.get(voice, 0.0) for voice in voices)
        weighted = sum(blend.get(voice, 0.0) * value for voice, value in voices.items())
        return weighted - total * float(np.mean([*voices.values()]))

    def as_dict(self) -> dict[str, Any]:
        """All but the place, for JSON."""
        values = {name: getattr(self, name) for name in ("text", "tokens", "log_likelihood")}
        return values | {"voice": self.voice, "strength": self.strength}


class Meter:
    """A model ready to measure texts by."""

    def __init__(
        self,
        losses: LossFunction,
        params: Params,
        tokenizer: Tokenizer,
        block_size: int,
    ) -> None:
        """Raises UserError where the tokenizer has fewer than two voices."""
        openers = tokenizer.voices
        if len(openers) < 2:
            raise UserError(
                "style is a comparison of voices, and this model has"
                f" {'only ' + ', '.join(openers) if openers else 'none'}: train one on two or more"
            )
        self._losses = losses
        self._params = params
        self._tokenizer = tokenizer
        self._openers = openers
        self._block_size = block_size

    def sentences(
        self,
        text: str,
        prompt: str = "",
        voices: Collection[str] | None = None,
        tick: Callable[[], object] = lambda: None,
    ) -> list[Lean]:
        """The lean of each sentence of `text`, as the words that follow `prompt`.

        `voices`, two or more of the model's, are compared; without them all are. `tick` is called
        for each window that is read: what it raises ends the measuring.
        """
        openers = {voice: self._openers[voice] for voice in voices or self._openers}
        nats, ends = self._measured(prompt + text, openers, tick)
        begin, byte = 0, len(prompt.encode())
        first = int(np.searchsorted(ends, byte, side="right"))
        leans = []
        for edge in _sentence_edges(text):
            piece, begin = text[begin:edge], edge
            byte += len(piece.encode())
            # A token belongs where its last byte lies: its first may be the space before a word.
            last = int(np.searchsorted(ends, byte, side="right"))
            if last > first:
                means = dict(
                    zip(openers, (-nats[:, first:last].mean(axis=1)).tolist(), strict=True)
                )
                start = edge - len(piece.lstrip())
                leans.append(Lean(" ".join(piece.split()), last - first, means, start, edge))
            first = last
        return leans

    def _measured(
        self, text: str, openers: Mapping[str, int], tick: Callable[[], object]
    ) -> tuple[Float[np.ndarray, "voice token"], Int[np.ndarray, " token"]]:
        """Nats of each token under each voice, and the byte behind each token.

        Every token is predicted from half a window of the text before it, or all there is.
        """
        ids = self._tokenizer.encode(text)
        voices = len(openers)
        works = [(ids, opener) for opener in openers.values()]
        inputs, targets, counts = (
            # Window by window, so that a batch is one window under every voice.
            part.reshape(voices, -1, self._block_size).swapaxes(0, 1)
            for part in cut_windows(works, self._block_size, max(self._block_size // 2, 1))
        )
        nats = []
        for window, wanted, counted in zip(inputs, targets, counts, strict=True):
            tick()
            losses = np.asarray(self._losses(self._params, window, wanted), np.float64)
            nats.append(losses[:, counted[0]])
        together = np.concatenate(nats, axis=1) if nats else np.zeros((voices, 0))
        return together, np.cumsum(self._tokenizer.byte_lengths[ids])


def together(leans: Sequence[Lean], text: str) -> Lean:
    """The lean of all these sentences as one, named `text`. Raises UserError if there are none."""
    if not leans:
        raise UserError("there is no sentence whose style could be measured; give a longer text")
    tokens = sum(lean.tokens for lean in leans)
    return Lean(
        text,
        tokens,
        {
            voice: sum(lean.tokens * lean.log_likelihood[voice] for lean in leans) / tokens
            for voice in leans[0].log_likelihood
        },
    )


def _sentence_edges(text: str) -> list[int]:
    """Where each sentence ends, behind its last mark or paragraph; the last one with the text."""
    edges: list[int] = []
    for end in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        if text[edges[-1] if edges else 0 : end].strip():
            edges.append(end)
    return edges


def table(leans: Sequence[Lean]) -> str:
    """A line for each sentence: its voice, how strongly, its words."""
    width = max((len(lean.voice) for lean in leans), default=0)
    return "\n".join(
        f"{lean.voice:<{width}} {lean.strength:+6.2f}  {_shortened(lean.text)}" for lean in leans
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 72 else f"{text[:70].rstrip()} \u2026"
