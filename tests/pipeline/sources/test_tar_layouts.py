"""Tars of any layout: every picture is a row, and no text is at a picture of another sample."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import UnreadableError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.sources.registry import source_of

ADAPTERS: dict[str, dict[str, Any]] = {
    "webdataset": {"adapter": "webdataset"},
    "member": {"adapter": "webdataset", "keys": "member"},
    "cc12m": {"adapter": "cc12m", "require_caption": False},
    "sa1b": {"adapter": "sa1b", "captions": None, "caption": "txt", "require_caption": False},
    "img2dataset": {"adapter": "img2dataset"},
}
REASONS = {None, "missing", "duplicate_key", "not_taken", "not_side_by_side"}
FOLDERS = ["", "./", "a/", "a/b/", "22.05/", "/"]
STEMS = ["1", "2", "22.05", "22.06", "22.5.1", "v 1.0 (final)", "é", "A"]
EXTENSIONS = ["jpg", "png", "JPG", "jpeg", "txt", "TXT", "json", "cls"]
NAMES = st.lists(st.tuples(*map(st.sampled_from, (FOLDERS, STEMS, EXTENSIONS))), min_size=1, max_size=14)
ORDERS = ["sorted", "as drawn", "by extension", "shuffled"]


def source(adapter: str, folder: Path) -> FileSource:
    where = {"folder": str(folder)} if adapter == "img2dataset" else {"files": str(folder / "*.tar")}
    given = {"name": "own", "corpus": str(folder / "corpus"), "sources": {"own": ADAPTERS[adapter] | where}}
    made = source_of(BuildConfig.model_validate(given), "own")
    assert isinstance(made, FileSource)
    return made


def ordered(names: list[tuple[str, str, str]], order: str, random: Random) -> list[str]:
    if order == "sorted":
        names = sorted(names)
    elif order == "by extension":
        names = sorted(names, key=lambda name: name[2])
    elif order == "shuffled":
        names = random.sample(names, len(names))
    return [f"{folder}{stem}.{extension}" for folder, stem, extension in names]


def is_picture(name: str) -> bool:
    return name.lower().endswith((".jpg", ".png", ".jpeg"))


def sample_of(name: str) -> tuple[str, str]:
    """The folder, and the name up to the first dot: what all members of a sample have in common."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    return folder, base.partition(".")[0]


def is_its_text(picture: str, text: str, pictures: list[str]) -> bool:
    """A text with the picture's whole name; or with the short one, where no other picture of the sample claims it."""
    if picture.rpartition(".")[0].removeprefix("./") == text.rpartition(".")[0].removeprefix("./"):
        return True
    short = "." not in text.rpartition("/")[2].rpartition(".")[0]
    others = {name.rpartition(".")[0] for name in pictures if sample_of(name) == sample_of(picture)}
    return sample_of(picture) == sample_of(text) and short and len(others) >= 1


@pytest.mark.parametrize("adapter", ADAPTERS)
@given(NAMES, st.sampled_from(ORDERS), st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    adapter: str,
    names: list[tuple[str, str, str]],
    order: str,
    random: Random,
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    members = ordered(names, order, random)
    with tarfile.open(folder / "00000.tar", "w") as tar:  # a name may be there twice, with other bytes
        for number, name in enumerate(members):
            data = b"{}" if name.endswith("json") else f"{number} {name}".encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    made = source(adapter, folder)
    made._joined = []
    try:
        found = list(made.read("own-000000", lambda ordinal: True))
    except UnreadableError:  # nothing in it that is known
        found = []
    pictures = [name for name in members if is_picture(name)]
    origins = [item.origin.removeprefix("own/00000.tar/") for item in found]
    rows = Counter(origin for origin in origins if is_picture(origin))
    assert rows == Counter(pictures)
    assert {item.reason for item in found} <= REASONS
    for item, origin in zip(found, origins, strict=True):
        if item.data is not None:
            assert item.data.decode().partition(" ")[2] == origin
        if item.caption:
            number, _, text = item.caption.partition(" ")
            assert members[int(number)] == text and is_its_text(origin, text, pictures), (origin, text)
    captions = Counter(item.caption for item in found if item.caption and item.data is not None)
    assert all(count == 1 for count in captions.values()), "one text at two pictures"
