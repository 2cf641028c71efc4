"""Ask embeddings of pictures by a text, where the model that made them has a text tower too."""

import re
from functools import lru_cache
from typing import Any

import numpy as np

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.records import Declaration

TWO_TOWERS = re.compile(r"clip|siglip", re.I)
LONGEST = 1000  # characters of a text that is looked for


def may_have_text(declaration: Declaration) -> bool:
    """Tell by its name whether the model of a column of embeddings may have a text tower; loading it tells for sure."""
    return TWO_TOWERS.search(str(declaration.made_by.get("name", ""))) is not None


def text_vector(declaration: Declaration, text: str) -> np.ndarray:
    """Compute the features of a text, (width,) float32, by the model of a column of embeddings.

    Raises:
        RequestError: the model cannot be loaded here, is another one, or has no text tower.
    """
    if len(text) > LONGEST:
        raise RequestError(f"text has {len(text):,} characters; expected {LONGEST:,} at most")
    name, model = str(declaration.made_by.get("name", "")), declaration.made_by.get("model", {})
    try:
        vector: np.ndarray = _model(name, model.get("revision"), tuple(sorted(map(repr, model.items())))).read([text])[
            0
        ]
        return vector
    except Exception as error:  # a model may fail to load in a hundred ways
        raise RequestError(
            f"{declaration.name} cannot be asked by text here: {first_line(error)}; look for words in the captions"
        ) from None


@lru_cache(maxsize=1)
def _model(name: str, revision: str | None, declared: tuple[str, ...]) -> Any:
    """Load a model with both towers, after it was held against what the column declares.

    Raises:
        ValueError: it is another one, or has no text tower.
    """
    from microdit.model.device import best_device
    from microdit.model.pretrained.vision import load_vision_model, vision_fingerprint

    here = vision_fingerprint(name, "embed", revision=revision)
    if tuple(sorted(map(repr, here.items()))) != declared:
        raise ValueError(f"the model {name!r} that is here is not the one that made them")
    return load_vision_model(name, "compare", revision=revision, device=best_device())
