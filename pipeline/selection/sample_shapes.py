"""Shapes of the samples of columns as a network sees them, and if latents are means and deviations."""

from collections.abc import Sequence

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.open_shard import BrokenError
from microdit.pipeline.selection.broken_samples import NotingShardCache
from microdit.pipeline.selection.sample_index import SampleIndex

MOST_SHARDS = 1000  # whose first samples are tried


def sample_shape(
    cache: NotingShardCache, index: SampleIndex, latents: str, text: Sequence[str]
) -> tuple[tuple[int, int, int], int]:
    """Find the shape of a latent (C, H, W) and the width of a caption embedding from the first sample that can be read.

    Raises:
        RequestError: text columns of different widths, which one network cannot read; or none can be read.
    """
    firsts = np.flatnonzero(np.diff(index.shard, prepend=-1))  # of each shard
    for position in firsts[:MOST_SHARDS].tolist():
        shard, row = index.locate(position)
        try:
            widths = {column: cache.field(column, shard, row).shape[1] for column in text}
            channels, height, width = cache.field(latents, shard, row).shape
        except (BrokenError, IndexError) as error:
            last = error
            continue
        if len(set(widths.values())) > 1:
            raise RequestError(f"text: the columns differ in width: {widths}; take columns of one text encoder")
        return (channels // 2 if holds_moments(cache, latents) else channels, height, width), widths[text[0]]
    raise RequestError(f"column {latents}: no sample can be read, the last because {last}; run `microdit verify`")


def holds_moments(cache: NotingShardCache, latents: str) -> bool:
    """Tell if a latents column holds means and standard deviations (2C, H, W), of which each step draws a sample."""
    return bool(cache.corpus.column(latents).made_by.get("posterior") == "moments")
