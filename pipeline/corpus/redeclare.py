"""Declare a source or a column again: one of which nothing is committed, or a source whose texts come from elsewhere.

docs/reference/corpus.md, section 5, is the contract.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus, MadeOtherwiseError, differences
from microdit.pipeline.corpus.failures import FAILURE
from microdit.pipeline.corpus.names import IMAGES, PROBES, SOURCE, UNITS, commit_name
from microdit.pipeline.corpus.presence import is_living
from microdit.pipeline.corpus.records import Declaration
from microdit.pipeline.corpus.retry_units import all_taken_again, list_retry_units

CORRECTION = re.compile(rf"units/({SOURCE.pattern})\.declaration\.([1-9][0-9]*)\.json")
HASHED = re.compile(
    r"^((?:tables\.\d+\.|captions\.(?:\d+\.)?)?(?:files|list))(?:\.(?:files|sha256))?: the corpus has ['\[].*"
)
NO_CAPTION = ("no_caption", "not_text")
"""Reasons for which pictures fail if their source requires a caption."""
DECLARATION = "declaration"
"""The number, in the timings of a commit, of the correction whose texts it has; absent for the declaration itself."""


def latest_declaration(corpus: Corpus, source: str) -> tuple[int, Declaration]:
    """Return the number and the content of a source's newest declaration: 0, or that of the newest correction.

    Raises:
        FileNotFoundError: the source is not declared.
    """
    matches = [CORRECTION.fullmatch(name) for name in corpus.store.names("units")]
    number = max((int(match[2]) for match in matches if match and match[1] == source), default=0)
    if number == 0:
        return 0, corpus.source(source)
    return number, Declaration.parse(corpus.store.get(f"units/{source}.declaration.{number}.json"))


def declare_source(
    corpus: Corpus,
    source: str,
    made_by: Mapping[str, Any],
    correctable: Collection[str],
    fixed: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Declare a source, or correct its declaration.

    Args:
        correctable: the keys of `made_by` that say where texts come from, and change no input.
        fixed: for others that look so, why they cannot be corrected.

    Raises:
        RequestError: it was declared with other options, and something of it is committed.
    """
    if source not in corpus.sources():
        corpus.declare_source(source, made_by)
        return
    number, declared = latest_declaration(corpus, source)
    wanted = Declaration.parse(Declaration(name=source, kind="source", stage=dict(made_by)).to_bytes())
    old, new = declared.made_by, wanted.made_by
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if not changed:
        return
    changes = _in_words(old, new, changed)
    if is_unused_source(corpus, source):
        _remove(corpus, [f"sources/{source}.json"], f"units/{source}.", f"failures/{UNITS}/{source}")
        corpus.forget(f"sources/{source}.json")
        corpus.declare_source(source, made_by)
        say(f"source {source}: nothing of it is committed, and it is declared again: {changes}")
    elif changed <= set(correctable):
        try:
            corpus.store.create(f"units/{source}.declaration.{number + 1}.json", wanted.to_bytes())
        except FileExistsError:
            raise RequestError(
                f"source {source}: another build has corrected it in this moment; run the command again"
            ) from None
        say(f"source {source}: {changes}; its pictures stay, its captions are read again{_left_out(corpus, source)}")
    else:
        refused = sorted(changed - set(correctable))
        why = ". ".join(dict.fromkeys(fixed[key] for key in refused if key in fixed))
        raise MadeOtherwiseError("source", source, corpus.url, _in_words(old, new, refused), why)


def _left_out(corpus: Corpus, source: str) -> str:
    """Say how many pictures failed for want of a caption, and stay so, and how they are taken again."""
    counts = Counter[str]()
    for commit in corpus.commits(IMAGES, source):
        counts.update({reason: commit.reasons[reason] for reason in NO_CAPTION if reason in commit.reasons})
    if counts:
        retries = {source: list_retry_units(corpus).get(source, {})}
        counts -= Counter(row.reason for _, row in all_taken_again(corpus, retries))
    if not counts:
        return ""
    again = " ".join(f"--retry-rows {reason}" for reason in counts)
    return f"; {counts.total():,} pictures that were left out for their captions stay so: {again} takes them again"


def declare_column(
    corpus: Corpus, column: str, made_by: Mapping[str, Any], scalars: Mapping[str, str], say: Callable[[str], None]
) -> None:
    """Declare a column; one of which nothing is committed, or only failures, may have been declared otherwise.

    Raises:
        RequestError: it was, and a sample of it is ok.
    """
    try:
        corpus.declare_column(column, made_by, scalars)
    except MadeOtherwiseError as error:
        columns = [column, *_computed_from(corpus, column)]
        if _is_built(corpus) or any(commit.counts["out"] for each in columns for commit in corpus.commits(each)):
            raise
        commits = [
            commit_name(each, source, shard, generation)
            for each in columns
            for (source, shard), generation in corpus.listed(each)
        ]
        failures = [name for name in corpus.store.names("failures") if _is_failure_of(name, columns)]
        corpus.store.delete([*commits, *failures, f"columns/{column}.json"])
        corpus.forget(f"columns/{column}.json")
        corpus.declare_column(column, made_by, scalars)
        say(f"column {column}: no sample of it is ok, and it is declared again: {error.changes}")


def _computed_from(corpus: Corpus, column: str) -> list[str]:
    """List the columns that are computed from one, by a commit of each: all of a column have the same inputs."""
    inputs: dict[str, set[str]] = {}
    for each in corpus.columns():
        for (source, shard), generation in list(corpus.committed(each).items())[:1]:
            commit = corpus.commit(each, source, shard, generation)
            inputs[each] = {ref.column for ref in commit.inputs}
    found = [column]
    for known in found:
        found += [each for each, columns in inputs.items() if known in columns and each not in found]
    return found[1:]


def is_unused_source(corpus: Corpus, source: str) -> bool:
    """Return True if nothing of a source is committed, and no other build works on the corpus."""
    return not any(corpus.committed(column, source) for column in (UNITS, IMAGES)) and not _is_built(corpus)


def _is_built(corpus: Corpus) -> bool:
    return any(is_living(corpus, probe) for probe in corpus.store.list(PROBES))


def _is_failure_of(name: str, columns: Collection[str]) -> bool:
    match = FAILURE.fullmatch(name)
    return match is not None and match[1] in columns


def _in_words(old: Mapping[str, Any], new: Mapping[str, Any], keys: Collection[str]) -> str:
    """Say how some options differ; of files, which are known by a hash, that they do."""
    lines = differences({key: _unfold(old.get(key)) for key in keys}, {key: _unfold(new.get(key)) for key in keys})
    return "; ".join(HASHED.sub(r"\1: others, by name, size or version, than the corpus has", line) for line in lines)


def _unfold(value: Any) -> Any:
    """Key the parts of a list of options by their number, so that they are compared one by one."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {str(number): part for number, part in enumerate(value)}
    return value


def _remove(corpus: Corpus, names: Collection[str], *prefixes: str) -> None:
    folders = {prefix.partition("/")[0] for prefix in prefixes}
    found = [name for folder in folders for name in corpus.store.names(folder) if name.startswith(prefixes)]
    corpus.store.delete([*names, *found])
