"""Choosing: the named queries, weights by source, and that a choice is the same whenever and wherever it is made."""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.choose import select as command
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.curation.duplicates import decontaminate, dedup
from microdit.pipeline.selection.queries import named_queries, parse
from microdit.pipeline.selection.selections import SELECTION, load_selection, select
from microdit.pipeline.selection.weights import parse_shares, weigh
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS

ROOT = Path(__file__).parents[3]
ROWS = 4
OK = "SELECT source, shard, row FROM samples WHERE status = 'ok'"

SCORES = {
    "scores/basic": {"sharpness": "float32", "phash": "string", "pixels_sha256": "string"},
    "scores/nsfw": {"nsfw": "float32"},
    "scores/text": {"area": "float32"},
}

BAD = {  # what is wrong with a row
    0: {"phash": 5},  # nothing
    1: {"width": 200},
    2: {"nsfw": 0.21},
    3: {"area": 0.11},
    4: {"sharpness": 19.0},
    5: {"width": 2000},
    6: {"phash": 5},  # as that of row 0
    7: {"phash": 77},  # of the evaluation set
    8: {"nsfw": None},  # not scored
}


def sample(number: int) -> dict:
    """The facts of an image, and its scores."""
    wide = np.random.default_rng(number).integers(0, 2**63)
    good = {"width": 400, "height": 300, "nsfw": 0.1, "area": 0.05, "sharpness": 80.0, "phash": int(wide)}
    return good | BAD.get(number, {})


def make(
    folder: Path, sources: Sequence[tuple[str, int]], columns: Sequence[str] = tuple(SCORES), order: int = 0
) -> Corpus:
    """A corpus of tables alone: `rows` images of each source, written shard by shard in some order."""
    corpus = Corpus.create(folder, "choosing", shard_samples=ROWS)
    corpus.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    for column in columns:
        corpus.declare_column(column, {"stage": column}, SCORES[column])
    shards = []
    for source, rows in sources:
        corpus.declare_source(source, {"adapter": "made"})
        unit = unit_name(source, 0)
        for first in range(0, rows, ROWS):
            ref = ShardRef(source=source, unit=unit, shard=shard_name(unit, first // ROWS))
            shards.append((ref, range(first, min(first + ROWS, rows))))
    random.Random(order).shuffle(shards)
    for ref, numbers in shards:
        with begin_attempt(corpus, "images", ref) as attempt:
            for row, number in enumerate(numbers):
                found = sample(number)
                about = {"width": found["width"], "height": found["height"], "fields": fields(ref.source, number)}
                about |= {f"original_{name}": about[name] for name in ("width", "height")}
                texts = {"caption": f"number {number}", "origin": "", "license": "", "sha256": "0" * 64}
                attempt.add(row, f"k{number}", {"jpg": b"-", "json": b"{}"}, **about, **texts, format="jpeg", bytes=1)
            images = attempt.commit()
        for column in columns:
            with begin_attempt(corpus, column, ref, [images]) as attempt:
                for row, number in enumerate(numbers):
                    found = sample(number)
                    found["phash"], found["pixels_sha256"] = f"{found['phash']:016x}", f"{number:064x}"
                    scores = {name: found[name] for name in SCORES[column]}
                    if None in scores.values():
                        attempt.fail(row, f"k{number}", "damaged")
                    else:
                        attempt.add(row, f"k{number}", **scores)
                attempt.commit()
    return corpus


def fields(source: str, number: int) -> str:
    return json.dumps({"image_nsfw": number / 10, "prompt_nsfw": 0.1}) if source == "diffusiondb" else ""


def chosen(corpus: Corpus, name: str, **arguments) -> dict[str, list[int]]:
    """The rows of each source in a new selection, counted through its shards."""
    select(corpus, name, **arguments)
    found: dict[str, list[int]] = {}
    for line in load_selection(corpus, name).to_pylist():
        found.setdefault(line["source"], []).append(int(line["shard"][-2:]) * ROWS + line["row"])
    return found


# -- named queries -----------------------------------------------------------------------------------------------------
def test_named_queries_are_told_where_they_are_looked_for(tmp_path: Path) -> None:
    known = named_queries()
    assert [query.name for query in known] == ["clean", "paper", "paper-512", "synthetic-only"]
    for named in known:
        assert named.about.endswith(".") and "--" not in named.about and named.sql.startswith("SELECT")
        assert parse(named.sql).unsteady() is None and parse(named.sql).conditions() is not None
        assert f"`{named.name}`" in str(command.__doc__)
    corpus = make(tmp_path, [("a", 2)])
    with pytest.raises(RequestError, match=r"no query named 'cleen'; give SQL .*(\n  [\w-]+: .+){4}$"):
        select(corpus, "cleen")


def test_the_papers_data(tmp_path: Path) -> None:
    corpus = make(tmp_path, [(name, 4) for name in ("sa1b", "cc12m", "textcaps", "journeydb", "diffusiondb", "mine")])
    large = [0, 2, 3]
    safe = [0, 2]  # row 1 is small, row 3 scored 0.3
    others = dict.fromkeys(("sa1b", "cc12m", "textcaps", "journeydb"), large)
    assert chosen(corpus, "paper") == others | {"diffusiondb": safe}
    assert chosen(corpus, "paper-512") == {name: rows for name, rows in others.items() if name != "cc12m"}
    assert chosen(corpus, "synthetic-only") == {"journeydb": [0, 1, 2, 3], "diffusiondb": [0, 1, 2, 3]}


def test_clean_says_what_it_needs_and_leaves_out_what_it_says(tmp_path: Path) -> None:
    bare = make(tmp_path / "bare", [("a", 3)], columns=["scores/basic"])
    with pytest.raises(RequestError) as told:
        select(bare, "clean")
    text = str(told.value)
    assert "contaminated: from `microdit decontaminate`, run again whenever the corpus has changed" in text
    assert "duplicate_keep: from `microdit dedup`" in text
    assert "nsfw: from `scores/nsfw` in the config of the corpus, and `microdit build`" in text
    assert "text_area: from `scores/text` in the config" in text

    corpus = make(tmp_path / "corpus", [("a", 11), ("b", 1)])
    dedup(corpus, 0)
    evaluation = pa.table({"key": ["coco/7"], "pixels_sha256": ["f" * 64], "phash": [f"{77:016x}"]})
    pq.write_table(evaluation, tmp_path / "coco.parquet")
    decontaminate(corpus, [str(tmp_path / "coco.parquet")], 0)
    assert chosen(corpus, "clean") == {"a": [0, 9, 10]}  # b's one row is a's first
    columns = select(corpus, "clean").columns
    assert sorted(columns) == ["images", "scores/basic", "scores/nsfw", "scores/text"]


# -- weights by source -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("weights", "shares"),
    [(None, [2 / 10, 8 / 10]), ("equal", [1 / 2, 1 / 2]), ("a=1,b=3", [1 / 4, 3 / 4]), ("b=0.5, a=2", [4 / 5, 1 / 5])],
)
def test_sources_come_as_often_as_they_shall(tmp_path: Path, weights: str | None, shares: list[float]) -> None:
    corpus = make(tmp_path, [("a", 2), ("b", 8)])
    given = None if weights is None else parse_shares(weights)
    made = select(corpus, "mixed", OK, given)
    table = load_selection(corpus, "mixed")
    total = {"a": 0.0, "b": 0.0}
    for line in table.to_pylist():
        total[line["source"]] += line["weight"]
    assert [total[source] / 10 for source in "ab"] == pytest.approx(shares)
    about = json.loads(table.schema.metadata[b"microdit"])
    assert about.get("weights") == given
    assert made.hash == select(corpus, "mixed", OK, given).hash


SHARE = st.floats(0.01, 100)
WEIGHT = st.floats(0.125, 8, width=32)


@settings(max_examples=100, deadline=None, print_blob=True)
@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(SHARE, st.lists(WEIGHT, min_size=1, max_size=9)), min_size=1))
def test_weights_keep_their_proportions_within_a_source(sources: dict[str, tuple[float, list[float]]]) -> None:
    rows = [(source, "s", row, w) for source in sorted(sources) for row, w in enumerate(sources[source][1])]
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SELECTION)
    found = weigh(table, {source: share for source, (share, _) in sources.items()})
    assert found.drop(["weight"]).equals(table.drop(["weight"])) and found.schema.equals(SELECTION)
    weight = found["weight"].to_numpy().astype(np.float64)
    assert weight.mean() == pytest.approx(1, rel=1e-5)
    whole = sum(share for share, _ in sources.values())
    for source, (share, before) in sources.items():
        mine = weight[np.array(found["source"].to_pylist()) == source]
        assert mine.sum() / len(rows) == pytest.approx(share / whole, rel=1e-5)
        assert mine / mine.sum() == pytest.approx(np.array(before) / math.fsum(before), rel=1e-5)
    if len({share for share, _ in sources.values()}) == 1:
        assert weigh(table, "equal").equals(found)


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=0", "a=-1", "a=nan", "a=inf", "a=1,,b=1", "a=1,a=2", "a:1"])
def test_weights_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"--weights {text}: ") + ".*expected equal, or each source once"):
        parse_shares(text)


def test_weights_name_every_source_and_no_other(tmp_path: Path) -> None:
    corpus = make(tmp_path, [("a", 2), ("b", 2)])
    message = r"there is no row of c, b has no number; expected a number for each source .*: a, b"
    with pytest.raises(RequestError, match=message):
        select(corpus, "x", OK, {"a": 1, "c": 1})
    with pytest.raises(RequestError, match="too far apart for 32-bit numbers"):
        select(corpus, "x", OK, {"a": 1e-300, "b": 1})


# -- the same choice everywhere ----------------------------------------------------------------------------------------
QUERIES = [
    f"{OK} AND width > 250",
    f"{OK} ORDER BY basic_sharpness LIMIT 7",  # nearly all are alike
    f"SELECT *, 1 / (1 + row) AS weight FROM ({OK}) LIMIT 9",
    "SELECT any_value(source) AS source, any_value(shard) AS shard, any_value(row) AS row FROM samples GROUP BY id",
]


@settings(max_examples=4, deadline=None, print_blob=True)
@given(st.integers(1, 2**32), st.sampled_from(QUERIES), st.sampled_from([None, "equal"]))
def test_the_order_of_the_commits_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, order: int, sql: str, weights: str | None
) -> None:
    folder = tmp_path_factory.mktemp("same")
    files = []
    for name, seed in (("one", 0), ("other", order)):
        corpus = make(folder / name, [("a", 9), ("b", 5)], ["scores/basic"], seed)
        shares = None if weights is None else parse_shares(weights)
        files.append(folder / name / select(corpus, "same", sql, shares).path)
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()


def test_processes_with_other_numbers_of_threads_make_the_same_file(tmp_path: Path) -> None:
    program = "from microdit.pipeline.cli.app import main; main()"
    names = []
    for threads, order in (("1", 3), ("4", 5)):
        make(tmp_path / threads, [("a", 9), ("b", 5)], ["scores/basic"], order)
        arguments = ["select", str(tmp_path / threads), "same", QUERIES[1], "--weights", "a=2,b=1", "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "ARROW_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        names.append(tmp_path / threads / json.loads(run.stdout)["path"])
    assert names[0].name == names[1].name and names[0].read_bytes() == names[1].read_bytes()
