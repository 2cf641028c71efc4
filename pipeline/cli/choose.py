"""The commands that choose samples: `select`, `dedup`, `decontaminate`."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.signals import stop_signals
from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.command import (
    CorpusUrl,
    Disk,
    Distance,
    Json,
    Memory,
    Timeout,
    json_answer,
    open_corpus,
    sql_limits,
)


def select(
    corpus: CorpusUrl,
    name: Annotated[str, typer.Argument(help="The selection's name.", show_default=False)],
    sql: Annotated[
        str | None, typer.Argument(metavar="SQL", help="One SELECT over the view `samples`.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="SHARES", help="How often each source comes: equal, or A=2,B=1. Default: by its size."),
    ] = None,
    timeout: Timeout = None,
    memory: Memory = None,
    disk: Disk = None,
    as_json: Json = False,
) -> None:
    """Save a selection: the rows (`source`, `shard`, `row`, and `weight` if you like) that a query gives.

    Without SQL it is the query of that name in configs/queries: `clean` (once, safe, sharp, in no test set, little
    text), `drawn` (what models drew of prompts, each picture once), `paper` and `paper-512` (the paper's data),
    `synthetic-only`. With `--weights` a source comes as often as its share says, however many samples it has; a
    `weight` of the query then counts within its source.

    **Examples**

    - `microdit select my/corpus large "SELECT source, shard, row FROM samples WHERE status = 'ok' AND width >= 128"`

    - `microdit select my/corpus clean --weights cc12m=2,sa1b=1`
    """
    from microdit.pipeline.selection.selections import select_apart
    from microdit.pipeline.selection.weights import parse_shares

    with json_answer(as_json) as answer, stop_signals():
        shares = None if weights is None else parse_shares(weights)
        chosen = select_apart(open_corpus(corpus), name, sql, shares, sql_limits(timeout, memory, disk))
        answer.update({"name": chosen.name, "hash": chosen.hash, "path": chosen.path, "rows": chosen.rows})
    if not as_json:
        print(printable(f"{chosen.name}@{chosen.hash}: {chosen.rows:,} rows"))


def dedup(
    corpus: CorpusUrl,
    distance: Annotated[
        int | None, typer.Option(metavar="BITS", help="How many of the 64 bits may differ, 0 to 8; 6 if not given.")
    ] = None,
    semantic: Annotated[bool, typer.Option("--semantic", help="By embeddings: the same in other pixels.")] = False,
    similarity: Annotated[
        float | None, typer.Option(metavar="COSINE", help="With --semantic: at least this near; 0.95 if not given.")
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="With --semantic, if there are several: which embeddings.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find pictures that are double or nearly so; remove nothing. For a corpus that has changed run it again.

    What is dropped is near what is kept itself, not only linked to it by others.
    By the hashes of `scores/basic`: `samples` gains `duplicate_group` (the id of the one to keep: the largest, then
    the first), `duplicate_distance` (bits between the two), `duplicate_exact` (the same pixels came before) and
    `duplicate_keep`; with the column `scores/turned` mirrored, rotated and letterboxed pictures are found too. By the
    embeddings of `scores/embedding`, with `--semantic`: `semantic_group`, `semantic_similarity` (the cosine) and
    `semantic_keep`, beside the others.

    **Examples**

    - `microdit dedup my/corpus`

    - `microdit dedup my/corpus --semantic --similarity 0.97`

    - `microdit select my/corpus once "SELECT source, shard, row FROM samples WHERE duplicate_keep AND semantic_keep"`

    - `microdit select my/corpus once "SELECT source, shard, row FROM samples WHERE nsfw < 0.2 QUALIFY
      one_per_group(duplicate_group)"`: beside other conditions `duplicate_keep` drops a group whose kept picture they
      drop; this keeps the largest that is left of each
    """
    from microdit.pipeline.curation.duplicates import dedup as find
    from microdit.pipeline.curation.semantic import dedup_semantic

    with json_answer(as_json) as answer:
        if semantic and distance is not None:
            raise RequestError("--distance counts bits of hashes; with --semantic give --similarity")
        if not semantic and (similarity, embedding) != (None, None):
            raise RequestError("--similarity and --embedding are of embeddings; give --semantic with them")
        if semantic:
            found = dedup_semantic(open_corpus(corpus), embedding, 0.95 if similarity is None else similarity)
            answer.update(found.to_json())
        else:
            answer.update(find(open_corpus(corpus), 6 if distance is None else distance).to_json())
    if not as_json:
        print(printable(_deduplicated(answer)))


def _deduplicated(answer: Mapping[str, Any]) -> str:
    """Say in one line what `dedup` has found."""
    what = (
        f"{answer['without_embedding']:,} more have no embedding in {answer['column']}; "
        f"{answer['beyond']:,} to drop are less like what is kept than {answer['similarity']:g}"
        if "similarity" in answer
        else f"{answer['exact']:,} repeat another one's pixels; {answer['without_hash']:,} more have no hash; "
        f"{answer['beyond']:,} to drop are more than {answer['distance']} bits from what is kept; {_turned(answer)}"
    )
    return (
        f"{answer['groups']:,} groups: {answer['kept']:,} of {answer['samples']:,} samples to keep, "
        f"{answer['dropped']:,} to drop; {what}; the largest group has {answer['largest']:,}"
    )


def decontaminate(
    corpus: CorpusUrl,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="CORPUS|FILE", help="An evaluation set: a corpus, or its hash table. May be repeated."),
    ] = None,
    distance: Distance = 6,
    as_json: Json = False,
) -> None:
    """Mark pictures that are in an evaluation set, or nearly so; remove nothing.

    Without `--against` that is COCO 2014 val, from the corpus that `microdit build configs/coco-val.yaml` makes here.
    `samples` gains `contaminated`, `contaminated_by` (whose picture) and `contaminated_distance`. If this corpus or the
    evaluation set has the column `scores/turned`, mirrored and rotated pictures are found too, and of the one that has
    it letterboxed ones.

    **Example**

    - `microdit select my/corpus clean "SELECT source, shard, row FROM samples WHERE NOT contaminated"`
    """
    from microdit.pipeline.curation.duplicates import decontaminate as find
    from microdit.pipeline.curation.duplicates import default_evaluation

    with json_answer(as_json) as answer:
        answer.update(find(open_corpus(corpus), against or [default_evaluation()], distance).to_json())
    if not as_json:
        print(printable(_contaminated(answer)))


def _contaminated(answer: Mapping[str, Any]) -> str:
    """Say in one line what `decontaminate` has found."""
    return (
        f"{answer['contaminated']:,} of {answer['samples']:,} samples are near an evaluation set "
        f"({', '.join(entry['name'] for entry in answer['against'])}), {answer['exact']:,} of them with the same "
        f"pixels; {answer['without_hash']:,} more have no hash; {_turned(answer)}"
    )


def _turned(answer: Mapping[str, Any]) -> str:
    """Say whether mirrored, rotated and letterboxed pictures were compared."""
    if not answer["turned"]:
        return "mirrored, rotated and letterboxed pictures are not found without the column scores/turned"
    return f"{answer['turned']:,} were compared mirrored, rotated and without borders too"
