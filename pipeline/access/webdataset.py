"""Give joined rows to the stock `webdataset` library, as samples of encoded files that it decodes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import webdataset

from microdit.pipeline.access.joined import JoinedRow, JoinedShard, read_joined
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import column_kind

WebdatasetSample = dict[str, str | bytes]


class JoinedWebDataset(webdataset.DataPipeline, webdataset.FluidInterface):
    """Joined samples, undecoded; made by `CorpusReader.to_webdataset`.

    `.decode("pil")`, `.shuffle(...)` and so on are those of `webdataset.WebDataset`.
    """

    def __init__(self, corpus: Corpus, shards: Sequence[JoinedShard]):
        super().__init__(
            partial(iter, shards),
            webdataset.split_by_node,
            webdataset.split_by_worker,
            partial(webdataset_samples, corpus),
        )


def webdataset_samples(corpus: Corpus, shards: Iterable[JoinedShard]) -> Iterator[WebdatasetSample]:
    """Read shards one by one; `__key__` is `source/key`, the other keys are `<column>.<extension>`."""
    for shard in shards:
        url = f"{corpus.url}/{next(iter(shard.commits.values())).object.name}"
        for row in read_joined(corpus, shard):
            yield {"__key__": row.id, "__url__": url} | _files(row)


def _files(row: JoinedRow) -> dict[str, bytes]:
    """Give each column's files: those of its tar; a caption as .txt, scores as .json, quantised text as .npy."""
    files: dict[str, bytes] = {}
    for column in row.lines:
        if column.startswith("captions/"):
            files[f"{column}.txt"] = str(row[column]).encode()
            continue
        if column_kind(column) == "table":
            files[f"{column}.json"] = json.dumps(row[column]).encode()
            continue
        for extension, content in row.members[column].items():
            if extension == "npz":
                files[f"{column}.npy"] = array_bytes(row[column])  # type: ignore[arg-type]
            else:
                files[f"{column}.{extension}"] = content
    return files
