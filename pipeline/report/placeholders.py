"""Count pictures that many URLs share: placeholders such as "photo removed", which pass as pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.report.sample_view import SampleView
from microdit.pipeline.tables.sample_table import TableField

NEEDED = {"sha256", "origin", "fields"}
FINAL_URL = r"""regexp_extract(fields, '"final_url": "([^"]*)"', 1)"""
SHARED = f"""
WITH same AS (
    SELECT count(*) AS n, min(coalesce(nullif({FINAL_URL}, ''), origin)) AS url
    FROM samples WHERE status = 'ok' AND sha256 <> '' AND (origin LIKE 'http://%' OR origin LIKE 'https://%')
    GROUP BY sha256 HAVING min(origin) <> max(origin)
)
SELECT coalesce(sum(n), 0)::BIGINT AS pictures, coalesce(max(n), 0) AS most, arg_max(url, n) AS url FROM same
"""


@dataclass(frozen=True)
class SharedPictures:
    """Pictures whose bytes came from other URLs, too: how many, the most of one kind, and where those came from."""

    pictures: int
    most: int
    url: str


def shared_pictures(view: SampleView, fields: Sequence[TableField]) -> SharedPictures | None:
    """Count the pictures whose bytes came from several URLs; None if there are none."""
    if not {field.name for field in fields if field.column == IMAGES} >= NEEDED:
        return None
    row = view.rows(SHARED)[0]
    return SharedPictures(**row) if row["pictures"] else None
