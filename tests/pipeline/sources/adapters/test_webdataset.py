"""The adapter `webdataset`: how the members of a tar become samples, with captions and fields."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.config.sources import WebdatasetSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources.adapters.webdataset import Webdataset
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import Task, UnitTask
from tests.pipeline.helpers.dataset_archives import by_key, read_all, write_tar
from tests.pipeline.helpers.stage_outputs import photo, saved


def source(folder: Path, **options: Any) -> Webdataset:
    given = {"adapter": "webdataset", "files": str(folder / "*.tar"), **options}
    return Webdataset("mine", WebdatasetSource.model_validate(given), folder / "scratch")


def test_caption_fields_and_keys(tmp_path: Path) -> None:
    about = {"caption": "from json", "deep": {"score": 0.5, "tags": ["a", "b"]}, "none": None}
    members = {
        "./x/b.jpg": b"B", "./x/b.txt": b" two\nwords ", "./x/b.json": json.dumps(about).encode(),
        "x/c.cls": b"1", "x/c.webp": b"C", "x/d.txt": b"no image", "x/e.json": b"{", "x/e.png": b"E",
    }  # fmt: skip
    write_tar(tmp_path / "a-0.tar", members)
    # the caption of d has lost its image
    fields = {"score": "json.deep.score", "tags": "json.deep.tags", "none": "json.none", "gone": "json.nothing"}
    found = read_all(source(tmp_path, fields=fields))
    assert [(item.key, item.data, item.caption, item.reason) for item in found] == [
        ("000000-000000", b"B", "two words", None),
        ("000000-000001", b"C", "", None),
        ("000000-000002", None, "", "missing"),
        ("000000-000003", None, "", "damaged_json"),
    ]
    assert found[0].fields == {"score": 0.5, "tags": '["a", "b"]'}
    assert found[0].origin == "mine/a-0.tar/./x/b.jpg"
    named = by_key(source(tmp_path, keys="member", caption="json.caption"))
    assert set(named) == {"b", "c", "d", "e"} and named["b"].caption == "from json"
    webp = by_key(source(tmp_path, keys="member", image=["WebP"]))
    assert {key: item.reason for key, item in webp.items()} == {
        "b": "missing",
        "c": None,
        "d": "missing",
        "e": "missing",
    }


@given(st.lists(st.text(st.characters(exclude_characters="/.\0", codec="utf-8"), min_size=1, max_size=12), max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_names_give_fitting_keys_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("tars")
    unique = list(dict.fromkeys(names))
    write_tar(folder / "t.tar", {f"{name}.jpg": name.encode() for name in unique})
    found = by_key(source(folder, keys="member"))
    assert [item.data for item in found.values()] == [name.encode() for name in unique]


def test_a_key_that_comes_again_fails(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", {"a.jpg": b"1", "b.jpg": b"2", "x/a.jpg": b"3"})
    found = read_all(source(tmp_path, keys="member"))
    assert [item.reason for item in found] == [None, None, "duplicate_key"]


def test_a_broken_tar_keeps_what_came_before(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", {f"{n}.jpg": bytes(2000) for n in range(5)})
    path.write_bytes(path.read_bytes()[:6000])
    found = read_all(source(tmp_path))
    assert [item.reason for item in found] == [None, None, "damaged_archive"]


def test_a_whole_build_with_a_joined_table(tmp_path: Path) -> None:
    for n in range(3):
        pictures = {f"k{n}{i}.png": saved(photo(10 * n + i)) for i in range(4)}
        texts = {f"k{n}{i}.txt": f"alt {n} {i}".encode() for i in range(4)}
        write_tar(tmp_path / f"part-{n}.tar", dict(sorted((pictures | texts).items())))
    table = tmp_path / "long.jsonl"
    table.write_text("".join(json.dumps({"id": f"k1{i}", "text": f"long {i}"}) + "\n" for i in range(3)))
    options = {
        "adapter": "webdataset", "files": str(tmp_path / "part-{0..2}.tar"), "keys": "member", "units": ["part-1.tar"],
        "joins": [{"file": str(table), "key": "id", "fields": {"long": "text"}}],
    }  # fmt: skip
    config = BuildConfig.model_validate(
        {
            "name": "mine", "corpus": str(tmp_path / "corpus"), "shard_samples": 3, "sources": {"mine": options},
            "images": ImageOptions(min_side=32), "columns": {"captions/source": {}, "captions/long": {"field": "long"}},
            "resources": {"scratch": str(tmp_path / "scratch")},
        }
    )  # fmt: skip
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    [mine], stages = sources_of(config), stages_of(config)
    declare(corpus, config, [mine], stages)
    assert mine.units() == ["mine-000001"]
    with mine.running(corpus, print):
        ingest_unit(corpus, mine, UnitTask(mine.units()[0]), config)
    captions: dict[str, dict[str, str | None]] = {}
    for stage in stages:
        for images in corpus.commits("images"):
            [commit] = stage.run(corpus, Task(images.ref, {stage.name: 0}))
            for line in corpus.sidecar(commit).to_pylist():
                captions.setdefault(line["key"], {})[stage.name] = line["caption"]
    assert captions == {
        f"k1{i}": {"captions/source": f"alt 1 {i}", "captions/long": f"long {i}" if i < 3 else None} for i in range(4)
    }


def test_no_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"sources\.mine\.files = .*no file matches"):
        source(tmp_path).units()
