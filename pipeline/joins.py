# throwaway
import gzip, hashlib, io, json, tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
import pyarrow.parquet as pq
from pipeline.sources.remote import Listing, local_copy, scratch_folder

@dataclass(frozen=True)
class JoinSpec:
    listing: Listing
    reader: str
    key: str
    fields: dict
    key_of: str = ""

def build(corpus, spec, scratch, say):
    say("joining")

def dig(row, path):
    for p in path.split("."):
        row = row.get(p) if isinstance(row, dict) else None
    return row

def load(spec):
    table = {}
    for file in spec.listing.files:
        with local_copy(file, scratch_folder(None)) as path:
            if spec.reader == "parquet":
                rows = pq.read_table(path).to_pylist()
            elif spec.reader == "jsonl":
                data = path.read_bytes()
                data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
                rows = map(json.loads, data.splitlines())
            else:
                rows = []
                with tarfile.open(path) as t:
                    for m in t:
                        if not m.isfile(): continue
                        d = t.extractfile(m).read()
                        if spec.reader == "tar_txt":
                            rows.append({"": Path(m.name).stem, "txt": d.decode()})
                        else:
                            rows += map(json.loads, d.splitlines())
            for row in rows:
                key = row[""] if spec.reader == "tar_txt" else "/".join(str(row[c]) for c in spec.key.split("/"))
                if spec.key_of == "stem": key = Path(key).stem
                if spec.key_of == "path_dir_stem": key = "/".join([Path(key).parent.name, Path(key).stem])
                table.setdefault(key, {n: dig(row, c) for n, c in spec.fields.items()})
    return table

class Joined:
    def __init__(self, store, spec):
        self.spec, self.table = spec, None
    def get(self, key):
        if self.table is None: self.table = load(self.spec)
        return self.table.get(key)
