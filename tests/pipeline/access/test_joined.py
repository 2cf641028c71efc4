"""Joined rows of a small corpus: which are there, what they hold, what is refused; in a folder and in a bucket."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from microdit.pipeline.access.joined import JoinedRow, RowReader, ok_rows, plan_join, read_joined
from microdit.pipeline.access.reader import CorpusReader
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.arrays import arrays_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import ShardId
from microdit.pipeline.corpus.quantised import quantise
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.selections import select
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    FAILED,
    LATENTS,
    NEXT,
    REF,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    make_corpus,
    replace,
    write_column,
    write_images,
)

ALL = ("images", *COLUMNS)
OK = [row for row in range(SHARD_SAMPLES) if row not in FAILED]
WHERE = [(ref.shard, row) for ref in (REF, NEXT) for row in OK]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    made = make_corpus(tmp_path / "corpus")
    fill(made)
    return made


def rows(corpus: Corpus, columns: Iterable[str] = ALL, selection: str | None = None) -> list[JoinedRow]:
    return list(CorpusReader(corpus).rows(list(columns), selection))


def where(found: Iterable[JoinedRow]) -> list[tuple[str, int]]:
    return [(row.shard, row.row) for row in found]


def check_row(row: JoinedRow) -> None:
    """The row is what `small_corpus` wrote."""
    number = row.row
    caption = f"picture {number} — é" if number % 2 else ""
    assert (row.source, row.key, row.id) == (SOURCE, f"{row.shard}-{number}", f"{SOURCE}/{row.shard}-{number}")
    assert row["captions/source"] == caption
    assert row["scores/basic"] == {"sharpness": pytest.approx(number / 10)}
    picture, latents, text = row["images"], row[LATENTS], row["text/minilm@source"]
    assert isinstance(picture, bytes) and picture[:2] == b"\xff\xd8"
    assert row.lines["images"]["width"] == 64 + number and row.lines["captions/source"]["tokens"] == len(
        caption.split()
    )
    assert isinstance(latents, np.ndarray) and (latents.dtype, latents.shape) == (np.float16, (4, 8, 8))
    assert isinstance(text, np.ndarray) and text.shape == (len(caption.split()), 8)
    assert (latents == number).all() and (text == number).all()


def test_all_columns_by_row(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus)
    found = rows(corpus)
    assert where(found) == WHERE
    for row in found:
        check_row(row)
        assert row.weight == 1.0 and set(row.members["images"]) == {"jpg", "json"} and not row.members["scores/basic"]
    reader, shards = RowReader(corpus), plan_join(corpus, ALL)
    for shard in reversed(shards):
        positions, weights = ok_rows(corpus, shard)
        assert (positions.tolist(), weights.tolist()) == (OK, [1.0] * len(OK))
        for number in reversed(OK):
            check_row(reader.read(shard, number, 1.0))


def test_columns_are_read_alone_and_in_any_order(corpus: Corpus) -> None:
    assert [row[LATENTS].shape for row in CorpusReader(corpus).rows(LATENTS)] == [(4, 8, 8)] * len(WHERE)  # type: ignore[union-attr]
    found = rows(corpus, ["scores/basic", "images", "scores/basic"])
    assert where(found) == WHERE and list(found[0].lines) == ["scores/basic", "images"]
    with pytest.raises(KeyError):
        found[0]["captions/source"]


def test_a_row_that_failed_in_one_column_is_in_no_join_with_it(corpus: Corpus) -> None:
    images = corpus.commits("images")[0]
    corpus.declare_column("captions/long", {"stage": "captions/long"}, {"caption": "string", "tokens": "int32"})
    for commit in corpus.commits("images"):
        with begin_attempt(corpus, "captions/long", commit.ref, [commit]) as attempt:
            for line in corpus.sidecar(commit).to_pylist():
                if line["row"] in (0, 2) and commit.shard == images.shard:
                    attempt.fail(line["row"], line["key"], "refusal", "it would not")
                else:
                    attempt.add(line["row"], line["key"], caption=f"long {line['row']}", tokens=2)
            attempt.commit()
    without = [one for one in WHERE if one != (REF.shard, 0)]
    assert where(rows(corpus, [*ALL, "captions/long"])) == without
    # row 2 of the second shard has this caption, and no picture
    assert where(rows(corpus, ["captions/long"])) == sorted([*without, (NEXT.shard, 2)])
    assert where(rows(corpus, ["captions/source"])) == WHERE
    assert sum(len(ok_rows(corpus, shard)[0]) for shard in plan_join(corpus, [*ALL, "captions/long"])) == len(without)


def test_only_shards_that_all_columns_have(corpus: Corpus) -> None:
    third = ShardRef(source=SOURCE, unit=REF.unit, shard=f"{REF.unit}-02")
    newest = {"images": write_images(corpus, third)}
    newest["captions/source"] = write_column(corpus, "captions/source", newest)
    write_column(corpus, "text/minilm@source", newest)
    assert where(rows(corpus)) == WHERE
    assert where(rows(corpus, ["images", "text/minilm@source"])) == [*WHERE, *((third.shard, row) for row in OK)]


def test_a_selection(corpus: Corpus) -> None:
    sql = "SELECT source, shard, row, width AS weight FROM samples WHERE status = 'ok' AND row IN (1, 4) AND {}"
    chosen = select(corpus, "some", sql.format("true"))
    wanted = [(ref.shard, row) for ref in (REF, NEXT) for row in (1, 4)]
    for name in ("some", f"some@{chosen.hash}"):
        found = rows(corpus, selection=name)
        assert where(found) == wanted and [row.weight for row in found] == [65.0, 68.0] * 2
    shards = plan_join(corpus, ALL, "some")
    assert [found.tolist() for shard in shards for found in ok_rows(corpus, shard)] == [[1, 4], [65.0, 68.0]] * 2
    one = select(corpus, "one", sql.format(f"shard = '{NEXT.shard}'"))
    assert where(rows(corpus, selection="one")) == [(NEXT.shard, 1), (NEXT.shard, 4)]
    select(corpus, "some", sql.format(f"shard = '{NEXT.shard}'"))
    with pytest.raises(RequestError, match="there are several of that name"):
        rows(corpus, selection="some")
    assert where(rows(corpus, selection=f"some@{chosen.hash}")) == wanted
    with pytest.raises(RequestError, match=rf"'none'.*there is no such selection.*one@{one.hash}"):
        rows(corpus, selection="none")


def test_what_cannot_be_joined(corpus: Corpus) -> None:
    with pytest.raises(RequestError, match=r"column 'latents/none': corpus .* has no such column; it has: captions/"):
        rows(corpus, [LATENTS, "latents/none"])
    with pytest.raises(RequestError, match=r"columns: none was named; corpus .* has captions/source, images"):
        rows(corpus, [])
    corpus.declare_column("latents/demo-32", {"stage": "latents", "resolution": 32})
    with pytest.raises(RequestError, match=r"column latents/demo-32: corpus .* has no shard of it; build it first"):
        rows(corpus, ["images", "latents/demo-32"])
    third = ShardRef(source=SOURCE, unit=REF.unit, shard=f"{REF.unit}-02")
    write_column(corpus, "latents/demo-32", {"images": write_images(corpus, third)})
    select(corpus, "two", f"SELECT source, shard, row FROM samples WHERE status = 'ok' AND shard <> '{third.shard}'")
    with pytest.raises(
        RequestError, match=r"selection two has no shard that is built in all of images, latents/demo-32"
    ):
        rows(corpus, ["images", "latents/demo-32"], "two")
    with pytest.raises(RequestError, match=r"corpus .* has no shard that is built in all of text"):
        rows(corpus, ["text/minilm@source", "latents/demo-32"])


def test_stale_columns_are_refused(corpus: Corpus) -> None:
    """As the trainer does: also where what is stale is only an input of what was asked for."""
    again = {"images": write_images(corpus, REF, generation=1, quality=70)}
    advice = "run `microdit build --repair`"
    for column in COLUMNS:
        message = rf"shard {REF.shard}: it was made from generation 0 of .*, the corpus now has generation 1; {advice}"
        with pytest.raises(RequestError, match=message):
            CorpusReader(corpus).rows(column)  # at once, before a row is asked for
    assert where(rows(corpus, ["images"])) == WHERE
    again["captions/source"] = write_column(corpus, "captions/source", again, generation=1)
    again["text/minilm@source"] = write_column(corpus, "text/minilm@source", again, generation=1)
    assert where(rows(corpus, ["images", "text/minilm@source"])) == WHERE
    with pytest.raises(RequestError, match=f"column {LATENTS}, shard {REF.shard}"):
        rows(corpus, ["captions/source", LATENTS])
    write_column(corpus, "captions/source", again, generation=2)
    with pytest.raises(RequestError, match=r"column text/minilm@source.* of captions/source.* generation 2"):
        newest_commits(corpus, ["text/minilm@source"])
    write_column(corpus, "captions/source", {"images": again["images"]}, generation=3)
    replace(corpus, corpus.commits("images")[0].name, None)
    replace(corpus, f"commits/images/{SOURCE}/{REF.shard}.0.json", None)
    with pytest.raises(RequestError, match=r"column captions/source.* of images, the corpus now has none"):
        newest_commits(corpus, ["captions/source"])


def first(corpus: Corpus, column: str) -> Commit:
    return corpus.commits(column)[0]


def test_damage_is_named(corpus: Corpus) -> None:
    commit = first(corpus, LATENTS)
    data = corpus.store.get(commit.object.name)
    advice = "run `microdit verify`, then `microdit build --repair`"
    named = (
        rf"column {LATENTS}, shard {REF.shard}: {commit.object.name} or its sidecar is missing or damaged .*{advice}"
    )
    for damaged in (None, data[:700], data[:300], b"no tar" * 200, data[:512] + data[3072:]):
        replace(corpus, commit.object.name, damaged)
        with pytest.raises(RequestError, match=named):
            rows(corpus)
    replace(corpus, commit.object.name, data)
    assert where(rows(corpus)) == WHERE
    shard = plan_join(corpus, ALL)[0]
    for damaged in (None, b"no parquet"):
        replace(corpus, commit.sidecar.name, damaged)
        for read in (lambda: rows(corpus), lambda: ok_rows(corpus, shard), lambda: RowReader(corpus).read(shard, 0, 1)):
            with pytest.raises(RequestError, match=named):
                read()


def test_columns_that_disagree_are_refused(corpus: Corpus) -> None:
    """No writer of ours makes such shards."""
    images = first(corpus, "images")
    for keys in ([f"other-{row}" for row in range(SHARD_SAMPLES)], [f"{REF.shard}-{row}" for row in range(3)]):
        name = f"scores/basic-{len(keys)}"
        corpus.declare_column(name, {"stage": "scores"}, {"sharpness": "float32"})
        with begin_attempt(corpus, name, REF, [images]) as attempt:
            for row, key in enumerate(keys):
                attempt.add(row, key, sharpness=0.0)
            attempt.commit()
        with pytest.raises(RequestError, match=rf"shard {REF.shard} of source demo: .* disagree about row .*verify"):
            rows(corpus, ["images", name])


def test_quantised_text_comes_as_float16(corpus: Corpus) -> None:
    exact = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    arrays = {name: part.numpy() for name, part in quantise(torch.from_numpy(exact), "int8").items()}
    corpus.declare_column("text/small@source", {"stage": "text", "storage": "int8"}, {"tokens": "int32"})
    with begin_attempt(corpus, "text/small@source", REF, [first(corpus, "images")]) as attempt:
        for line in corpus.sidecar(first(corpus, "images")).to_pylist():
            attempt.add(line["row"], line["key"], {"npz": arrays_bytes(arrays)}, tokens=3)
        attempt.commit()
    for row in [
        *rows(corpus, ["text/small@source"]),
        RowReader(corpus).read(plan_join(corpus, "text/small@source")[0], 0, 1.0),
    ]:
        value = row["text/small@source"]
        assert isinstance(value, np.ndarray) and value.dtype == np.float16 and value.shape == exact.shape
        assert np.abs(value - exact).max() < 0.02


def test_samples_without_a_picture(tmp_path: Path) -> None:
    """As `microdit convert` makes them: the JSON alone, and null for what is said of a picture."""
    corpus = make_corpus(tmp_path / "corpus")
    with begin_attempt(corpus, "images", REF) as attempt:
        attempt.add(0, "k0", {"json": b"{}"}, caption="c", origin="", license="", fields="")
        attempt.commit()
    (row,) = rows(corpus, ["images"])
    assert row["images"] is None and row.lines["images"]["caption"] == "c"
    assert RowReader(corpus).read(plan_join(corpus, "images")[0], 0, 1.0)["images"] is None


def test_what_is_read_later_or_elsewhere_is_what_was_planned(corpus: Corpus) -> None:
    shards: list[ShardId] = [(shard.source, shard.shard) for shard in plan_join(corpus, ALL)]
    planned = pickle.loads(pickle.dumps((corpus, plan_join(corpus, ALL))))
    late = CorpusReader(corpus).rows(ALL)
    write_images(corpus, REF, generation=1, quality=70)
    found = [row for shard in planned[1] for row in read_joined(planned[0], shard)]
    assert shards == [(SOURCE, REF.shard), (SOURCE, NEXT.shard)]
    assert where(found) == where(late) == WHERE
    for row in found:
        check_row(row)


def test_few_sidecars_are_kept_in_memory(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    sidecar = Corpus.sidecar

    def counted(self: Corpus, commit: Commit) -> object:
        read.append(commit.shard)
        return sidecar(self, commit)

    monkeypatch.setattr(Corpus, "sidecar", counted)
    reader, (one, other) = RowReader(corpus, most_shards=1), plan_join(corpus, "scores/basic")
    for shard in (one, one, other, other, one):
        reader.read(shard, 0, 1.0)
    assert read == [REF.shard, NEXT.shard, REF.shard]
