"""Failed rows are made again: URLs as retry units, rows of other columns in a new generation of their shard."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.access.joined import plan_join, read_joined
from microdit.pipeline.access.reader import CorpusReader
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.engine import retries
from microdit.pipeline.engine.build import build
from microdit.pipeline.engine.summary import BuildSummary
from microdit.pipeline.report.page import gather
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.sample_index import index_samples
from microdit.pipeline.upkeep.gc import gc
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.build_checks import check_adds_up
from tests.servers.pictures import CAPTION, PictureServer

PICTURES = 60


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.2)


def config_of(
    folder: Path, server: PictureServer, columns: dict[str, Any], unit_inputs: int = 40, **fetch: Any
) -> BuildConfig:
    folder.joinpath("list.tsv").write_text("".join(f"{server.url}/{n}\ta picture {n}\n" for n in range(PICTURES)))
    source = {"adapter": "urls", "list": str(folder / "list.tsv"), "unit_inputs": unit_inputs}
    fetch = {"timeout": 5, "idle_timeout": 2, "allow_networks": ["127.0.0.0/8"], "robots_txt": False, **fetch}
    return BuildConfig.model_validate(
        {
            "name": "retried",
            "corpus": str(folder / "corpus"),
            "shard_samples": 16,
            "sources": {"web": {**source, "fetch": fetch}},
            "images": {"min_side": 32, "format": "png"},
            "columns": columns,
        }
    )


def check_counts(corpus: Corpus, summary: BuildSummary, out: int, reasons: dict[str, int]) -> None:
    """Everything that counts counts every input once."""
    check_adds_up(summary)
    failed = PICTURES - out
    images = summary.columns["images"]
    assert (images.inputs, images.out, images.failed, images.reasons) == (PICTURES, out, failed, reasons)
    said = status(corpus)
    assert (said.sources["web"].units, said.sources["web"].units_done, said.sources["web"].inputs) == (2, 2, PICTURES)
    for column, by_source in said.columns.items():
        entry = by_source["web"]
        assert (entry.inputs, entry.out, entry.failed) == (PICTURES, out, failed), column
        assert (entry.left, entry.stale, entry.set_aside) == (0, 0, 0)
        assert entry.reasons == (reasons if column == "images" else {"upstream": failed} if failed else {})
    found = verify(corpus)
    assert not found.problems
    assert {(c.inputs, c.out, c.failed) for c in found.totals.samples.values()} == {(PICTURES, out, failed)}
    reader = CorpusReader(corpus)
    assert {(c.rows, c.ok, c.failed) for c in reader.counts().values()} == {(PICTURES, out, failed)}
    rows = reader.query("SELECT id, status, reason FROM samples")
    assert len(rows) == len({row["id"] for row in rows}) == PICTURES
    assert Counter(row["reason"] for row in rows if row["status"] == "failed") == reasons
    columns = [column for column in said.columns if column != "scores/basic"]
    joined = [row.id for shard in plan_join(corpus, columns) for row in read_joined(corpus, shard)]
    assert len(set(joined)) == len(joined) == len(index_samples(corpus, newest_commits(corpus, columns))[0]) == out
    page = gather(corpus, None)
    assert (page.listed, page.kept, page.incomplete_sources) == (PICTURES, out, [])
    assert gc(corpus, older_than_hours=0, dry_run=True).attempts == 0


def test_a_server_that_stopped_and_is_there_again(cluster: None, tmp_path: Path) -> None:
    server = PictureServer(answers=24)
    config = config_of(tmp_path, server, {"captions/source": {}, "scores/basic": {}})
    with server:
        first = build(config)
    corpus = Corpus.open(config.corpus)
    check_counts(corpus, first, 24, {"connection": 36})
    assert first.exit_status == 1
    assert "images: 36 may be good another time: --retry-failed takes again what failed for connec" in first.text()
    assert not build(config).worked

    failed_again = build(config, retry_failed=True)  # the server is still gone
    assert failed_again.worked
    check_counts(corpus, failed_again, 24, {"connection": 36})
    retried = {unit for unit in corpus.units("web") if "-r" in unit}
    assert retried and retried <= {"web-000000-r1", "web-000001-r1"}

    server.answers = None
    with server:
        whole = build(config, retry_failed=True)
    check_counts(corpus, whole, PICTURES, {})
    assert whole.exit_status == 0 and "--retry" not in whole.text()
    keys = Counter(
        row.key for commit in corpus.commits("images") for row in read_rows(corpus, commit) if row.ok
    )  # stock readers of the tars see each once
    assert len(keys) == PICTURES and set(keys.values()) == {1}
    again = build(config, retry_failed=True)
    assert not again.worked
    check_counts(corpus, again, PICTURES, {})


def test_a_host_that_allows_few_requests(cluster: None, tmp_path: Path) -> None:
    """It asks for a pause that is longer than the config waits: what it refused comes with each retry."""
    with PictureServer(rate=30) as server:
        config = config_of(tmp_path, server, {"captions/source": {}}, retry_after=1)
        summary = build(config)
        corpus = Corpus.open(config.corpus)
        assert server.refused and summary.columns["images"].reasons == {"http_429": PICTURES - server.sent}
        for _ in range(20):
            if not summary.columns["images"].failed:
                break
            assert "--retry-failed takes again what failed for http_429" in summary.text()
            summary = build(config, retry_failed=True)
            assert summary.columns["images"].inputs == PICTURES
    check_counts(corpus, summary, PICTURES, {})
    assert server.sent == PICTURES  # nothing that had come was asked for again


def bytes_of(corpus: Corpus, column: str) -> dict[str, Any]:
    """The lines and members of the good rows of a column, by key."""
    return {
        row.key: ({name: value for name, value in row.scalars.items() if name != "offset"}, row.members)
        for commit in corpus.commits(column)
        for row in read_rows(corpus, commit)
        if row.ok
    }


def test_captions_that_a_server_rejected(cluster: None, tmp_path: Path) -> None:
    endpoint = {"endpoint": "", "model": "some-vl"}
    columns = {"captions/vl": endpoint, "captions/source": {}, "text/minilm@vl": {"encoder": "minilm"}}
    with PictureServer(rejects=3) as server:
        endpoint["endpoint"] = f"{server.url}/v1"
        config = config_of(tmp_path, server, columns)
        first = build(config)
        corpus = Corpus.open(config.corpus)
        assert first.columns["captions/vl"].reasons == {"http_400": 3}
        assert "captions/vl: 3 may be good another time: --retry-rows http_400 makes them again" in first.text()
        assert not build(config, retry_failed=True).worked
        before = bytes_of(corpus, "captions/vl"), bytes_of(corpus, "text/minilm@vl")
        names = {commit.name for commit in corpus.commits("captions/source")}

        for wrong in ("http_429", "http_5xx", "upstream", "no_such"):
            with pytest.raises(RequestError, match=rf"--retry-rows {wrong}: .*\(captions/vl: http_400 3\)"):
                build(config, retry_rows=[wrong])

        still = build(config, retry_rows=["http_4xx"])  # it rejects them again: nothing is written
        assert still.columns["captions/vl"].reasons == {"http_400": 3} and not still.worked
        assert {commit.generation for commit in corpus.commits("text/minilm@vl")} == {0}

        server.rejects = 0
        whole = build(config, retry_rows=["http_4xx"])
    check_adds_up(whole)
    assert whole.exit_status == 0 and "--retry" not in whole.text()
    assert {(name, c.inputs, c.out) for name, c in whole.columns.items()} == {
        (name, PICTURES, PICTURES) for name in ("images", *columns)
    }
    assert not verify(corpus).problems
    assert {entry["web"].stale for entry in status(corpus).columns.values()} == {0}
    assert {commit.name for commit in corpus.commits("captions/source")} == names
    vl, text = bytes_of(corpus, "captions/vl"), bytes_of(corpus, "text/minilm@vl")
    assert {line["caption"] for line, _ in vl.values()} == {CAPTION}
    assert {key: vl[key] for key in before[0]} == before[0] and len(vl) == len(before[0]) + 3 == len(text)
    assert not build(config).worked
    with pytest.raises(RequestError, match=r"expected one of their reasons \(none has failed\)"):
        build(config, retry_rows=["http_4xx"])
