"""Captions of models in the process: several columns in one pass, the same bytes twice, and what is asked once more."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microdit.model.pretrained.captioners import CaptionAnswer, CaptionModel, load_captioner
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import load_config
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.content.caption_faults import fault
from microdit.pipeline.content.images import decode_within
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.stages.captions import asking
from microdit.pipeline.stages.captions.vision_language import Vlm
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.rows import image_bytes
from microdit.pipeline.stages.stage import Task, seed_of
from microdit.pipeline.upkeep.verify import verify
from tests.model.pretrained.captioner_models import vision_folder
from tests.pipeline.helpers.stage_outputs import check_rows, config, lines, make, start

BATCH = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vision_folder(tmp_path_factory.mktemp("models") / "blip", "blip")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return start(tmp_path / "corpus")


def asked(folder: str, **more: Any) -> dict[str, Any]:
    return {"vlm": folder, "max_tokens": 12, "temperature": 1.0, "image_side": 64, "prompt": "a red apple", **more}


def pair(folder: str) -> dict[str, Any]:
    return {"captions/long": asked(folder), "captions/short": asked(folder, kind="short", prompt="the dog runs")}


def in_batches(corpus: Corpus, columns: dict[str, Any]) -> dict[str, list[Commit]]:
    return make(corpus, columns, resources={"captions_batch": BATCH})


def expected(corpus: Corpus, model: CaptionModel, column: str, options: CaptionsColumn) -> dict[str, tuple[str, str]]:
    """(caption, reason) of each image by its key: a bare loop over the samples, in the batches that a shard has."""
    found: dict[str, tuple[str, str]] = {}

    def ask(some: list[tuple[str, Any]], name: str, temperature: float) -> list[CaptionAnswer]:
        seeds = [seed_of(name, "photos", key) for key, _ in some]
        return model.generate([p for _, p in some], str(options.prompt), options.most_tokens, temperature, seeds)

    for images in corpus.commits("images"):
        rows = [row for row in read_rows(corpus, images) if row.ok]
        pictures = [(r.key, model.prepare(decode_within(image_bytes(r.members), 10**6, 64))) for r in rows]
        again: list[tuple[str, Any]] = []
        for last, temperature in ((False, options.temperature), (True, max(options.temperature, 0.7))):
            waiting = again if last else pictures
            while waiting:
                batch, waiting = waiting[:BATCH], waiting[BATCH:]
                answers = ask(batch, f"{column} again" if last else column, temperature)
                for one, answer in zip(batch, answers, strict=True):
                    bad = fault(answer.text, answer.finished, options.asked_kind, "en")
                    found[one[0]] = ("", bad[0]) if bad else (" ".join(answer.text.split()), "")
                    if bad and not last:
                        again.append(one)
    return found


def told(corpus: Corpus, commits: list[Commit]) -> dict[str, tuple[str, str]]:
    found = [line for line in lines(corpus, commits) if line["reason"] != "upstream"]
    for line in found:
        assert line["tokens"] == (len(line["caption"].split()) if line["caption"] else None)
    return {line["key"]: (line["caption"] or "", line["reason"] or "") for line in found}


def test_long_and_short_come_of_one_pass_over_the_images(
    corpus: Corpus, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, prepared = [], []

    def load(*where: Any, **options: Any) -> CaptionModel:
        loads.append(where)
        model = load_captioner(*where, **options)
        prepare: Callable[[Any], Any] = model.prepare

        def counted(pixels: Any) -> Any:
            prepared.append(pixels.shape)
            return prepare(pixels)

        monkeypatch.setattr(model, "prepare", counted)
        return model

    monkeypatch.setattr("microdit.model.pretrained.captioners.load_captioner", load)
    columns = pair(folder)
    made = in_batches(corpus, columns)
    assert len(loads) == 1 and len(prepared) == 10  # of twelve photos, the missing and the broken one are not seen
    assert max(side for shape in prepared for side in shape[:2]) == 64
    model = load_captioner(folder)
    reasons = set()
    for column, options in columns.items():
        check_rows(corpus, made[column], "images")
        wanted = expected(corpus, model, column, CaptionsColumn.model_validate(options))
        assert told(corpus, made[column]) == wanted
        reasons |= {reason for _, reason in wanted.values()}
        for commit in made[column]:
            assert {"encode_seconds", "batch", "again"} <= commit.timings.keys()
        assert sum(commit.timings["again"] for commit in made[column]) > 0
    assert "" in reasons and "cut_off" in reasons  # a random model seldom ends, and sometimes does
    assert told(corpus, made["captions/long"]) != told(corpus, made["captions/short"])
    stages = [corpus.column(column).made_by for column in columns]
    assert [stage["prompt"] for stage in stages] == ["a red apple", "the dog runs"]
    assert [stage["kind"] for stage in stages] == ["long", "short"]
    assert stages[0]["captioner"] == folder and stages[0]["model"]["folder"] == "blip"
    assert verify(corpus).problems == []


def hashes(commits: list[Commit]) -> list[str]:
    return [commit.object.sha256 for commit in commits]


def test_the_same_bytes_again_alone_and_together(tmp_path: Path, folder: str) -> None:
    corpus = start(tmp_path / "one")
    columns = pair(folder)
    first = in_batches(corpus, columns)
    # in a second corpus `short` was there already, and `long` is made of it alone
    other = start(tmp_path / "two")
    stage = stages_of(config(tmp_path / "two", columns, resources={"captions_batch": BATCH}))[0]
    for column, spec in stage.columns.items():
        other.declare_column(column, spec.stage, spec.scalars)
    again: dict[str, list[Commit]] = {}
    for column in ("captions/short", "captions/long"):
        for images in other.commits("images"):
            again.setdefault(column, []).extend(stage.run(other, Task(images.ref, {column: 0})))
    for column, commits in first.items():
        assert hashes(again[column]) == hashes(commits)
    # and a repair
    images = other.commits("images")[0]
    (repaired,) = stage.run(other, Task(images.ref, {"captions/long": 1}))
    assert repaired.object.sha256 == first["captions/long"][0].object.sha256


def test_rows_that_are_set_aside_fail_and_a_trial_commits_nothing(corpus: Corpus, folder: str) -> None:
    (stage,) = stages_of(config(Path(corpus.url), {"captions/long": asked(folder)}))
    spec = stage.columns["captions/long"]
    corpus.declare_column("captions/long", spec.stage, spec.scalars)
    images = corpus.commits("images")[0]
    assert stage.run(corpus, Task(images.ref, {"captions/long": 0}, rows=range(2))) == []
    (made,) = stage.run(corpus, Task(images.ref, {"captions/long": 0}, {0: "crash"}))
    assert corpus.sidecar(made).to_pylist()[0]["reason"] == "crash"


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ("I'm sorry, I can't do that.", "A dog on a beach.", ""),
        ("", "", "empty"),
        ("I cannot help with that.", "a dog " * 30, "loop"),
        ("A dog on a", "Ein Hund sitzt auf einem roten Sofa.", "wrong_language"),
        ("A dog on a", "A dog on a green", "cut_off"),
        ("As an AI, I cannot.", "I am unable to.", "refusal"),
    ],
)
def test_what_is_no_caption_is_asked_for_once_more(
    corpus: Corpus, folder: str, monkeypatch: pytest.MonkeyPatch, first: str, second: str, outcome: str
) -> None:
    """What a real model would say of a hard image: no random one says it."""
    temperatures = []

    def generate(
        self: Any, pictures: Any, prompt: str, most: int, temperature: float, seeds: Any
    ) -> list[CaptionAnswer]:
        temperatures.append(temperature)
        said = second if temperature else first
        return [CaptionAnswer(said, "." in said)] * len(seeds)

    monkeypatch.setattr(CaptionModel, "generate", generate)
    made = make(corpus, {"captions/long": asked(folder, temperature=0.0)})["captions/long"]
    found = set(told(corpus, made).values())
    assert found == ({("", outcome)} if outcome else {(second, "")})
    assert set(temperatures) == {0.0, asking.AGAIN}
    assert sum(commit.timings["again"] for commit in made) == 10
    details = {line["detail"] for line in lines(corpus, made) if line["reason"] == "wrong_language"}
    assert all("first cut_off" in detail for detail in details)


def test_a_model_that_cannot_do_one_image_does_the_others(
    corpus: Corpus, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = CaptionModel.generate
    seed = seed_of("captions/long", "photos", "k1")

    def fails(self: Any, pictures: Any, prompt: str, most: int, temperature: float, seeds: Any) -> list[CaptionAnswer]:
        if seed in seeds:
            raise RuntimeError("this one")
        return generate(self, pictures, prompt, most, temperature, seeds)

    monkeypatch.setattr(CaptionModel, "generate", fails)
    found = {
        line["key"]: line for line in lines(corpus, make(corpus, {"captions/long": asked(folder)})["captions/long"])
    }
    assert (found["k1"]["reason"], found["k1"]["detail"]) == ("error", "RuntimeError: this one")
    assert {found[key]["reason"] for key in found} - {"upstream", "cut_off", None, "error", "wrong_language"} == set()
    assert sum(line["reason"] == "error" for line in found.values()) == 1


# -- what a config asks for ------------------------------------------------------------------------------------------
def stages(tmp_path: Path, columns: dict[str, Any]) -> list[Any]:
    return stages_of(config(tmp_path, columns))


def test_columns_of_one_model_are_one_stage(tmp_path: Path, folder: str) -> None:
    columns = {**pair(folder), "captions/source": {}, "captions/small": asked(folder, image_side=32)}
    found = stages(tmp_path, columns)
    assert [(s.name, sorted(s.columns)) for s in found] == [
        ("captions:long+1", ["captions/long", "captions/short"]),
        ("captions/source", ["captions/source"]),
        ("captions:small", ["captions/small"]),
    ]
    assert pickle.loads(pickle.dumps(found[0])).columns == found[0].columns
    usual = Vlm({"captions/x": CaptionsColumn(vlm=folder)}, 10**6, config(tmp_path, {}).resources)
    assert usual.columns["captions/x"].stage["max_tokens"] == 384


def test_a_model_that_is_not_to_be_had_is_named_before_the_build(tmp_path: Path, folder: str) -> None:
    with pytest.raises(RequestError, match=r"columns.captions/x.vlm = 'qwen9': captioner 'qwen9' is neither"):
        stages(tmp_path, {"captions/x": {"vlm": "qwen9"}})
    with pytest.raises(
        RequestError, match=r"captions/x.engine = 'vllm': it is missing; pip install \"microdit\[vllm\]"
    ):
        stages(tmp_path, {"captions/x": asked(folder, engine="vllm")})
    with pytest.raises(RequestError, match=r"captions/x.language = 'xx': expected one of "):
        stages(tmp_path, {"captions/x": asked(folder, language="xx")})
    with pytest.raises(RequestError, match=r"captions/x.tags = 'vgg': there is no such tagger"):
        stages(tmp_path, {"captions/x": {"tags": "vgg"}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{vlm: a, endpoint: 'http://x/v1', model: m}", "vlm = 'a': give either vlm or endpoint"),
        ("{field: a, tags: efficientnet-lite0}", "field = 'a': give either field or tags"),
        ("{prompt: a}", "prompt = 'a': it is for vlm and endpoint, not for source"),
        ("{vlm: a, clean: paper}", "clean = 'paper': it is for source and field and join, not for vlm"),
        ("{vlm: a, top: 3}", "top = 3: it is for tags, not for vlm"),
        ("{vlm: a, max_spend: 3}", "max_spend = 3.0: it is for endpoint, not for vlm"),
        ("{endpoint: 'http://x/v1'}", "model = None: say what the server calls its model"),
        ("{endpoint: 'ftp://x', model: m}", "endpoint = 'ftp://x': expected a URL"),
        ("{endpoint: 'http://a:b@x', model: m}", "it must not hold a password"),
        ("{endpoint: 'http://x', model: m, max_spend: 1}", "give price_in and price_out too"),
        ("{vlm: a, kind: poem}", "kind = 'poem': input should be 'alt', 'short', 'long' or 'tags'"),
    ],
)
def test_columns_that_make_no_sense_are_refused(tmp_path: Path, options: str, message: str) -> None:
    file = tmp_path / "corpus.yaml"
    file.write_text(
        f"name: n\ncorpus: c\nsources: {{s: {{adapter: urls, list: x}}}}\ncolumns: {{captions/a: {options}}}\n"
    )
    with pytest.raises(RequestError) as error:
        load_config(file)
    assert f"columns.captions/a.{message}" in str(error.value) or message in str(error.value)
