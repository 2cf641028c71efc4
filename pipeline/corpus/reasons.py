"""The reasons of failed rows that another try may mend: one table of them (docs/reference/corpus.md, section 3.3)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UPSTREAM = "upstream"
"""The row failed in an input of the column: there it can be made again, and not here."""


@dataclass(frozen=True)
class Rule:
    """Rows of these reasons; with `detail` those alone whose detail begins so, or does not."""

    reasons: re.Pattern[str]
    detail: re.Pattern[str] | None = None

    def holds(self, reason: str, detail: str) -> bool:
        return bool(self.reasons.fullmatch(reason)) and (self.detail is None or bool(self.detail.match(detail)))


PASSING = (
    Rule(re.compile(r"http_(?:408|425|429|5\d\d)")),
    Rule(re.compile("timeout|connection")),
    Rule(re.compile("dns"), re.compile("(?!there is no such host)")),
    Rule(re.compile("truncated"), re.compile("the transfer broke off")),  # a picture that is cut stays so
)
"""Transient reasons of a URL: another fetch may succeed."""

OF_SERVERS = re.compile(r"http_\d\d\d|timeout|connection|dns|certificate|redirects")
"""Reasons of URLs whose server is at fault or gone."""

MADE_AGAIN = re.compile(r"http_\d\d\d|timeout|connection|bad_answer|too_long|cut_off|error|crash|stall")
"""Transient reasons of rows of other columns: a server or a process was at fault, and another try may succeed."""


def may_pass(reason: str, detail: str) -> bool:
    """Return True if a URL that failed so may come another time."""
    return any(rule.holds(reason, detail) for rule in PASSING)


def surely_passing(reason: str) -> bool:
    """Return True if a URL that failed for this reason may come another time, whatever its detail is."""
    return any(rule.detail is None and rule.reasons.fullmatch(reason) for rule in PASSING)


def named_by(reason: str, names: Iterable[str]) -> bool:
    """Return True if a reason is one of `names`, where `http_4xx` and `http_5xx` stand for all that begin so."""
    return reason != UPSTREAM and any(
        reason == name or bool(re.fullmatch(r"http_[1-9]xx", name) and re.fullmatch(name[:6] + r"\d\d", reason))
        for name in names
    )


def in_words(counts: Mapping[str, int]) -> str:
    """Write counts of reasons, the largest first: `timeout 12, http_503 3`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count:,}" for reason, count in ordered)
