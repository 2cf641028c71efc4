"""Lists as people have them are read by their format, and what is no list is refused before anything is fetched."""

import csv
import hashlib
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.sources.list_format import ListFormat, find_format
from microdit.pipeline.sources.source import Input

CASES = Path(__file__).parents[2] / "data" / "cases" / "fetch"


def inputs(path: Path, unit_inputs: int = 7, limit: int | None = None) -> list[Input]:
    source = Urls("web", path, unit_inputs, FetchOptions(), limit)
    return [item for unit in source.units() for item in source.read(unit, lambda ordinal: False)]


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("N_3col.tsv", "a red apple {}"),
        ("N_quoted.tsv", 'the "old" mill {}'),
        ("N_bom.tsv", "apple {}"),
        ("N_cc3m.tsv", "a caption {}"),
        ("N_utf16.tsv", "apple {}"),
        ("N_header3.tsv", "a red apple {}"),
        ("N_csv.csv", "apple {}"),
    ],
)
def test_lists_as_people_have_them(name: str, caption: str):
    found = inputs(CASES / name)
    assert len(found) >= 20
    assert [item.caption for item in found] == [caption.format(i) for i in range(len(found))]
    assert [item.origin for item in found] == [f"http://127.0.0.1:18080/ok/n{i}" for i in range(len(found))]
    assert [item.key for item in found] == [f"{i:09d}" for i in range(len(found))]
    assert all(item.reason is None for item in found)
    assert [item.origin for item in inputs(CASES / name, limit=9)] == [item.origin for item in found[:9]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{}\n" * 50, "none of its first 50 lines has a URL and a caption"),
        (b"\n\n\n", "none of its first 0 lines"),
        (b"PAR1...", "list.tsv is damaged: Parquet file"),
        (b"\x1f\x8b\x08...", "list.tsv is damaged"),
        (b"http://a/1\n" * 3, "none of its first 3 lines"),
        (b"http://a/1\tcat\tde\nhttp://a/2\tdog\ten\n", "which of its 3 columns are the URL and the caption is open"),
        (b"http://a/1\thttp://b/1\tdog\n" * 2, "which of its 3 columns are the URL and the caption is open"),
        (b"http://a/1\tcat\t0.3\nhttp://a/2\tdog\n", "its lines have from 2 to 3 columns"),
        (b'["a", "b"]\n', "one JSON list"),
        (b'{"link": "http://a/1", "name": "cat"}\n', "which column is the caption is open"),
        (b"url\tscore\nhttp://a/1\t0.3\n", "its header names no column with the caption: url, score"),
    ],
)
def test_what_is_no_list_is_refused_at_once(tmp_path: Path, text: bytes, message: str):
    (tmp_path / "list.tsv").write_bytes(text)
    with pytest.raises(RequestError, match=r"sources\.web\.list = .*list\.tsv.*expected ") as raised:
        inputs(tmp_path / "list.tsv")
    assert message in str(raised.value)


def test_the_advice_for_an_open_list_works(tmp_path: Path):
    (tmp_path / "list.tsv").write_bytes(b"URL\tTEXT\tlanguage\nhttp://a/1\tcat\tde\nhttp://a/2\tdog\ten\n")
    assert [(item.origin, item.caption) for item in inputs(tmp_path / "list.tsv")] == [
        ("http://a/1", "cat"),
        ("http://a/2", "dog"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"http://a/1\tcat\nhttp://a/2\tdog\n",
        b"\xef\xbb\xbfhttp://a/1\tcat\n",
        b"url\tcaption\nhttp://a/1\tcat\n",
        b'http://a/1\t"Cats" of Rome\nhttp://a/2\tdog\n',
        b'http://a/1\t"Love"\nhttp://a/2\tdog\n',
        b'http://a/1\t12" pipe\nhttp://a/2\tdog\n',
        b'http://a/1\t"Cats\nhttp://a/2\tdog"\n',
        b"http://a/1\ta cat\twith a tab\n" + b"http://a/2\tdog\n" * 3,
        b"http://a/1\thttp://a/page\n",
        b"junk\n\nhttp://a/1\tcat\n" + b"junk\n" * 9 + b"ftp://a/1\tcat\n",
    ],
)
def test_lists_that_were_read_rightly_have_the_same_declaration(tmp_path: Path, text: bytes):
    assert find_format(text, True) == ListFormat()
    (tmp_path / "list.tsv").write_bytes(text)
    source = Urls("web", tmp_path / "list.tsv", 10, FetchOptions())
    assert set(source.stage()) == {
        *("adapter", "version", "list", "inputs", "units", "unit_inputs", "license", "max_bytes")
    }
    assert source.stage()["inputs"] == len(text.splitlines())


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=20)


def broken(words: list[str]) -> str:
    """A caption with line breaks between its words."""
    return "x " + "\r\n\n".join(words) + " ,y"


@settings(max_examples=60, deadline=None, print_blob=True)
@given(
    captions=st.lists(st.lists(WORDS, min_size=1, max_size=3).map(broken), min_size=2, max_size=12),
    delimiter=st.sampled_from(["\t", ","]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]),
    names=st.permutations(["url", "caption", "score"]),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_csv_writes_is_read(tmp_path_factory, captions, delimiter, encoding, names, end, quoting):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writeheader()
    for i, caption in enumerate(captions):
        writer.writerow({"url": f"http://a/{i}", "caption": caption, "score": i / 10})
    path = tmp_path_factory.mktemp("list") / "list.csv"
    path.write_bytes(text.getvalue().encode(encoding))
    found = inputs(path, unit_inputs=3)
    assert [item.origin for item in found] == [f"http://a/{i}" for i in range(len(captions))]
    if "\ufffd" not in "".join(captions):
        assert [item.caption for item in found] == [" ".join(caption.split()) for caption in captions]


def test_a_record_with_line_breaks_is_one_input(tmp_path: Path):
    (tmp_path / "list.csv").write_bytes(
        b'url,caption\nhttp://a/1,"two\nlines"\nhttp://a/2,"a ""quoted""\n\nword, and"\r\nhttp://a/3,plain\n'
        b'"http://a/4","last\n"'
    )
    found = inputs(tmp_path / "list.csv", unit_inputs=1)
    assert [(item.origin[-1], item.caption) for item in found] == [
        *(("1", "two lines"), ("2", 'a "quoted" word, and'), ("3", "plain"), ("4", "last"))
    ]
    assert [item.origin[-1] for item in inputs(tmp_path / "list.csv", limit=2)] == ["1", "2"]
    assert [item.key for item in found] == [f"{i:09d}" for i in range(4)]


@pytest.mark.parametrize("bad", ['http://a/x,"not closed', 'http://a/x,12" pipe', 'http://a/x,"a" b"'])
@pytest.mark.parametrize("rows", [8, 5000])
def test_a_stray_quote_costs_its_own_line(tmp_path: Path, bad: str, rows: int):
    lines = [f"http://a/{i},caption {i}" for i in range(rows)]
    lines[3:3] = [bad]
    lines[6:6] = [bad]
    (tmp_path / "list.csv").write_text("url,caption\n" + "\n".join(lines) + "\n")
    found = inputs(tmp_path / "list.csv", unit_inputs=rows + 2)
    assert len(found) == rows + 2
    good = [item for number, item in enumerate(found) if number not in (3, 6)]
    assert [item.caption for item in good] == [f"caption {i}" for i in range(rows)]


def test_a_list_without_breaks_has_the_declaration_that_it_had(tmp_path: Path):
    text = b"url,caption\r\n" + b"".join(b'http://a/%d,"a, ""b"" %d"\r\n' % (i, i) for i in range(100))
    (tmp_path / "list.csv").write_bytes(text)
    stage = Urls("web", tmp_path / "list.csv", 7, FetchOptions()).stage()
    assert (stage["inputs"], stage["units"]) == (100, 15)
    assert stage["list"] == hashlib.sha256(text.partition(b"\n")[2]).hexdigest()
