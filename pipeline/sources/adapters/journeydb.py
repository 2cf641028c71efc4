"""`journeydb`: JourneyDB's tgz files, with the prompt and GPT-3.5's caption from the annotations beside them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from microdit.pipeline.config.sources import JourneydbSource
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample, FileSource
from microdit.pipeline.sources.members import failed, is_image, one_line
from microdit.pipeline.tables.joins.spec import JoinSpec

PAGE = "https://huggingface.co/datasets/JourneyDB/JourneyDB"
LICENSE = "JourneyDB Terms of Usage"
FIELDS = {"prompt": "prompt", "task2": "Task2.Caption"}
FEW_WORDS = 3
_ALONE = "tile|hd|testp?|creative|upbeta|uplight|upanime|video|turbo|fast|relax"  # flags without a value

_DASHED = (
    "ar|aspect|v|version|q|quality|s|stylize|niji|no|seed|c|chaos|iw|stop|style|w|h"  # what phones write with a dash
)

FLAG = re.compile(
    rf"\s*(?:--|—(?=(?:{_DASHED})\b))"
    rf"(?:(?:{_ALONE})\b|no\b(?:(?!--|—).)*|[a-z]\w*(?:\s+(?!--|—)[^\s,]+)?)",
    re.IGNORECASE | re.DOTALL,
)


class Journeydb(FileSource):
    """The adapter `journeydb`. Samples are called `<folder>/<uuid>`; fields: `prompt` as it came, `task2`, `split`.

    A file is called `<split>/<number>.tgz`, in `units`, too.
    """

    adapter = "journeydb"
    text_options = frozenset({"caption", "prompt_fallback", "strip_flags", "require_caption", "tables"})

    def __init__(self, name: str, options: JourneydbSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self.license = options.license or LICENSE
        self.terms = f"{LICENSE}: research, not commercial, and Midjourney's terms; accept them at {PAGE}"

    def listing(self) -> Listing:
        files: list[RemoteFile] = []
        identity: dict[str, Any] = {}
        for split in self._options.splits:
            listing = list_files(f"{self._root}/data/{split}/imgs/*.tgz", f"sources.{self.name}.root")
            files += [replace(file, name=f"{split}/{file.name.rpartition('/')[2]}") for file in listing.files]
            identity[split] = listing.identity
            if "repo" in listing.identity:
                identity["repo"] = listing.identity["repo"]
        return Listing(tuple(files), identity)

    def details(self) -> dict[str, Any]:
        return self._options.model_dump(
            include={"splits", "caption", "prompt_fallback", "strip_flags", "require_caption"}
        )

    def tables(self) -> Sequence[JoinSpec]:
        # the train split's is called train_anno_realease_repath; the file without `repath` names other folders
        return [
            JoinSpec(
                self.list_table(f"{self._root}/data/{split}/*_anno*repath.jsonl.tgz", f"sources.{self.name}.root"),
                "tar_jsonl",
                "img_path",
                FIELDS,
                "path_dir_stem",
                f"sources.{self.name}.root",
                first_counts=True,
            )
            for split in self._options.splits
        ]

    @property
    def _root(self) -> str:
        return self._options.root.rstrip("/")

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        split = file.name.partition("/")[0]
        table = self.table(list[str](self._options.splits).index(split))
        for member in members(path, is_image, MAX_BYTES):
            folder = member.name.rpartition("/")[0].rpartition("/")[2]
            if folder in ("", "."):  # an archive without its folder
                folder = stem(file.name)[0]
            key = f"{folder}/{stem(member.name)[0]}"  # names alone need not differ
            if member.data is None:
                yield failed(member, key if member.name else "")
                continue
            row = table.get(key) or {}
            prompt, task2 = one_line(row.get("prompt")), one_line(row.get("task2"))  # the table's texts are checked
            caption, why = self._caption(prompt, task2)
            fields = {name: text for name, text in (("prompt", prompt), ("task2", task2), ("split", split)) if text}
            if not row:
                why = f"the annotations have no {key}"
            if caption or not self._options.require_caption:
                yield FileSample(key, member.data, caption, member.name, fields)
            else:
                yield FileSample(key, None, "", member.name, fields, "no_caption", why)

    def _caption(self, prompt: str, task2: str) -> tuple[str, str]:
        """Choose the sample's caption; return it, and the explanation in case it is empty."""
        options = self._options
        stripped = strip_flags(prompt) if options.strip_flags else prompt
        if options.caption == "prompt":
            return stripped, "its prompt is nothing but flags" if prompt else "its prompt is empty"
        if options.prompt_fallback and len(task2.split()) < FEW_WORDS:
            return stripped, "neither Task2's caption nor the prompt says anything"
        return task2, "Task2 has no caption of it; prompt_fallback: true takes the prompt"


def strip_flags(prompt: str) -> str:
    """Remove Midjourney's flags from a prompt (`--ar 16:9`, `--no text`, `--tile`)."""
    return " ".join(FLAG.sub("", prompt).split()).rstrip(" ,;")
