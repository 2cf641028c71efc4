"""CC12M: the alt-text, cleaned or not, or a caption of LLaVA-NeXT's."""

from pathlib import Path

from microdit.pipeline.config.sources import Cc12mSource
from microdit.pipeline.sources.adapters.cc12m import Cc12m
from tests.pipeline.helpers.dataset_archives import by_key, empty, read_all, write_tar

TABLE = {"000000000": {"llavanext_long": "A long one.", "llavanext_short": "Short."}}


def source(folder: Path, **options) -> Cc12m:
    members = {"000000000.jpg": b"0", "000000000.txt": b"A <PERSON>  in\nRED", "000000000.json": b"{}"}
    write_tar(folder / "cc12m-train-0000.tar", {**members, "000000001.jpg": b"1", "000000001.json": b"{}"})
    table = str(empty(folder / "train.jsonl.gz"))
    given = {"files": str(folder / "cc12m-train-*.tar"), "llavanext": table, **options}
    return Cc12m("cc12m", Cc12mSource(adapter="cc12m", **given), folder)


def test_the_alt_text(tmp_path: Path):
    found = by_key(source(tmp_path), TABLE)
    first = found["000000000"]
    assert first.caption == "A <PERSON> in RED"
    assert first.fields == {"alt": "A <PERSON> in RED", "llavanext_long": "A long one.", "llavanext_short": "Short."}
    assert first.origin == "cc12m/cc12m-train-0000.tar/000000000.jpg"
    assert (found["000000001"].data, found["000000001"].reason) == (None, "no_caption")


def test_the_alt_text_cleaned_stays_as_it_came_in_its_field(tmp_path: Path):
    first = by_key(source(tmp_path, clean=True), TABLE)["000000000"]
    assert first.caption != first.fields["alt"] == "A <PERSON> in RED"
    assert first.caption == first.caption.lower()


def test_captions_of_the_table(tmp_path: Path):
    for name, text in (("llavanext_long", "A long one."), ("llavanext_short", "Short.")):
        found = by_key(source(tmp_path, caption=name), TABLE)
        assert found["000000000"].caption == text
        assert found["000000001"].reason == "no_caption"
    spec = source(tmp_path).tables()[0]
    assert (spec.reader, spec.key) == ("jsonl", "key")


def test_without_a_table(tmp_path: Path):
    plain = source(tmp_path, llavanext=None, require_caption=False)
    assert not plain.tables()
    assert [item.caption for item in by_key(plain).values()] == ["A <PERSON> in RED", ""]


def test_an_image_that_is_there_twice_is_not_lost(tmp_path: Path):
    write_tar(tmp_path / "cc12m-train-0000.tar", {"./1.jpg": b"1", "1.jpg": b"2", "1.txt": b"two", "2.jpg": b"3"})
    options = Cc12mSource(adapter="cc12m", files=str(tmp_path / "*.tar"), require_caption=False)
    found = read_all(Cc12m("cc12m", options, tmp_path))
    assert [(item.data, item.caption, item.reason) for item in found] == [
        (b"1", "", None), (None, "two", "duplicate_key"), (b"3", "", None),
    ]  # fmt: skip
