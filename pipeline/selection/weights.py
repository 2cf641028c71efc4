"""Weights of sources in a selection: by their sizes, equal, or as given."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.selection.chosen_rows import ChosenRows

EQUAL: Literal["equal"] = "equal"
Shares = Literal["equal"] | Mapping[str, float]
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def parse_shares(text: str) -> Shares:
    """Parse `equal`, or `cc12m=2,sa1b=1`: how often the samples of a source come, all together, relative to others'.

    Raises:
        RequestError: it is neither.
    """
    if text.strip() == EQUAL:
        return EQUAL
    shares: dict[str, float] = {}
    for part in text.split(","):
        source, equals, number = (word.strip() for word in part.partition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not equals or not source or source in shares or not (math.isfinite(share) and share > 0):
            raise RequestError(
                f"--weights {text}: {part.strip() or 'nothing'!r} is wrong; expected equal, or each source once with a "
                "number above 0, as in cc12m=2,sa1b=1"
            )
        shares[source] = share
    return shares


def weigh(chosen: ChosenRows, shares: Shares) -> ChosenRows:
    """Weight the rows of a selection so that each source comes as often as its share says; the mean weight is 1.

    Within a source the weights that the rows had keep their proportions.

    Raises:
        RequestError: the sources are not those that the shares name.
    """
    codes = chosen.sources
    sources = codes.dictionary.to_pylist()
    given = dict.fromkeys(sources, 1.0) if shares == EQUAL else dict(shares)
    if given.keys() != set(sources):
        wrong = [f"there is no row of {source}" for source in sorted(given.keys() - set(sources))]
        wrong += [f"{source} has no number" for source in sorted(set(sources) - given.keys())]
        raise RequestError(
            f"--weights: {', '.join(wrong)}; expected a number for each source that the query gives: "
            f"{', '.join(sorted(sources))}"
        )
    index = codes.indices.to_numpy()
    weight = chosen.weight.astype(np.float64)
    total = np.bincount(index, weight)  # adds up row by row, so that every machine has the same sums
    share = np.array([given[source] for source in sources])
    factor = share / math.fsum(share) * len(chosen) / total
    scaled = factor[index] * weight
    if not ((scaled >= LEAST) & (scaled <= MOST)).all():
        raise RequestError("--weights: some weights are too far apart for 32-bit numbers; give shares nearer together")
    return replace(chosen, weight=scaled.astype(np.float32))
