"""Which selections of a corpus have a sample; the newest ones that were looked at stay in memory."""

from collections import OrderedDict
from threading import Lock
from typing import Any

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.explore.rows import Place
from microdit.pipeline.selection.selections import list_selections, selected_rows

MOST_ROWS = 5_000_000  # of a selection that is looked into
MOST_SELECTIONS = 20
KEPT = 8


def chosen_by(selected: "SelectedRows", at: Place) -> list[dict[str, Any]]:
    """Tell of each selection whether it has a sample, and the query that decided."""
    found = []
    for selection in list_selections(selected.corpus)[:MOST_SELECTIONS]:
        if selection.rows > MOST_ROWS:
            continue
        name = f"{selection.name}@{selection.hash}"
        try:
            rows = selected.rows(name).get(at[:2])
        except RequestError:  # a damaged one, which the command line names
            continue
        chosen = rows is not None and bool(np.any(rows == at[2]))
        found.append({"name": name, "chosen": chosen, "why": selection.query})
    return found


class SelectedRows:
    """The rows of selections, by shard; those of the last few are kept, and a hash says that they never change."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self._known: OrderedDict[str, dict[tuple[str, str], np.ndarray]] = OrderedDict()
        self._lock = Lock()

    def rows(self, name: str) -> dict[tuple[str, str], np.ndarray]:
        """Read the rows of a selection (`name@hash`)."""
        with self._lock:
            if name not in self._known:
                self._known[name] = {shard: rows for shard, (rows, _) in selected_rows(self.corpus, name).items()}
            self._known.move_to_end(name)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            return self._known[name]
