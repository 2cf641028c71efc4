"""Reading YAML: overrides land where they say, and every fault is one message."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig, load_config
from microdit.pipeline.config.sources import OpenmojiSource, UrlsSource
from microdit.pipeline.config.yaml import find_file, load_yaml
from tests.pipeline.config.conftest import TREE


def test_a_file_of_the_current_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text(yaml.safe_dump(TREE))
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo.yaml").name == "tried"
    assert find_file(tmp_path / "configs/demo.yaml") == tmp_path / "configs/demo.yaml"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("shard_samples=64", lambda c: c.shard_samples == 64),
        ("max_failures=1e-2", lambda c: c.max_failures == 0.01),
        ("images.max_side=null", lambda c: c.images.max_side is None),
        ("columns.latents/sd1.5-64.resolution=32", lambda c: c.columns["latents/sd1.5-64"].resolution == 32),
        ("columns.captions/source.by=key", lambda c: c.columns["captions/source"].by == "key"),
        ("sources.web.fetch.timeout=3", lambda c: c.sources["web"].fetch.timeout == 3.0),
        ("sources.more={adapter: urls, list: b.tsv}", lambda c: c.sources["more"].list == "b.tsv"),
        ("sources.web.license=a=b", lambda c: c.sources["web"].license == "a=b"),
        ("resources.latents_batch=7", lambda c: c.resources.latents_batch == 7),
    ],
)
def test_overrides_land(path: Path, override: str, found):
    assert found(load_config(path, [override]))


def test_the_last_override_counts(path: Path):
    assert load_config(path, ["shard_samples=3", "shard_samples=4"]).shard_samples == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("shard_sample=64", ["shard_sample", "no such field"]),
        ("shard_samples=many", ["shard_samples", "'many'", "integer"]),
        ("shard_samples=yes", ["shard_samples", "True", "number"]),
        ("shard_samples=0", ["shard_samples", "0", "greater than or equal to 1"]),
        ("max_failures=1.5", ["max_failures", "1.5", "less than or equal to 1"]),
        ("name=a b", ["name", "'a b'"]),
        ("sources={}", ["sources", "{}"]),
        ("sources.Web={adapter: urls, list: x}", ["sources.Web", "lower-case"]),
        ("sources.web.adapter=ftp", ["sources.web.adapter", "'ftp'", "'urls', 'openmoji'"]),
        ("sources.web.list=null", ["sources.web.list", "None", "string"]),
        ("sources.web.fetch.concurrency=true", ["sources.web.fetch.concurrency", "True"]),
        ("images.min_side=1000", ["images", "max_side (512)", "min_side (1000)"]),
        ("images.format=gif", ["images.format", "'gif'", "jpg"]),
        ("columns.images/x={}", ["columns.images/x", "captions/..."]),
        ("columns.scores/beauty={}", ["columns.scores/beauty", "scores/basic"]),
        ("columns.latents/x={resolution: 64}", ["columns.latents/x.autoencoder", "required"]),
        ("columns.latents/sd1.5-64.resolution=x", ["columns.latents/sd1.5-64.resolution", "'x'"]),
        ("columns.latents/sd1.5-64.size=3", ["columns.latents/sd1.5-64.size", "no such field"]),
        ("columns.text/minilm@long={encoder: minilm}", ["columns.text/minilm@long", "source"]),
        ("columns.text/minilm={encoder: minilm}", ["columns.text/minilm", "@"]),
        ("columns.captions/a/b={}", ["columns.captions/a/b"]),
        ("columns.captions/a={field: b, join: c}", ["columns.captions/a.field", "either field or join"]),
    ],
)
def test_a_fault_names_file_field_value_and_what_was_expected(path: Path, override: str, words: list[str]):
    with pytest.raises(RequestError) as error:
        load_config(path, [override])
    for word in [str(path), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override", ["shard_samples", "=3", "name.x.y=3", "shard_samples=[1", "images=&a [*a", "name=2026-99-99"]
)
def test_a_bad_override_is_named(path: Path, override: str):
    with pytest.raises(RequestError, match="override"):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "line 1"),
        ("- a\n- b", "key: value"),
        ("name: a\nname: b", "'name' is given twice"),
        ("name: !!python/object/apply:os.getcwd []", "line 1"),
        ("? [a]\n: b", "line 1"),
        ("name: 2026-99-99", "month"),
        ("[" * 5000, "recursion"),
        ("", "key: value"),
        ("name: x", "sources"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, words: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RequestError) as error:
        load_config(tmp_path / "bad.yaml")
    assert words in str(error.value)
    assert "bad.yaml" in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path):
    with pytest.raises(RequestError, match=r"nothing\.yaml: there is no such file"):
        load_config("nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match=r"bytes\.yaml"):
        load_config(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("kind", ["list", "mapping", "merge", "self"])
@pytest.mark.timeout(20)
def test_an_alias_bomb_is_refused(tmp_path: Path, kind: str):
    one = {"list": "[{}]", "mapping": "{{{}}}", "merge": "{{<<: [{}]}}"}
    lines = ["a0: &a0 {x: y}"]
    for i in range(40):
        names = [f"*a{i}"] * 9
        inner = ", ".join(names) if kind != "mapping" else ", ".join(f"k{n}: {name}" for n, name in enumerate(names))
        lines.append(f"a{i + 1}: &a{i + 1} {one.get(kind, '').format(inner)}")
    (tmp_path / "c.yaml").write_text("a: &a [*a]" if kind == "self" else "\n".join(lines))
    with pytest.raises(RequestError, match="alias") as caught:
        load_yaml(tmp_path / "c.yaml", BuildConfig)
    assert len(str(caught.value)) < 400


def test_some_aliases_are_fine(path: Path):
    override = "columns.captions/source={stage: &s x, a: [*s, *s]}"
    with pytest.raises(RequestError) as caught:
        load_config(path, [override])
    assert "there is no such field" in str(caught.value) and "unfolded" not in str(caught.value)


def test_lists_are_reached_by_number(tmp_path: Path):
    from microdit.pipeline.config.block import Options

    class Part(Options):
        steps: int

    class Recipe(Options):
        stages: list[Part]

    file = tmp_path / "recipe.yaml"
    file.write_text("stages: [{steps: 1}, {steps: 2}]")
    assert load_yaml(file, Recipe, ["stages.1.steps=9"]).stages[1].steps == 9
    assert load_yaml(file, Recipe, ["stages.0={steps: 5}"]).stages[0].steps == 5
    for override in ("stages.2.steps=9", "stages.x.steps=9"):
        with pytest.raises(RequestError, match="0 to 1"):
            load_yaml(file, Recipe, [override])


KEYS = st.lists(
    st.sampled_from([*TREE, *TREE["columns"], "web", "images", "min_side", "resolution", "0", "", "x"]), max_size=4
).map(".".join)

VALUES = st.one_of(
    st.text(max_size=12),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
        max_leaves=4,
    ).map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(KEYS, VALUES).map("=".join) | st.text(max_size=20), max_size=3))
def test_any_overrides_give_a_config_or_a_message(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]):
    file = tmp_path_factory.getbasetemp() / "overrides.yaml"
    file.write_text(yaml.safe_dump(TREE))
    try:
        config = load_config(file, overrides)
    except RequestError as error:
        assert str(error).strip()
    else:
        assert isinstance(config, BuildConfig)
        assert all(isinstance(options, UrlsSource | OpenmojiSource) for options in config.sources.values())
