"""Voices: their names and tokens, and weights of several of them."""

import math
import re
from collections.abc import Collection, Mapping

from gothic_jax.errors import UserError

ANY = "any"
"""No voice in particular: the voice of works that name none, and of blends that leave a rest."""
ALL = "all"
"""The name of all voices together, in scores."""
VOICE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
REST = "rest"
"""All voices that weights do not name, in `voice_weights`."""
RESERVED_VOICES = frozenset({ALL, ANY, REST, "endoftext", "mixed", "none"})
"""Names with another meaning in file names, scores and commands."""
MARKER = re.compile(rf"<\|({VOICE_NAME.pattern})\|>")
"""A special token; its group is the name."""
MAX_WEIGHT = 100.0
"""Larger weights, of either sign, only make log-probabilities lose their last digits."""
Blend = Mapping[str, float]
"""Weights by voice: those by which next-token log-probabilities are added up. An empty blend is
no voice in particular."""


def voice_token(voice: str) -> str:
    """The special token of a voice."""
    return f"<|{voice}|>"


def parse_weights(text: str, *, name: str, known: Collection[str] = ()) -> dict[str, float]:
    """The weights of voices as `wilde=0.3,lovecraft=0.7` gives them, each at most MAX_WEIGHT.

    For the UserError where they are malformed or all 0, `name` is what the user gave them as, and
    `known` are the voices that there are, if that is known.
    """
    there_are = f"; the voices are {', '.join(known)}" if known else ""
    weights: dict[str, float] = {}
    for part in text.split(","):
        voice, _, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not VOICE_NAME.fullmatch(voice) or math.isnan(weight):
            raise UserError(
                f"{name} must be voices and their weights, as in wilde=0.3,lovecraft=0.7, not"
                f" {part.strip()!r}{there_are}"
            )
        if abs(weight) > MAX_WEIGHT:
            raise UserError(f"{name}: the weight of {voice} must be at most {MAX_WEIGHT:g}")
        if voice in weights:
            raise UserError(f"{name} names {voice} twice; once is enough")
        weights[voice] = weight
    if not any(weights.values()):
        raise UserError(f"{name} has no weight but 0; give one voice another{there_are}")
    return weights


def complete(blend: Blend, voices: Collection[str]) -> dict[str, float]:
    """The weights of all that take part, which add up to 1: `any` has what the voices leave.

    So `lovecraft=1.5` is Lovecraft and half of what sets him apart from all voices together, and
    `lovecraft=1.5,wilde=-0.5` of what sets him apart from Wilde. `voices` are the model's. Raises
    UserError where it does not know a voice, or the weights are all 0.
    """
    if unknown := [voice for voice in blend if voice not in voices and voice != ANY]:
        raise UserError(
            f"there is no voice {unknown[0]!r}; this model's voices: {', '.join(voices)}"
            if voices
            else f"there is no voice {unknown[0]!r}, nor any other: this model was trained on a"
            " text without voices"
        )
    if blend and not any(blend.values()):
        raise UserError("the blend has no weight but 0; give one voice another")
    # A smaller one would be 0 in f32.
    weights = {voice: weight for voice, weight in blend.items() if abs(weight) > 1e-9}
    left = 1 - sum(weights.values())
    if abs(left) > 1e-9:
        weights[ANY] = weights.get(ANY, 0.0) + left
    weights = {voice: weight for voice, weight in weights.items() if weight}
    return weights if len(weights) > 1 else dict.fromkeys(weights, 1.0)


def describe(blend: Blend) -> str:
    """The blend in a few words."""
    if not blend:
        return "voice none"
    if len(blend) == 1 and (only := next(iter(blend.items())))[1] == 1:
        return f"voice {only[0]}"
    return "blend " + ",".join(f"{voice}={weight:g}" for voice, weight in blend.items())


def one_voice(name: str) -> Blend:
    """The blend that a single voice is; `none` is no voice in particular."""
    return {} if name == "none" else {name: 1.0}
