"""At the end of a build the hosts that failed the most URLs are named, with their reasons."""

import json
from pathlib import Path
from typing import Any

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources import failing_hosts
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare
from microdit.pipeline.stages.stage import UnitTask
from tests.pipeline.sources.adapters.test_urls import Server, server

__all__ = ["server"]


def said(folder: Path, urls: list[str], units: slice = slice(None)) -> list[str]:
    (folder / "list.jsonl").write_text("".join(json.dumps({"url": url, "caption": "c"}) + "\n" for url in urls))
    fetch: dict[str, Any] = {"allow_networks": ["127.0.0.0/8"], "robots_txt": False, "contact": "me@example.org"}
    source = {"adapter": "urls", "list": str(folder / "list.jsonl"), "unit_inputs": 10, "fetch": fetch}
    tree = {"name": "x", "corpus": str(folder / "corpus"), "shard_samples": 4, "sources": {"web": source}}
    config = BuildConfig.model_validate(tree)
    corpus = Corpus.create(config.corpus, "x", 4)
    [web] = sources_of(config)
    declare(corpus, config, [web], [])
    lines: list[str] = []
    with web.running(corpus, lines.append):
        for unit in web.units()[units]:
            ingest_unit(corpus, web, UnitTask(unit), config)
    return lines


def test_the_hosts_that_cost_most_are_named(tmp_path: Path, server: Server) -> None:
    urls = [f"{server.url}/status/{status}" for status in [404] * 8 + [410] * 5]
    urls += [f"{server.url.replace('127.0.0.1', '127.0.0.2')}/status/404"] * 9  # nobody listens there
    assert said(tmp_path, urls, slice(2)) == [
        "source web: servers failed 20 URLs of 2 hosts, most of them 127.0.0.1 13 (http_404 8, http_410 5); "
        "127.0.0.2 7 (connection 7)"
    ]
    assert said(tmp_path, urls) == []  # the two of the third unit are not worth a line


def test_of_many_shards_some_are_read(tmp_path: Path, server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(failing_hosts, "MOST_SHARDS", 3)
    [line] = said(tmp_path, [f"{server.url}/status/404"] * 20)
    assert "10 URLs of 1 hosts in 3 of its 6 new shards, most of them 127.0.0.1 10 (http_404 10)" in line
