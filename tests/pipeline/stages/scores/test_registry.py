"""Every scorer on a small corpus: real weights where a package carries them, else tiny random ones."""

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from microdit.model.pretrained import packaged as carried
from microdit.model.pretrained.vision import load_vision_model
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig, load_config
from microdit.pipeline.content.images import decode
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import column_kind
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest, read_rows
from microdit.pipeline.engine.messages import ShardWork
from microdit.pipeline.estimate.estimate import Machines, estimate
from microdit.pipeline.selection.view import query
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.identity import vision_identity
from microdit.pipeline.stages.ingest import SCALARS, ingest_unit
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.rows import image_bytes
from microdit.pipeline.stages.scores.caption_text import repetition, words_of
from microdit.pipeline.stages.stage import Task, UnitTask
from microdit.pipeline.upkeep.verify import verify
from tests.model.pretrained.test_packaged import CODES, drawing, written
from tests.model.pretrained.vision_models import aesthetic_model, classifier, clip_model, dino_model
from tests.pipeline.helpers.stage_outputs import SHARD, Photos, arrays, check_rows, config, lines, make, saved
from tests.servers.hub import Hub, hub

__all__ = ["hub"]

CAPTIONS = [
    "a cat, a cat, a cat and a cat",
    "the words GRAND OPENING in black letters",
    "",
    "ein Auto, das vor einem alten Haus auf der Straße steht",
]


class Pictures(Photos):
    """Ten pictures: drawings and a text. Of the third nothing came, the fifth is broken, some have no caption."""

    def read(self, unit: str, wanted) -> Generator[Input]:
        for i in range(10):
            pixels = written(("GRAND OPENING", 40)) if i == 1 else drawing(CODES[i % 3], 64 + 8 * i)
            data: bytes | None = b"broken" if i == 4 else saved(Image.fromarray(pixels))
            reason = "http_404" if i == 2 else None
            fields = {"long": f"a drawing number {i}"} if i != 3 else {}
            yield Input(i, f"k{i}", None if reason else data, "", CAPTIONS[i % 4], "", fields, reason)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus.create(tmp_path / "corpus", "scored", SHARD)
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("photos", {"adapter": "photos"})
    ingest_unit(corpus, Pictures(), UnitTask("photos-000000"), config(tmp_path / "corpus", {}))
    return corpus


def rows_of(corpus: Corpus) -> dict[str, Row]:
    return {row.key: row for commit in corpus.commits("images") for row in read_rows(corpus, commit) if row.ok}


def pixels_of(corpus: Corpus) -> dict[str, np.ndarray]:
    return {key: decode(image_bytes(row.members), 10**8).pixels for key, row in rows_of(corpus).items()}


def scores(corpus: Corpus, commits: list[Commit], scalar: str) -> dict[str, float]:
    return {line["key"]: line[scalar] for line in lines(corpus, commits) if line["status"] == "ok"}


# -- models that packages carry ----------------------------------------------------------------------------------------
def test_carried_models_on_a_corpus(corpus: Corpus) -> None:
    columns = {
        "captions/source": {},
        "scores/nsfw": {},
        "scores/text": {},
        "scores/embedding": {"model": "efficientnet"},
        "scores/caption": {"captions": "source"},
    }
    made = make(corpus, columns)
    assert made.keys() == columns.keys()
    for column, commits in made.items():
        check_rows(corpus, commits, "captions/source" if column == "scores/caption" else "images")
    pixels = pixels_of(corpus)
    nsfw, text = carried.NsfwScorer(), carried.TextScorer()
    assert scores(corpus, made["scores/nsfw"], "nsfw") == {
        key: pytest.approx(nsfw(image)["nsfw"], abs=1e-6) for key, image in pixels.items()
    }
    area = scores(corpus, made["scores/text"], "area")
    assert area["k1"] == pytest.approx(text(pixels["k1"])["area"])
    assert {key for key, share in area.items() if share > 0} == {"k1"}
    # an embedding is float16 (width,) of unit length, in a tar
    found = arrays(corpus, made["scores/embedding"])
    assert found.keys() == pixels.keys()
    for array in found.values():
        assert (array.dtype, array.shape) == (np.float16, (1280,))
        assert np.linalg.norm(array.astype(np.float32)) == pytest.approx(1, abs=2e-3)
    assert found["k0"].astype(np.float32) @ found["k9"] > 0.9  # the same drawing in two sizes
    by_key = {line["key"]: line for line in lines(corpus, made["scores/caption"])}
    assert [by_key[key]["language"] for key in ("k1", "k3")] == ["en", "de"]
    assert (by_key["k0"]["characters"], by_key["k0"]["words"]) == (29, 9)
    assert by_key["k0"]["repetition"] == pytest.approx(2 / 7)
    assert verify(corpus).problems == []
    rows = query(
        corpus, "SELECT key, nsfw, text_area, caption_words, has_scores_embedding FROM samples ORDER BY row, key"
    )
    assert rows.column_names == ["key", "nsfw", "text_area", "caption_words", "has_scores_embedding"]


def test_they_are_named_before_a_build_begins_where_they_are_not_installed(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        return None

    carried.package_fingerprint.cache_clear()
    monkeypatch.setattr(carried.importlib.util, "find_spec", missing)
    for column, options in (
        ("scores/nsfw", {}),
        ("scores/text", {}),
        ("scores/caption", {"captions": "source"}),
        ("scores/embedding-lite", {"model": "efficientnet"}),
    ):
        with pytest.raises(RequestError, match=rf"columns\.{column}.* pip install \"microdit\[scorers\]\""):
            stages_of(config(Path(corpus.url), {"captions/source": {}, column: options}))


def test_they_come_without_torch(tmp_path: Path) -> None:
    columns = {"captions/a": {}, "scores/nsfw": {}, "scores/text": {}}
    probe = (
        "import sys; from microdit.pipeline.config.build import BuildConfig\n"
        "from microdit.pipeline.stages.registry import stages_of\n"
        "for stage in stages_of(BuildConfig.model_validate_json(sys.argv[1])):\n"
        "    stage.load()\n"
        "assert not {'torch', 'ray', 'transformers'} & sys.modules.keys()\n"
    )
    asked = config(tmp_path, columns).model_dump_json()
    found = subprocess.run([sys.executable, "-c", probe, asked], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


# -- models of the hub -------------------------------------------------------------------------------------------------
def test_hub_models_on_a_corpus(corpus: Corpus, tmp_path: Path) -> None:
    beauty, vit, dino = aesthetic_model(tmp_path / "b"), classifier(tmp_path / "v"), dino_model(tmp_path / "d")
    columns = {
        "scores/aesthetic": {"model": beauty},
        "scores/nsfw-hub": {"model": vit, "label": "nsfw"},
        "scores/embedding-dino": {"model": dino},
    }
    made = make(corpus, columns, resources={"scores_batch": 4})
    pixels = pixels_of(corpus)
    for column, name, task, label in (
        ("scores/aesthetic", beauty, "aesthetic", None),
        ("scores/nsfw-hub", vit, "classify", "nsfw"),
        ("scores/embedding-dino", dino, "embed", None),
    ):
        check_rows(corpus, made[column], "images")
        assert all(commit.timings["batch"] == 4 for commit in made[column])
        model = load_vision_model(name, task, label=label)  # type: ignore[arg-type]
        wanted = {key: model.see([model.prepare(image)], 4)[0] for key, image in pixels.items()}
        if task == "embed":
            found = arrays(corpus, made[column])
            assert all(np.array_equal(found[key], wanted[key].astype(np.float16)) for key in wanted)
        else:
            found = scores(corpus, made[column], column.partition("/")[2].partition("-")[0])
            assert found == {key: float(score) for key, score in wanted.items()}
        assert found.keys() == wanted.keys()
    assert verify(corpus).problems == []
    before = {commit.name: commit.object.sha256 for column in made for commit in made[column]}
    for stage in stages_of(config(Path(corpus.url), columns, resources={"scores_batch": 4})):
        for image in corpus.commits("images"):
            [again] = stage.run(corpus, Task(image.ref, dict.fromkeys(stage.columns, 1)))
            assert again.object.sha256 == before[again.name.replace(".1.json", ".0.json")]


def test_a_clip_compares_each_captions_column(corpus: Corpus, tmp_path: Path) -> None:
    name = clip_model(tmp_path / "clip")
    captions = {"captions/source": {}, "captions/long": {"field": "long"}}
    both = {
        "scores/clip": {"model": name, "captions": "source"},
        "scores/clip-long": {"model": name, "captions": "long"},
    }
    stages = stages_of(config(Path(corpus.url), {**captions, **both}))
    assert [list(stage.columns) for stage in stages[2:]] == [list(both)]  # one model, one actor
    made = make(corpus, {**captions, **both}, resources={"scores_batch": 3})
    model, pixels = load_vision_model(name, "compare"), pixels_of(corpus)
    assert model.count_cut(["a dog " * 200, "a dog", "a cat " * 200]) == 2 and model.count_cut([]) == 0
    for column, options in both.items():
        texts = scores(corpus, corpus.commits(f"captions/{options['captions']}"), "caption")
        wanted = {
            key: float((model.see([model.prepare(pixels[key])], 3) * model.read([text], 3)).sum())
            for key, text in texts.items()
        }
        assert sum(ShardWork.of(commit).cut for commit in made[column]) == model.count_cut([*texts.values()])
        found = scores(corpus, made[column], "clip")
        assert found == {key: pytest.approx(score, abs=2e-3) for key, score in wanted.items()}
        assert all(-1 <= score <= 1 for score in found.values())
        reasons = {line["key"]: line["reason"] for line in lines(corpus, made[column]) if line["status"] == "failed"}
        assert set(reasons.values()) == {"upstream"}
        assert reasons.keys() == {f"k{i}" for i in range(10)} - texts.keys()
        for commit in made[column]:
            inputs = ["images", f"captions/{options['captions']}"]
            assert commit.inputs == [latest(corpus, column, commit.ref).as_input() for column in inputs]
    assert {"k3"} == scores(corpus, made["scores/clip"], "clip").keys() - scores(
        corpus, made["scores/clip-long"], "clip"
    ).keys()
    assert verify(corpus).problems == []
    # one column alone, and rows that are set aside or only tried
    [stage] = [stage for stage in stages if "scores/clip" in stage.columns]
    ref = corpus.commits("images")[0].ref
    assert stage.run(corpus, Task(ref, {"scores/clip": 1}, rows=range(0, 2))) == []
    [commit] = stage.run(corpus, Task(ref, {"scores/clip": 1}, aside={0: "crash", 2: "stall"}))
    told = {line["key"]: line["reason"] for line in lines(corpus, [commit])}
    assert (told["k0"], told["k1"], told["k2"]) == ("crash", None, "upstream")
    assert scores(corpus, [commit], "clip")["k1"] == pytest.approx(
        scores(corpus, made["scores/clip"], "clip")["k1"], abs=2e-3
    )


def test_a_picture_that_fails_fails_alone(corpus: Corpus, tmp_path: Path) -> None:
    """The bytes of one picture are damaged, of another one there is none."""
    first = corpus.commits("images")[0]
    with begin_attempt(corpus, "images", first.ref, generation=1) as attempt:
        for row in read_rows(corpus, first):
            scalars = {name: row.scalars[name] for name in SCALARS}
            if not row.ok:
                attempt.fail(row.row, row.key, "gone")
            elif row.key == "k0":
                attempt.add(row.row, row.key, {**row.members, "png": row.members["png"][:200]}, **scalars)
            else:
                attempt.add(row.row, row.key, row.members, **scalars)
        attempt.commit()
    name = clip_model(tmp_path / "clip")
    columns = {
        "captions/source": {},
        "scores/nsfw": {},
        "scores/clip": {"model": name, "captions": "source"},
        "scores/embedding": {"model": dino_model(tmp_path / "dino")},
    }
    made = make(corpus, columns, resources={"scores_batch": 4})
    for column in ("scores/nsfw", "scores/clip", "scores/embedding"):
        told = {line["key"]: line["reason"] for line in lines(corpus, made[column])}
        assert told["k0"] == "truncated"
        assert [key for key, reason in told.items() if reason not in (None, "upstream")] == ["k0"]
        assert told["k1"] is None


def test_a_model_that_gives_nan(corpus: Corpus, tmp_path: Path) -> None:
    name = Path(classifier(tmp_path / "vit"))
    weights = load_file(name / "model.safetensors")
    weights["classifier.bias"][:] = float("nan")
    save_file(weights, name / "model.safetensors", {"format": "pt"})
    made = make(corpus, {"scores/nsfw": {"model": str(name), "label": "nsfw"}})["scores/nsfw"]
    assert {line["reason"] for line in lines(corpus, made)} == {"not_finite", "upstream"}


def test_models_of_the_hub_are_named_before_a_build_begins(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("owner/dino", Path(dino_model(tmp_path / "dino")))
    asked = {"scores/embedding": {"model": "owner/dino"}}
    [stage] = stages_of(config(tmp_path, asked))
    told = stage.columns["scores/embedding"].stage
    assert (told["name"], told["model"]["revision"], told["model"]["dtype"]) == ("owner/dino", commit, "bfloat16")
    assert not any(path.endswith("safetensors") for path in hub.downloads())
    for column, options, words in (
        ("scores/embedding-x", {"model": "owner/none"}, "the hub has no repository owner/none"),
        ("scores/embedding-x", {"model": "owner/dino", "revision": "v9"}, "has no revision 'v9'"),
        ("scores/clip", {"model": "owner/dino", "captions": "a"}, "no text tower"),
        ("scores/nsfw", {"model": "owner/dino", "label": "nsfw"}, "it is no classifier"),
        ("scores/aesthetic", {"model": "owner/dino", "label": "good"}, "no label 'good'"),
    ):
        with pytest.raises(RequestError, match=rf"columns\.{column}\.model = 'owner/.*{words}"):
            stages_of(config(tmp_path, {"captions/a": {}, column: options}))
    # and files of it that are missing, by a listing of the repository
    for folder, without, column, options in (
        (dino_model(tmp_path / "d"), "model.safetensors", "embedding-x", {}),
        (classifier(tmp_path / "v"), "model.safetensors", "nsfw", {"label": "nsfw"}),
        (classifier(tmp_path / "v"), "model.safetensors", "aesthetic", {"label": "nsfw"}),
        (clip_model(tmp_path / "c"), "model.safetensors", "clip", {"captions": "a"}),
        (clip_model(tmp_path / "c"), "tokenizer.json or vocab", "clip-x", {"captions": "a"}),
    ):
        repo = f"owner/{column}"
        hub.add(repo, {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name.split(".")[0] not in without})
        field = rf"columns\.scores/{column}\.model = '{repo}': {repo} at [0-9a-f]{{40}} lacks "
        with pytest.raises(RequestError, match=rf"{field}(weights \()?{without}"):
            stages_of(config(tmp_path, {"captions/a": {}, f"scores/{column}": {"model": repo, **options}}))
    assert not any(path.endswith("safetensors") for path in hub.downloads())
    # what a corpus was made with stays: the branch moved on
    corpus = Corpus.create(tmp_path / "corpus", "tried", SHARD)
    corpus.declare_column("scores/embedding", told)
    (tmp_path / "dino" / "README.md").write_text("new")
    hub.add("owner/dino", tmp_path / "dino")
    vision_identity.cache_clear()
    [stage] = stages_of(config(tmp_path, asked))
    with pytest.raises(RequestError, match="revision"):
        corpus.declare_column("scores/embedding", stage.columns["scores/embedding"].stage)


# -- configs and plans -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"scores/beauty": {}}, "no such scorer; expected one of scores/basic, scores/turned, scores/nsfw"),
        ({"scores/clip": {"model": "a/b"}}, r"scores/clip\.captions.*required"),
        (
            {"scores/clip": {"model": "a/b", "captions": "long"}},
            r"scores/clip\.captions = 'long'.*this config \(source\)",
        ),
        ({"scores/caption": {"captions": "long"}}, r"scores/caption\.captions = 'long'"),
        ({"scores/embedding": {}}, r"scores/embedding\.model.*required"),
        ({"scores/nsfw": {"model": "a/b"}}, r"scores/nsfw\.label = None: which label of a/b is unsafe"),
        ({"scores/nsfw": {"label": "nsfw"}}, r"scores/nsfw\.model = 'yahoo'.*neither label nor revision"),
        ({"scores/text": {"model": "x"}}, r"scores/text\.model = 'x': there is no such field"),
    ],
)
def test_wrong_options_are_told(tmp_path: Path, columns: dict, words: str) -> None:
    tree = {"name": "x", "corpus": "x", "sources": {"web": {"adapter": "urls", "list": "x"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**tree, "columns": {"captions/source": {}, **columns}}))
    with pytest.raises(RequestError, match=words):
        load_config(tmp_path / "config.yaml")


def test_what_is_written_of_a_config_is_the_same_config(tmp_path: Path) -> None:
    columns = {
        "captions/a": {},
        "scores/basic": {},
        "scores/nsfw-hub": {"model": "a/b", "label": "nsfw", "revision": "main"},
        "scores/clip-a": {"model": "a/b", "captions": "a"},
        "scores/embedding-dino": {"model": "a/b"},
        "scores/caption": {"captions": "a"},
    }
    given_config = config(tmp_path, columns)
    assert BuildConfig.model_validate_json(given_config.model_dump_json()) == given_config


def test_whoever_holds_a_model_is_an_actor(tmp_path: Path) -> None:
    columns = {
        "captions/source": {},
        "scores/basic": {},
        "scores/nsfw": {},
        "scores/text": {},
        "scores/embedding": {"model": "efficientnet"},
        "scores/caption": {"captions": "source"},
    }
    found = {stage.name: stage.device for stage in stages_of(config(tmp_path / "corpus", columns))}
    assert found == {
        "captions/source": None,
        "scores/basic": None,
        "scores/nsfw": "cpu",
        "scores/text": "cpu",
        "scores/embedding": "gpu",
        "scores/caption": "cpu",
    }


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("scores/embedding", "tar"),
        ("scores/embedding-dino", "tar"),
        ("scores/embeddings", "table"),
        ("scores/basic", "table"),
        ("captions/embedding", "table"),
        ("embedding", "tar"),
    ],
)
def test_embeddings_are_in_tars_and_other_scores_in_tables(column: str, kind: str) -> None:
    assert column_kind(column) == kind


def test_the_config_that_curates_can_be_planned() -> None:
    found = estimate(load_config("configs/curate.yaml"), Machines(cpus=16, gpus=1, gpu="h100")).to_json()
    scored = [column for column in found["columns"] if column.startswith("scores/")]
    assert {column.partition("/")[2].partition("-")[0] for column in scored} == {
        "basic", "turned", "nsfw", "text", "aesthetic", "clip", "embedding", "caption"
    }  # fmt: skip
    assert found["stages"]["scores/nsfw"]["device"] == "cpu"
    assert found["stages"]["scores/aesthetic"]["device"] == "h100"
    assert "not measured" in found["stages"]["scores/aesthetic"]["origin"]
    assert "scores/clip" in found["totals"]["not_measured"]
    assert found["money"]["complete"] is False


# -- captions ----------------------------------------------------------------------------------------------------------
def test_words_and_repetition() -> None:
    assert words_of("The cat's hat, on 2 chairs!") == ["the", "cat's", "hat", "on", "2", "chairs"]
    assert words_of("一只猫 sits") == ["一", "只", "猫", "sits"]
    assert words_of("ภาพ")[0] == "ภ"
    assert repetition(words_of("a red apple on a green table")) == 0
    assert repetition(["a", "b"]) == 0
    assert repetition(["a"] * 10) == pytest.approx(7 / 8)
    assert repetition(words_of("猫猫猫猫猫猫")) == pytest.approx(3 / 4)
    loop = "a photo of a dog " * 20
    assert repetition(words_of(loop)) > 0.9


@settings(print_blob=True, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_words(text: str) -> None:
    words = words_of(text)
    assert all(word and not word.isspace() for word in words)
    assert 0 <= repetition(words) < 1
    assert words_of(" ".join(words)) == words
