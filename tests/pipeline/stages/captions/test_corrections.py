"""Options of a declared source that are corrected: its pictures stay, its captions are made again."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import write_failure
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.corpus.presence import presence
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.stage import UnitTask
from microdit.pipeline.upkeep.damage import damage
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.corrected_build import CorrectedBuild
from tests.pipeline.helpers.dataset_archives import picture, write_tar


def write(folder: Path, number: int, count: int = 6) -> None:
    members: dict[str, bytes] = {}
    for n in range(count):
        about = {"caption": f"caption {number} {n}", "long": f"long {number} {n}"}
        members |= {f"{n}.jpg": picture(10 * number + n), f"{n}.json": json.dumps(about).encode()}
    write_tar(folder / "in" / f"{number}.tar", members)


class Build(CorrectedBuild):
    """Of tars with their texts in a json, or as the options say."""

    def __init__(self, folder: Path, grow: bool = False, read: bool = True, field: str = "long", **options: Any):
        source = {"adapter": "webdataset", "files": str(folder / "in" / "*.tar"), "caption": "json.caption"}
        columns = {"captions/source": {}, "captions/long": {"field": field}}
        super().__init__(folder, source | options, columns, grow, read)


def right(numbers: list[int], what: str = "caption") -> list[str]:
    return [f"{what} {number} {n}" for number in numbers for n in range(6)]


def test_a_mistyped_caption_is_corrected_and_no_picture_is_made_again(tmp_path: Path) -> None:
    for number in (0, 2):
        write(tmp_path, number)
    first = Build(tmp_path, caption="json.captoin", fields={"long": "json.lnog"})
    assert first.captions() == first.captions("captions/long") == ["no_caption"] * 12
    pictures = first.images()
    second = Build(tmp_path, fields={"long": "json.long"})
    assert second.captions() == right([0, 2]) and second.captions("captions/long") == right([0, 2], "long")
    assert second.images() == pictures and verify(second.corpus).ok
    [note] = second.notes
    assert "caption: the corpus has 'json.captoin', the config says 'json.caption'" in note
    assert "its pictures stay, its captions are read again" in note
    assert len(list(tmp_path.glob("corpus/units/own.declaration.*.json"))) == 1
    third = Build(tmp_path, fields={"long": "json.long"})
    assert (third.notes, third.readers) == ([], []) and third.captions() == right([0, 2])
    write(tmp_path, 1)  # what is read from now on has the texts itself
    fourth = Build(tmp_path, grow=True, fields={"long": "json.long"})
    assert fourth.captions() == right([0, 2, 1]) and not fourth.readers and verify(fourth.corpus).ok
    assert fourth.corpus.source("own").fingerprint == first.corpus.source("own").fingerprint
    again = Build(tmp_path, caption="json.long", fields={"long": "json.long"})  # and once more
    assert again.captions() == right([0, 2, 1], "long") and verify(again.corpus).ok


def test_what_was_in_the_middle_of_a_unit_is_corrected(tmp_path: Path) -> None:
    """The first shard has the old texts, the second the new ones."""
    write(tmp_path, 0)
    first = Build(tmp_path, caption="json.captoin")
    unit = first.corpus.unit("own", "own-000000")
    first.corpus.store.delete(["commits/units/own/own-000000.0.json"])
    for column in (IMAGES, "captions/source", "captions/long"):
        first.corpus.store.delete([f"commits/{column}/own/{unit.shards[1]}.0.json"])
    assert Build(tmp_path).captions() == right([0])


def test_a_repair_after_a_correction_keeps_the_texts_right(tmp_path: Path) -> None:
    write(tmp_path, 0)
    first = Build(tmp_path, caption="json.captoin")
    second = Build(tmp_path)
    commit = second.corpus.commit(IMAGES, "own", "own-000000-00", 0)
    path = tmp_path / "corpus" / commit.object.name
    data = bytearray(path.read_bytes())
    data[commit.size // 3] ^= 1
    path.write_bytes(data)
    redo = damage(second.corpus).redo
    assert redo[IMAGES] == {("own", "own-000000-00")}
    source = {"adapter": "webdataset", "files": str(tmp_path / "in" / "*.tar"), "caption": "json.caption"}
    config = BuildConfig.model_validate({"name": "c", "corpus": str(tmp_path / "corpus"), "sources": {"own": source}})
    [own] = sources_of(config)
    ingest_unit(second.corpus, own, UnitTask("own-000000", {"own-000000-00": 1}), config)
    third = Build(tmp_path)
    assert third.images() == first.images() and third.captions() == right([0])


def test_a_source_of_which_nothing_is_committed_may_be_declared_with_any_options(tmp_path: Path) -> None:
    write(tmp_path, 0)
    first = Build(tmp_path, read=False, image=["img"])
    write_failure(first.corpus, UNITS, "own", "own-000000", stage="ingest", attempts=1, message="none", traceback="")
    with presence(first.corpus), pytest.raises(RequestError, match="made otherwise"):  # another build is at it
        Build(tmp_path)
    write(tmp_path, 1)
    second = Build(tmp_path)
    assert "nothing of it is committed, and it is declared again: " in second.notes[0]
    assert "image: the corpus has ['img'], the config says []" in second.notes[0]
    assert second.captions() == right([0, 1]) and verify(second.corpus).ok


def test_a_column_of_which_nothing_is_committed_may_be_declared_with_any_options(tmp_path: Path) -> None:
    write(tmp_path, 0)
    corpus = Corpus.create(tmp_path / "corpus", "c", 4)
    corpus.declare_column("captions/long", {"stage": "captions", "version": 1}, {"caption": "string"})
    built = Build(tmp_path, fields={"long": "json.long"})
    assert built.captions("captions/long") == right([0], "long") and verify(built.corpus).ok
    assert "column captions/long: no sample of it is ok, and it is declared again" in built.notes[0]


def test_a_column_without_one_caption_may_be_corrected_and_no_other(tmp_path: Path) -> None:
    write(tmp_path, 0)
    fields = {"long": "json.long", "short": "json.caption"}
    first = Build(tmp_path, fields=fields, field="lnog")
    first.corpus.declare_column("text/x@long", {"stage": "text"}, {})
    for commit in first.corpus.commits("captions/long"):
        with begin_attempt(first.corpus, "text/x@long", commit.ref, [commit]) as attempt:
            for line in first.corpus.sidecar(commit).to_pylist():
                attempt.fail(line["row"], line["key"], "upstream", "captions/long: no_caption")
            attempt.commit()
    assert set(first.captions("captions/long")) == {"no_caption"}
    with presence(first.corpus), pytest.raises(RequestError, match="made otherwise: field: the corpus has 'lnog'"):
        Build(tmp_path, fields=fields)
    second = Build(tmp_path, fields=fields)
    assert second.captions("captions/long") == right([0], "long") and second.captions() == right([0])
    assert not second.corpus.committed("text/x@long") and verify(second.corpus).ok
    assert second.images() == first.images()
    message = (
        "made otherwise: field: the corpus has 'long', the config says 'short'. "
        "Put the old value back, or give the column a new name"
    )
    with pytest.raises(RequestError, match=message):
        Build(tmp_path, fields=fields, field="short")
    source = {"adapter": "webdataset", "files": str(tmp_path / "in" / "*.tar"), "caption": "json.caption"}
    columns = {"captions/source": {}, "captions/short": {"field": "short"}}
    advised = CorrectedBuild(tmp_path, source | {"fields": fields}, columns)
    assert advised.captions("captions/short") == right([0]) and advised.captions("captions/long") == right([0], "long")
    assert not Build(tmp_path, fields=fields).notes and verify(advised.corpus).ok


def test_options_that_make_other_pictures_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, 0)
    Build(tmp_path)
    message = (
        r"source 'own' .* was made otherwise: image: the corpus has \[\], the config says \['png'\]. Put the old value "
        "back, or give the source a new name$"
    )
    with pytest.raises(RequestError, match=message):
        Build(tmp_path, image=["png"], caption="txt")


def test_the_same_origin_twice_with_other_texts_is_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        for n, text in enumerate("abb"):
            for name, data in {"x.jpg": picture(n), "x.json": json.dumps({"caption": text}).encode()}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    Build(tmp_path, caption="json.captoin")
    assert Build(tmp_path).captions() == ["ambiguous_key"] * 3


def test_a_table_of_captions_that_is_corrected(tmp_path: Path) -> None:
    rows = {"jpg": [picture(n) for n in range(5)], "text": list("abcde"), "other": ["né", "", None, "x", "y" * 9000]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in" / "0.tar")
    parquet = {"adapter": "parquet"}
    assert Build(tmp_path, **parquet, caption="text").captions() == list("abcde")
    assert Build(tmp_path, **parquet, caption="other").captions() == ["né", "no_caption", "no_caption", "x", "y" * 9000]
    with pytest.raises(RequestError, match="no such column"):
        Build(tmp_path, **parquet, caption="othre")


def test_files_and_tables_are_told_apart_without_their_hashes(tmp_path: Path) -> None:
    write(tmp_path, 0)
    table = tmp_path / "table.jsonl"
    joins = [{"file": str(table), "key": "key", "fields": {"told": "told"}, "rows_of": "all", "by": "origin"}]
    table.write_text('{"key": "0.jpg", "told": "a"}\n')
    Build(tmp_path, joins=joins)
    table.write_text('{"key": "0.jpg", "told": "longer"}\n')
    [note] = Build(tmp_path, joins=joins).notes
    assert "tables.0.files: others, by name, size or version, than the corpus has; its pictures stay" in note
    next(tmp_path.glob("corpus/units/own.0.json")).unlink()  # as of an earlier version
    write(tmp_path, 1)
    with pytest.raises(RequestError, match="made otherwise: files: others, by name, size or version, than the corpus"):
        Build(tmp_path, joins=joins)
