"""Blends of voices: the weights by which their next-token log-probabilities are added up."""

from collections.abc import Collection, Mapping

from gothic_jax.errors import UserError
from gothic_jax.texts import ANY

Blend = Mapping[str, float]
"""Weights by voice. An empty one is no voice in particular."""


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
    weights = dict(blend)
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
