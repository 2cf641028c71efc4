"""SA-1B: Meta's list of links and their expiry, and the choice of the caption."""

from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import Sa1bSource
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.sources.adapters.sa1b import Sa1b, check_expiry, expires, read_links
from tests.pipeline.helpers.dataset_archives import by_key, empty, write_tar

LINK = "https://scontent.example/m1/sa.tar?_nc_sid=0a&oh=00_Ab&oe="
TABLE = {"sa_1": {"joined": "a  red\nbus"}, "sa_30": {"joined": None}}


def mirror(folder: Path, **options) -> Sa1b:
    members = {"./sa_1.jpg": b"1", "./sa_1.txt": b"a bus", "./sa_1.json": b"{}", "sa_30.jpg": b"30", "sa_4.jpg": b"4"}
    write_tar(folder / "sa_000000.tar", members, "w:gz")
    captions = empty(folder / "SA1B_caption.tar.gz")
    given = {"files": str(folder / "sa_*.tar"), "captions": str(captions), **options}
    return Sa1b("sa1b", Sa1bSource(adapter="sa1b", **given), folder)


def test_only_shards_of_the_list_are_taken(tmp_path: Path):
    links = tmp_path / "links.txt"
    rows = ["file_name\tcdn_link", f"sa_000010.tar\t{LINK}1", f"sa_000002.tar\t{LINK}2", f"sa_images_ids.txt\t{LINK}3"]
    rows += [f"sa_co_gold.tar\t{LINK}4", f"sa_000002.tar\t{LINK}5", "sa_000003.tar\tnowhere", ""]
    links.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    files = read_links(str(links), "sources.sa1b.links")
    assert [(file.name, file.url) for file in files] == [("sa_000002.tar", LINK + "5"), ("sa_000010.tar", LINK + "1")]


def test_a_new_list_is_the_same_source(tmp_path: Path):
    links = tmp_path / "links.txt"
    options = Sa1bSource(adapter="sa1b", links=str(links), captions=None, caption="txt")
    stages = []
    for oe in ("67A68F58", "77A68F58"):
        links.write_text(f"file_name\tcdn_link\nsa_000000.tar\t{LINK}{oe}\n")
        stages.append(Sa1b("sa1b", options, tmp_path).stage())
    assert stages[0] == stages[1]


@pytest.mark.parametrize("text", ["", "file_name\tcdn_link\nsa_images_ids.txt\thttps://a/b\n", "sa_000000.tar\n"])
def test_a_list_without_tars_says_where_to_get_one(tmp_path: Path, text: str):
    links = tmp_path / "links.txt"
    links.write_text(text)
    with pytest.raises(RequestError, match=r"sources\.sa1b\.links.*sa_000000\.tar<TAB>https.*ai\.meta\.com"):
        read_links(str(links), "sources.sa1b.links")
    with pytest.raises(RequestError, match=r"No such file.*ai\.meta\.com"):
        read_links(str(tmp_path / "none.txt"), "sources.sa1b.links")


def test_the_expiry_is_read_from_the_links():
    assert expires(LINK + "67A68F58") == 1738968920
    assert expires(LINK + "zz") is None
    assert expires("https://mirror.example/sa_000000.tar") is None
    files = [RemoteFile("a", LINK + "67A68F58"), RemoteFile("b", LINK + "67A6AB78")]
    assert "from 2025-02-07 22:55 UTC on, in 10 hours" in check_expiry(files, "links", 1738968920 - 36000)
    with pytest.raises(RequestError, match=r"1 of its 2 links have expired, the first on 2025-02-07 22:55 UTC; get"):
        check_expiry(files, "links", 1738968921)
    assert check_expiry([RemoteFile("a", "https://a/b")], "links", 2e9) == ""


def test_expired_links_are_refused_before_the_first_byte_and_only_when_something_is_read(tmp_path: Path):
    links = tmp_path / "links.txt"
    links.write_text(f"sa_000000.tar\t{LINK}67A68F58\n")
    source = Sa1b("sa1b", Sa1bSource(adapter="sa1b", links=str(links), captions=None, caption="txt"), tmp_path)
    assert source.units() == ["sa1b-000000"]
    with pytest.raises(RequestError, match="have expired"), source.running(None, print):  # type: ignore[arg-type]
        raise AssertionError


def test_the_joined_caption_is_the_caption_and_an_image_without_one_fails(tmp_path: Path):
    found = by_key(mirror(tmp_path), TABLE)
    assert list(found) == ["sa_1", "sa_30", "sa_4"]
    one = found["sa_1"]
    assert (one.data, one.caption, one.origin) == (b"1", "a red bus", "sa1b/sa_000000.tar/./sa_1.jpg")
    assert one.fields == {"joined": "a red bus", "txt": "a bus"}
    assert one.license == "SA-1B Dataset Research License"
    assert {(found[key].data, found[key].reason) for key in ("sa_30", "sa_4")} == {(None, "no_caption")}


def test_the_caption_of_the_tar(tmp_path: Path):
    found = by_key(mirror(tmp_path, caption="txt", require_caption=False), TABLE)
    assert [item.caption for item in found.values()] == ["a bus", "", ""]
    assert [item.data for item in found.values()] == [b"1", b"30", b"4"]


def test_what_comes_before_a_broken_place_is_kept(tmp_path: Path):
    source = mirror(tmp_path)
    path = write_tar(tmp_path / "sa_000000.tar", {f"sa_{i}.jpg": bytes([i]) * 600 for i in range(1, 5)})
    path.write_bytes(path.read_bytes()[:3700])
    found = list(by_key(source, {f"sa_{i}": {"joined": "x"} for i in range(9)}).values())
    assert [item.reason for item in found] == [None, None, "damaged_archive"]


def test_the_form_of_the_captions_is_told_by_their_name(tmp_path: Path):
    options = mirror(tmp_path)._options
    assert mirror(tmp_path).tables()[0].reader == "tar_txt"
    for name, reader in (("a.parquet", "parquet"), ("a.jsonl.gz", "jsonl")):
        table = options.model_copy(update={"captions": str(empty(tmp_path / name)), "captions_key": "id"})
        spec = Sa1b("sa1b", table, tmp_path).tables()[0]
        assert (spec.reader, spec.key, spec.fields) == (reader, "id", {"joined": "txt"})
