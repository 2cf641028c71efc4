"""The sample table that was shown last, noted on this machine: a page opens with it while the commits are listed."""

import hashlib
import json
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from obstore.exceptions import BaseError

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, PART
from microdit.pipeline.corpus.records import ObjectRef
from microdit.pipeline.tables.part_specs import FieldGroup, part_schemas
from microdit.pipeline.tables.sample_parts import FOLDER
from microdit.pipeline.tables.sample_table import SampleTable

LAYOUT = 2
LARGEST = 256 << 20  # bytes of a note: of a million commits it has 80 million


def keep_table(corpus: Corpus, table: SampleTable, folder: Path) -> None:
    """Note a table; one with parts that are not in the corpus is not noted."""
    refs = [ref for of in table.parts.values() for ref in of]
    if not all(PART.fullmatch(ref.name) for ref in refs):
        return
    about = {
        "layout": LAYOUT,
        "url": corpus.url,
        "names": table.names,
        "parts": [[*group, [ref.model_dump() for ref in of]] for group, of in table.parts.items()],
        "written": {column: when.isoformat() for column, when in table.written.items()},
    }
    path = _path(corpus, folder)
    with suppress(OSError):  # the next page opens later, then
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}#{os.urandom(4).hex()}")
        part.write_text(json.dumps(about))
        part.replace(path)


def last_table(corpus: Corpus, folder: Path) -> SampleTable | None:
    """Read the table that was noted, if all of its parts are there, its columns declared, and it can be understood."""
    path = _path(corpus, folder)
    try:
        if path.stat().st_size > LARGEST:
            return None
        about = json.loads(path.read_bytes())
        if (about["layout"], about["url"]) != (LAYOUT, corpus.url):
            return None
        parts = {FieldGroup(*group): [ObjectRef(**ref) for ref in refs] for *group, refs in about["parts"]}
        names = [name for name in about["names"] if COMMIT.fullmatch(name)]
        written = {column: datetime.fromisoformat(when) for column, when in about["written"].items()}
        there = set(corpus.store.names(FOLDER))
        whole = all(PART.fullmatch(ref.name) and ref.name in there for refs in parts.values() for ref in refs)
        declared = corpus.columns()
        columns = {group.column for group in parts}
        schemas = {
            g: schema for column in sorted(columns) for g, schema in part_schemas(column, declared[column]).items()
        }
        if not whole or parts.keys() != schemas.keys():
            return None
        return SampleTable(names, parts, written, schemas, runs={}, present={})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, BaseError):
        return None


def _path(corpus: Corpus, folder: Path) -> Path:
    return folder / f"{hashlib.sha256(corpus.url.encode()).hexdigest()}.json"
