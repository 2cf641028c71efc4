"""The real sets: SA-1B with its captions and mirrors, CC12M, TextCaps, COCO."""

import gzip
import hashlib
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from tests.miniatures import Expected, Miniature, Repository, beside, expand, layout
from tests.miniatures.packing import EMPTY_TAR, json_bytes, json_lines, parquet, tar, tgz, zipped
from tests.miniatures.pictures import Picture, picture

CAPTIONS, MIRROR = "PixArt-alpha/SAM-LLaVA-Captions10M", "hanlincs/InternVL-SA1B-Caption-WebDataset"
BLIP3O = "BLIP3o/BLIP3o-Pretrain-Long-Caption"
CC12M, LLAVANEXT = "pixparse/cc12m-wds", "CaptionEmporium/conceptual-captions-cc12m-llavanext"


# -- SA-1B -------------------------------------------------------------------------------------------------------------
def sa1b_links(address: str, expiry: int) -> str:
    """Write Meta's list of links with another address than Meta's; `expiry` in seconds since 1970."""
    links = layout("sa1b")["links"]
    lines = ["\t".join(links["columns"])]
    for name in [*links["others"][:1], *expand(links["rows"]), *links["others"][1:]]:
        link = _link(name, expiry).replace(links["host"], address)
        lines.append(f"{name}\t{link}")
    return "\n".join(lines) + "\n"


def _link(name: str, expiry: int) -> str:
    opaque = hashlib.sha256(name.encode()).hexdigest()
    extension = name.rpartition(".")[2]
    link: str = layout("sa1b")["links"]["link"]
    return link.format(opaque=f"An8{opaque[:40]}", extension=extension, hash=f"AY{opaque[40:50]}", expiry=expiry)


@cache
def sa1b() -> Miniature:
    """Meta's tars behind the links, and the captions; fields and captions are those of LLaVA."""
    about = layout("sa1b")
    mini, pattern = about["miniature"], about["tar"]["members"]
    expected: list[Expected] = []
    tars = dict.fromkeys(expand(about["links"]["rows"]), EMPTY_TAR)
    for unit, shard in mini["shards"].items():
        members: list[tuple[str, bytes]] = []
        for sample in (s for s in mini["samples"] if s["unit"] == unit):
            image = picture(f"sa_{sample['id']}", tuple(sample["size"]))
            names = [shard["prefix"] + name.format(id=sample["id"]) for name in pattern]
            note = json_bytes(_sa1b_note(sample))
            both = [(names[1], note), (names[0], image.data)]  # so that the image is the last one
            members += both
            broken = sample.get("fails") == "damaged_archive"
            expected.append(
                Expected(
                    unit,
                    "" if broken else names[0],
                    sample.get("caption", "").strip() if not broken else "",
                    picture=image,
                    reason=sample.get("fails", ""),
                )
            )
        data = tgz(members) if shard.get("compressed") else tar(members)
        if shard.get("broken"):
            data = data[: data.rindex(members[-1][1][-64:]) - len(members[-1][1]) // 2]
        tars[unit] = data
    urls = {urlsplit(_link(name, 0)).path: data for name, data in tars.items()}
    urls |= {urlsplit(_link(name, 0)).path: b"1\n" for name in about["links"]["others"]}
    return Miniature(expected, _sa1b_captions() | _sa1b_mirrors(), urls)


def _sa1b_note(sample: dict[str, Any]) -> dict[str, Any]:
    width, height = sample["size"]
    image = {"image_id": sample["id"], "width": width, "height": height, "file_name": f"sa_{sample['id']}.jpg"}
    mask = {"size": [height, width], "counts": "PPYo0"}
    box = {"bbox": [0.0, 0.0, 9.0, 9.0], "crop_box": [0.0, 0.0, width, height], "point_coords": [[4.0, 4.0]]}
    scores = {"area": 81, "predicted_iou": 0.9, "stability_score": 0.95}
    return {"image": image, "annotations": [{"id": sample["id"] * 100, "segmentation": mask, **scores, **box}]}


def _sa1b_captions() -> dict[str, Repository]:
    about = layout("sa1b")
    repository, mini = about["repositories"][CAPTIONS], about["miniature"]
    captioned = [s for s in [*mini["samples"], *mini["captions_without_image"]] if "caption" in s]
    captioned.sort(key=lambda s: str(s["id"]))  # not the order of the images
    texts = [
        (s.get("caption_prefix", "") + repository["members"].format(id=s["id"]), s["caption"].encode())
        for s in captioned
    ]
    converted = repository["converted"]
    rows = {
        "__key__": [f"sa_{s['id']}" for s in captioned],
        "__url__": [f"hf://datasets/{CAPTIONS}@1d50d07/SA1B_caption.tar.gz"] * len(captioned),
        "txt": [s["caption"] for s in captioned],
    }
    table = parquet({name: (pa.string(), rows[name]) for name in converted["columns"]})
    files = beside(repository["files"][1:], CAPTIONS) | {repository["files"][0]: tgz(texts)}
    branches = {converted["revision"]: {converted["file"]: table}}
    return {CAPTIONS: Repository(files, branches=branches)}


@cache
def sa1b_mirror(repo: str = MIRROR) -> Miniature:
    """A mirror in webdataset form: small images with captions beside them."""
    about = layout("sa1b")
    repository = about["repositories"][repo]
    folder = repository["tars"].rpartition("/")[0]
    expected = []
    for sample in about["miniature"]["samples"]:
        unit = f"{folder}/{sample['unit']}" if folder else sample["unit"]
        caption = f"A paragraph about image {sample['id']}. {sample.get('caption', '')}".strip()
        image = _mirrored(sample, repo)
        expected.append(Expected(unit, repository["members"][0].format(id=sample["id"]), caption, picture=image))
    return Miniature(expected, {repo: _sa1b_mirrors()[repo]})


def _mirrored(sample: dict[str, Any], repo: str) -> Picture:
    size = (512, 512) if repo == BLIP3O else Picture("", tuple(sample["size"]), b"", False).stored_size()
    return picture(f"{repo}/sa_{sample['id']}", size)


def _sa1b_mirrors() -> dict[str, Repository]:
    about = layout("sa1b")
    found = {}
    for repo in (MIRROR, BLIP3O):
        repository = about["repositories"][repo]
        files = beside(repository["files"], repo) | dict.fromkeys(expand(repository["tars"]), EMPTY_TAR)
        for unit in about["miniature"]["shards"]:
            members = []
            for sample in (s for s in about["miniature"]["samples"] if s["unit"] == unit):
                image, text = (name.format(id=sample["id"]) for name in repository["members"])
                caption = f"A paragraph about image {sample['id']}. {sample.get('caption', '')}".strip()
                members += [(image, _mirrored(sample, repo).data), (text, caption.encode())]
            files[next(name for name in files if name.endswith(unit))] = tar(members)
        found[repo] = Repository(files, revision=repository.get("revision"))
    return found


# -- CC12M -------------------------------------------------------------------------------------------------------------
@cache
def cc12m(caption: str = "cleaned", joined: bool = False) -> Miniature:
    """`caption`: caption (the alt-text as it came), cleaned, long or short; `joined`: the others are fields."""
    about = layout("cc12m")
    repository, mini = about["repositories"][CC12M], about["miniature"]
    tars: dict[str, list[tuple[str, bytes]]] = {}
    expected, rows = [], []
    for sample in mini["samples"]:
        key = sample["key"]
        image = picture(key, tuple(sample["size"]), sample.get("as", "jpg"))
        names = [name.format(key=key) for name in repository["members"]]
        contents = [image.data, sample["caption"], json_bytes(_cc12m_note(sample))]
        found = [
            (n, c.encode() if isinstance(c, str) else c) for n, c in zip(names, contents, strict=True) if c is not None
        ]
        tars.setdefault(sample["unit"], []).extend(found)
        words = sample.get(caption) or ""
        reason = "" if sample.get("fails") == "no_caption" and words else sample.get("fails", "")
        reason = reason or ("" if words else "no_caption")
        fields = {"alt": sample["caption"]}
        if joined:
            fields |= {"llavanext_long": sample["long"], "llavanext_short": sample["short"]}
        expected.append(Expected(sample["unit"], names[0], words, fields, image, reason))
        if sample["long"] is not None:
            rows.append(_llavanext_row(sample))
    rows += [
        _llavanext_row({"key": f"{n:09d}", "long": f"Number {n}.", "short": "Nothing."}) for n in range(9000, 9050)
    ]
    rows.insert(0, rows.pop(-60))
    rows.append({**next(r for r in rows if r["key"] == mini["table_twice"]), "caption_llava": "A second time."})
    files = dict.fromkeys(expand(repository["tars"]), EMPTY_TAR) | {name: tar(found) for name, found in tars.items()}
    info = {"splits": {"train": {"filenames": list(files), "num_samples": repository["samples"]}}}
    files |= beside(repository["files"], CC12M) | {"_info.json": json_bytes(info)}
    captions = about["repositories"][LLAVANEXT]["files"]
    table = {captions[0]: gzip.compress(json_lines(rows), mtime=0)} | beside(captions[1:], LLAVANEXT)
    return Miniature(expected, {CC12M: Repository(files), LLAVANEXT: Repository(table)})


def _cc12m_note(sample: dict[str, Any]) -> dict[str, Any]:
    width, height = sample["size"]
    note = {
        "url": f"https://example.com/{sample['key']}.jpg",
        "caption": sample["caption"],
        "key": sample["key"],
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": 2 * width,
        "original_height": 2 * height,
        "exif": "{}",
        "sha256": "0" * 64,
    }
    return {name: note[name] for name in layout("cc12m")["repositories"][CC12M]["json"]}


def _llavanext_row(sample: dict[str, Any]) -> dict[str, str]:
    row = {
        "key": sample["key"],
        "url": f"https://example.com/{sample['key']}.jpg",
        "caption_llava": sample["long"],
        "caption_llava_short": sample["short"],
    }
    return {name: row[name] for name in layout("cc12m")["repositories"][LLAVANEXT]["columns"]}


# -- TextCaps and COCO -------------------------------------------------------------------------------------------------
@cache
def textcaps() -> Miniature:
    about = layout("textcaps")
    mini, urls = about["miniature"], about["urls"]
    expected, members = [], [("train_images/", b"")]
    unit = urls["images"].rpartition("/")[2]
    for sample in [*mini["samples"][::2], *mini["without_caption"], *mini["samples"][1::2]]:
        member = about["member"].format(id=sample["id"])
        image = picture(sample["id"], tuple(sample["size"]))
        members.append((member, image.data))
        if "references" in sample:
            expected.append(Expected(unit, member, sample["references"][0], picture=image))
    expected += [Expected(unit, "", reason="missing") for _ in mini["without_image"]]
    files = {urls["images"]: zipped(members), urls["test_images"]: zipped([("test_images/", b"")])}
    for split in urls["splits"]:
        entries = [
            _textcaps_entry(split, sample, number)
            for sample in [*mini["samples"], *mini["without_image"]]
            if sample["split"] == split
            for number in range(about["references"])
        ]
        found = {"dataset_type": split, "dataset_name": "textcaps", "dataset_version": "0.1", "data": entries}
        files[urls["captions"].format(split=split)] = json_bytes(found)
    return Miniature(expected, urls={urlsplit(url).path: data for url, data in files.items()})


def _textcaps_entry(split: str, sample: dict[str, Any], number: int) -> dict[str, Any]:
    about = layout("textcaps")
    width, height = sample.get("size", (1024, 768))
    references = sample["references"]
    entry = {
        "image_id": sample["id"],
        "image_classes": ["Sign"],
        "flickr_original_url": f"https://farm1.staticflickr.com/{sample['id']}_o.jpg",
        "flickr_300k_url": f"https://c1.staticflickr.com/{sample['id']}_z.jpg",
        "image_width": width,
        "image_height": height,
        "set_name": split,
        "image_name": sample["id"],
        "image_path": about["image_path"].format(id=sample["id"]),
        "caption_id": number,
        "caption_str": references[number],
        "caption_tokens": references[number].lower().rstrip(".").split(),
        "reference_strs": references,
        "reference_tokens": [text.lower().rstrip(".").split() for text in references],
    }
    return {name: entry[name] for name in about["json"]}


@cache
def coco() -> Miniature:
    about = layout("coco")
    urls, mini = about["urls"], about["miniature"]
    unit = urls["images"].rpartition("/")[2]
    expected, members = [], [("val2014/", b"")]
    images, annotations = [], []
    for sample in mini["samples"]:
        member = about["member"].format(id=sample["id"])
        image = picture(member, tuple(sample["size"]), sample.get("as", "jpg"))
        members.append((member, image.data))
        expected.append(Expected(unit, member, " ".join(sample["captions"][0].split()), picture=image))
        width, height = sample["size"]
        images.append({"id": sample["id"], "file_name": member.rpartition("/")[2], "width": width, "height": height})
        annotations += [
            {"image_id": sample["id"], "id": 100 * sample["id"] + n, "caption": text}
            for n, text in enumerate(sample["captions"])
        ]
    # those of an image are not side by side, but in the order of their own numbers
    annotations.sort(key=lambda a: a["id"] % 100)
    notes = [(name, json_bytes({"info": {}, "images": [], "annotations": []})) for name in about["beside"]]
    notes.append(
        (about["annotations"], json_bytes({"info": {}, "images": images, "licenses": [], "annotations": annotations}))
    )
    files = {urls["images"]: zipped(members), urls["captions"]: zipped(notes, deflated=True)}
    return Miniature(expected, urls={urlsplit(url).path: data for url, data in files.items()})
