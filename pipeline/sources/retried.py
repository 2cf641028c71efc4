"""Read a unit of a source, or of its inputs those alone that a retry unit takes again."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.retry_units import RETRY, RetryUnit
from microdit.pipeline.sources.source import Input, Source


def read_unit(corpus: Corpus, source: Source, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
    """Read exactly one Input per input of the unit, as `Source.read`; a retry unit's from the unit that it retries.

    Raises:
        DamagedError: the record of the retry unit's inputs cannot be understood.
        ValueError: the source has fewer inputs than it says.
    """
    if (match := RETRY.fullmatch(unit)) is None:
        yield from source.read(unit, wanted)
        return
    record = corpus.read_record(f"units/{source.name}/{unit}.json", RetryUnit)
    index = {ordinal: number for number, (ordinal, _) in enumerate(record.ordinals())}

    def wanted_again(ordinal: int) -> bool:
        return ordinal in index and wanted(index[ordinal])

    given = 0
    with closing(source.read(match[1], wanted_again)) as inputs:
        for item in inputs:
            if item.ordinal in index:
                given += 1
                yield replace(item, ordinal=index[item.ordinal])
                if given == len(index):
                    return
    raise ValueError(f"{unit}: the source gives {given} of its {len(index)} inputs: its file was changed, or is cut")
