"""Build a latent corpus of image-caption pairs, and train a MicroDiT on it.

    build(config)               build a corpus, or go on with it
    open_corpus(url)            SQL, joined rows, and datasets of webdataset, torch and Ray, of a corpus
    MicroDiT                    the network
    MicroDiTPipeline            prompts to pictures, from any checkpoint
    create_latent_diffusion     the same with the interface of the released code

Training is a command: `microdit train RECIPE`, or `torchrun ... -m microdit.trainer RECIPE`. To import this package
costs nothing: what a name needs is imported with its first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microdit.model.latent_diffusion import create_latent_diffusion
    from microdit.model.network import MicroDiT
    from microdit.model.text_to_image import MicroDiTPipeline
    from microdit.pipeline.access.reader import CorpusReader
    from microdit.pipeline.config.build import BuildConfig
    from microdit.pipeline.engine.summary import BuildSummary

__all__ = ["MicroDiT", "MicroDiTPipeline", "build", "create_latent_diffusion", "open_corpus"]

_MODULES = {
    "MicroDiT": "microdit.model.network",
    "MicroDiTPipeline": "microdit.model.text_to_image",
    "create_latent_diffusion": "microdit.model.latent_diffusion",
}


def open_corpus(url: str | PathLike[str]) -> CorpusReader:
    """Open a corpus to read it: a folder, or `s3://bucket/prefix` (`gs://`, `az://`).

    >>> import microdit
    >>> corpus = microdit.open_corpus("my/corpus")
    >>> [row["captions/source"] for row in corpus.rows(["captions/source", "latents/demo-64"])][:2]
    ['picture 0', 'picture 1']

    Raises:
        microdit.pipeline.base.errors.RequestError: there is none, or it cannot be reached.
    """
    from microdit.pipeline.access.reader import CorpusReader
    from microdit.pipeline.corpus.corpus import Corpus

    return CorpusReader(Corpus.open(str(url)))


def build(
    config: str | PathLike[str] | BuildConfig,
    overrides: Sequence[str] = (),
    *,
    corpus: str | PathLike[str] | None = None,
    columns: Sequence[str] | None = None,
    retry_failed: bool = False,
    retry_rows: Sequence[str] = (),
    repair: bool = False,
) -> BuildSummary:
    """Build a corpus, or go on with it: everything that the config asks for and that is not there.

    config: a YAML file, of ours too (`configs/demo.yaml`), or a `BuildConfig`. overrides: `key=value` as on the command
        line, of a file alone. corpus: in place of the config's. columns: make these alone.
    retry_failed: take again what was set aside, and URLs that failed for a transient reason. retry_rows: make rows
        again that failed for these reasons, in all columns. repair: read all that is there, and make again what is
        damaged.

    With `RAY_ADDRESS` in the environment it works on that cluster, otherwise on this machine alone. Progress goes to
    standard error. The summary's `exit_status` is that of the command, and `text()` what it prints.

    >>> import microdit
    >>> summary = microdit.build("my/config.yaml", ["shard_samples=4"], corpus="my/corpus")
    >>> summary.exit_status, summary.columns["latents/demo-64"].out
    (0, 8)

    Raises:
        microdit.pipeline.base.errors.RequestError: the config is wrong, or the corpus was made otherwise.
    """
    from microdit.pipeline.base.errors import RequestError
    from microdit.pipeline.base.progress import shown
    from microdit.pipeline.config.build import BuildConfig, load_config
    from microdit.pipeline.engine.build import build

    if not isinstance(config, BuildConfig):
        config = load_config(str(config), overrides)
    elif overrides:
        raise RequestError("overrides are for the path of a config; change the BuildConfig itself")
    if corpus is not None:
        config = config.model_copy(update={"corpus": str(corpus)})
    with shown() as progress:
        return build(
            config, columns, retry_failed=retry_failed, retry_rows=retry_rows, repair=repair, progress=progress
        )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
