"""Errors of a bucket for callers that know files."""

from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import first_line


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what a bucket refuses for good as an OSError."""
    try:
        yield
    except BaseError as error:
        raise OSError(first_line(error)) from error
