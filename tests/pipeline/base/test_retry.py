import datetime
import email.utils
import math

import pytest

from microdit.pipeline.base import retry
from microdit.pipeline.base.retry import Backoff, retry_after


def test_pauses_double_up_to_the_longest() -> None:
    backoff = Backoff(0.1, longest=1.0)
    assert [backoff.next_pause() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert backoff.failures == 6


def test_a_thousand_failures_are_no_overflow() -> None:
    backoff = Backoff(0.1, longest=20.0)
    assert [backoff.next_pause() for _ in range(2000)][-1] == 20.0


def test_the_jitter_is_drawn_for_each_pause() -> None:
    backoff = Backoff(1.0, longest=1.0, jitter=(0.5, 1.0))
    pauses = [backoff.next_pause() for _ in range(50)]
    assert all(pause is not None and 0.5 <= pause <= 1.0 for pause in pauses)
    assert len(set(pauses)) > 40


def test_the_last_try_has_no_pause() -> None:
    backoff = Backoff(1.0, tries=3)
    assert [backoff.next_pause() for _ in range(3)] == [1.0, 2.0, None]


def test_a_reset_begins_again() -> None:
    backoff = Backoff(1.0, tries=3)
    assert [backoff.next_pause(), backoff.next_pause()] == [1.0, 2.0]
    backoff.reset()
    assert [backoff.next_pause() for _ in range(3)] == [1.0, 2.0, None]


def test_no_try_begins_after_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.5, 103.0, 103.0])
    monkeypatch.setattr(retry.time, "monotonic", lambda: next(clock))
    backoff = Backoff(1.0)
    assert backoff.next_pause(patience=5.0) == 1.0
    assert backoff.next_pause(patience=4.0) is None
    assert backoff.waited == 3.0
    assert backoff.next_pause(patience=5.0) == 2.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        (" 17 ", 17.0),
        ("0.8", 0.8),
        ("9" * 400, 1e9),
        ("", None),
        (None, None),
        ("junk", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header) == seconds


@pytest.mark.parametrize("seconds", [2, 3600])
def test_retry_after_as_a_date(seconds: int) -> None:
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    asked = retry_after(email.utils.format_datetime(when, usegmt=True))
    assert asked is not None and math.isclose(asked, seconds, abs_tol=1.5)
