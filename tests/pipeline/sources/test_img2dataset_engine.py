"""`fetcher: img2dataset`: its files are our inputs, its errors our reasons; what failed in passing is asked again."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from aiohttp import web

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.sources import Img2datasetOptions
from microdit.pipeline.sources.img2dataset_engine import check_img2dataset, reason_of
from microdit.pipeline.sources.registry import source_of
from tests.pipeline.helpers.dataset_archives import ingested, picture
from tests.pipeline.sources.adapters.test_urls import Server, server

__all__ = ["server"]

STAND_IN = Path(__file__).parents[1] / "helpers" / "img2dataset_stand_in"
GIVEN = os.environ.get("MICRODIT_IMG2DATASET_PYTHON")


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an interpreter that has img2dataset, or its stand-in."""
    if GIVEN is None and find_spec("img2dataset") is None:
        monkeypatch.setenv("PYTHONPATH", str(STAND_IN), prepend=os.pathsep)
    return GIVEN or sys.executable


def block(folder: Path, urls: list[str], python: str) -> dict[str, object]:
    (folder / "list.jsonl").write_text("".join(json.dumps({"url": u, "caption": f"c {u}"}) + "\n" for u in urls))
    fetch = {"timeout": 8, "idle_timeout": 1, "max_bytes": 50_000, "allow_networks": ["127.0.0.0/8"]}
    return {
        "adapter": "urls",
        "list": str(folder / "list.jsonl"),
        "unit_inputs": 6,
        "fetch": {**fetch, "robots_txt": False},
        "fetcher": "img2dataset",
        "img2dataset": {"python": python, "options": {"thread_count": 4}},
    }


def test_what_it_fetches_is_ingested(
    tmp_path: Path, server: Server, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "ok", _picture)
    monkeypatch.setattr(Server, "once", _picture_later)
    urls = [f"{server.url}/ok/{n}" for n in range(4)]
    urls += [f"{server.url}/status/404", "http://10.0.0.1/x.jpg", "ftp://a/x.jpg", f"{server.url}/once/503-5"]
    images, _ = ingested(tmp_path, block(tmp_path, urls, python))
    assert [row["origin"] for row in images] == [*urls[:6], "", urls[7]]
    assert [row["reason"] for row in images] == [
        *[None] * 4,
        *("http_404", "private_address", "unreadable_list_line"),
        None,
    ]
    assert [row["caption"] for row in images[:4]] == [f"c {url}" for url in urls[:4]]
    assert not list((tmp_path / "scratch").glob("microdit-img2dataset-*"))


async def _picture(self: Server, request: web.Request, rest: str) -> web.Response:
    return web.Response(body=picture(int(rest)))


async def _picture_later(self: Server, request: web.Request, rest: str) -> web.Response:
    status, _, number = rest.partition("-")
    if self.events.count(request.path) == 1:
        return web.Response(status=int(status))
    return web.Response(body=picture(int(number)))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 429: Too Many Requests", "http_429"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "certificate"),
        ("Use of image disallowed by X-Robots-Tag directive", "noai"),
        ("IncompleteRead(10 bytes read, 5 more expected)", "truncated"),
        ("<urlopen error [Errno 104] Connection reset by peer>", "connection"),
        ("'ascii' codec can't encode character", "connection"),
    ],
)
def test_its_errors_are_our_reasons(message: str, reason: str) -> None:
    assert reason_of(message)[0] == reason


def test_without_it_the_message_says_what_to_do(tmp_path: Path) -> None:
    options = Img2datasetOptions(python=str(tmp_path / "none"))
    with pytest.raises(RequestError, match=r"sources\.web\.fetcher = 'img2dataset': .*none cannot import it .*python"):
        check_img2dataset("sources.web.fetcher", options)


def test_options_that_a_unit_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a unit sets this option of img2dataset itself"):
        Img2datasetOptions(options={"output_folder": "x"})
    (tmp_path / "list.tsv").write_text("http://a/1\tcat\n")
    tree = {"name": "x", "corpus": str(tmp_path / "corpus"), "columns": {"captions/source": {}}}
    tree["sources"] = {"web": block(tmp_path, ["http://a/1"], "python")}
    assert source_of(BuildConfig.model_validate(tree), "web").stage()["inputs"] == 1
