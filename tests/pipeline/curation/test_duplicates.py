"""Table jobs on a small corpus of real pictures: near-duplicates, and what is near an evaluation set."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation.duplicates import decontaminate, dedup, hash_table
from microdit.pipeline.selection.selections import load_selection, select
from microdit.pipeline.selection.view import query
from tests.pipeline.helpers.picture_corpus import UNIT, corpus_of, microdit, photo, write
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS

KEEP = "SELECT source, shard, row FROM samples WHERE duplicate_keep"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """0 = 1 in pixels, 2 is the same larger; 3 is a failed row; 4 and 5 are alone."""
    return corpus_of(tmp_path / "corpus", [photo(1), photo(1), photo(1, 160), None, photo(2), photo(3)])


def rows(corpus: Corpus, what: str) -> list[dict[str, Any]]:
    return query(corpus, f"SELECT row, {what} FROM samples ORDER BY shard, row").to_pylist()


def test_the_largest_of_a_group_is_kept(corpus: Corpus) -> None:
    found = dedup(corpus)
    counts = ("samples", "groups", "kept", "dropped", "exact", "without_hash")
    assert {name: found.to_json()[name] for name in counts} == {
        "samples": 5,
        "groups": 1,
        "kept": 3,
        "dropped": 2,
        "exact": 1,
        "without_hash": 0,
    }
    lines = rows(corpus, "duplicate_group, duplicate_exact, duplicate_keep, duplicate_distance")
    assert [line["duplicate_keep"] for line in lines] == [False, False, True, None, True, True]
    assert [line["duplicate_exact"] for line in lines] == [False, True, False, None, False, False]
    assert [line["duplicate_group"] for line in lines] == [f"demo/{UNIT}-00-2"] * 3 + [None] * 3
    assert lines[2]["duplicate_distance"] == 0 and lines[4]["duplicate_distance"] is None
    chosen = load_selection(corpus, f"once@{select(corpus, 'once', KEEP).hash}")
    assert chosen["row"].to_pylist() == [2, 4, 5]
    assert dedup(corpus) == found  # at once
    assert dedup(corpus, 0).path != found.path


def test_plain_colours_are_different_pictures(tmp_path: Path) -> None:
    colours = ["red", "blue", "white", "red"]
    found = dedup(corpus_of(tmp_path / "flat", [Image.new("RGB", (64, 64), colour) for colour in colours]))
    assert (found.groups, found.dropped, found.largest, found.beyond) == (1, 1, 2, 0)


def test_a_table_of_before_is_shown_and_made_again_when_asked_for(corpus: Corpus) -> None:
    """Records of method 1 do not have these fields; they count groups that were linked by steps."""
    found = dedup(corpus)
    name = found.path.rsplit(".", 2)[0] + ".json"
    record = json.loads(corpus.store.get(name))
    for field in ("largest", "beyond", "method"):
        del record[field]
    corpus.store.delete([name])
    corpus.store.create(name, json.dumps(record).encode())
    assert [line["duplicate_keep"] for line in rows(corpus, "duplicate_keep")][:3] == [False, False, True]
    again = dedup(corpus)
    assert again.path != found.path and again.largest == 3


def test_of_pictures_with_one_hash_the_equal_one_is_named(tmp_path: Path) -> None:
    """Plain colours have one hash; each is compared with all of the evaluation set."""
    pictures: list[Image.Image | None] = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "white")]
    own = corpus_of(tmp_path / "own", pictures)
    other = corpus_of(tmp_path / "other", [*reversed(pictures)])
    found = decontaminate(own, [other.url])
    assert (found.contaminated, found.exact) == (3, 3)
    lines = rows(own, "contaminated_by, contaminated_distance")
    assert [line["contaminated_by"][-1] for line in lines] == ["2", "1", "0"]
    assert {line["contaminated_distance"] for line in lines} == {0}
    itself = decontaminate(own, [own.url])
    assert itself.exact == 3 and all(line["contaminated_by"] == line["id"] for line in rows(own, "id, contaminated_by"))


def test_the_keeper_is_chosen_among_what_the_other_conditions_leave(corpus: Corpus) -> None:
    """The kept one of the group is 160 pixels wide; a WHERE that drops it leaves another one of the group."""
    dedup(corpus)
    small = "SELECT source, shard, row FROM samples WHERE status = 'ok' AND width < 100"
    lost = load_selection(corpus, f"lost@{select(corpus, 'lost', f'{small} AND duplicate_keep').hash}")
    assert lost["row"].to_pylist() == [4, 5]
    chosen = select(corpus, "once", f"{small} QUALIFY one_per_group(duplicate_group)")
    assert load_selection(corpus, f"once@{chosen.hash}")["row"].to_pylist() == [0, 4, 5]
    assert "scores/basic" in chosen.columns
    every = select(
        corpus, "every", "SELECT * FROM samples s WHERE status = 'ok' QUALIFY one_per_group(s.duplicate_group)"
    )
    assert load_selection(corpus, f"every@{every.hash}")["row"].to_pylist() == [2, 4, 5]


def test_a_new_commit_asks_for_a_new_table(corpus: Corpus) -> None:
    first = dedup(corpus)
    write(corpus, 1, [photo(2)])
    with pytest.raises(RequestError, match=r"duplicate_keep(.|\n)*`microdit dedup`, run again"):
        select(corpus, "once", KEEP)
    second = dedup(corpus)
    assert second.path != first.path and (second.groups, second.dropped) == (2, 3)
    assert [line["duplicate_keep"] for line in rows(corpus, "duplicate_keep")][-3:] == [True, True, False]


def test_two_at_once_make_one_table(corpus: Corpus) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(dedup, [corpus, Corpus.open(corpus.url)])
    assert one == other
    assert len([name for name in corpus.store.names("tables/duplicates") if name.endswith(".parquet")]) == 1


def test_what_is_in_an_evaluation_set(corpus: Corpus, tmp_path: Path) -> None:
    other = corpus_of(tmp_path / "evaluation", [photo(7), photo(3), None])
    found = decontaminate(corpus, [other.url])
    assert (found.contaminated, found.exact, found.samples) == (1, 1, 5)
    lines = rows(corpus, "contaminated, contaminated_by")
    assert [line["contaminated"] for line in lines] == [False, False, False, None, False, True]
    assert lines[5]["contaminated_by"] == f"demo/{UNIT}-00-1"
    file = f"{other.url}/{hash_table(other).object.name}"
    again = decontaminate(corpus, [file])
    assert (again.contaminated, again.against[0].sha256) == (1, found.against[0].sha256)
    dedup(corpus)  # both at once in the view
    assert [line["duplicate_keep"] for line in rows(corpus, "contaminated, duplicate_keep")][2:] == [
        True,
        None,
        True,
        True,
    ]


def test_what_cannot_be_asked(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="distance 9: expected 0 to 8"):
        dedup(corpus, 9)
    (tmp_path / "no.parquet").write_bytes(b"nothing")
    with pytest.raises(RequestError, match=r"--against .*no\.parquet: it cannot be read"):
        decontaminate(corpus, [str(tmp_path / "no.parquet")])
    empty = Corpus.create(tmp_path / "empty", "empty")
    empty.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    with pytest.raises(RequestError, match="it has no scores/basic with hashes"):
        dedup(empty)


def test_both_commands(corpus: Corpus, tmp_path: Path) -> None:
    said = microdit("dedup", corpus.url)
    assert said.exit_code == 0 and "1 groups: 3 of 5 samples to keep, 2 to drop; 1 repeat" in said.stdout
    assert json.loads(microdit("dedup", corpus.url, "--json").stdout)["groups"] == 1
    other = corpus_of(tmp_path / "evaluation", [photo(2), photo(9)])
    said = microdit("decontaminate", corpus.url, "--against", other.url)
    assert said.exit_code == 0 and said.stdout.startswith("1 of 5 samples are near an evaluation set")
    found = json.loads(microdit("decontaminate", corpus.url, "--against", other.url, "--json").stdout)
    assert (found["contaminated"], found["exact"]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dedup", "--distance", 9), "9"),
        (("decontaminate", "--against", "nowhere"), "nowhere"),
        (("decontaminate",), "configs/coco-val.yaml"),
    ],
)
def test_a_wrong_request_is_one_message(
    corpus: Corpus, arguments: tuple[object, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = microdit(arguments[0], corpus.url, *arguments[1:])
    assert said.exit_code == 2
    assert words in said.stderr and "Traceback" not in said.output
