"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line that names the cure."""
