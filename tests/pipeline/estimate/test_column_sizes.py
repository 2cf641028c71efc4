"""Bytes of columns that no past build has, from the shapes of their samples."""

from pathlib import Path

import pytest
import torch

from microdit.pipeline.corpus.arrays import array_bytes, arrays_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.quantised import Storage, quantise
from microdit.pipeline.upkeep.status import status
from tests.pipeline.helpers.tar_build import COLUMNS, build, config_of, planned, small, write_tars

__all__ = ["small"]


def test_a_column_that_was_not_built_comes_from_its_shape(small: Corpus, tmp_path: Path) -> None:
    more = {"latents/demo-128": {"autoencoder": "demo", "resolution": 128}, "text/t5-xxl@source": {"encoder": "t5-xxl"}}
    config = config_of(tmp_path, write_tars(tmp_path / "tars", 2, 1), columns={**COLUMNS, **more})
    found = planned(config, learn_from=small.url)
    latents, text = found["columns"]["latents/demo-128"], found["columns"]["text/t5-xxl@source"]
    real = build(
        config_of(tmp_path, str(tmp_path / "tars/*.tar"), columns={"latents/demo-128": more["latents/demo-128"]})
    )
    assert latents["origin"] == "shapes" and "words" in text["origin"]
    assert latents["out"] == text["out"] == found["columns"][IMAGES]["out"] == 55
    assert latents["bytes"] == pytest.approx(status(real).columns["latents/demo-128"]["own"].bytes, rel=0.1)
    assert 55 * 4 * 8192 < text["bytes"] < 55 * 25 * 8192  # three to twelve words
    assert found["totals"]["not_measured"] == ["text:t5-xxl@source"]
    assert found["stages"]["text:t5-xxl@source"]["seconds"] is None and not found["money"]["complete"]


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_quantised_column_comes_from_its_shape(storage: Storage, small: Corpus, tmp_path: Path) -> None:
    columns = {**COLUMNS, "text/t5-xxl@source": {"encoder": "t5-xxl", "storage": storage}}
    config = config_of(tmp_path, write_tars(tmp_path / "tars", 2, 1), columns=columns)
    whole = planned(config, learn_from=small.url)["columns"]["text/t5-xxl@source"]
    plain = {**columns, "text/t5-xxl@source": {"encoder": "t5-xxl"}}
    less = planned(config_of(tmp_path, str(tmp_path / "tars/*.tar"), columns=plain), learn_from=small.url)
    embedding = torch.zeros(6, 4096)
    stored = len(arrays_bytes({name: tensor.numpy() for name, tensor in quantise(embedding, storage).items()}))
    ratio = stored / len(array_bytes(embedding.half().numpy()))
    assert whole["bytes"] / less["columns"]["text/t5-xxl@source"]["bytes"] == pytest.approx(ratio, rel=0.1)
