"""Find the captions to make again where a source's declaration was corrected."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, ShardId
from microdit.pipeline.corpus.redeclare import latest_declaration
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.sources.source import Source
from microdit.pipeline.stages.captions.correction import Correction, is_outdated
from microdit.pipeline.stages.captions.given import GivenCaptions
from microdit.pipeline.stages.stage import Stage


def correct(
    corpus: Corpus, sources: Iterable[Source], stages: Sequence[Stage], columns: Collection[str] | None, scratch: Path
) -> tuple[list[FileSource], dict[str, set[ShardId]]]:
    """Give the stages the corrections of their sources.

    Returns:
        The sources whose texts are to be read again, and by column the shards to make again.
    """
    given = [stage for stage in stages if isinstance(stage, GivenCaptions) and stage.table is None]
    given = [stage for stage in given if columns is None or stage.name in columns]
    readers: list[FileSource] = []
    redo: dict[str, set[ShardId]] = defaultdict(set)
    for source in sources:
        if not isinstance(source, FileSource) or not given:
            continue
        number, declaration = latest_declaration(corpus, source.name)
        if number == 0:
            continue
        outdated = {commit.shard for commit in corpus.commits(IMAGES, source.name) if is_outdated(commit, number)}
        left = False
        for stage in given:
            stage.corrections[source.name] = Correction(number, declaration.fingerprint, source, scratch)
            made = {commit.shard: commit for commit in corpus.commits(stage.name, source.name)}
            again = {shard for shard in outdated & made.keys() if is_outdated(made[shard], number)}
            redo[stage.name] |= {(source.name, shard) for shard in again}
            left = left or bool(again or outdated - made.keys())
        if left:
            readers.append(source)
    return readers, dict(redo)
