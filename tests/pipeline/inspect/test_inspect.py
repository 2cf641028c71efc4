"""`microdit inspect`: what it finds in data sets of many layouts, and that its config builds them without an edit."""

import base64
import csv
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from microdit.pipeline.cli.app import app
from microdit.pipeline.config.build import load_config
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.upkeep.verify import verify
from tests.miniatures.built import build, rows_of
from tests.miniatures.modern import modern
from tests.miniatures.server import publish
from tests.pipeline.helpers.dataset_archives import picture, write_tar
from tests.pipeline.sources.adapters.test_layouts import example, framed
from tests.servers.files_server import FilesServer, files_server
from tests.servers.hub import Hub, hub

__all__ = ["files_server", "hub"]

COUNT = 3
CAPTIONS = {f"the caption {n} of a red fox" for n in range(COUNT)}


def image(n: int) -> bytes:
    return picture(n, (300, 256))


def caption(n: int) -> str:
    return f"the caption {n} of a red fox"


def files(picture: str, *others: tuple[str, Callable[[int], bytes]]) -> dict[str, bytes]:
    made = {}
    for n in range(COUNT):
        made |= {f"{n:03d}.{extension}": of(n) for extension, of in others} | {f"{n:03d}.{picture}": image(n)}
    return made


def about(n: int) -> bytes:
    return json.dumps({"id": n, "prompt": caption(n), "score": 0.5}).encode()


def text(n: int) -> bytes:
    return caption(n).encode()


def tars_with_texts(folder: Path) -> None:
    write_tar(folder / "00000.tar", files("jpg", ("txt", text)))


def tars_with_json(folder: Path) -> None:
    write_tar(folder / "train/00000.tar", files("jpg", ("json", about)))


def tars_with_unknown_names(folder: Path) -> None:
    write_tar(folder / "00000.tar", files("img", ("cap", text)))


def tgz(folder: Path) -> None:
    write_tar(folder / "all.tar.gz", files("jpg", ("txt", text)), "w:gz")


def zips(folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for name, data in files("jpg", ("txt", text)).items():
            archive.writestr(name, data)


def split_tgz_with_a_list(folder: Path) -> None:
    whole = write_tar(folder / "gen.tar.gz", files("jpg"), "w:gz")
    data = whole.read_bytes()
    whole.unlink()
    for n in range(3):
        (folder / f"gen.tar.gz.{n:02d}").write_bytes(data[n * len(data) // 3 : (n + 1) * len(data) // 3])
    rows = [{"input_prompt": caption(n), "output_image": f"{n:03d}.jpg"} for n in range(COUNT)]
    (folder / "gen.json").write_text(json.dumps(rows))


def parquets(folder: Path) -> None:
    folder.mkdir()
    rows = [{"image": {"bytes": image(n), "path": None}, "text": caption(n), "width": 300} for n in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet")


def parquets_with_lists(folder: Path) -> None:
    folder.mkdir()
    pq.write_table(
        pa.Table.from_pylist([{"jpg": image(n), "captions": [caption(n), "b"]} for n in range(COUNT)]),
        folder / "a.parquet",
    )


def lines_with_base64(folder: Path) -> None:
    folder.mkdir()
    rows = [{"image": base64.b64encode(image(n)).decode(), "caption": caption(n)} for n in range(COUNT)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))


def folder_with_texts(folder: Path) -> None:
    (folder / "deep").mkdir(parents=True)
    for name, data in files("jpg", ("txt", text)).items():
        (folder / "deep" / name).write_bytes(data)


def folder_with_json(folder: Path) -> None:
    folder.mkdir()
    for name, data in files("jpg", ("json", about)).items():
        (folder / name).write_bytes(data)


def folder_with_a_csv(folder: Path) -> None:
    folder.mkdir()
    for name, data in files("jpg").items():
        (folder / name).write_bytes(data)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows([f"{n:03d}.jpg", caption(n)] for n in range(COUNT))


def tfrecords(folder: Path) -> None:
    folder.mkdir()
    data = b"".join(framed(example(image=image(n), caption1=caption(n), width=300)) for n in range(COUNT))
    (folder / "a-00000-of-00001.tfrecord").write_bytes(data)


def img2dataset(folder: Path) -> None:
    write_tar(folder / "00000.tar", files("jpg", ("txt", text)))
    rows = [{"key": f"{n:03d}", "caption": caption(n), "status": "success", "url": "u"} for n in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": COUNT, "successes": COUNT}))


LAYOUTS = [
    tars_with_texts, tars_with_json, tars_with_unknown_names, tgz, zips, split_tgz_with_a_list, parquets,
    parquets_with_lists, lines_with_base64, folder_with_texts, folder_with_json, folder_with_a_csv, tfrecords,
    img2dataset,
]  # fmt: skip


def microdit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("made", LAYOUTS, ids=lambda made: made.__name__)
def test_what_inspect_writes_is_built(made: Callable[[Path], None], tmp_path: Path) -> None:
    made(tmp_path / "in")
    written = tmp_path / "my.yaml"
    found = microdit("inspect", tmp_path / "in", "--write", written, "--json")
    assert found.exit_code == 0, (found.output, found.exception)
    answer = json.loads(found.stdout)
    assert answer["layout"] == load_config(written).sources["data"].adapter
    corpus, _ = build(load_config(written, [f"resources.scratch={tmp_path / 'scratch'}"], str(tmp_path / "corpus")))
    captions = rows_of(corpus, "captions/source", "data")
    assert {row.scalars["caption"] for row in captions} == CAPTIONS and len(captions) == COUNT
    assert verify(corpus).problems == []


def test_the_page_escapes_captions_and_shows_pictures(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/a.tar", {"a.txt": b"<script>alert(1)</script>", "a.jpg": image(0)})
    found = microdit("inspect", tmp_path / "in", "--out", tmp_path / "page.html")
    assert found.exit_code == 0, (found.output, found.exception)
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count('<img src="data:image/jpeg;base64,') == 1
    assert "webdataset" in found.stdout and "<script>alert(1)</script>" in found.stdout


def test_odd_things_are_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "a/a.tar", {"a.jpg": image(0), "b.jpg": image(1), "a.txt": b"red", "b.2.txt": b"blue"})
    notes = json.loads(microdit("inspect", tmp_path / "a", "--json").stdout)["notes"]
    assert any("not side by side" in note for note in notes) and any("dots within names" in note for note in notes)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git-lfs pointer" in json.loads(microdit("inspect", tmp_path / "b", "--json").stdout)["notes"][0]


def test_a_place_with_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/README.md").write_text("nothing")
    found = microdit("inspect", tmp_path / "in")
    assert found.exit_code == 2 and "none of its 1 files is an archive" in found.stderr


@pytest.mark.parametrize("name", ["sharegpt-4o-image", "fine-t2i", "commoncatalog-cc-by"])
def test_repositories_of_the_hub(name: str, tmp_path: Path, hub: Hub, files_server: FilesServer) -> None:
    made = modern(name)
    publish([made], hub, files_server)
    written = tmp_path / "my.yaml"
    found = microdit("inspect", next(iter(made.repositories)), "--write", written)
    assert found.exit_code == 0, (found.output, found.exception)
    corpus, _ = build(load_config(written, [f"resources.scratch={tmp_path / 'scratch'}"], str(tmp_path / "corpus")))
    captions = sorted(row.scalars["caption"] for row in rows_of(corpus, "captions/source", "data"))
    assert len(captions) == len(made.expected) and all(captions)


def test_a_list_of_urls(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_text("".join(f"http://127.0.0.1:9/{n}.jpg\t{caption(n)}\n" for n in range(COUNT)))
    found = microdit("inspect", path, "--write", tmp_path / "my.yaml")
    assert found.exit_code == 0, (found.output, found.exception)
    assert "private_address" in found.stdout and caption(0) in found.stdout
    assert load_config(tmp_path / "my.yaml").sources["data"].adapter == "urls"


def test_the_command_builds_what_inspect_wrote(tmp_path: Path) -> None:
    folder_with_texts(tmp_path / "in")
    written = tmp_path / "my.yaml"
    assert microdit("inspect", tmp_path / "in", "--write", written).exit_code == 0
    for _ in range(2):  # the second time there is nothing to do
        found = microdit("build", written, "--corpus", tmp_path / "corpus", "--json")
        assert found.exit_code == 0, (found.output, found.exception)


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "csv.zst"])
def test_a_table_of_urls_is_a_list(tmp_path: Path, kind: str) -> None:
    rows = [{"link": f"http://127.0.0.1:9/{n}.jpg", "words": f"a cat {n}", "score": n / 2} for n in range(3)]
    path = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        lines = "link,caption\n" + "".join(f"{row['link']},{row['words']}\n" for row in rows)
        path.write_bytes(pa.compress(lines.encode(), "zstd", asbytes=True))
    said = microdit("inspect", path, "--write", tmp_path / "my.yaml")
    assert said.exit_code == 0, (said.output, said.exception)
    config = load_config(tmp_path / "my.yaml")
    assert config.sources["data"].adapter == "urls"
    (source,) = sources_of(config)
    found = [item for unit in source.units() for item in source.read(unit, lambda ordinal: False)]
    assert [(item.origin, item.caption) for item in found] == [(row["link"], row["words"]) for row in rows]
    if kind != "csv.zst":
        assert [item.fields["score"] for item in found] == [0.0, 0.5, 1.0]
