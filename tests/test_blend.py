import pytest
from hypothesis import given
from hypothesis import strategies as st

from gothic_jax.errors import UserError
from gothic_jax.text.voices import complete, describe, parse_weights

VOICES = ["lovecraft", "wilde"]


@pytest.mark.parametrize(
    ("blend", "weights"),
    [
        ({}, {"any": 1.0}),
        ({"wilde": 1.0}, {"wilde": 1.0}),
        ({"wilde": 1.0, "lovecraft": 0.0}, {"wilde": 1.0}),
        ({"wilde": 0.25, "lovecraft": 0.75}, {"wilde": 0.25, "lovecraft": 0.75}),
        ({"lovecraft": 1.5, "wilde": -0.5}, {"lovecraft": 1.5, "wilde": -0.5}),
        ({"lovecraft": 1.5}, {"lovecraft": 1.5, "any": -0.5}),
        ({"wilde": 0.25}, {"wilde": 0.25, "any": 0.75}),
        ({"any": 1.0}, {"any": 1.0}),
    ],
)
def test_what_the_voices_leave_of_1_is_all_voices_together(
    blend: dict[str, float], weights: dict[str, float]
) -> None:
    assert complete(blend, VOICES) == weights


@given(
    st.dictionaries(st.sampled_from([*VOICES, "any"]), st.floats(-100, 100)).filter(
        lambda blend: not blend or any(blend.values())
    )
)
def test_the_weights_of_a_blend_add_up_to_1(blend: dict[str, float]) -> None:
    weights = complete(blend, VOICES)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
    assert all(weights.values())


def test_a_voice_that_the_model_does_not_know_is_told_with_those_it_does() -> None:
    with pytest.raises(UserError, match="lovecraft, wilde"):
        complete({"poe": 1.0}, VOICES)
    with pytest.raises(UserError, match="without voices"):
        complete({"poe": 1.0}, [])
    with pytest.raises(UserError, match="no weight but 0"):
        complete({"wilde": 0.0}, VOICES)
    with pytest.raises(UserError, match="the voices are me, poe"):
        parse_weights("me", name="--blend", known=["me", "poe"])


def test_a_blend_is_read_as_it_is_told() -> None:
    assert describe({}) == "voice none"
    assert describe({"wilde": 1.0}) == "voice wilde"
    told = describe({"wilde": 0.3, "lovecraft": -0.7})
    assert parse_weights(told.removeprefix("blend "), name="--blend") == {
        "wilde": 0.3,
        "lovecraft": -0.7,
    }
