"""`scores/fields`: numbers that came with the samples become columns of the sample table."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.config.scores import FieldScores
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.view import query
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.ingest import SCALARS, ingest_unit
from microdit.pipeline.stages.stage import UnitTask
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.dataset_archives import picture
from tests.pipeline.helpers.stage_outputs import SHARD, Photos, check_rows, config, make

FIELDS: list[dict[str, Any]] = [
    {"similarity": 0.25, "id": 7},
    {"similarity": "0.5", "id": "x"},
    {"similarity": "nan", "id": True},
    {},
    {"similarity": "1e400"},
]


class Listed(Photos):
    """Pictures with numbers, as a list has them; the second did not come."""

    def read(self, unit: str, wanted) -> Generator[Input]:
        for i, fields in enumerate(FIELDS):
            data = None if i == 1 else picture(i)
            yield Input(i, f"k{i}", data, "", "a cat", "", fields, "http_404" if data is None else None)
        for i in range(len(FIELDS), SHARD + 1):
            yield Input(i, f"k{i}", picture(i), "", "a cat", "", {"similarity": "0.75"})


def test_numbers_of_the_list_are_columns_of_the_sample_table(tmp_path: Path) -> None:
    corpus = Corpus.create(tmp_path / "corpus", "scored", SHARD)
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("photos", {"adapter": "photos"})
    ingest_unit(corpus, Listed(), UnitTask("photos-000000"), config(tmp_path / "corpus", {}))
    made = make(corpus, {"scores/fields": {"fields": ["similarity", "id"]}})
    check_rows(corpus, made["scores/fields"], "images")
    rows = query(corpus, "SELECT key, fields_similarity, fields_id FROM samples WHERE status = 'ok' ORDER BY key")
    expected = [("k0", 0.25, 7.0), ("k2", None, 1.0), ("k3", None, None), ("k4", None, None)]
    expected += [(f"k{i}", 0.75, None) for i in range(len(FIELDS), SHARD + 1)]
    assert [tuple(row.values()) for row in rows.to_pylist()] == expected
    assert verify(corpus).problems == []


@pytest.mark.parametrize("fields", [[], ["a", "a"], ["a b"], ["1"], [""]])
def test_names_that_are_no_columns_are_refused(fields: list[str]) -> None:
    with pytest.raises(ValueError):
        FieldScores(fields=fields)
