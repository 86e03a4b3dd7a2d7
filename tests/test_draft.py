import pytest

from gothic_jax.errors import UserError
from gothic_jax.writing.draft import Draft, Origin


def numbers(draft: Draft) -> list[tuple[int, int]]:
    return [(depth, state.number) for depth, state in draft.branches()]


def test_a_text_grows_by_replies_and_edits() -> None:
    draft = Draft()
    beginning = draft.begin("The sea")
    reply = draft.reply(beginning, " was out")
    assert (reply.text, reply.prompt, reply.added) == ("The sea was out", "The sea", " was out")
    edit = draft.edit("The sea was far out")
    assert (edit.text, edit.origin, edit.added) == ("The sea was far out", Origin.EDIT, "far out")
    more = draft.reply(edit, ".")
    assert (more.text, more.prompt, more.added) == ("The sea was far out.", edit.text, ".")
    assert draft.current is more
    assert draft.last_reply is more
    assert numbers(draft) == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_what_an_edit_takes_away_adds_nothing() -> None:
    draft = Draft()
    draft.begin("The sea was out ")
    assert draft.edit("The sea ").added == ""
    assert draft.edit("The seal").added == "seal"


def test_undo_goes_back_state_by_state_and_loses_none() -> None:
    draft = Draft()
    first = draft.reply(draft.begin("One"), " two")
    draft.edit("One three")
    assert draft.undo() is first
    assert draft.undo().text == "One"
    with pytest.raises(UserError, match="nothing to undo"):
        draft.undo()
    assert draft.go(3).text == "One three"


def test_a_new_text_can_be_undone_too() -> None:
    draft = Draft()
    left = draft.reply(draft.begin("One"), " two")
    new = draft.begin("Other")
    assert draft.branches() == [(0, new)]
    assert draft.last_reply is None
    assert draft.undo() is left


def test_what_is_retried_is_a_branch_beside_the_reply() -> None:
    draft = Draft()
    with pytest.raises(UserError, match="nothing to retry"):
        draft.take_back()
    draft.reply(draft.begin("One"), " two")
    draft.reply(draft.take_back(), " three")
    assert draft.current is not None
    assert draft.current.text == "One three"
    draft.reply(draft.current, " four")
    draft.reply(draft.take_back(), " five")
    # The beginning has two replies, and the second of them has two again.
    assert numbers(draft) == [(0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    assert draft.take_back().text == "One three"
    # A person's own text is what is continued, and stays.
    edit = draft.edit("One six")
    assert draft.take_back() is edit


def test_the_last_reply_is_one_of_this_text() -> None:
    draft = Draft()
    reply = draft.reply(draft.begin("One"), " two")
    draft.edit("One too")
    assert draft.last_reply is reply
    draft.begin("Other")
    assert draft.last_reply is None


@pytest.mark.parametrize("number", [-1, 0, 3])
def test_only_states_that_there_are_can_be_gone_to(number: int) -> None:
    draft = Draft()
    current = draft.reply(draft.begin("One"), " two")
    with pytest.raises(UserError, match="/branch"):
        draft.go(number)
    assert draft.current is current


def test_a_long_text_has_no_limit() -> None:
    draft = Draft()
    state = draft.begin("a")
    for _ in range(3000):
        state = draft.reply(state, "a")
    assert len(draft.branches()) == 3001
    assert draft.last_reply is state
