"""The errors of our own that users can mend; any other exception that leaves the command line is a bug of ours."""


class UserError(ValueError):
    """A mistake in what was asked for or given: a setting, a file, a text. Its message is one line for the user.

    The command line prints it and exits with 2.
    """


class NotFiniteError(UserError, FloatingPointError):
    """Numbers that are not finite, where the model or the settings are to blame."""
