"""`scores/fields`: numbers that came with the samples."""

import json
import math
from functools import partial

from microdit.pipeline.config.scores import FieldScores
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.rows import Row
from microdit.pipeline.stages.row_stage import RowStage
from microdit.pipeline.stages.rows import Scalars
from microdit.pipeline.stages.stage import ColumnSpec


def field_score_stage(name: str, options: FieldScores) -> RowStage:
    """Make the stage of `scores/fields`."""
    stage = {"stage": "scores/fields", "version": 1, "fields": options.fields}
    scalars = dict.fromkeys(options.fields, "float64")
    load = partial(partial, _score_row, options.fields)
    return RowStage(name, ColumnSpec(stage, scalars, (IMAGES,)), None, load, scalars_only=True)


def _score_row(names: list[str], row: Row) -> Scalars:
    text = row.scalars.get("fields")
    fields = json.loads(text) if text else {}
    return {name: number for name in names if (number := as_number(fields.get(name))) is not None}


def as_number(value: object) -> float | None:
    """Convert a field to a number; None if it is none."""
    if not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
