"""Webdatasets, corpora, named lists of prompts and statistics, kept features."""

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.evaluation import corpus_pictures, evaluate, feature_cache, named_files
from microdit.pipeline.evaluation.corpus_pictures import Subset
from microdit.pipeline.evaluation.evaluate import EvaluationOptions, evaluate_pictures, open_set
from microdit.pipeline.evaluation.named_files import NamedFile, named_file
from microdit.pipeline.evaluation.prompt_files import find_prompts, read_prompts
from microdit.pipeline.evaluation.statistics import FeatureStatistics
from microdit.pipeline.selection.selections import select
from tests.pipeline.evaluation.test_evaluate import folder
from tests.pipeline.helpers.small_corpus import fill, make_corpus

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = make_corpus(tmp_path_factory.mktemp("made") / "corpus")
    fill(corpus, units=2)
    return corpus


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_webdataset_is_measured_as_the_folder_that_it_holds(tmp_path: Path) -> None:
    some = folder(tmp_path / "some", range(24))
    other = folder(tmp_path / "other", range(50, 74))
    tars = tmp_path / "tars"
    tars.mkdir()
    paths = sorted(some.iterdir())
    for number, half in enumerate((paths[:12], paths[12:])):
        members: dict[str, bytes] = {}
        for path in half:
            members |= {f"a/{path.name}": path.read_bytes(), f"a/{path.stem}.json": b"{}"}
            members[f"a/{path.stem}.txt"] = b"a caption\n"
        write_tar(tars / f"{number:05}.tar", members)
    found = open_set(tars, "pictures")
    assert len(found) == 24 and found.captions() == ["a caption"] * 24
    for one, path in zip(found.stream(), paths, strict=True):
        assert one.data == path.read_bytes()
    options = EvaluationOptions(["fid-lite", "kid-lite"])
    assert evaluate_pictures(tars, other, options)["metrics"] == evaluate_pictures(some, other, options)["metrics"]
    assert len(open_set(tars / "00000.tar", "pictures")) == 12


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    some = folder(tmp_path / "some", range(2))
    path = write_tar(tmp_path / "a.tar", {each.name: each.read_bytes() for each in sorted(some.iterdir())})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(RequestError, match=r"a\.tar.*a set is measured whole, so make it again"):
        open_set(path, "pictures")
    write_tar(tmp_path / "b.tar", {"1.png": b"", "1.jpg": b""})
    with pytest.raises(RequestError, match=r"sample '1' has two pictures, the second is 1\.jpg"):
        open_set(tmp_path / "b.tar", "pictures")
    write_tar(tmp_path / "c.tar", {"1.json": b"{}"})
    with pytest.raises(RequestError, match=r"c\.tar: it holds no pictures; expected members in \.png"):
        open_set(tmp_path / "c.tar", "pictures")


def test_a_corpus_is_measured_by_source_and_selection(corpus: Corpus) -> None:
    everything = open_set(corpus.url, "pictures", 64)
    assert len(everything) == 20 and everything.shape == (64, 64)
    assert [each.caption for each in everything.stream()][:3] == ["", "picture 1 — é", "picture 3 — é"]
    assert len(open_set(corpus.url, "pictures", 64, Subset(source="demo"))) == 20
    select(corpus, "odd", "SELECT source, shard, row FROM samples WHERE row % 2 = 1")
    odd = open_set(corpus.url, "pictures", 64, Subset(selection="odd"))
    assert len(odd) == 12 and set(odd.captions()) == {f"picture {row} — é" for row in (1, 3, 5)}
    options = EvaluationOptions(["fid-lite"], size=64, subset=Subset(selection="odd"))
    found = evaluate_pictures(corpus.url, corpus.url, options)
    assert found["pictures"]["count"] == 12 and found["reference"]["count"] == 20
    assert found["pictures"]["sha256"] != found["reference"]["sha256"]
    cases = [
        (lambda: open_set(corpus.url, "pictures", 64, Subset(source="coco")), "source 'coco' has no pictures; there"),
        (lambda: open_set(corpus.url, "pictures", 64, Subset(selection="even")), "even"),
        (lambda: open_set(corpus.url, "pictures", 64, Subset(coco=True)), r"5 images of COCO.*coco-val\.yaml"),
        (lambda: everything.captions(), "it has no caption; select samples that have one"),
        (lambda: list(open_set(corpus.url, "pictures").pixels()), r"has 64 x 64 pixels and .* 65 x 65; give --size N"),
        (lambda: open_set("/nowhere", "reference", None, Subset(source="demo")), "reference /nowhere: it is no corpus"),
        (lambda: open_set("coco-30k", "reference"), "COCO val is not at"),
    ]
    for attempt, message in cases:
        with pytest.raises(RequestError, match=message):
            attempt()


def test_coco_30k_is_what_the_rule_of_its_source_chooses(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_pictures, "image_id", lambda key: int(key[-1]))
    monkeypatch.setattr(corpus_pictures, "COCO_COUNT", 2)
    monkeypatch.setattr(evaluate, "default_evaluation", lambda: corpus.url)
    ids = sorted({0, 1, 3, 4, 5}, key=lambda number: hashlib.sha256(f"2014:{number}".encode()).digest())[:2]
    assert {int(each.name[-1]) for each in open_set("coco-30k", "reference", 64).stream()} == set(ids)


def test_kept_features_give_the_same_figures_and_are_of_the_very_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = folder(tmp_path / "first", range(24)), folder(tmp_path / "other", range(50, 74))
    options = EvaluationOptions(["fid-lite"], cache=tmp_path / "cache")
    before = evaluate_pictures(first, other, options)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_extract", lambda *_: pytest.fail("extracted again"))
        assert evaluate_pictures(first, other, options) == before
    extracted = []
    extract = evaluate._extract
    monkeypatch.setattr(evaluate, "_extract", lambda *args: extracted.append(args[1].where) or extract(*args))
    (first / "0000.png").write_bytes((first / "0001.png").read_bytes())
    assert evaluate_pictures(first, other, options)["metrics"] != before["metrics"]
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:100])  # of a full disk
    evaluate_pictures(first, other, options)
    assert extracted == [str(first), str(first), str(other)]


def test_features_that_were_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 2_000)
    for number in range(3):
        feature_cache.keep_features(tmp_path, np.full((20, 10), number, np.float32), number)  # 928 bytes
        for path in tmp_path.iterdir():  # all are older by now
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
        if number == 1:
            assert feature_cache.cached_features(tmp_path, 0) is not None  # it is used
    kept = [feature_cache.cached_features(tmp_path, number) for number in range(3)]
    assert kept[1] is None and kept[0] is not None and kept[2] is not None
    assert (kept[0] == 0).all() and (kept[2] == 2).all()


# -- named files -----------------------------------------------------------------------------------------------------
@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A web server of this machine: its address, its files, and what was asked for."""
    files: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", files, asked
        server.shutdown()


def test_a_named_list_is_fetched_once_and_checked(
    served: tuple[str, dict[str, bytes], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, files, asked = served
    data = files["/list.csv"] = b"id,text\n1,a cat\n2,a dog\n"
    right = NamedFile(f"{url}/list.csv", "list.csv", hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(named_files.PROMPTS, "animals", right)
    assert read_prompts(find_prompts("animals")) == ["a cat", "a dog"] == read_prompts(find_prompts("animals"))
    assert asked == ["/list.csv"]
    path = find_prompts("animals")
    path.write_bytes(data[:9])  # half of it
    assert find_prompts("animals").read_bytes() == data and len(asked) == 2
    wrong = NamedFile(f"{url}/list.csv", "other.csv", "0" * 64)
    with pytest.raises(RequestError, match=f"another file than it was: its hash is {right.sha256}, expected 0000"):
        named_file("animals", wrong)
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    assert named_file("animals", NamedFile(f"{url}/list.csv", "blob.csv", blob=blob)).read_bytes() == data
    with pytest.raises(RequestError, match="another file"):
        named_file("animals", NamedFile(f"{url}/list.csv", "blob2.csv", blob="1" * 40))
    with pytest.raises(RequestError, match=r"404.*download it elsewhere and give its path"):
        named_file("animals", NamedFile(f"{url}/none.csv", "none.csv"))
    monkeypatch.setattr(named_files, "MOST_BYTES", 10)
    with pytest.raises(RequestError, match="more than 10 bytes"):
        named_file("animals", NamedFile(f"{url}/list.csv", "large.csv"))
    with pytest.raises(RequestError, match="there is no such file; expected one, or one of geneval, partiprompts"):
        find_prompts(str(tmp_path / "none"))


def test_without_a_published_hash_the_first_one_counts(served: tuple[str, dict[str, bytes], list[str]]) -> None:
    url, files, _ = served
    files["/list.csv"] = b"text\na cat\n"
    unknown = NamedFile(f"{url}/list.csv", "list.csv")
    path = named_file("animals", unknown)
    path.unlink()
    assert named_file("animals", unknown) == path and path.exists()
    path.unlink()
    files["/list.csv"] += b"a dog\n"
    with pytest.raises(RequestError, match="another file than it was"):
        named_file("animals", unknown)


def test_statistics_by_name(
    served: tuple[str, dict[str, bytes], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, files, _ = served
    some = folder(tmp_path / "some", range(24))
    FeatureStatistics(np.zeros(1280), np.eye(1280)).write(tmp_path / "file.npz")
    files["/file.npz"] = (tmp_path / "file.npz").read_bytes()
    monkeypatch.setitem(named_files.STATISTICS, "coco-30k-boomb0om", NamedFile(f"{url}/file.npz", "file.npz"))
    options = EvaluationOptions(["fid-lite"])
    named = evaluate_pictures(some, "coco-30k-boomb0om", options)
    assert named["metrics"] == evaluate_pictures(some, tmp_path / "file.npz", options)["metrics"]
    assert named["reference"]["statistics"] == "coco-30k-boomb0om"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.tsv", 'image_id\tid\tcaption\n5\t1\tsay "hi"\n6\t2\ta dog\n', ['say "hi"', "a dog"]),
        ("drawbench.csv", "Prompts,Category\na red car,Colors\na red car,Colors\n", ["a red car", "a red car"]),
        ("dpg.csv", 'item_id,text,proposition_id\n1,"a, b",1\n1,"a, b",2\n2,c,1\n', ["a, b", "c"]),
        ("a.jsonl", '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "line 2: id '1' is there twice"),
        ("b.csv", "id,text\n7,a\n7,a\n", "line 3: id '7' is there twice; give each prompt an id of its own"),
        ("d.csv", "item_id,text,proposition_id\n1,a,1\n1,b,2\n", "line 3: item_id '1' is there twice"),
        ("c.csv", "id,text\n7," + "a" * 200_000 + "\n", "it is no table"),
    ],
)
def test_lists_of_prompts(name: str, text: str, expected: list[str] | str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    if isinstance(expected, list):
        assert read_prompts(tmp_path / name) == expected
    else:
        with pytest.raises(RequestError, match=expected):
            read_prompts(tmp_path / name)
