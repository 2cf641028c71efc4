"""What the report page counts and draws with: scales, numbers, ticks, means and colours."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.report import charts


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (charts.format_bytes(0), "0 B"),
        (charts.format_bytes(999), "999 B"),
        (charts.format_bytes(999_600), "1 MB"),
        (charts.format_bytes(12_345_678), "12.3 MB"),
        (charts.format_bytes(1.5e15), "1.5 PB"),
        (charts.format_number(0), "0"),
        (charts.format_number(0.012345), "0.0123"),
        (charts.format_number(9.996), "10"),
        (charts.format_number(1234.5), "1,234"),
        (charts.format_number(200.3), "200"),
        (charts.format_number(12.96), "13"),
        (charts.format_number(1.5e-7), "1.5e-07"),
        (charts.format_number(-20.0), "-20"),
        (charts.format_duration(0.04), "0.0 s"),
        (charts.format_duration(59.7), "1 min 0 s"),
        (charts.format_duration(3599.6), "1 h 0 min"),
        (charts.format_duration(200_000), "2.3 days"),
    ],
)
def test_numbers_for_people(made: str, wanted: str) -> None:
    assert made.replace("\xa0", " ") == wanted


@given(st.floats(1e-12, 1e15), st.sampled_from([1, -1]))
def test_a_number_for_people_is_the_number(value: float, sign: int) -> None:
    assert float(charts.format_number(sign * value).replace(",", "")) == pytest.approx(sign * value, rel=0.051)
    amount, unit = charts.format_bytes(value).split("\xa0")
    size = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(amount) * size == pytest.approx(value, rel=0.0051, abs=0.5)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0031, 0.0032), (-3, 17), (1, 1e6), (0.5, 0.5)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    assert 1 <= len(ticks) <= 6 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


def test_the_running_mean_neither_lags_nor_drifts() -> None:
    line = [3 - 0.01 * i for i in range(200)]
    assert charts.smooth(line, 20)[20:180] == pytest.approx(line[20:180])


def test_colours_can_be_told_apart_in_both_schemes() -> None:
    """WCAG 2.2: text 4.5:1 against what it stands on, shapes 3:1."""
    css = (Path(charts.__file__).parent / "page.html.j2").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    for colours in schemes:
        for text in ("ink", "soft", "accent", "warm"):
            for ground in ("paper", "card") + (("warm-paper",) if text == "warm" else ()):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for shape in ("fill", "axis", "warm-fill", "accent"):
            assert contrast(colours[shape], colours["card"]) >= 3, shape
        assert contrast(colours["fill"], colours["ghost"]) >= 2, "what is left against what was there"


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
