"""Configs of builds: the shipped ones load, and have defaults."""

from pathlib import Path

import pytest

from microdit.model.pretrained.captioners import CAPTIONERS
from microdit.pipeline.config.build import load_config
from microdit.pipeline.config.captions import CaptionsColumn, pass_key
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.sources import OpenmojiSource
from microdit.pipeline.config.yaml import HOME


def test_the_demo_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("configs/demo.yaml", corpus="elsewhere")
    assert config.corpus == "elsewhere"
    assert isinstance(config.sources["openmoji"], OpenmojiSource)
    kinds = {name: type(options) for name, options in config.columns.items()}
    assert kinds["captions/long"] is CaptionsColumn
    assert kinds["latents/demo-128"] is LatentsColumn
    assert kinds["text/minilm@long"] is TextColumn


@pytest.mark.parametrize("path", sorted((HOME / "configs").glob("microdit-*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_papers_data(path: Path):
    config = load_config(path)
    assert config.name == path.stem
    assert all(options.adapter == name for name, options in config.sources.items())
    assert {"captions/source", "text/t5-xxl@source", "text/dfn-clip-h@source"} <= config.columns.keys()
    assert len([name for name in config.columns if name.startswith("latents/")]) == 2


def test_the_config_that_captions_anew():
    config = load_config("configs/recaption.yaml")
    captions = {name: options for name, options in config.columns.items() if isinstance(options, CaptionsColumn)}
    assert {name: options.origin for name, options in captions.items()} == {
        "captions/source": "source",
        "captions/long": "vlm",
        "captions/short": "vlm",
    }
    assert pass_key(captions["captions/long"]) == pass_key(captions["captions/short"])  # one pass
    assert captions["captions/long"].vlm in CAPTIONERS


def test_what_is_not_given_has_defaults(path: Path):
    config = load_config(path)
    assert config.shard_samples == 2048
    assert (config.images.min_side, config.images.max_side, config.images.format) == (256, 512, "jpg")
    assert config.columns["captions/source"] == CaptionsColumn()
