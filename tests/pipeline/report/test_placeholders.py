"""Pictures that many URLs share are counted."""

import io
import json
from pathlib import Path

from PIL import Image

from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.report.page import gather, render
from microdit.pipeline.report.placeholders import SharedPictures
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS, REF, SOURCE, UNIT

JPEG = io.BytesIO()
Image.new("RGB", (8, 8)).save(JPEG, "JPEG")
ROWS = [  # sha256, origin, final URL
    ("a", "https://h/1", "https://h/removed.png"),
    ("a", "https://h/2", "https://h/removed.png"),
    ("a", "https://h/3", "https://h/removed.png"),
    ("b", "https://h/4", ""),
    ("b", "https://h/5", ""),
    ("c", "https://h/6", ""),
    ("c", "https://h/6", ""),  # listed twice
    ("d", "drawings/7", ""),
    ("d", "drawings/8", ""),
]


def made(folder: Path, rows: list[tuple[str, str, str]]) -> Corpus:
    corpus = Corpus.create(folder, "made", shard_samples=16)
    corpus.declare_source(SOURCE, {"adapter": "made"})
    corpus.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    with begin_attempt(corpus, "images", REF) as attempt:
        for row, (sha256, origin, url) in enumerate(rows):
            fields = json.dumps({"final_url": url}) if url else ""
            known = {"caption": "", "license": "", "format": "jpeg", "sha256": sha256, "origin": origin}
            sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 8)
            attempt.add(
                row, f"k{row}", {"jpg": JPEG.getvalue(), "json": b"{}"}, **known, **sizes, fields=fields, bytes=1
            )
        attempt.commit()
    commit_unit(corpus, SOURCE, UNIT, len(rows), [REF.shard])
    return corpus


def test_pictures_of_several_urls_are_counted(tmp_path: Path) -> None:
    facts = gather(made(tmp_path / "corpus", ROWS), None)
    assert facts.shared_pictures == SharedPictures(pictures=5, most=3, url="https://h/removed.png")
    assert "5 pictures have the same bytes" in render(facts) and "3 copies of https://h/removed.png" in render(facts)


def test_where_there_are_none_nothing_is_said(tmp_path: Path) -> None:
    facts = gather(made(tmp_path / "corpus", ROWS[5:]), None)
    assert facts.shared_pictures is None and "same bytes" not in render(facts)
