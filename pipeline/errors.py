"""The one exception that is a message for the user."""


class RequestError(ValueError):
    """The request itself is wrong: the message names the thing, its value, what was expected and what to do.

    The command line prints it without a traceback and ends with exit status 2.
    """
