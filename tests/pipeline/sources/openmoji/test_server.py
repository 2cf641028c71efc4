"""The demo's input over HTTP: the list is deterministic, and each bad URL fails in the way of its kind."""

import hashlib
import io
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
from PIL import Image

from microdit.pipeline.sources.openmoji import drawings as openmoji
from microdit.pipeline.sources.openmoji.server import (
    KINDS,
    SIZE,
    TINY,
    DemoSource,
    caption,
    long_caption,
    plain_caption,
    prepare,
    serve,
)

LIMIT = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> DemoSource:
    return prepare(tmp_path_factory.mktemp("openmoji"), limit=LIMIT)


@pytest.fixture(scope="module")
def base(source):
    with serve(source.folder) as url:
        yield url


def lines(source: DemoSource) -> list[tuple[str, str]]:
    return [tuple(line.split("\t")) for line in source.list.read_text().splitlines()]


def get(base: str, url: str, timeout: float = 20) -> bytes:
    with urllib.request.urlopen(urljoin(base, url), timeout=timeout) as response:
        return response.read()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def test_the_list_is_what_was_planned(source):
    listed = lines(source)
    bad = [url for urls in source.bad.values() for url in urls]
    assert tuple(source.bad) == KINDS
    assert all(len(urls) >= 2 for urls in source.bad.values())
    assert len(set(bad)) == len(bad) == len(KINDS) * 2
    assert source.inputs == len(listed) == len({url for url, _ in listed}) == LIMIT + len(bad)
    assert set(bad) <= {url for url, _ in listed}
    captions = {caption(drawing) for drawing in openmoji.catalogue()}
    assert {told for _, told in listed} <= captions


def test_bad_urls_are_spread(source):
    bad_lines = [number for number, (url, _) in enumerate(lines(source)) if url.startswith("broken/")]
    assert min(bad_lines) < source.inputs / 3 and max(bad_lines) > source.inputs * 2 / 3


def test_the_second_captions_are_joined_by_url(source):
    table = [json.loads(line) for line in source.captions.read_text().splitlines()]
    assert [entry["url"] for entry in table] == [url for url, _ in lines(source)]
    for entry, (_, told) in zip(table, lines(source), strict=True):
        name, group = told.rsplit(", ", 1)
        assert entry["caption"].startswith(name) and entry["caption"].endswith(f", from {group}")
        assert len(entry["caption"]) > len(told)
        assert entry["license"] == openmoji.LICENSE


def test_captions_are_made_of_name_aliases_and_group():
    apple = next(drawing for drawing in openmoji.catalogue() if drawing.code == "1F34E")
    assert caption(apple) == "red apple, food fruit"
    assert long_caption(apple) == "red apple, also known as apple, from food fruit"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1F34E", "a red apple"),
        ("1F419", "an octopus"),
        ("1F1EB-1F1EF", "the flag of Fiji"),
        ("1F347", "grapes"),
        ("1F68C", "a bus"),
        ("1F52D", "a telescope"),
    ],
)
def test_plain_captions_are_what_a_user_asks_for(code: str, expected: str) -> None:
    assert plain_caption(next(drawing for drawing in openmoji.catalogue() if drawing.code == code)) == expected


def test_the_plain_captions_are_joined_by_url(source: DemoSource) -> None:
    table = [json.loads(line) for line in source.plain.read_text().splitlines()]
    assert [entry["url"] for entry in table] == [url for url, _ in lines(source)]
    for entry, (_, told) in zip(table, lines(source), strict=True):
        assert entry["plain"].endswith(told.rsplit(", ", 1)[0])


def test_preparing_again_gives_the_same_bytes(source, tmp_path):
    again = prepare(tmp_path, limit=LIMIT)
    files = sorted(path.relative_to(source.folder) for path in source.folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for file in files:
        assert digest(source.folder / file) == digest(tmp_path / file), file
    assert again.bad == source.bad


def test_what_is_there_is_not_made_again_and_what_is_damaged_is(tmp_path):
    first = prepare(tmp_path, limit=1)
    image = next((tmp_path / "images").iterdir())
    before = image.stat().st_mtime_ns
    assert prepare(tmp_path, limit=1) == first
    assert image.stat().st_mtime_ns == before
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    assert prepare(tmp_path, limit=1) == first
    assert image.read_bytes() == whole
    (tmp_path / "source.json").write_text("{")  # as no process of ours leaves it
    assert prepare(tmp_path, limit=1) == first


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="limit = 0"):
        prepare(tmp_path, limit=0)


def test_good_urls_give_whole_drawings_in_several_formats(source, base):
    bad = {url for urls in source.bad.values() for url in urls}
    drawings = {caption(drawing): drawing for drawing in openmoji.catalogue()}
    formats = set()
    for url, told in lines(source):
        if url in bad:
            continue
        data = get(base, url)
        image = Image.open(io.BytesIO(data))
        formats.add(image.format)
        assert image.size == (SIZE, SIZE)
        truth = np.asarray(openmoji.rasterise(drawings[told].svg.read_text(), SIZE)).astype(float)
        assert np.abs(pixels(data) - truth).mean() < 4, url
    assert formats == {"JPEG", "PNG", "WEBP"}


def test_not_found(source, base):
    for url in source.bad["not_found"]:
        with pytest.raises(urllib.error.HTTPError) as error:
            get(base, url)
        assert error.value.code == 404


def test_hang_never_answers(source, base):
    for url in source.bad["hang"]:
        with pytest.raises(TimeoutError):
            get(base, url, timeout=0.3)


def test_html_is_called_jpg(source, base):
    for url in source.bad["html"]:
        assert url.endswith(".jpg")
        assert get(base, url).startswith(b"<!doctype html>")


def test_truncated(source, base):
    for url in source.bad["truncated"]:
        image = Image.open(io.BytesIO(get(base, url)))
        assert image.size == (SIZE, SIZE)
        with pytest.raises(OSError, match="truncated"):
            image.load()


def test_tiny(source, base):
    for url in source.bad["tiny"]:
        assert pixels(get(base, url)).shape == (TINY, TINY, 3)


def test_bomb_is_small_and_claims_to_be_huge(source, base, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for url in source.bad["bomb"]:
        data = get(base, url)
        assert len(data) < 200_000
        assert Image.open(io.BytesIO(data)).size == (30_000, 30_000)
    monkeypatch.undo()
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


def test_duplicates_show_another_listed_image_in_other_bytes(source, base):
    bad = {url for urls in source.bad.values() for url in urls}
    originals = {name: url for url, name in lines(source) if url not in bad}
    captions = dict(lines(source))
    for url in source.bad["duplicate"]:
        original, copy = get(base, originals[captions[url]]), get(base, url)
        assert original != copy
        assert np.abs(pixels(original) - pixels(copy)).mean() < 4


def test_a_port_that_is_taken_is_an_error(source):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(OSError), serve(source.folder, holder.getsockname()[1]):
            pass


def test_the_server_is_gone_afterwards_even_with_a_request_under_way(source):
    with serve(source.folder) as url:
        client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1].strip("/"))))
        client.sendall(f"GET /{source.bad['hang'][0]} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
    client.settimeout(20)
    assert client.recv(1) == b""
    client.close()
    with pytest.raises(urllib.error.URLError):
        get(url, source.bad["html"][0])


def test_nothing_but_the_pictures_is_served(source, base):
    for url in ("source.json", "images/", "images/%2e%2e/source.json", "broken/../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as error:
            get(base, url)
        assert error.value.code in (403, 404)
