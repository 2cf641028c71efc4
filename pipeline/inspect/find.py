"""Find the layout of a data set by its files' names and a few samples, and the source's options that read it."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.content.text_bytes import NotTextError, decode_text
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.files.split_files import joined_copy, with_parts_joined
from microdit.pipeline.files.tfrecords import parse_example, records
from microdit.pipeline.files.unpacked import unpacked
from microdit.pipeline.files.wrong_files import what_it_is
from microdit.pipeline.inspect import columns as of
from microdit.pipeline.inspect.found import Found
from microdit.pipeline.inspect.prompts import as_prompts
from microdit.pipeline.inspect.tables import join_of, rows_of_table
from microdit.pipeline.sources.file_source import MAX_BYTES
from microdit.pipeline.sources.members import IMAGES, is_image, whole_stem

LOOKED_AT = 200  # members, rows or records
SOME = 20  # json files beside pictures
MOST_HELD = 256 << 20  # bytes of an archive's members
START = 32  # bytes of a picture that tell its format
FILES = re.compile(r"[*?\[{]|^hf://datasets/[^/]+/[^/]+/.*\.\w{2,8}$|^(?:s3|gs|az)://.+/.*\.\w{2,8}$")
"""An address of files: with a wildcard, or a name with an extension below a bucket or a repository."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TABLES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
KINDS = {
    "webdataset": re.compile(r".*\.(tar|tgz|zip|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE),
    "tfrecord": re.compile(r".*\.tfrecords?(\.gz)?(-\d+-of-\d+)?(\.gz)?$", re.IGNORECASE),
    "folder": re.compile(rf".*\.({'|'.join(IMAGES)})$", re.IGNORECASE),
    "parquet": re.compile(r".*\.parquet$", re.IGNORECASE),
    "jsonl": re.compile(r".*\.(jsonl|ndjson)(\.(gz|zst))?$|.*\.json$", re.IGNORECASE),
    "urls": re.compile(r".*\.(txt|tsv|csv)(\.(gz|zst|bz2|xz))?$", re.IGNORECASE),
}


def inspect(place: str, scratch: Path) -> Found:
    """Find what there is at a place: a file, a folder, a pattern, a bucket's prefix, a repository of the hub.

    Raises:
        RequestError: there is nothing, or nothing that can be a data set.
    """
    root, listing = _listed(place)
    kind, files = _kind(listing.files)
    sizes = [file.size for file in files]
    found = Found(kind, {"adapter": kind}, len(files), None if None in sizes else sum(size or 0 for size in sizes))
    if any(file.name.endswith("_stats.json") for file in listing.files) and kind in ("webdataset", "parquet"):
        found.layout, found.block = "img2dataset", {"adapter": "img2dataset", "folder": root}
        with joined_copy(next(f for f in listing.files if f.name.endswith("_stats.json")), scratch) as path:
            found.columns = of.by_name([json.loads(path.read_bytes())])
        return found
    if kind == "folder":
        _look_at_folder(found, root, listing, scratch)
        return found
    found.block["list" if kind == "urls" else "files"] = _pattern(root, files)
    with joined_copy(files[0], scratch) as path:
        if wrong := what_it_is(path):
            found.notes.append(f"{files[0].name}: {wrong}")
            return found
        looks = {"webdataset": _look_at_archive, "parquet": _look_at_parquet, "tfrecord": _look_at_records}
        looks |= {"jsonl": _look_at_lines, "urls": _look_at_list}
        looks[kind](found, path, files)
    if kind == "webdataset" and not found.block.get("caption"):
        tables = [file for file in listing.files if file.name.endswith(TABLES)]
        names = [str(name) for name in found.columns.get("name", [])]
        if (join := join_of(tables, names, scratch)) is not None:
            found.block |= join
    return found


# -- files -----------------------------------------------------------------------------------------------------------
def _listed(place: str) -> tuple[str, Listing]:
    """List a place; return it as a folder or file of its own, and its files."""
    what = "PLACE"
    path = Path(place).expanduser()
    if "://" not in place and not path.exists() and HUB_NAME.fullmatch(place):
        place = f"hf://datasets/{place}"
    if "://" not in place:
        root = str(path.absolute())
        listing = list_files(f"{root}/**" if path.is_dir() else root, what)
    elif FILES.search(place) or place.startswith(("http://", "https://")):
        root, listing = place, list_files(place, what)
    else:
        root, listing = place.rstrip("/"), list_files(f"{place.rstrip('/')}/**", what)
    return root, with_parts_joined(listing, what)


def _kind(files: Sequence[RemoteFile]) -> tuple[str, list[RemoteFile]]:
    """Find the kind of most files, the first kinds before others: a table beside tars belongs to these."""
    for kind, names in KINDS.items():
        if chosen := [file for file in files if names.fullmatch(file.name) and not file.name.startswith(".")]:
            return kind, chosen
    some = ", ".join(file.name for file in files[:5])
    raise RequestError(
        f"PLACE: none of its {len(files):,} files is an archive, a table, a list or a picture: {some}; "
        "expected .tar, .zip, .parquet, .jsonl, .tfrecord, .jpg, or a .tsv of URLs"
    )


def _pattern(root: str, files: Sequence[RemoteFile]) -> str:
    """Write the pattern that stands for the files below a folder; of a file or a pattern itself."""
    name = root.rpartition("/")[2]
    if re.search(r"[*?\[{]", root) or (len(files) == 1 and (name == files[0].name and not files[0].parts)):
        return root
    names = [part.name for file in files for part in (file.parts or (file,))]
    deep = "**/" if any("/" in each for each in names) else ""
    endings = {re.sub(r"^.*?(?=\.[a-zA-Z])", "", each.rpartition("/")[2], count=1) for each in names}
    if files[0].parts:
        return f"{root}/{deep}{files[0].name.rpartition('/')[2]}.*"
    ending = min(endings, key=len) if len(endings) == 1 else f".{_usual_ending(files)}"
    return f"{root}/{deep}*{ending}"


def _usual_ending(files: Sequence[RemoteFile]) -> str:
    return Counter(file.name.rpartition(".")[2] for file in files).most_common(1)[0][0]


# -- layouts ---------------------------------------------------------------------------------------------------------
def _look_at_folder(found: Found, root: str, listing: Listing, scratch: Path) -> None:
    pictures = [file.name for file in listing.files if is_image(file.name)]
    stems = {name.rpartition(".")[0] for name in pictures}
    beside = Counter(
        file.name.rpartition(".")[2] for file in listing.files
        if not is_image(file.name) and file.name.rpartition(".")[0] in stems
    )  # fmt: skip
    found.block |= {"files": root, "caption": ""}
    found.estimate, found.files = len(pictures), len(pictures)
    found.columns = {"name": pictures[:LOOKED_AT]}
    texts = [file for file in listing.files if file.name.rpartition(".")[0] in stems and not is_image(file.name)]
    if "json" in beside:
        records = [file for file in texts if file.name.endswith(".json")][:SOME]
        rows = [row for file in records for row in _rows_of(file, scratch)]
        caption = of.caption_column(of.by_name(rows))
        found.block["caption"] = f"json.{caption}" if caption else ""
    if beside and not found.block["caption"]:
        extension = beside.most_common(1)[0][0]
        found.block["caption"] = extension if extension != "json" else ""
    if not found.block["caption"]:
        tables = [file for file in listing.files if file.name.endswith(TABLES)]
        if (join := join_of(tables, pictures[:LOOKED_AT], scratch)) is not None:
            found.block |= join


def _look_at_archive(found: Found, path: Path, files: Sequence[RemoteFile]) -> None:
    names: list[str] = []
    kept: dict[str, list[bytes]] = {}
    read = 0
    for member in islice(members(path, lambda name: not name.endswith("/"), MAX_BYTES), LOOKED_AT):
        if member.reason == "damaged_archive":
            found.notes.append(f"{files[0].name} is damaged: {member.detail}")
            break
        names.append(member.name)
        if member.data is not None:
            data = member.data[:START] if of.is_picture(member.data) else member.data
            kept.setdefault(stem(member.name)[1], []).append(data)
            read += len(member.data)
        if read > MOST_HELD:
            break
    found.columns = {"name": [name for name in names if is_image(name)] or names}
    pictures = [extension for extension, data in kept.items() if all(map(of.is_picture, data))]
    unknown = [extension for extension in pictures if extension.rpartition(".")[2] not in IMAGES]
    if unknown or (len(pictures) > 1 and any("." in extension for extension in pictures)):
        found.block["image"] = pictures
    texts, records = _texts_of(kept, pictures)
    found.columns |= texts | {f"json.{name}": values for name, values in records.items()}
    caption = of.caption_column(texts)
    inner = of.caption_column(records)
    found.block["caption"] = caption or (f"json.{inner}" if inner else "")
    if records:
        found.block["fields"] = of.other_fields(records, [inner] if not caption else [], "json.")
    whole = [whole_stem(name) for name in names]
    if any("." in stem(name)[1] for name in names):
        found.notes.append("there are dots within names; a picture's whole name before its extension is its own")
    runs = [name for n, name in enumerate(whole) if n == 0 or whole[n - 1] != name]
    if len(runs) > len(set(runs)):
        found.notes.append("members of a sample are not side by side: pack again with names sorted (tar --sort=name)")
    if len(set(names)) < len(names):
        found.notes.append("names come again within the archive; the second ones fail with duplicate_key")
    size = files[0].size or path.stat().st_size
    count = len(found.columns["name"])
    if read and found.bytes:
        of_one = count if len(names) < LOOKED_AT and read <= MOST_HELD else count * size / read
        found.estimate = round(of_one * found.bytes / size)


def _rows_of(file: RemoteFile, scratch: Path) -> list[dict[str, Any]]:
    """Read a json beside a picture; nothing if it is no object."""
    with joined_copy(file, scratch) as path:
        try:
            row = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_BYTES else None
        except (ValueError, RecursionError):
            return []
    return [row] if isinstance(row, dict) else []


def _texts_of(
    kept: dict[str, list[bytes]], pictures: Sequence[str]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return the texts by extension, and the columns of the json members."""
    texts: dict[str, list[Any]] = {}
    rows: list[dict[str, Any]] = []
    for extension, data in kept.items():
        if extension in pictures or extension.rpartition(".")[2] in IMAGES:
            continue
        for each in data:
            try:
                text = decode_text(each)
                row = json.loads(text) if extension == "json" else None
            except (NotTextError, ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
            elif extension != "json":
                texts.setdefault(extension, []).append(text)
    return texts, of.by_name(rows)


def _look_at_parquet(found: Found, path: Path, files: Sequence[RemoteFile]) -> None:
    with pq.ParquetFile(path) as table:
        rows = next(table.iter_batches(8)).to_pylist() if table.metadata.num_rows else []
        found.estimate = table.metadata.num_rows * len(files)
    found.columns = of.by_name(rows)
    pictures = {n: v for n, v in found.columns.items() if v and all(of.is_picture(_bytes_of(each)) for each in v)}
    if not pictures:
        if _is_list(found) or as_prompts(found, files):
            return
        known = ", ".join(found.columns)
        raise RequestError(f"PLACE: no column of {files[0].name} holds pictures or URLs; it has {known}")
    image = next(iter(pictures))
    caption = of.caption_column(found.columns)
    found.block |= {"image": image, "caption": caption, "fields": of.other_fields(found.columns, [image, caption])}


def _is_list(found: Found) -> bool:
    """Describe a table without pictures as a list, if it has URLs."""
    url = of.url_column(found.columns)
    if url:
        caption = of.caption_column({name: values for name, values in found.columns.items() if name != url})
        fields = of.other_fields(found.columns, [url, caption])
        found.layout, place = "urls", found.block["files"]
        found.block = {"adapter": "urls", "list": place, "url": url, "caption": caption, "fields": fields}
    return bool(url)


def _bytes_of(value: object) -> object:
    return value.get("bytes") if isinstance(value, dict) else value


def _look_at_records(found: Found, path: Path, files: Sequence[RemoteFile]) -> None:
    rows = []
    for record in islice(records(path, MAX_BYTES), 16):
        if record.data is not None:
            _, names = parse_example(record.data, ())
            rows.append(parse_example(record.data, names)[0])
    found.columns = {name: [_decoded(value) for value in values] for name, values in of.by_name(rows).items()}
    image = next((n for n, v in found.columns.items() if v and all(map(of.is_picture, v))), "image")
    caption = of.caption_column(found.columns)
    found.block |= {"image": image, "caption": caption, "fields": of.other_fields(found.columns, [image, caption])}


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    try:
        return decode_text(value) if isinstance(value, bytes) and not of.is_picture(value) else value
    except NotTextError:
        return value


def _look_at_lines(found: Found, path: Path, files: Sequence[RemoteFile]) -> None:
    rows = list(islice(rows_of_table(path, files[0].name), LOOKED_AT))
    found.columns = of.by_name(rows)
    images = [n for n, v in found.columns.items() if v and all(isinstance(x, str) and _is_image_text(x) for x in v)]
    if not images:
        if _is_list(found) or as_prompts(found, files):
            return
        known = ", ".join(found.columns)
        raise RequestError(f"PLACE: no field of {files[0].name} has pictures (paths or base64) or URLs; it has {known}")
    image = images[0]
    caption = of.caption_column({n: v for n, v in found.columns.items() if n != image})
    found.block |= {"image": image, "caption": caption, "fields": of.other_fields(found.columns, [image, caption])}


def _is_image_text(text: str) -> bool:
    return (is_image(text) and "://" not in text) or text.startswith(("data:image/", "/9j/", "iVBORw0KGgo", "UklGR"))


def _look_at_list(found: Found, path: Path, files: Sequence[RemoteFile]) -> None:
    with unpacked(path) as file:
        found.columns = {"line": list(_first_lines(file))}
    if not any("://" in line for line in found.columns["line"]):
        if not files[0].name.lower().endswith(".txt"):
            found.columns = of.by_name(list(islice(rows_of_table(path, files[0].name), LOOKED_AT)))
        if as_prompts(found, files):
            return
        raise RequestError(
            f"PLACE: {files[0].name} has neither URLs nor prompts; its columns are {', '.join(found.columns) or 'none'}"
        )


def _first_lines(file: Any) -> Iterator[str]:
    for line in islice(iter(lambda: file.readline(4096), b""), 16):
        yield line.decode("utf-8", "replace").rstrip("\r\n")
