"""Give joined rows to torch, as a dataset of known length that is read in any order."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from microdit.pipeline.access.joined import JoinedShard, RowReader, ok_rows
from microdit.pipeline.corpus.corpus import Corpus


class JoinedTorchDataset(Dataset[dict[str, Any]]):
    """Samples as dictionaries: `id`, `weight`, and by column what `JoinedRow` says, arrays as tensors.

    Made by `CorpusReader.to_torch_dataset`. `weights` (float32, N) are those of the selection, for
    `torch.utils.data.WeightedRandomSampler`.
    """

    def __init__(self, corpus: Corpus, shards: Sequence[JoinedShard]):
        self._shards, self._reader = list(shards), RowReader(corpus)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(partial(ok_rows, corpus), self._shards))
        self._shard = np.repeat(np.arange(len(found), dtype=np.int32), [len(rows) for rows, _ in found])
        self._row = np.concatenate([rows for rows, _ in found])
        self.weights = np.concatenate([weights for _, weights in found])

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not -len(self) <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        shard, weight = self._shards[self._shard[position]], float(self.weights[position])
        row = self._reader.read(shard, int(self._row[position]), weight)
        values = {column: row[column] for column in shard.commits}
        return {"id": row.id, "weight": weight} | {
            column: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for column, value in values.items()
        }
