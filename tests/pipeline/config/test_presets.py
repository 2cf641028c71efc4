"""Presets: each set of 2026 built to the end from a miniature of it, and what they require."""

from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.presets import presets
from microdit.pipeline.upkeep.verify import verify
from tests.miniatures import layout
from tests.miniatures.built import build, check
from tests.miniatures.modern import modern
from tests.miniatures.server import missed, publish
from tests.servers.files_server import FilesServer, files_server
from tests.servers.hub import TOKEN, Hub, hub

__all__ = ["files_server", "hub"]
REQUIRED = [(name, option) for name, preset in presets().items() for option in preset.get("required", {})]


def config_of(folder: Path, source: dict[str, Any]) -> BuildConfig:
    given = {"name": "mini", "corpus": str(folder / "corpus"), "shard_samples": 4, "sources": {"it": source}}
    given |= {"columns": {"captions/source": {}}, "resources": {"scratch": str(folder / "scratch")}}
    return BuildConfig.model_validate(given)


def test_every_preset_has_a_layout_and_terms():
    assert presets().keys() == layout("modern")["sets"].keys()
    assert all(preset["block"]["terms"] for preset in presets().values())
    for preset in presets().values():
        assert "license" in preset["block"] or "license" in preset["required"]


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_sample_of_a_preset(
    name: str, tmp_path: Path, hub: Hub, files_server: FilesServer, monkeypatch: pytest.MonkeyPatch
):
    made, given = modern(name), layout("modern")["sets"][name].get("given", {})
    publish([made], hub, files_server)
    if layout("modern")["sets"][name].get("gated"):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = config_of(tmp_path, {"preset": name, **given})
    corpus, told = build(config)
    assert len(check(corpus, "it", made.expected)) == len(made.expected)
    assert presets()[name]["block"]["terms"] in told
    assert verify(corpus).problems == []
    before = {each.name for each in corpus.store.list("commits")}
    again, _ = build(config)  # nothing to do
    assert {each.name for each in again.store.list("commits")} == before
    assert missed(hub, files_server) == []
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize(("name", "option"), REQUIRED)
def test_what_is_not_sure_is_required_with_a_message(tmp_path: Path, name: str, option: str):
    given = dict.fromkeys(presets()[name]["required"], "x")
    del given[option]
    with pytest.raises(ValueError, match=f"{name} requires this option: ") as raised:
        config_of(tmp_path, {"preset": name, **given})
    assert presets()[name]["required"][option] in str(raised.value)


def test_a_preset_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match="expected one of gpic, flux-reason-6m"):
        config_of(tmp_path, {"preset": "laion"})
