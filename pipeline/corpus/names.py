"""Names of columns, sources, shards, attempts and commits, and the patterns that make one valid."""

import re

ShardId = tuple[str, str]  # source, and shard or unit
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
COLUMN = re.compile(r"[A-Za-z0-9_@-][A-Za-z0-9_.@-]*(/[A-Za-z0-9_@-][A-Za-z0-9_.@-]*)?")
SOURCE = re.compile(r"[a-z0-9][a-z0-9_-]*")
RESERVED = {"units", "commits", "columns", "sources", "tables", "selections", "failures", "probes"}
IMAGES = "images"
UNITS = "units"
PROBES = "probes"
COMMIT = re.compile(r"commits/([^/]+(?:/[^/]+)?)/([^/]+)/([^/]+)\.(0|[1-9][0-9]{0,8})\.json")
SHARD = re.compile(r"[a-z0-9][a-z0-9_-]*")
ATTEMPT = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{8}")
OBJECT = re.compile(rf"([^/]+(?:/[^/]+)?)/([^/]+)/([^/]+)\.{ATTEMPT.pattern}\.(?:tar|parquet|rows\.parquet)")
TABLE = re.compile(
    r"tables/((?:commits|statuses|joins|duplicates|semantic|contaminated|hashes)/)?"
    rf"[0-9a-f]{{32,64}}\.(?:json|{ATTEMPT.pattern}\.parquet)"
)

PART = re.compile(r"tables/samples/([0-9a-f]{64})\.([0-9a-f]{64})\.parquet")  # its key, and the hash of its bytes


def column_kind(column: str) -> str:
    """Tell whether a column is a `table` (captions and scores) or a `tar` (all others, and embeddings)."""
    family, _, name = column.partition("/")
    table = family == "captions" or (family == "scores" and name.partition("-")[0] != "embedding")
    return "table" if table else "tar"


def commit_name(column: str, source: str, shard: str, generation: int) -> str:
    """Name a commit's object."""
    return f"commits/{column}/{source}/{shard}.{generation}.json"


def unit_name(source: str, number: int) -> str:
    """Name a unit by its number in the source."""
    return f"{source}-{number:06d}"


def shard_name(unit: str, number: int) -> str:
    """Name a shard by its number in the unit."""
    return f"{unit}-{number:02d}"
