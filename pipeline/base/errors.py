"""Exceptions whose messages are for the user."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text that is not blank, or its type: obstore's texts go on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


class RequestError(ValueError):
    """The request itself is wrong: the message names the thing, its value, what was expected and what to do.

    The command line prints it without a traceback and ends with exit status 2.
    """


class UnreadableError(RequestError):
    """A unit of which nothing can be read: it is set aside, the rest of a build goes on."""


class DamagedError(RequestError):
    """A record of a corpus cannot be parsed: what depends on it fails, the rest of a build goes on."""


class ServerRejects(OSError):
    """A server rejects most of what one shard asks for; with its words. It may be wrong for every shard."""


class CredentialsExpired(OSError):
    """The credentials of a bucket have expired. `may_come`: new ones may be found later by the same program."""

    def __init__(self, message: str, may_come: bool):
        super().__init__(message)
        self.may_come = may_come

    def __reduce__(self) -> tuple[type["CredentialsExpired"], tuple[str, bool]]:
        return CredentialsExpired, (str(self), self.may_come)
