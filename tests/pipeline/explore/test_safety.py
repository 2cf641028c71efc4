"""Who may ask the server of `microdit explore`, what it gives away, and what a hostile corpus can do."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.marks import Mark, Marks
from microdit.pipeline.corpus.presence import presence
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.explore import histograms, rows
from microdit.pipeline.explore.condition import checked
from microdit.pipeline.explore.guard import check_host
from microdit.pipeline.explore.histograms import edges_of
from microdit.pipeline.explore.last_table import keep_table, last_table
from microdit.pipeline.explore.server import bind
from microdit.pipeline.explore.thumbnails import ThumbnailFolder
from microdit.pipeline.explore.worker import WorkerView
from microdit.pipeline.selection.view import query
from microdit.pipeline.tables.database import SqlLimits
from microdit.pipeline.tables.part_specs import ROWS
from microdit.pipeline.tables.sample_table import sample_table
from tests.pipeline.explore.serving import Served, served
from tests.pipeline.helpers.small_corpus import SOURCE, fill, make_corpus, write_column, write_images

TOKEN = "a-secret-of-24-characters"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of one unit; no server of it is read-only or has a token but those that say so."""
    found = make_corpus(tmp_path_factory.mktemp("safety") / "corpus")
    fill(found)
    return found


@pytest.fixture(scope="module")
def server(made: Corpus) -> Iterator[Served]:
    with served(made) as found:
        yield found


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
    ],
)
def test_other_hosts_and_sites_may_not_ask(server: Served, headers: dict[str, str], status: int) -> None:
    given_headers = {name: value.format(port=server.port) for name, value in headers.items()}
    assert server.ask("/api/corpus", **given_headers).status == status


def test_every_answer_says_what_a_browser_may_do(server: Served) -> None:
    for path in ("/api/corpus", "/api/rows?where=x", "/nothing", f"/api/image?source={SOURCE}&key=nope"):
        headers = server.ask(path).headers
        assert (
            "default-src 'none'" in headers["content-security-policy"]
            and "unsafe" not in headers["content-security-policy"]
        )
        assert (
            headers["x-content-type-options"] == "nosniff" and headers["cross-origin-resource-policy"] == "same-origin"
        )


@pytest.mark.parametrize(
    "path", ["/page/../server.py", "/page/%2e%2e%2fserver.py", "/page/.hidden", "/page/x.py", "/etc"]
)
def test_nothing_but_the_page_is_served(server: Served, path: str) -> None:
    assert server.ask(path).status == 404


def test_a_change_needs_the_pages_own_token(server: Served) -> None:
    body = {"source": SOURCE, "key": "demo-000000-00-0", "mark": "keep"}
    assert server.ask("/api/marks", "POST", body).status == 403
    assert server.ask("/api/marks", "POST", body, X_Microdit_Token="guess").status == 403
    csrf = server.get("corpus")["token"]
    assert server.ask("/api/marks", "POST", body, X_Microdit_Token=csrf, Origin="http://evil.example").status == 403
    assert server.ask("/api/marks", "POST", body, X_Microdit_Token=csrf).status == 200
    plain = server.ask("/api/marks", "POST", body, X_Microdit_Token=csrf, Content_Type="text/plain")
    assert plain.status == 400
    large = {**body, "note": "x" * (1 << 20)}
    assert server.ask("/api/marks", "POST", large, X_Microdit_Token=csrf).status == 413
    assert len(server.get("marks")["marks"]) == 1


def test_a_token_is_asked_for_once_and_a_page_that_may_only_read_changes_nothing(made: Corpus) -> None:
    before = sorted(name for name in made.store.names() if not name.startswith("tables/"))
    with served(made, token=TOKEN, read_only=True) as server:
        assert server.url.endswith(f"/?token={TOKEN}")
        assert server.ask("/api/corpus").status == 401
        assert server.ask("/?token=another-of-as-many-chars").status == 401
        first = server.ask(f"/?token={TOKEN}")
        assert (first.status, first.headers["location"]) == (302, "/")
        cookie = first.headers["set-cookie"]
        assert TOKEN in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        server.cookies["microdit-token"] = TOKEN[:-1]
        assert server.ask("/api/corpus").status == 401
        server.cookies["microdit-token"] = TOKEN
        assert server.get("corpus")["read_only"]
        assert server.post("marks", source=SOURCE, key="demo-000000-00-0", mark="keep").status == 403
        assert server.post("selections", name="x", where="status = 'ok'").status == 403
    assert sorted(name for name in made.store.names() if not name.startswith("tables/")) == before


def test_a_corpus_without_embeddings_says_how_to_have_some(server: Served) -> None:
    assert server.get("corpus")["embeddings"] == []
    for name, asked in (("similar", {"source": SOURCE, "key": "demo-000000-00-0"}), ("search", {"text": "x"})):
        assert "add `scores/embedding` to the config" in server.refused(name, **asked)


@pytest.mark.parametrize(
    ("host", "token"), [("0.0.0.0", None), ("192.168.0.7", None), ("::", None), ("0.0.0.0", "short")]
)
def test_other_machines_need_a_long_token(host: str, token: str | None) -> None:
    with pytest.raises(RequestError, match="--token"):
        check_host(host, token)
    check_host("0.0.0.0", TOKEN)
    check_host("127.0.0.1", None)


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(RequestError, match="another program has it"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_the_command_refuses_another_host_and_a_missing_corpus(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", "explore"]
    for arguments, message in (
        ([str(tmp_path), "--host", "0.0.0.0"], "give a --token too"),
        ([str(tmp_path)], "there is no corpus.json"),
    ):
        ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stdout) == (2, "") and message in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def test_the_command_ends_by_a_signal_and_its_workers_with_it(made: Corpus) -> None:
    command = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", "explore", made.url]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        assert Served(url).get("count") == {"rows": 12, "of": 12}
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert workers and not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_broken_tars_and_bytes_that_are_no_picture_break_one_picture(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus, units=2)
    cut, gone, other, whole = corpus.commits("images")
    os.truncate(tmp_path / "corpus" / cut.object.name, 700)
    (tmp_path / "corpus" / gone.object.name).unlink()
    line = corpus.sidecar(other).to_pylist()[0]
    path = tmp_path / "corpus" / other.object.name
    data = bytearray(path.read_bytes())
    data[line["offset"] : line["offset"] + line["size"]] = b"<script>alert(1)</script>".ljust(line["size"])
    path.write_bytes(data)
    with served(corpus) as server:
        for size in ("160", "full"):
            assert "is cut" in server.refused("image", source=SOURCE, key=f"{cut.shard}-4", size=size)
            assert "missing" in server.refused("image", source=SOURCE, key=f"{gone.shard}-4", size=size)
            assert "no picture" in server.refused("image", source=SOURCE, key=line["key"], size=size)
            assert server.ask(f"/api/image?source={SOURCE}&key={whole.shard}-4&size={size}").status == 200
        assert server.get("count") == {"rows": 24, "of": 24}


def test_shards_that_a_build_adds_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microdit.pipeline.explore.state.LOOK", 0.2)
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus)
    with served(corpus) as server, presence(corpus):
        assert server.get("count")["rows"] == 12
        cursor = server.get("rows", limit=12)["rows"][-1]
        fill(corpus, units=2)
        end = time.monotonic() + 60
        while server.get("count")["rows"] != 24:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert server.get("corpus")["growing"]
        after = f"{cursor['source']}/{cursor['shard']}/{cursor['row']}"
        assert len(server.get("rows", after=after)["rows"]) == 12


def test_histograms_of_a_large_table_are_estimates_unless_few_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    for number in range(0, 7 * 128, 128):  # each in a part of its own
        unit = f"{SOURCE}-{number:06d}"
        images = write_images(corpus, ShardRef(source=SOURCE, unit=unit, shard=f"{unit}-00"))
        write_column(corpus, "scores/basic", {"images": images})
    view = WorkerView(corpus, SqlLimits(), 1)
    view.open(sample_table(corpus))
    edges = [0.0, 0.25, 0.5]
    exact = histograms.bins(view, "basic_sharpness", checked(""), edges)
    assert (exact["counts"], exact["nulls"], exact["estimated"]) == ([14, 21], 7, False)
    monkeypatch.setattr(histograms, "EXACT_ROWS", 20)
    monkeypatch.setattr(histograms, "SAMPLED_ROWS", 20)
    monkeypatch.setattr(histograms, "FEW", 12)
    assert histograms.sampled_runs(view, checked(""))[0] == [1, 3, 5]
    assert histograms.bins(view, "basic_sharpness", checked(""), edges) == {**exact, "estimated": True}
    assert not histograms.bins(view, "basic_sharpness", checked("row < 2"), edges)["estimated"]
    assert histograms.values(view, "status", checked(""))["values"] == [
        {"value": "ok", "rows": 35},
        {"value": "failed", "rows": 7},
    ]
    monkeypatch.setattr(rows, "DRAWN_ROWS", 7)
    drawn = rows.drawn(view, checked("status = 'ok'"), 8, "s")
    assert len({row["shard"] for row in drawn}) == 2 and drawn == rows.drawn(view, checked("status = 'ok'"), 8, "s")
    assert len(rows.drawn(view, checked("row = 1"), 8, "s")) == 7


def test_a_corpus_on_a_bucket(s3_url: str) -> None:
    corpus = make_corpus(s3_url)
    fill(corpus)
    with served(corpus) as server:
        found = server.get("rows", where="status = 'ok'", limit=3)["rows"]
        assert server.ask(f"/api/image?source={SOURCE}&key={found[2]['key']}").status == 200
        assert server.get("count", where="basic_sharpness > 0.2") == {"rows": 6, "of": 12}
        assert server.post("marks", source=SOURCE, key=found[0]["key"], mark="keep").status == 200
        assert server.get("rows", where="mark = 'keep'")["rows"][0]["key"] == found[0]["key"]


# -- parts -------------------------------------------------------------------------------------------------------------
def test_of_two_who_mark_at_once_both_marks_are_kept(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    one, other = Marks(corpus), Marks(corpus)
    for marks, word in ((one, "keep"), (other, "drop"), (one, None)):
        marks.add(Mark(source=SOURCE, shard="demo-000000-00", row=1, key="k", mark=word))
    found = Marks(corpus)
    found.read()
    assert [mark.mark for _, mark in sorted(found.by_number.items())] == ["keep", "drop", None]
    assert found.newest()[SOURCE, "demo-000000-00", 1].mark is None and found.next == 3


def test_a_column_that_is_called_mark_stays_what_it_was(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    corpus.declare_column("scores/mark", {"stage": "scores/mark"}, {"mark": "float32"})
    fill(corpus)
    Marks(corpus).add(Mark(source=SOURCE, shard="demo-000000-00", row=1, key="k", mark="keep"))
    assert query(corpus, "SELECT count(*) AS n, count(mark) AS m FROM samples").to_pylist() == [{"n": 12, "m": 0}]
    assert "mark_note" not in query(corpus, "SELECT * FROM samples").column_names


def test_the_last_table_is_known_as_long_as_its_parts_are_there(tmp_path: Path) -> None:
    corpus, folder = make_corpus(tmp_path / "corpus"), tmp_path / "noted"
    fill(corpus)
    table = sample_table(corpus, reads=None)
    assert last_table(corpus, folder) is None
    keep_table(corpus, table, folder)
    assert last_table(corpus, folder) == table
    (noted,) = folder.iterdir()
    for damaged in (b"", b"{}", b"[1]", noted.read_bytes()[:-9]):
        whole = noted.read_bytes()
        noted.write_bytes(damaged)
        assert last_table(corpus, folder) is None
        noted.write_bytes(whole)
    (tmp_path / "corpus" / table.parts[ROWS][0].name).unlink()
    assert last_table(corpus, folder) is None


def test_small_pictures_stay_within_their_bound(tmp_path: Path) -> None:
    folder = ThumbnailFolder(tmp_path / "small", most=10_000)
    rng = random.Random(0)
    for number in range(60):
        folder.put(folder.key(number), rng.randbytes(900))
        assert sum(path.stat().st_size for path in folder.folder.glob("??/*")) <= 10_000
    assert folder.get(folder.key(59)) is not None and folder.get(folder.key(0)) is None


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-1e12, 1e12) | st.integers(-9, 9), min_size=2, max_size=40), st.integers(1, 60))
def test_edges_are_equal_and_cover_the_quantiles(numbers: list[float], bins: int) -> None:
    values = sorted(numbers)
    values = [values[0], *values, values[-1]]
    edges = edges_of(values, bins)
    assert 2 <= len(edges) <= bins + 1
    assert all(low < high for low, high in pairwise(edges))
    assert edges[0] <= values[1] and edges[-1] >= values[-2]


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_any_text_is_a_condition_or_refused_with_one_message(text: str) -> None:
    try:
        condition = checked(text)
    except RequestError as error:
        assert str(error).startswith("SQL: ")
    else:
        assert condition.text == text.strip().rstrip(";").rstrip()
