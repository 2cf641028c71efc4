"""Caption options of the datasets by name: corrected without reading a picture again, or refused with what to do."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.selections import select
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.corrected_build import CorrectedBuild
from tests.pipeline.helpers.dataset_archives import picture, write_tar, write_zip

COUNT = 6
COLUMNS: dict[str, Any] = {"captions/source": {}}


def build(folder: Path, source: dict[str, Any], **how: Any) -> CorrectedBuild:
    return CorrectedBuild(folder, source, how.pop("columns", COLUMNS), **how)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def sa1b(folder: Path) -> dict[str, Any]:
    members: dict[str, bytes] = {}
    for n in range(COUNT):
        members |= {f"sa_{n}.jpg": picture(n), f"sa_{n}.txt": f"txt {n}".encode()}
    write_tar(folder / "in" / "sa_000000.tar", members)
    rows = [{"__key__": f"sa_{n}", "long": f"long {n}", "short": f"short {n}"} for n in range(COUNT)]
    rows[1] |= {"long": ""}
    table = lines(folder / "in" / "captions.jsonl", rows)
    return {"adapter": "sa1b", "files": str(folder / "in" / "sa_*.tar"), "captions": table, "captions_text": "long"}


def cc12m(folder: Path) -> dict[str, Any]:
    members: dict[str, bytes] = {}
    for n in range(COUNT):
        members |= {f"{n:09d}.jpg": picture(n), f"{n:09d}.txt": b"" if n == 1 else f"LONG {n}!".encode()}
    write_tar(folder / "in" / "cc12m-train-0000.tar", members)
    rows = [{"key": f"{n:09d}", "caption_llava": f"short {n}", "caption_llava_short": f"txt {n}"} for n in range(COUNT)]
    table = lines(folder / "in" / "train.jsonl.gz", rows)
    return {"adapter": "cc12m", "files": str(folder / "in" / "cc12m-*.tar"), "llavanext": table}


def journeydb(folder: Path) -> dict[str, Any]:
    root = folder / "in"
    write_tar(root / "data/train/imgs/000.tgz", {f"000/{n}.jpg": picture(n) for n in range(COUNT)}, "w:gz")
    rows = [
        {"img_path": f"./000/{n}.jpg", "prompt": f"long {n} --ar 2:3", "Task2": {"Caption": f"it is short {n}"}}
        for n in range(COUNT)
    ]
    rows[1] |= {"prompt": ""}
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_tar(root / "data/train/train_anno_realease_repath.jsonl.tgz", {"train_anno.jsonl": text}, "w:gz")
    return {"adapter": "journeydb", "root": str(root)}


MADE = {"sa1b": sa1b, "cc12m": cc12m, "journeydb": journeydb}
CHANGES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "sa1b": [({}, "long {}"), ({"captions_text": "short"}, "short {}"), ({"caption": "txt"}, "txt {}")],
    "cc12m": [
        ({}, "LONG {}!"), ({"caption": "llavanext_long"}, "short {}"), ({"caption": "llavanext_short"}, "txt {}"),
        ({"clean": True}, "long {}!"),
    ],
    "journeydb": [
        ({}, "long {} --ar 2:3"), ({"caption": "task2"}, "it is short {}"), ({"strip_flags": True}, "long {}"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("adapter", MADE)
@pytest.mark.parametrize("require", [True, False])
def test_their_captions_are_corrected_and_no_picture_is_made_again(tmp_path: Path, adapter: str, require: bool) -> None:
    """Of the picture 1 the first options have no caption: with `require_caption` it is left out."""
    source = MADE[adapter](tmp_path) | {"require_caption": require}
    first = build(tmp_path, source)
    pictures, left_out = first.images(), [1]
    texts = sorted(CHANGES[adapter][0][1].format(n) for n in range(COUNT) if n not in left_out)
    assert sorted(first.by_key().values()) == texts
    for change, text in CHANGES[adapter][1:]:
        built = build(tmp_path, source | change)
        has = [n for n in range(COUNT) if not (n in left_out and (require or change.keys() & {"clean", "strip_flags"}))]
        assert sorted(built.by_key().values()) == [text.format(n) for n in has]
        assert built.images() == pictures and verify(built.corpus).ok
        note = next(note for note in built.notes if "its pictures stay, its captions are read again" in note)
        assert ("1 pictures that were left out for their captions stay so: --retry-rows no_caption" in note) == require
        assert not build(tmp_path, source | change).notes


@pytest.mark.parametrize("adapter", MADE)
def test_what_was_left_out_is_taken_again_as_the_note_says(tmp_path: Path, adapter: str) -> None:
    source = MADE[adapter](tmp_path)
    before = build(tmp_path, source).by_key()
    assert len(before) == COUNT - 1
    change, text = CHANGES[adapter][1]
    whole = build(tmp_path, source | change, retry_rows=["no_caption"])
    assert sorted(whole.by_key().values()) == [text.format(n) for n in range(COUNT)]
    assert whole.by_key().keys() > before.keys() and verify(whole.corpus).ok
    # what is taken again is corrected with the others, once more too
    for change, text in (CHANGES[adapter][2], CHANGES[adapter][0]):
        again = build(tmp_path, source | change)
        left = COUNT - (not change or "strip_flags" in change)  # the picture 1 has none of these
        texts = {text.format(n) for n in range(COUNT)}
        assert len(again.by_key()) == left and set(again.by_key().values()) <= texts
        assert "stay so" not in again.notes[0] and again.images() == whole.images() and verify(again.corpus).ok
    # and with the option that left it out
    other = tmp_path / "other"
    source = MADE[adapter](other)
    build(other, source)
    kept = build(other, source | {"require_caption": False}, retry_rows=["no_caption"])
    rows = [row for commit in kept.corpus.commits("images") for row in kept.corpus.sidecar(commit).to_pylist()]
    assert sum(row["status"] == "ok" for row in rows) == COUNT and len(kept.by_key()) == COUNT - 1


def test_a_mistyped_column_leaves_nothing_and_is_mended(tmp_path: Path) -> None:
    """The caption's column is another one that has nothing: every picture is left out."""
    source = sa1b(tmp_path)
    rows = [{"__key__": f"sa_{n}", "long": f"long {n}", "nothing": None} for n in range(COUNT)]
    lines(tmp_path / "in" / "captions.jsonl", rows)
    assert build(tmp_path, source | {"captions_text": "nothing"}).by_key() == {}
    mended = build(tmp_path, source, retry_rows=["no_caption"])
    assert sorted(mended.by_key().values()) == [f"long {n}" for n in range(COUNT)] and verify(mended.corpus).ok


# -- what cannot be corrected -----------------------------------------------------------------------------------------
def textcaps(folder: Path, text: str) -> dict[str, Any]:
    data = [{"image_id": f"i{n}", "caption_str": f"{text} {n}"} for n in range(COUNT)]
    path = folder / "in" / f"{text}_train.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": data}))
    if not (folder / "in" / "all.zip").exists():
        write_zip(folder / "in" / "all.zip", {f"train/i{n}.jpg": picture(n) for n in range(COUNT)})
    return {"adapter": "textcaps", "images": str(folder / "in" / "all.zip"), "captions": str(path), "splits": ["train"]}


def coco(folder: Path, text: str) -> dict[str, Any]:
    about = {"annotations": [{"image_id": n, "caption": f"{text} {n}"} for n in range(COUNT)]}
    path = folder / "in" / f"{text}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about))
    if not (folder / "in" / "val.zip").exists():
        names = {f"val2014/COCO_val2014_{n:012d}.jpg": picture(n) for n in range(COUNT)}
        write_zip(folder / "in" / "val.zip", names)
    return {"adapter": "coco", "images": str(folder / "in" / "val.zip"), "captions": str(path)}


@pytest.mark.parametrize("made", [textcaps, coco])
def test_captions_that_choose_the_images_are_refused_and_the_advice_works(tmp_path: Path, made: Any) -> None:
    source = made(tmp_path, "first")
    first = build(tmp_path, source)
    message = (
        r"captions\.(0\.)?files: others, by name, size or version, than the corpus has\. They say which images of the "
        r"zip are taken\. Other captions of the same images are another column, as in captions/mine: \{join: TABLE, "
        r"by: key\}\. Put the old value back, or give the source a new name"
    )
    with pytest.raises(RequestError, match=message):
        build(tmp_path, made(tmp_path, "second"))
    rows = [{"key": key, "caption": text.replace("first", "mine")} for key, text in first.by_key().items()]
    table = lines(tmp_path / "mine.jsonl", rows)
    both = build(tmp_path, source, columns=COLUMNS | {"captions/mine": {"join": table, "by": "key"}})
    assert sorted(both.by_key("captions/mine").values()) == [f"mine {n}" for n in range(COUNT)]
    assert both.by_key() == first.by_key() and both.images() == first.images() and verify(both.corpus).ok


def test_scores_that_choose_the_images_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    root = tmp_path / "in"
    members = {f"x{n}.webp": picture(n) for n in range(COUNT)}
    prompts = {name: {"p": f"prompt of {name}"} for name in members}
    write_zip(root / "images/part-000001.zip", {**members, "part-000001.json": json.dumps(prompts).encode()})
    rows = {"image_name": list(members), "part_id": [1] * COUNT, "image_nsfw": [n / 20 for n in range(COUNT)]}
    rows |= {"prompt_nsfw": [0.0] * COUNT, "width": [512] * COUNT, "height": [512] * COUNT}
    pq.write_table(pa.table(rows), root / "metadata.parquet")
    source = {"adapter": "diffusiondb", "root": str(root), "subset": "2m"}
    build(tmp_path, source)
    with pytest.raises(
        RequestError, match=r"image_nsfw: .*The scores say which images are taken\..*select by "
    ) as error:
        build(tmp_path, source | {"image_nsfw": 0.1})
    sql = str(error.value).split('"')[1]
    assert select(Corpus.open(tmp_path / "corpus"), "safe", sql).rows == 3  # 0, 0.05 and 0.1


def test_other_options_are_refused_without_a_reason(tmp_path: Path) -> None:
    build(tmp_path, journeydb(tmp_path))
    with pytest.raises(RequestError, match=r"made otherwise: license: [^.]* says 'mine'\. Put the old value back"):
        build(tmp_path, journeydb(tmp_path) | {"license": "mine", "caption": "task2"})
