"""Pictures that are mirrored, rotated or letterboxed: their hashes, and what the table jobs find by them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation.duplicates import decontaminate, dedup, hash_table
from microdit.pipeline.curation.greedy import nearest_kept
from microdit.pipeline.curation.hashes import SOME_WAYS, WAYS, Hashed, bits_between, linked, near
from microdit.pipeline.selection.view import query
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.scores.pixels import basic_scores
from microdit.pipeline.stages.scores.turned import SCALARS, cut_borders, turned_scores
from microdit.pipeline.stages.stage import Task
from tests.pipeline.helpers.picture_corpus import add_turned, corpus_of, microdit, photo
from tests.pipeline.helpers.stage_outputs import config as build_config

TURN = Image.Transpose
WAYS_TO_TURN = [
    [], [TURN.FLIP_LEFT_RIGHT], [TURN.FLIP_TOP_BOTTOM], [TURN.ROTATE_180],
    [TURN.TRANSPOSE], [TURN.TRANSPOSE, TURN.FLIP_LEFT_RIGHT], [TURN.TRANSPOSE, TURN.FLIP_TOP_BOTTOM], [TURN.TRANSVERSE],
]  # fmt: skip


def turn(image: Image.Image, way: int) -> Image.Image:
    for step in WAYS_TO_TURN[way]:
        image = image.transpose(step)
    return image


def letterboxed(image: Image.Image, colour: str = "black") -> Image.Image:
    return ImageOps.expand(image, (0, image.height // 6), colour)


def hashes(image: Image.Image) -> list[int]:
    text = str(turned_scores(np.asarray(image))["phashes"])
    return [int(text[i : i + 16], 16) for i in range(0, 128, 16)]


@given(st.integers(0, 2**32 - 1), st.integers(20, 200), st.integers(0, WAYS - 1))
@settings(max_examples=60, deadline=None)
def test_the_hash_of_a_turned_picture_is_known_from_the_picture(seed: int, width: int, way: int) -> None:
    image = photo(seed, 96).resize((width, 96))
    of_turned = int(str(basic_scores(np.asarray(turn(image, way)))["phash"]), 16)
    assert (hashes(image)[way] ^ of_turned).bit_count() <= 4
    if way == 0:
        assert hashes(image)[0] == of_turned


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 130, 255]))
def test_borders_are_cut_from_every_side(left: int, top: int, right: int, bottom: int, gray: int) -> None:
    inner = np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    whole = np.full((64 + top + bottom, 80 + left + right, 3), gray, np.uint8)
    whole[top : top + 64, left : left + 80] = inner
    assert np.array_equal(cut_borders(whole), inner)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0, 90, 255]), st.booleans()), min_size=1, max_size=4),
    st.booleans(),
)
def test_bars_around_a_drawing_with_a_margin_of_its_own(bars: list[tuple[int, int, bool]], frame: bool) -> None:
    """However often bars are put around a picture, what is left is what is left of the picture."""
    inner = np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    drawing = np.pad(inner, ((5, 5), (7, 7), (0, 0)), constant_values=255) if frame else inner
    whole = drawing
    for width, gray, across in bars:
        whole = np.pad(whole, ((width, width), (0, 0), (0, 0)) if across else ((0, 0), (width, width), (0, 0)),
                       constant_values=gray)  # fmt: skip
    assert np.array_equal(cut_borders(whole), cut_borders(drawing)) and np.array_equal(cut_borders(whole), inner)
    once = cut_borders(np.pad(drawing, ((9, 9), (0, 0), (0, 0))), 1)  # the stage's first version
    assert np.array_equal(once, inner) != frame


def test_a_column_of_the_first_version_goes_on_with_it(tmp_path: Path) -> None:
    pictures = [np.pad(np.asarray(photo(1, 96)), ((8, 8), (8, 8), (0, 0)), constant_values=255)]
    pictures.append(np.pad(pictures[0], ((20, 20), (0, 0), (0, 0))))
    bits = {}
    for version in (1, 2):
        corpus = corpus_of(tmp_path / str(version), [Image.fromarray(pixels) for pixels in pictures])
        columns = {"scores/turned": {}}
        if version == 1:
            corpus.declare_column("scores/turned", {"stage": "scores/turned", "version": 1}, SCALARS)
        [stage] = stages_of(build_config(Path(corpus.url), columns), corpus)
        spec = stage.columns["scores/turned"]
        assert spec.stage == {"stage": "scores/turned", "version": version}
        corpus.declare_column("scores/turned", spec.stage, spec.scalars)
        for commit in corpus.commits("images"):
            stage.run(corpus, Task(commit.ref, {"scores/turned": 0}))
        hashes = [int(row["turned_phashes"][:16], 16) for row in query(corpus, "FROM samples").to_pylist()]
        bits[version] = (hashes[0] ^ hashes[1]).bit_count()
    assert bits[2] == 0 < bits[1]


@pytest.mark.parametrize("side", [1, 2, 3, 64])
def test_a_plain_colour_has_no_border(side: int) -> None:
    pixels = np.full((side, side, 3), 200, np.uint8)
    assert np.array_equal(cut_borders(pixels), pixels)
    assert turned_scores(pixels)["border"] == 0


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_however_two_pictures_are_turned_they_are_linked(made: list[int], data: st.DataObject) -> None:
    """Each hash is a picture's; with it come copies that are turned, whose list of hashes is in another order."""
    across, down = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    across[:, 1::2] = down[1::2] = True

    def ways(bits: np.ndarray) -> list[np.ndarray]:
        return [b ^ (down & d) ^ (across & a) for b in (bits, bits.T) for d in (False, True) for a in (False, True)]

    def number(bits: np.ndarray) -> int:
        return int.from_bytes(np.packbits(bits).tobytes(), "big")

    pictures = [np.unpackbits(np.array([one], ">u8").view(np.uint8)).astype(bool).reshape(8, 8) for one in made]
    copies = [ways(picture)[data.draw(st.integers(0, WAYS - 1))] for picture in pictures]
    every = [*pictures, *copies]
    turned = np.array([[number(way) for way in ways(picture)] for picture in every], np.uint64)
    count = len(every)
    pixels = np.stack([np.arange(count, dtype=np.uint64)] * 2, 1)
    colour = np.zeros((count, 3), np.float32)
    found = Hashed(np.arange(count), turned[:, 0], pixels, np.ones(count, int), colour, 0, turned, count)
    half = len(pictures)
    assert (bits_between(found, np.arange(half), np.arange(half) + half) == 0).all()
    labels = linked(found, 2).labels
    assert np.array_equal(labels[:half], labels[half:])
    keeper = nearest_kept(labels, found.area, lambda a, b: near(found, 2, a, b)).keeper
    assert (bits_between(found, np.arange(count), keeper) <= 2).all()
    assert len(SOME_WAYS) == 4


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """0 mirrored, rotated, letterboxed, and letterboxed white after half a turn; 5 is another picture."""
    first = photo(1, 160)
    changed = [turn(first, 1), first.rotate(90), letterboxed(first), letterboxed(turn(first, 3), "white"), photo(2)]
    return corpus_of(tmp_path / "corpus", [first, *changed])


def test_turned_pictures_are_double(corpus: Corpus) -> None:
    before = dedup(corpus)
    assert (before.dropped, before.turned) == (0, 0)
    said = microdit("dedup", corpus.url)
    assert "mirrored, rotated and letterboxed pictures are not found without the column scores/turned" in said.stdout
    add_turned(corpus)
    found = dedup(corpus)
    assert (found.groups, found.dropped, found.largest, found.beyond, found.turned) == (1, 4, 5, 0, 6)
    assert "6 were compared mirrored, rotated and without borders too" in microdit("dedup", corpus.url).stdout
    kept = query(
        corpus, "SELECT duplicate_keep AS keep, duplicate_distance AS bits FROM samples ORDER BY row"
    ).to_pylist()
    assert [row["keep"] for row in kept].count(True) == 2 and kept[5]["keep"]
    assert all((row["bits"] or 0) <= 6 for row in kept)
    border = query(corpus, "SELECT turned_border FROM samples ORDER BY row").to_pylist()
    assert [round(row["turned_border"], 2) for row in border] == [0, 0, 0, 0.25, 0.25, 0]


@pytest.mark.parametrize(("own_turned", "other_turned", "contaminated"), [(0, 0, 1), (1, 0, 5), (0, 1, 3), (1, 1, 5)])
def test_turned_pictures_of_an_evaluation_set_are_found(
    corpus: Corpus, tmp_path: Path, own_turned: int, other_turned: int, contaminated: int
) -> None:
    other = corpus_of(tmp_path / "evaluation", [photo(7), photo(1, 160)])
    for one, wanted in ((corpus, own_turned), (other, other_turned)):
        if wanted:
            add_turned(one)
    found = decontaminate(corpus, [other.url])
    rows = query(corpus, "SELECT contaminated_by FROM samples WHERE contaminated").to_pylist()
    assert found.contaminated == contaminated == len(rows)
    assert {row["contaminated_by"][-1] for row in rows} == {"1"}
    assert (found.turned > 0) == bool(own_turned or other_turned)
    again = decontaminate(corpus, [f"{other.url}/{hash_table(other).object.name}"])
    assert again.contaminated == contaminated and again.against[0].sha256 == found.against[0].sha256
