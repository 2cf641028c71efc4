"""The drawings: their list, their names and their pixels."""

import hashlib

import numpy as np
import pytest

from microdit.pipeline.sources.openmoji import drawings as openmoji


def by_code(code):
    return next(drawing for drawing in openmoji.catalogue() if drawing.code == code)


def test_catalogue_has_every_named_drawing_once():
    drawings = openmoji.catalogue()
    assert len(drawings) >= 1_900
    assert len({drawing.code for drawing in drawings}) == len(drawings)
    assert len({drawing.name for drawing in drawings}) == len(drawings)
    assert [drawing.svg.name for drawing in drawings] == sorted(drawing.svg.name for drawing in drawings)
    for drawing in drawings:
        assert drawing.name == " ".join(drawing.name.split())
        assert "_" not in drawing.name and ":" not in drawing.name
        assert drawing.name not in drawing.aliases


def test_no_skin_tones_and_no_private_use():
    for drawing in openmoji.catalogue():
        points = [int(point, 16) for point in drawing.code.split("-")]
        assert not any(0x1F3FB <= point <= 0x1F3FF or 0xE000 <= point <= 0xF8FF for point in points)
    assert "1F44B-1F3FD" in openmoji.svg_files()  # a waving hand of medium skin: drawn, and not taken


@pytest.mark.parametrize(
    ("code", "name", "aliases", "group"),
    [
        ("1F34E", "red apple", ("apple",), "food fruit"),
        ("1F1EB-1F1EF", "flag of Fiji", (), "country flag"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag of Scotland", (), "subdivision flag"),
        ("1F3F4-200D-2620-FE0F", "pirate flag", (), "flag"),
        ("0023-FE0F-20E3", "keycap #", ("hash",), "keycap"),
        ("1F408-200D-2B1B", "black cat", (), "animal mammal"),
        ("2764", "red heart", ("heart",), "heart"),
        ("1F563", "eight-thirty", (), "time"),  # "eight thirty" and "clock830" say nothing more
        ("1FAC6", "fingerprint", (), "person symbol"),
        ("1F469-200D-2695-FE0F", "woman health worker", (), "person role"),  # by the whole sequence
        ("26BD", "soccer ball", ("soccer",), "sport"),
        ("1F50C", "electric plug", (), "computer"),
    ],
)
def test_names_aliases_groups(code, name, aliases, group):
    drawing = by_code(code)
    assert (drawing.name, drawing.aliases, drawing.group) == (name, aliases, group)


def test_base_character_is_the_same_for_all_variants():
    assert openmoji.base_character("1F44B-1F3FD") == openmoji.base_character("1F44B") == "\U0001f44b"
    assert openmoji.base_character("2764-FE0F") == openmoji.base_character("2764")


def test_rasters_are_the_same_every_time_and_on_white():
    svg = by_code("1F34E").svg.read_text()
    for size in (10, 64, 256):
        image = openmoji.rasterise(svg, size)
        assert image.mode == "RGB" and image.size == (size, size)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.tobytes() == openmoji.rasterise(svg, size).tobytes()
    red, green, blue = np.asarray(openmoji.rasterise(svg, 64))[24:40, 24:40].reshape(-1, 3).mean(0)
    assert red > 180 > 120 > max(green, blue)  # an apple of this name


def test_a_transform_moves_the_drawing():
    svg = by_code("1F34E").svg.read_text()
    here = np.asarray(openmoji.rasterise(svg, 72)).astype(int)
    moved = np.asarray(openmoji.rasterise(svg, 72, "translate(4 0)")).astype(int)
    assert np.abs(moved[:, 4:] - here[:, :-4]).max() <= 2
    assert np.abs(moved - here).max() > 100


def test_an_svg_that_is_none_is_an_error():
    with pytest.raises(ValueError):
        openmoji.rasterise("no picture", 64)


def test_results_of_processes_come_in_order():
    texts = [str(number).encode() for number in range(40)]
    results = [digest.hexdigest() for digest in map(hashlib.sha256, texts)]
    assert list(openmoji.in_processes(_digest, texts, workers=2)) == results


def _digest(data):
    return hashlib.sha256(data).hexdigest()


def test_attribution_names_the_makers_and_the_licence():
    assert "OpenMoji" in openmoji.ATTRIBUTION and openmoji.LICENSE in openmoji.ATTRIBUTION
    assert openmoji.LICENSE_URL.startswith("https://creativecommons.org/")
