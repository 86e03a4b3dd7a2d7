"""Which of several samples is the best: the one that copies least, then the nearest in style."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gothic_jax.measuring import novelty, style
from gothic_jax.text.voices import Blend
from gothic_jax.writing.writer import Writer


class Ranked(NamedTuple):
    """A sample, and what it is ranked by."""

    number: int
    """Among the samples; from 0 on."""
    novelty: novelty.Novelty
    towards: float
    """How far it leans to its blend, as `style.Lean.towards`; 0 where there is no style."""


def ranked(
    writer: Writer,
    index: novelty.Index,
    prompt: str,
    texts: Sequence[str],
    blend: Blend,
    tick: Callable[[], object] = lambda: None,
) -> list[Ranked]:
    """The samples that follow a prompt, best first; `tick` is as in what measures them."""
    meter = writer.meter if len(writer.voices) > 1 else None
    samples = []
    for number, text in enumerate(texts):
        leans = meter.sentences(text, prompt, tick=tick) if meter else []
        towards = style.together(leans, text).towards(blend) if leans else 0.0
        samples.append(Ranked(number, index.measure(text, tick), towards))
    return best_first(samples)


def best_first(samples: Sequence[Ranked]) -> list[Ranked]:
    """Those that copy least, and among them the nearest in style; an empty text is the last."""
    return sorted(samples, key=lambda s: (s.novelty.words == 0, s.novelty.copied, -s.towards))
