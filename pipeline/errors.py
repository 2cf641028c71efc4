"""The exceptions that are messages for the user."""


class RequestError(ValueError):
    """The request itself is wrong: the message names the thing, its value, what was expected and what to do.

    The command line prints it without a traceback and ends with exit status 2.
    """


class DamagedError(RequestError):
    """A record of a corpus cannot be understood: what depends on it fails, the rest of a build goes on."""
