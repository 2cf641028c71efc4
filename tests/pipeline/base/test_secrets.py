"""Passwords and signatures of URLs are found in all their forms, and nothing else is touched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.base.secrets import has_secrets, split_login, without_secrets


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:s3cret@h:8/a?b=1", "https://h:8/a?b=1"),
        ("http://s3cret@h/a", "http://h/a"),
        ("http://me:s3@cret@h/a@b", "http://h/a@b"),
        ("https://h/a?x=1&X-Amz-Signature=s3cret&y=2", "https://h/a?x=1&X-Amz-Signature=***&y=2"),
        ("https://h/a?sig=s3cret", "https://h/a?sig=***"),
        ("https://h/a?TOKEN=s3cret#f", "https://h/a?TOKEN=***#f"),
        ("Cannot reach 'http://me:s3cret@h/a?token=s3cret'", "Cannot reach 'http://h/a?token=***'"),
    ],
)
def test_secrets_are_left_out(text: str, kept: str):
    assert without_secrets(text) == kept
    assert has_secrets(text) and not has_secrets(kept)


@pytest.mark.parametrize(
    "text",
    ["https://h/a@b?c=d@e", "http://h/?u=me@h", "a caption: sig=nature, token=x", "http://h/design=1?assign=2&key=3"],
)
def test_others_stay(text: str):
    assert without_secrets(text) == text


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/?#'\"<>&;"), min_size=6))
def test_any_password_is_left_out(password: str):
    url = f"https://me:{password}@h.test/x?sig={password}&a=b"
    assert without_secrets(url) == "https://h.test/x?sig=***&a=b"


def test_logins_are_split_off():
    assert split_login("https://me:p%40ss@h/a") == ("https://h/a", "Basic bWU6cEBzcw==")
    assert split_login("https://h/a@b") == ("https://h/a@b", None)
