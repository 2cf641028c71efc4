"""Make archives as the datasets have them, deterministic in every byte."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Members = Iterable[tuple[str, bytes]]
EMPTY_TAR = bytes(1024)
EMPTY_TGZ = gzip.compress(EMPTY_TAR, mtime=0)
EMPTY_ZIP = b"PK\5\6" + bytes(18)
DAY = (2023, 4, 5, 12, 0, 0)


def tar(members: Members) -> bytes:
    """Make a tar; a name that ends in / is a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name.removesuffix("/"))
            info.mtime, info.mode = 1680000000, 0o644
            if name.endswith("/"):
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tgz(members: Members) -> bytes:
    return gzip.compress(tar(members), compresslevel=1, mtime=0)


def zipped(members: Members, deflated: bool = False) -> bytes:
    """Make a zip, as zip tools write it for images: stored, unless `deflated`; a name that ends in / is a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name, DAY)
            info.compress_type = zipfile.ZIP_DEFLATED if deflated and data else zipfile.ZIP_STORED
            archive.writestr(info, data)
    return buffer.getvalue()


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(columns: Mapping[str, tuple[pa.DataType, list[Any]]]) -> bytes:
    table = pa.table({name: pa.array(values, kind) for name, (kind, values) in columns.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=4)
    return buffer.getvalue()
