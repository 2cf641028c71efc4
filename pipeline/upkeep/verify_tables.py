"""Check what is kept beside the shards: cached tables, the parts of the sample table, selections."""

from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import PART, TABLE
from microdit.pipeline.selection.selections import load_selection
from microdit.pipeline.tables.published import Table
from microdit.pipeline.upkeep.problem import Problem
from microdit.pipeline.upkeep.verify_shard import Hashing


def check_tables(corpus: Corpus, problems: list[Problem]) -> None:
    """Read and hash the cached tables."""
    for item in corpus.store.list("tables"):
        if part := PART.fullmatch(item.name):
            problems += _part_problems(corpus, item.name, part[2])
        if not (item.name.endswith(".json") and TABLE.fullmatch(item.name)):
            continue
        try:
            table = Table.parse(corpus.store.get(item.name))
            if not table.object.name.startswith(item.name.removesuffix("json")):
                raise ValueError(f"it names {table.object.name!r}")
            with corpus.store.open(table.object.name) as file:
                hashing = Hashing(file)
                hashing.drain()
            if hashing.digest.hexdigest() != table.object.sha256:
                raise ValueError(f"{table.object.name} has another checksum")
        except FileNotFoundError:
            continue  # a cache: what is gone is made again
        except (OSError, BaseError) as error:
            problems.append(Problem("unreadable", item.name, first_line(error)))
        except ValueError as error:
            detail = f"{first_line(error)}; remove the folder tables, it is made again"
            problems.append(Problem("table", item.name, detail))


def _part_problems(corpus: Corpus, name: str, sha256: str) -> list[Problem]:
    """Hold a part of the sample table against the hash in its name."""
    try:
        with corpus.store.open(name) as file:
            hashing = Hashing(file)
            hashing.drain()
    except FileNotFoundError:
        return []
    except (OSError, BaseError) as error:
        return [Problem("unreadable", name, first_line(error))]
    if hashing.digest.hexdigest() == sha256:
        return []
    return [Problem("table", name, "it has another checksum; remove it, it is made again")]


def check_selections(corpus: Corpus, problems: list[Problem]) -> None:
    """Load every selection, which checks its hash."""
    for item in corpus.store.list("selections"):
        try:
            load_selection(corpus, item.name.removeprefix("selections/").removesuffix(".parquet"))
        except RequestError as error:
            problems.append(Problem("selection", item.name, str(error)))
