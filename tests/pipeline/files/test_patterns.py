"""Patterns that stand for many files."""

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.files.patterns import expand_braces, matcher


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar", "x") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{9..10}/{a,b,}", "x") == ["9/a", "9/b", "9/", "10/a", "10/b", "10/"]
    assert expand_braces("plain{0}{}", "x") == ["plain{0}{}"]
    for bad in ("{3..2}", "{0..9999999}", "{0..9999}{0..9999}"):
        with pytest.raises(RequestError, match=r"sources\.a\.files"):
            expand_braces(bad, "sources.a.files")


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [
        ("*.tar", ["a.tar", ".tar"], ["a/b.tar", "a.tar.gz"]),
        ("**/*.tar", ["a.tar", "a/b.tar", "a/b/c.tar"], ["a.zip"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a/c"]),
        ("p-?.[tz]*", ["p-1.tar", "p-2.zip"], ["p-10.tar", "p-/.tar", "p-1.rar"]),
        ("[!a]+(x)", ["b+(x)"], ["a+(x)", "bb(x)"]),
    ],
)
def test_wildcards(pattern: str, fits: list[str], does_not: list[str]) -> None:
    assert [name for name in fits + does_not if matcher(pattern).fullmatch(name)] == fits
