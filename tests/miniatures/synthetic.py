"""The synthetic sets: JourneyDB, DiffusionDB, FLUX-Reason-6M."""

import datetime
from functools import cache
from typing import Any

import pyarrow as pa

from tests.miniatures import Expected, Miniature, Repository, beside, expand, layout
from tests.miniatures.packing import EMPTY_TGZ, EMPTY_ZIP, json_bytes, json_lines, parquet, tgz, zipped
from tests.miniatures.pictures import picture

JOURNEYDB, DIFFUSIONDB, FLUXREASON = "JourneyDB/JourneyDB", "poloclub/diffusiondb", "LucasFang/FLUX-Reason-6M"


@cache
def journeydb(caption: str = "prompt") -> Miniature:
    """`caption`: prompt (as it came), plain (without flags) or task2."""
    about = layout("journeydb")
    repository, mini = about["repositories"][JOURNEYDB], about["miniature"]
    files = {name: EMPTY_TGZ for pattern in repository["tgzs"] for name in expand(pattern)}
    units: dict[str, list[tuple[str, bytes]]] = {}
    tables: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    expected = []
    for sample in mini["samples"]:
        unit = f"data/{sample['split']}/imgs/{sample['folder']}.tgz"
        member = repository["members"].format(**sample)
        image = picture(f"{unit}/{member}", tuple(sample["size"]))
        units.setdefault(unit, [(f"{sample['folder']}/", b"")]).append((member, image.data))
        task2 = (sample.get("task2") or {}).get("Caption")
        words = {"prompt": sample.get("prompt"), "plain": sample.get("plain"), "task2": task2}[caption] or ""
        fields = {"prompt": sample.get("prompt"), "task2": task2}
        expected.append(Expected(unit, member, words, fields, image, "" if words else "no_caption"))
        if "prompt" in sample:
            tables[sample["split"]].append(_journeydb_row(sample))
    files |= {name: tgz(members) for name, members in units.items()}
    files |= beside([name for name in repository["files"] if name.endswith((".md", ".gitattributes"))], JOURNEYDB)
    for split, path in repository["annotations"].items():
        inside = path.rpartition("/")[2].removesuffix(".tgz")
        files[path] = tgz([(inside, json_lines(reversed(tables[split])))])
    # the annotations before their paths were put right: other folders, other prompts
    wrong = [
        {**row, "img_path": f"./999/{row['img_path'][6:]}", "prompt": "of an older release"} for row in tables["train"]
    ]
    files["data/train/train_anno.jsonl.tgz"] = tgz([("train_anno.jsonl", json_lines(wrong))])
    files["data/test/imgs.tgz"] = EMPTY_TGZ
    files["data/test/test_questions.jsonl.tgz"] = tgz([("test_questions.jsonl", b"")])
    return Miniature(expected, {JOURNEYDB: Repository(files, gated=True)})


def _journeydb_row(sample: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "img_path": layout("journeydb")["repositories"][JOURNEYDB]["img_path"].format(**sample),
        "prompt": sample["prompt"],
        "Task1": {"Style": "", "Content": ""},
        "Task3": [],
    }
    if "task2" in sample:
        row["Task2"] = sample["task2"]
    return row


@cache
def diffusiondb(subset: str = "large") -> Miniature:
    """`subset`: 2m or large; the other one's files are there too."""
    about = layout("diffusiondb")
    repository, mini = about["repositories"][DIFFUSIONDB], about["miniature"]
    files = beside(repository["files"], DIFFUSIONDB)
    expected = []
    for name, one in repository["subsets"].items():
        zips = [path for pattern in one["zips"] for path in expand(pattern)]
        files |= dict.fromkeys(zips, EMPTY_ZIP)
        samples = [s for s in mini["samples"] if s["part"] <= one["count"]]
        for part in {s["part"] for s in samples}:
            unit, members, prompts = zips[part - 1], [], {}
            for sample in (s for s in samples if s["part"] == part):
                member = f"{sample['uuid']}.{one['extension']}"
                image = picture(sample["uuid"], tuple(sample["size"]), sample.get("as", one["extension"]))
                members.append((member, image.data))
                prompts[member] = {"p": sample["prompt"], "se": 38753269, "c": 7.0, "st": 50, "sa": "k_lms"}
                if name == subset:
                    fields = {"image_nsfw": sample["nsfw"][0], "prompt_nsfw": sample["nsfw"][1]}
                    expected.append(Expected(unit, member, sample["prompt"], fields, image, sample.get("fails", "")))
            members.insert(1, (f"part-{part:06d}.json", json_bytes(prompts)))  # among the images, as zip tools sort it
            files[unit] = zipped(members)
        files[one["metadata"]] = _metadata(samples, one["extension"])
    expected.sort(key=lambda e: e.unit)
    return Miniature(expected, {DIFFUSIONDB: Repository(files)})


def _metadata(samples: list[dict[str, Any]], extension: str) -> bytes:
    about = layout("diffusiondb")
    others = [
        {
            "part": 500 + n,
            "uuid": f"{n:08x}-0000-4000-8000-000000000000",
            "size": [512, 512],
            "prompt": "x",
            "nsfw": [0, 0],
        }
        for n in range(about["miniature"]["others"])
    ]
    rows = sorted([*samples, *others], key=lambda s: str(s["uuid"]))  # parts in no order
    time = datetime.datetime(2022, 8, 8, 12, tzinfo=datetime.UTC)
    values = {
        "image_name": [f"{s['uuid']}.{extension}" for s in rows],
        "prompt": [s["prompt"] for s in rows],
        "part_id": [s["part"] for s in rows],
        "seed": [38753269 for _ in rows],
        "step": [50 for _ in rows],
        "cfg": [7.0 for _ in rows],
        "sampler": [8 for _ in rows],
        "width": [s["size"][0] for s in rows],
        "height": [s["size"][1] for s in rows],
        "user_name": ["0" * 64 for _ in rows],
        "timestamp": [time for _ in rows],
        "image_nsfw": [s["nsfw"][0] for s in rows],
        "prompt_nsfw": [s["nsfw"][1] for s in rows],
    }
    kinds = {"timestamp": pa.timestamp("ns", "UTC"), "string": pa.string()}
    columns = about["repositories"][DIFFUSIONDB]["columns"]
    return parquet({n: (kinds.get(kind) or pa.type_for_alias(kind), values[n]) for n, kind in columns.items()})


@cache
def fluxreason() -> Miniature:
    about = layout("fluxreason")
    repository, mini = about["repositories"][FLUXREASON], about["miniature"]
    names = [
        repository["parquets"].format(subset=subset, number=number, count=count)
        for subset, count in repository["subsets"].items()
        for number in range(count)
    ]
    files = dict.fromkeys(names, _flux_table([])) | beside(repository["files"], FLUXREASON)
    expected = []
    for unit in dict.fromkeys(s["unit"] for s in mini["samples"]):
        samples = [s for s in mini["samples"] if s["unit"] == unit]
        files[unit] = _flux_table(samples)
        for sample in samples:
            image = None if sample.get("as") == "none" else _flux_image(sample)
            fields = {"style": sample["style"], "image_clarity": 9.0}
            member = str(sample["id"])
            expected.append(Expected(unit, member, sample["detail"], fields, image, sample.get("fails", "")))
    return Miniature(expected, {FLUXREASON: Repository(files)})


def _flux_image(sample: dict[str, Any]) -> Any:
    return picture(f"flux/{sample['id']}", tuple(sample["size"]))


def _flux_table(samples: list[dict[str, Any]]) -> bytes:
    repository = layout("fluxreason")["repositories"][FLUXREASON]
    images = [None if s.get("as") == "none" else {"bytes": _flux_image(s).data, "path": None} for s in samples]
    columns: dict[str, tuple[pa.DataType, list[Any]]] = {
        "image": (pa.struct({"bytes": pa.binary(), "path": pa.string()}), images),
        "id": (pa.int64(), [s["id"] for s in samples]),
    }
    for kind in repository["captions"]:
        columns[f"caption_{kind}"] = (pa.string(), [s.get(kind) for s in samples])
        columns[f"caption_{kind}_cn"] = (pa.string(), [None for _ in samples])
        columns[f"bool_caption_{kind}"] = (pa.bool_(), [True for _ in samples])
    for kind in repository["scores"]:
        columns[f"score_{kind}"] = (pa.float32(), [9.0 for _ in samples])
    for n in range(repository["columns"] - len(columns)):  # whose names the page of facts does not tell
        columns[f"other_{n}"] = (pa.string(), ["" for _ in samples])
    return parquet(columns)
