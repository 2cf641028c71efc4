"""The source `synthesize`: its inputs, what fails, and corpora that are killed or built twice at once."""

import io
import json
import os
import pickle
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import side_by_side
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.selection.view import query
from microdit.pipeline.sources.source import Input, holds_models
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.drawn_corpus import COUNT, build_here, config_of, draw_all, source_of
from tests.pipeline.helpers.small_corpus import Hashes, hashes
from tests.pipeline.helpers.tiny_pipelines import flagging_checker, save_pipeline


def pixels(item: Input) -> list[Any]:
    assert item.data is not None, item.reason
    return np.asarray(Image.open(io.BytesIO(item.data))).tolist()


def test_pictures_say_how_they_were_made_and_can_be_made_again_alone(tiny_sd: Path, tmp_path: Path) -> None:
    other = save_pipeline("sd", tmp_path / "other", seed=5)
    makers = [{"model": str(tiny_sd), "weight": 2}, {"model": str(other), "name": "second", "license": "CC-BY-NC-4.0"}]
    config = config_of(tmp_path / "corpus", makers, images_per_prompt=2, seed=3)
    source = pickle.loads(pickle.dumps(source_of(config)))
    assert holds_models(source)
    told: list[str] = []
    with source.running(Corpus.create(config.corpus, "drawn", 3), told.append):
        pass
    revision = source.makers[0].identity["sha256"][:12]
    how = "2 steps, guidance 7.5, float32, 32x32, no safety checker"
    assert told[0] == f"source drawn: tiny-sd: StableDiffusionPipeline tiny-sd at {revision}, {how}"
    assert source.terms.endswith("second: CC-BY-NC-4.0 (non-commercial use only)")
    drawn = draw_all(source)
    assert len(drawn) == 2 * COUNT
    assert all(item.reason is None for item in drawn.values())
    makers_of = {item.fields["maker"] for item in drawn.values()}
    assert makers_of == {"tiny-sd", "second"}
    fields = dict(next(item for item in drawn.values() if item.fields["maker"] == "second").fields)
    assert 0 <= fields.pop("seed") < 2**53 and len(fields.pop("revision")) == 64
    row, variant = fields.pop("prompt_row"), fields.pop("variant")
    assert fields == {
        "maker": "second", "model": "other", "steps": 2, "guidance": 7.5, "size": "32x32",
        "license": "CC-BY-NC-4.0", "commercial_use": False, "prompt_source": "templates",
        "colour": drawn[f"{row:09d}-{variant:03d}"].caption.split()[1],
        "thing": drawn[f"{row:09d}-{variant:03d}"].caption.split()[2],
    }  # fmt: skip

    chosen = random.Random(0).sample(sorted(drawn), 3)
    again = source_of(config)
    for unit in again.units():
        inputs = list(again.read(unit, lambda ordinal: False))
        assert all(item.data is None and item.reason is None for item in inputs)
        wanted = {item.ordinal for item in inputs if item.key in chosen}
        for item in again.read(unit, wanted.__contains__):
            assert item == (drawn[item.key] if item.ordinal in wanted else inputs[item.ordinal])


def test_what_ingest_stores_is_what_was_encoded_and_a_corpus_cannot_change_its_makers(
    tiny_sd: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path / "corpus", [{"model": str(tiny_sd)}])
    corpus = build_here(config)
    drawn = draw_all(source_of(config))
    stored = query(corpus, "SELECT key, caption, format, bytes, fields FROM samples WHERE status = 'ok'").to_pylist()
    assert len(stored) == COUNT
    for row in stored:
        item = drawn[row["key"]]
        assert (row["caption"], row["format"], row["bytes"]) == (item.caption, "webp", len(item.data or b""))
        assert json.loads(row["fields"]) == item.fields
    assert verify(corpus).problems == []
    with pytest.raises(RequestError, match=r"makers\.0\.arguments\.num_inference_steps"):
        build_here(config_of(tmp_path / "corpus", [{"model": str(tiny_sd), "steps": 3}]))


def test_a_safety_checker_fails_what_it_flags(tmp_path: Path) -> None:
    for flags in (True, False):
        folder = save_pipeline("sd", tmp_path / f"flags-{flags}", safety_checker=flagging_checker(flags))
        drawn = draw_all(source_of(config_of(tmp_path / "corpus", [{"model": str(folder)}])))
        assert {item.reason for item in drawn.values()} == {"nsfw" if flags else None}
        assert all((item.data is None) == flags for item in drawn.values())


def test_degenerate_pictures_fail_with_a_reason(tiny_sd: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    for reason, value in (("one_colour", 0.0), ("not_finite", float("nan"))):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
        with torch.no_grad():
            pipeline.vae.decoder.conv_out.weight.fill_(value)
        pipeline.save_pretrained(tmp_path / reason)
        drawn = draw_all(source_of(config_of(tmp_path / "corpus", [{"model": str(tmp_path / reason)}])))
        assert {item.reason for item in drawn.values()} == {reason}


def test_pictures_that_repeat_fail_also_where_only_the_later_ones_are_wanted(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(save_pipeline("sd", tmp_path / "model"))
    with torch.no_grad():  # whatever the seed is, the decoder sees the same
        pipeline.vae.post_quant_conv.weight.fill_(0.0)
    pipeline.save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "corpus", [{"model": str(tmp_path / "model"), "batch": 2}], images_per_prompt=5)
    source = source_of(config)
    drawn = draw_all(source)
    assert [drawn[f"000000003-{variant:03d}"].reason for variant in range(5)] == [None, *["repeated"] * 4]
    [last] = [item for item in source.read(source.units()[0], lambda ordinal: ordinal == 19) if item.ordinal == 19]
    assert last == drawn["000000003-004"]


def hash_of(config: Any) -> Hashes:
    return hashes(Corpus.open(config.corpus), [IMAGES])


def test_killed_at_every_step_or_built_twice_at_once_the_bytes_are_the_same(tiny_sd: Path, tmp_path: Path) -> None:
    other = save_pipeline("sd", tmp_path / "other", seed=5)
    makers = [{"model": str(tiny_sd)}, {"model": str(other)}]
    undisturbed = config_of(tmp_path / "undisturbed", makers, images_per_prompt=2)
    source = source_of(undisturbed)
    build_here(undisturbed, source)
    expected, seed = hash_of(undisturbed), random.randrange(2**32)
    print(f"seed {seed}")
    torch.set_num_threads(1)  # a child that is forked has no other ones
    shards, units = len(expected), len(source.units())
    points = {"fetching": shards, "writing": 2 * COUNT, "committing": shards, "committed": shards}
    for point, most in {**points, "committing-unit": units}.items():
        config = config_of(tmp_path / point, makers, images_per_prompt=2)
        if (child := os.fork()) == 0:
            signal.alarm(120)
            side_by_side.cache_clear()  # its threads are the parent's
            os.environ["MICRODIT_FAIL_POINT"] = f"{point}:{random.Random(seed).randint(1, most)}"
            try:
                build_here(config, source)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert verify(Corpus.open(config.corpus)).problems == []
        assert hash_of(config).items() <= expected.items()
        build_here(config, source)
        assert hash_of(config) == expected

    twice = config_of(tmp_path / "twice", makers, images_per_prompt=2)
    threads = [threading.Thread(target=build_here, args=[twice]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hash_of(twice) == expected
    assert verify(Corpus.open(twice.corpus)).problems == []


def test_a_unit_in_which_a_maker_has_nothing_to_draw_is_complete(tiny_sd: Path, tmp_path: Path) -> None:
    makers = [{"model": str(tiny_sd), "name": name} for name in ("one", "two")]
    for seed in range(50):
        config = config_of(tmp_path / "corpus", makers, prompts_per_unit=2, seed=seed)
        source = source_of(config)
        empty = [unit for unit in source.units() if not source._pictures(*source._run(unit))]
        if empty:
            break
    corpus = build_here(config, source)
    assert corpus.unit("drawn", empty[0], 0).shards == []
    assert sum(commit.counts["out"] for commit in corpus.commits(IMAGES)) == COUNT
    assert verify(corpus).problems == []
