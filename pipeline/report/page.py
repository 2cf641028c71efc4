"""`microdit report`: one self-contained page about a corpus, and about a training run on it.

What the page says comes from commits, sidecars, declarations and the sample table; nothing is remembered elsewhere,
so a report of a corpus that is still being built is right for the moment at which it was made. Text that came with
the data is untrusted: it is escaped, and the page's policy lets it load nothing.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.yaml import HOME
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit, Declaration
from microdit.pipeline.report import charts
from microdit.pipeline.report.curation import Curation, curation
from microdit.pipeline.report.facts import (
    ColumnBytes,
    ColumnSetAside,
    CorpusWork,
    FunnelStep,
    IncompleteSource,
    bytes_by_column,
    complete_samples,
    funnel,
    incomplete_sources,
    newest_selections,
    rates,
    set_aside,
)
from microdit.pipeline.report.histograms import HistogramGroup, histograms
from microdit.pipeline.report.pictures import Pictures, pictures
from microdit.pipeline.report.placeholders import SharedPictures, shared_pictures
from microdit.pipeline.report.sample_view import SampleView, open_samples
from microdit.pipeline.report.training import Training, training
from microdit.pipeline.selection.selections import Selection
from microdit.pipeline.tables.sample_table import table_fields


@dataclass(frozen=True)
class LicenceCount:
    """Kept images of a source under a licence; empty if the source does not say it."""

    license: str
    source: str
    images: int


@dataclass(frozen=True)
class LineageRow:
    """Stage or adapter that made one column or source."""

    name: str
    stage: str
    model: str
    revision: str
    """Of the model, or its hash."""
    fingerprint: str
    inputs: list[str]
    declared: str
    """The declaration in full, as JSON."""


@dataclass(frozen=True)
class PageFacts:
    """Everything that the page says; the template reads it by these names."""

    name: str
    made: str
    listed: int
    kept: int
    steps: list[FunnelStep]
    unbuilt: list[str]
    incomplete_sources: list[IncompleteSource]
    set_aside: list[ColumnSetAside]
    shared_pictures: SharedPictures | None
    notes: list[str]
    """Objects that could not be read."""
    selections: list[Selection]
    pictures: Pictures
    histograms: list[HistogramGroup]
    curation: Curation
    sizes: list[ColumnBytes]
    total_bytes: int
    work: CorpusWork
    training: Training | None
    licences: list[LicenceCount]
    attributions: list[str]
    commands: list[tuple[str, str]]
    sources: list[LineageRow]
    lineage: list[LineageRow]
    shard_samples: int


def write_report(corpus: Corpus, out: Path | None = None, run: Path | None = None) -> Path:
    """Write the page; returns its path.

    Args:
        out: the HTML file; `report.html` in the current folder if None.
        run: the output folder of a training run (`log.jsonl`, `evaluation.json`, `grid.png`).

    Raises:
        RequestError: the corpus has no images yet, or `run` is no folder, or `out` cannot be written.
    """
    out = Path(out or "report.html").expanduser()
    if run is not None and not Path(run).is_dir():
        raise RequestError(f"run {str(run)!r}: expected the output folder of a training run; there is no such folder")
    page = render(gather(corpus, Path(run) if run is not None else None))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RequestError(
            f"report {str(out)!r}: it cannot be written: {error.strerror}; give another --out"
        ) from error
    return out


def render(facts: PageFacts) -> str:
    """Fill the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": charts.format_count,
        "number": charts.format_number,
        "bytes": charts.format_bytes,
        "duration": charts.format_duration,
        "ticks": _code,
    }
    return environment.get_template("page.html.j2").render(**vars(facts), bar=charts.bar, timeline=charts.timeline)


def gather(corpus: Corpus, run: Path | None) -> PageFacts:
    """Collect everything that the page says.

    Raises:
        RequestError: the corpus has no images yet.
    """
    columns = dict(sorted(corpus.columns().items(), key=lambda item: _order(item[0])))
    commits = {name: corpus.commits(name) for name in columns}
    notes: list[str] = []
    if not commits.get(IMAGES):
        raise RequestError(f"corpus {corpus.url}: no images are committed yet; run `microdit build` first")
    fields = sorted(table_fields(columns), key=lambda field: _order(field.column))
    complete = complete_samples(fields, [name for name in columns if name != IMAGES and commits[name]])
    selections = newest_selections(corpus)
    with open_samples(corpus, commits, notes) as view:
        steps = funnel(view, commits, complete, notes)
        drawn = pictures(view, columns, commits, fields, complete.values())
        spreads = histograms(view, fields)
        chosen = curation(view, fields, list(complete.values()), selections)
        counted = licences(view)
        shared = shared_pictures(view, fields)
    sizes = bytes_by_column(commits)
    return PageFacts(
        name=corpus.name,
        made=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        listed=steps[0].count,
        kept=steps[3].count,
        steps=steps,
        unbuilt=[name for name in columns if name != IMAGES and name not in complete],
        incomplete_sources=incomplete_sources(corpus),
        set_aside=set_aside(corpus, columns),
        shared_pictures=shared,
        notes=list(dict.fromkeys(notes)),
        selections=selections,
        pictures=drawn,
        histograms=spreads,
        curation=chosen,
        sizes=sizes,
        total_bytes=sum(size.bytes for size in sizes),
        work=rates(commits),
        training=training(run) if run is not None else None,
        licences=counted,
        attributions=_attributions(corpus.sources().values()),
        commands=commands(corpus, selections),
        sources=[_lineage(d, []) for d in corpus.sources().values()],
        lineage=[_lineage(d, commits[name]) for name, d in columns.items()],
        shard_samples=corpus.shard_samples,
    )


# -- licences, lineage, commands -----------------------------------------------------------------------------------
def licences(view: SampleView) -> list[LicenceCount]:
    """Count the kept images by licence and source, the most frequent first."""
    rows = view.rows(
        "SELECT coalesce(license, '') AS license, source, count(*) AS images FROM samples WHERE status = 'ok' "
        "GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT 40"
    )
    return [LicenceCount(**row) for row in rows]


def _attributions(sources: Iterable[Declaration]) -> list[str]:
    return list(dict.fromkeys(str(s.made_by["attribution"]) for s in sources if s.made_by.get("attribution")))


def commands(corpus: Corpus, selections: Sequence[Selection]) -> list[tuple[str, str]]:
    """List (what it does, the command line) to build, look into, and check this corpus again."""
    url = corpus.url
    if corpus.store.root is not None:  # a page to share need not tell where somebody's home is
        here = Path.cwd()
        inside = corpus.store.root.is_relative_to(here)
        url = str(corpus.store.root.relative_to(here)) if inside else corpus.store.root.name
    quoted = shlex.quote(url)
    config = Path("configs") / f"{corpus.name}.yaml"
    ready = (HOME / config).is_file()
    lines = [
        ("build it, or go on where it stopped", f"microdit build {config if ready else 'CONFIG'} --corpus {quoted}")
    ]
    for selection in selections:
        line = f"microdit select {quoted} {shlex.quote(selection.name)} {_quoted(selection.query.strip())}"
        lines.append((f"select {selection.name}@{selection.hash}", line))
    lines.append(("check every byte, count and lineage", f"microdit verify {quoted}"))
    lines.append(
        ("ask your own question", f'microdit query {quoted} "SELECT source, count(*) FROM samples GROUP BY 1"')
    )
    lines.append(("make this page again", f"microdit report {quoted}"))
    return lines


def _lineage(declaration: Declaration, commits: Sequence[Commit]) -> LineageRow:
    """Say what made a column: the model that its declaration names, and the inputs that its commits name."""
    stage = declaration.made_by
    model = next((stage[k] for k in ("autoencoder", "encoder", "model", "captioner", "adapter") if k in stage), "")
    return LineageRow(
        name=declaration.name,
        stage=str(stage.get("stage", stage.get("name", declaration.kind))),
        model=model if isinstance(model, str) else json.dumps(model),
        revision=_identity({name: value for name, value in stage.items() if name != "images"}),
        fingerprint=declaration.fingerprint[:12],
        inputs=sorted({i.column for c in commits for i in c.inputs}),
        declared=json.dumps(stage, indent=2, sort_keys=True, ensure_ascii=False),
    )


def _identity(value: Any) -> str:
    """Find the revision or hash of the model, list or table that a declaration names; empty if it names none."""
    if not isinstance(value, Mapping):
        return ""
    hashes = (value.get(name) for name in ("revision", "sha256", "list", "table", "model"))
    own = next((text for text in hashes if isinstance(text, str) and text), "")
    return own[:12] or next((inner for item in value.values() if (inner := _identity(item))), "")


def _quoted(text: str) -> str:
    """Quote a shell word; in double quotes where that is safe, because SQL is full of single ones."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def _code(text: str) -> Markup:
    """Write what stands in backticks as code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else part for number, part in enumerate(text.split("`"))
    )


def _order(column: str) -> tuple[int, list[Any]]:
    """Sort columns as they are made; `demo-64` before `demo-128`, and the sources' captions first."""
    families = (IMAGES, "captions", "scores", "latents", "text")
    family = column.split("/")[0]
    rank = families.index(family) if family in families else len(families)
    parts = re.split(r"(\d+)", column.replace("captions/source", "captions/").replace("@source", "@"))
    return rank, [int(part) if part.isdecimal() else part for part in parts]
