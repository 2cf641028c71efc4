"""Show the first prompts of files, and the first prompts or pictures of a source `synthesize`."""

from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.prompts import PromptsConfig
from microdit.pipeline.config.synthesis import SynthesizeSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.files.scratch import scratch_folder
from microdit.pipeline.inspect import columns as of
from microdit.pipeline.inspect.found import Found
from microdit.pipeline.inspect.sheet import SHOWN, Shown, shown_input
from microdit.pipeline.sources.registry import source_of
from microdit.pipeline.sources.synthesis.prompt_files import is_prompt_file
from microdit.pipeline.sources.synthesis.prompts import open_prompts

MODEL = {"model": "black-forest-labs/FLUX.2-klein-4B", "size": 512}
"""The maker in a config that is written: Apache-2.0, four steps."""
COUNTED = 100_000
"""Prompts of a file that are read to count them."""


def as_prompts(found: Found, files: Sequence[RemoteFile]) -> bool:
    """Take files without pictures for prompts, if there is a column of texts, or they are text; return if it is so."""
    if not is_prompt_file(files[0].name):
        return False
    prompts = {"path": found.block.get("files") or found.block["list"]}
    if "line" not in found.columns:
        column = "prompt" if "prompt" in found.columns else of.caption_column(found.columns)
        if not column:
            return False
        prompts["column"] = column
    found.layout, found.estimate = "prompts", None
    found.block = {"adapter": "synthesize", "prompts": prompts, "makers": [dict(MODEL)]}
    return True


def few_prompts(found: Found, scratch: Path) -> list[Shown]:
    """Read the first prompts of files, and note how many there are."""
    prompts = PromptsConfig(**found.block["prompts"], limit=COUNTED)
    lines, shown = _first_prompts(prompts, scratch, "PLACE")
    found.notes += lines
    return shown


def look_at_config(config: BuildConfig, draw: bool) -> tuple[Found, list[Shown]]:
    """Read the first samples of each source of a config, as a build reads them.

    Args:
        draw: load the models of sources `synthesize` and draw their first pictures; else their prompts are shown.
    """
    found, shown = Found("config", {}, len(config.sources), None), list[Shown]()
    scratch = scratch_folder(config.resources.scratch)
    for name, options in config.sources.items():
        each = max(1, SHOWN // len(config.sources))
        if isinstance(options, SynthesizeSource):
            lines, prompts = _first_prompts(options.prompts, scratch, f"sources.{name}.prompts")
            makers = ", ".join(maker.label for maker in options.makers)
            found.notes += [f"{name}: {options.images_per_prompt} for each prompt, by {makers}"]
            found.notes += [f"{name}: {line}" for line in lines]
            if not draw:
                shown += prompts[:each]
                continue
        shown += _first_samples(config, name, each)
    return found, shown


def _first_prompts(config: PromptsConfig, scratch: Path, what: str) -> tuple[list[str], list[Shown]]:
    """Open prompts; return what there is to say of them, and the first."""
    prompts = open_prompts(config, scratch, what)
    more = "the first " if len(prompts) == config.limit else ""
    lines = [f"{more}{len(prompts):,} prompts"]
    if prompts.left_out:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in prompts.left_out.items())
        lines += [f"left out: {counts}", *prompts.examples]
    return lines, [Shown(f"row {one.row + 1:,}", one.text, "", "", "") for one in prompts.read(0, SHOWN)]


def _first_samples(config: BuildConfig, name: str, most: int) -> list[Shown]:
    """Read the first samples of a source; of several makers each draws its part."""
    options, each = config.sources[name], most
    if isinstance(options, SynthesizeSource):
        enough = 4 * most  # each maker draws those of them that are its own
        few = options.prompts.model_copy(update={"limit": min(enough, options.prompts.limit or enough)})
        options, each = options.model_copy(update={"prompts": few}), max(1, most // len(options.makers))
    else:
        options = options.model_copy(update={"limit": most})
    shown: list[Shown] = []
    with TemporaryDirectory() as folder:
        source = source_of(config.model_copy(update={"sources": {name: options}}), name)
        corpus = Corpus.create(folder, config.name, config.shard_samples)
        with source.running(corpus, lambda line: None):
            for unit in source.units():
                with closing(source.read(unit, lambda ordinal: True)) as inputs:
                    shown += map(shown_input, islice(inputs, min(each, most - len(shown))))
                if len(shown) >= most:
                    break
    return shown
