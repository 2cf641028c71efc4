import random
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus import open_shard
from microdit.pipeline.corpus.arrays import array_bytes, array_from_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.disk_cache import DiskCache
from microdit.pipeline.selection.broken_samples import NotingShardCache
from microdit.trainer.data.batches import LegData
from microdit.trainer.data.randomness import Draw, Noise
from microdit.trainer.data.samples import open_samples
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3 import environ, environment
from tests.trainer.conftest import STAGE, build_corpus, build_recipe, write_shard


@pytest.fixture
def leg_data(corpus: Corpus, tmp_path):
    opened = []

    def make(rank: int = 0, world: int = 1, number: int = 0, max_bytes: int = 1 << 30, of: Corpus = corpus, **fields):
        recipe = build_recipe(of, tmp_path / "run", **fields)
        samples = open_samples(recipe)
        cache = NotingShardCache(of, samples.columns, max_bytes)
        opened.append(cache)
        return LegData(recipe, recipe.stages[number], samples.legs[number], cache, 2, rank, world)

    yield make
    for cache in opened:
        cache.close()


def stored(corpus: Corpus, column: str, where: tuple[str, str], row: int) -> np.ndarray:
    """The slow and plain way to one array."""
    commit = next(c for c in corpus.commits(column) if (c.source, c.shard) == where)
    line = corpus.sidecar(commit).slice(row, 1).to_pylist()[0]
    assert line["row"] == row
    return array_from_bytes(corpus.store.get_range(commit.object.name, line["offset"], line["size"]))


def test_batches_hold_what_the_columns_hold_joined_by_row(corpus: Corpus, leg_data) -> None:
    data = leg_data(caption_dropout=0.3)
    dropped = columns = 0
    for step, batch in enumerate(data.batches(0, 0, 4)):
        (micro,) = batch.micro_batches
        draw = Draw.of(3, step, 16, np.arange(16))
        noise = Noise.of(3, step, np.arange(16), (4, 4, 4), 4)
        for i, position in enumerate(batch.positions.tolist()):
            where, row = data.index.shards[data.index.shard[position]], int(data.index.row[position])
            assert np.array_equal(micro.latents[i], stored(corpus, "latents/demo-32", where, row))
            length = int(micro.text_mask[i].sum())
            assert not micro.text[i, length:].any()
            if draw.dropout[i] < 0.3:
                dropped += 1
                assert not micro.text[i].any()
            else:
                column = "text/tiny@long" if draw.caption[i] < 0.3 else "text/tiny@source"
                columns += column.endswith("long")
                assert np.array_equal(micro.text[i, :length], stored(corpus, column, where, row))
        assert torch.equal(micro.noise, noise.noise) and torch.equal(micro.permutation, noise.permutation)
        assert micro.text.shape[1] in (4, 8, 16, 32)
    assert dropped and columns


def test_of_moments_each_step_draws_a_sample(tmp_path: Path, leg_data) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=1)
    corpus.declare_column("latents/moments-32", {"stage": "latents", "resolution": 32, "posterior": "moments"})
    (images,) = corpus.commits("images")
    write_shard(corpus, "latents/moments-32", images.ref, [images])
    stages = [STAGE | {"latents": "latents/moments-32", "steps": 5, "mask_ratio": 0.5}]
    data = leg_data(of=corpus, stages=stages)
    assert data.latent_shape == (2, 4, 4)
    plain = leg_data(of=corpus)
    for step, (batch, other) in enumerate(zip(data.batches(0, 0, 3), plain.batches(0, 0, 3), strict=True)):
        (micro,) = batch.micro_batches
        draw = Noise.of(3, step, np.arange(16), (2, 4, 4), 4, moments=True)
        assert draw.posterior is not None and draw.posterior.std() > 0.8
        assert not torch.equal(draw.posterior, draw.noise)
        for i, position in enumerate(batch.positions.tolist()):
            where, row = data.index.shards[data.index.shard[position]], int(data.index.row[position])
            mean, deviation = np.split(stored(corpus, "latents/moments-32", where, row).astype(np.float32), 2)
            wanted = torch.from_numpy(mean) + torch.from_numpy(deviation) * draw.posterior[i]
            assert torch.equal(micro.latents[i], wanted)
        assert batch.positions.tolist() == other.positions.tolist()
        assert torch.equal(micro.sigma_normal, other.micro_batches[0].sigma_normal)
        without = Noise.of(3, step, np.arange(16), (2, 4, 4), 4)
        assert torch.equal(without.noise, draw.noise) and torch.equal(without.permutation, draw.permutation)


def test_batches_are_the_same_for_any_number_of_processes_micro_batches_and_start(leg_data) -> None:
    def rows(data: LegData, step: int, count: int) -> dict:
        """Everything about each global row, by step and row."""
        found = {}
        for s, batch in enumerate(data.batches(step, step * 16, count), step):
            assert data.lanes.batch(s * 16, 16, data.rank, data.world)[1].tolist() == batch.positions.tolist()
            found |= {
                (s, row): (p.latents[i], p.text[i][p.text_mask[i]], p.sigma_normal[i], p.noise[i], p.permutation[i])
                for p in batch.micro_batches
                for i, row in enumerate(p.rows.tolist())
            }
        return found

    alone = rows(leg_data(), 0, 6)
    stage = {"latents": "latents/demo-32", "batch": 16, "learning_rate": 1e-3, "steps": 9, "mask_ratio": 0.5}
    others = [
        rows(leg_data(rank=0, world=2), 0, 6) | rows(leg_data(rank=1, world=2), 0, 6),
        {k: v for rank in range(4) for k, v in rows(leg_data(rank=rank, world=4), 0, 6).items()},
        rows(leg_data(stages=[stage | {"micro_batch": 5}]), 0, 6),
        {k: v for k, v in alone.items() if k[0] < 2} | rows(leg_data(), 2, 4),
    ]
    for other in others:
        assert other.keys() == alone.keys() and len(alone) == 96
        for key, parts in alone.items():
            assert all(torch.equal(a, b) for a, b in zip(parts, other[key], strict=True)), key


def test_a_folder_is_read_where_it_is_and_each_object_is_checked_once(leg_data, monkeypatch) -> None:
    plenty = leg_data(max_bytes=1)
    digested: list[str] = []
    monkeypatch.setattr(
        open_shard, "_digest", lambda file, real=open_shard._digest: digested.append(file.name) or real(file)
    )
    monkeypatch.setattr(plenty.cache, "_most_files", 4)
    tight = [batch.positions.tolist() for batch in plenty.batches(0, 0, 12)]
    assert (
        plenty.cache.reads > 18 and len(digested) == len(set(digested)) == 30
    )  # 6 shards of 3 columns, and sidecars; one was open
    assert len(plenty.cache._shards) <= 4 and not any(map(plenty.cache._memory, plenty.cache._shards))
    other = leg_data()
    assert [batch.positions.tolist() for batch in other.batches(0, 0, 12)] == tight and other.cache.reads == 18


def test_a_small_cache_of_a_bucket_gives_the_same_batches_and_stays_small(s3_url, leg_data) -> None:
    of = build_corpus(s3_url, units=1)
    slow = {"lanes": 1, "shuffle_window": 1}
    plenty = leg_data(of=of, **slow)
    size = max(c.size for name in (plenty.leg.latents, *plenty.text) for c in of.commits(name))
    tight = leg_data(of=of, max_bytes=4 * size, **slow)
    for a, b in zip(plenty.batches(0, 0, 12), tight.batches(0, 0, 12), strict=True):
        assert torch.equal(a.micro_batches[0].latents, b.micro_batches[0].latents)
        assert torch.equal(a.micro_batches[0].text, b.micro_batches[0].text)
    tight.cache.trim()
    assert 0 < sum(map(tight.cache._memory, tight.cache._shards)) <= 4 * size
    assert plenty.cache.reads == 9 < tight.cache.reads


def test_what_would_be_fetched_again_and_again_is_refused(s3_url, tmp_path, leg_data) -> None:
    of = build_corpus(s3_url, units=1)
    with pytest.raises(RequestError, match=r"cache_mb = 0.047.*8 lanes.* give cache_folder.*set cache_mb to 1 or more"):
        leg_data(of=of, max_bytes=50_000)
    data = leg_data(of=of)
    data.cache.reader.disk = DiskCache(tmp_path, 50_000)
    with pytest.raises(RequestError, match=r"cache_gb = 5e-05.* set cache_gb to 1 or more"):
        LegData(data.recipe, data.leg, data.index, data.cache, 2)


def test_lanes_ask_for_their_shards_one_after_the_other_and_before_they_need_them(tmp_path, leg_data) -> None:
    of = build_corpus(tmp_path / "c", units=8, shards=4)
    data = leg_data(of=of, lanes=4)
    asked: list[str] = []
    request = data.cache.request
    data.cache.request = lambda column, where: (asked.append(where[1]), request(column, where))[1]
    first: dict[str, int] = {}
    for number, batch in enumerate(data.batches(0, 0, 32)):  # an epoch: four windows of a lane, eight batches each
        read = {data.index.shards[data.index.shard[i]][1] for i in batch.positions.tolist()}
        assert read <= set(asked)
        for shard in asked:
            first.setdefault(shard, number)
    news = np.bincount(list(first.values()))
    assert news.sum() == 32 and news[1:].max() <= 4  # without it 8 shards at once, as all lanes begin a window


def test_micro_batches_put_texts_of_like_length_together(leg_data) -> None:
    stage = {"latents": "latents/demo-32", "batch": 16, "learning_rate": 1e-3, "steps": 9}
    whole = next(leg_data(stages=[stage]).batches(0, 0, 1)).micro_batches
    parts = next(leg_data(stages=[stage | {"micro_batch": 6}]).batches(0, 0, 1)).micro_batches
    assert [len(p.latents) for p in whole] == [16] and [len(p.latents) for p in parts] == [6, 6, 4]
    lengths = [p.text_mask.sum(dim=1).tolist() for p in parts]
    assert [n for part in lengths for n in part] == sorted(whole[0].text_mask.sum(dim=1).tolist())
    assert parts[0].text.shape[1] < parts[2].text.shape[1] == whole[0].text.shape[1]


def test_masks_are_drawn_only_where_they_are_used(leg_data) -> None:
    masked, plain = leg_data(number=0), leg_data(number=1)
    a, b = next(masked.batches(0, 0, 1)), next(plain.batches(0, 0, 1))
    assert a.micro_batches[0].permutation is not None and b.micro_batches[0].permutation is None
    assert torch.equal(a.micro_batches[0].noise, b.micro_batches[0].noise)


def test_processes_must_divide_the_lanes(leg_data) -> None:
    with pytest.raises(RequestError, match="3 processes share 8 lanes"):
        leg_data(world=3)


def test_text_columns_of_different_widths_are_refused(tmp_path, leg_data) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=1)
    corpus.declare_column("text/wide@source", {"stage": "text"})
    (source,) = corpus.commits("captions/source")
    with begin_attempt(corpus, "text/wide@source", source.ref, [source]) as attempt:
        for row in range(16):
            attempt.add(row, f"k0-{row}", {"npy": array_bytes(np.zeros((2, 24), np.float16))})
        attempt.commit()
    with pytest.raises(RequestError, match="differ in width"):
        leg_data(of=corpus, text={"text/tiny@source": 1, "text/wide@source": 1})


def damage(corpus: Corpus, column: str, shard: str, how: str) -> None:
    (commit,) = [c for c in corpus.commits(column) if c.shard == shard]
    assert corpus.store.root is not None
    path = corpus.store.root / commit.object.name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:3000])
    else:
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])


def keys(data: list[LegData], step: int, count: int) -> list[list[str]]:
    """The sample names of global batches from step `step`, put together from all processes' parts."""
    batches = []
    for parts in zip(*(d.batches(step, 16 * step, count) for d in data), strict=True):
        whole = {}
        for d, part in zip(data, parts, strict=True):
            places = d.lanes.batch(0, 16, d.rank, d.world)[0]
            whole |= dict(zip(places.tolist(), map(d.index.name, part.positions), strict=True))
        batches.append([whole[row] for row in range(16)])
    return batches


@pytest.mark.parametrize(
    ("how", "said"), [("missing", "is not there"), ("cut", "3000 bytes, the commit says"), ("bit", "SHA-256")]
)
def test_a_broken_shard_is_named_and_replaced_from_its_lane(how, said, tmp_path, leg_data, capsys) -> None:
    corpus = build_corpus(tmp_path / "c")
    lost = "art-000000-01"
    damage(corpus, "latents/demo-32", lost, how)
    whole, data = leg_data(), leg_data(of=corpus, max_broken=0.2, lanes=4)
    lane_of = {}
    for lane in range(4):
        lane_of |= dict.fromkeys(data.lanes.samples(lane, 0, data.lanes.size(lane)).tolist(), lane)
    replaced = 0
    for step, batch in enumerate(data.batches(0, 0, 18)):  # three epochs
        rows, planned = data.lanes.batch(step * 16, 16)
        for row, want, got in zip(rows.tolist(), planned.tolist(), batch.positions.tolist(), strict=True):
            assert lane_of[got] == row % 4 and f"/{lost}/" not in data.index.name(got)
            replaced += want != got
            assert (want == got) == (f"/{lost}/" not in data.index.name(want))
    assert replaced >= 32
    said_all = capsys.readouterr().err
    assert said_all.count("broken, and replaced") == 1 and said in said_all and f"shard {lost}" in said_all
    assert data.cache.broken.count(data.index, ["latents/demo-32"]) == 16
    assert not whole.cache.broken.listed()
    with pytest.raises(RequestError, match=r"16 of 96 samples are broken, more than max_broken = 0.1 allows.*-01: "):
        list(leg_data(of=corpus, max_broken=0.1, lanes=4).batches(0, 0, 18))


def test_the_sequence_with_broken_samples_is_the_same_for_any_processes_and_resumes(tmp_path, leg_data) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=9)
    mended = {c.shard: c.object.name for c in corpus.commits("text/tiny@source")}
    kept = (tmp_path / "c" / mended["art-000000-05"]).read_bytes()
    damage(corpus, "text/tiny@source", "art-000000-05", "cut")
    damage(corpus, "latents/demo-32", "art-000000-02", "missing")
    fields = {"of": corpus, "max_broken": 0.4, "lanes": 4}
    alone = keys([leg_data(**fields)], 0, 14)
    for world in (2, 4):
        team = [leg_data(rank=rank, world=world, **fields) for rank in range(world)]
        assert keys(team, 0, 5) == alone[:5]
        listed = [line for d in team for line in d.cache.broken.listed()]  # as a checkpoint gathers it
    # killed, the shard mended meanwhile, and resumed on another number: what was broken stays replaced
    (tmp_path / "c" / mended["art-000000-05"]).write_bytes(kept)
    team = [leg_data(rank=rank, world=2, **fields) for rank in range(2)]
    for d in team:
        d.cache.broken.restore(listed)
    assert keys(team, 5, 9) == alone[5:]
    assert keys([leg_data(**fields)], 5, 9) != alone[5:]  # without the list


def test_a_row_that_is_no_array_is_replaced_alone(tmp_path, leg_data) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=2)
    corpus.declare_column("latents/bad-32", {"stage": "latents", "resolution": 32})
    for images in corpus.commits("images"):
        with begin_attempt(corpus, "latents/bad-32", images.ref, [images]) as attempt:
            for row in range(16):
                good = array_bytes(np.ones((4, 4, 4), np.float16))
                bad = {5: b"no array", 6: array_bytes(np.ones((4, 2, 4), np.float16))}.get(row, good)
                attempt.add(row, f"k-{row}", {"npy": bad})
            attempt.commit()
    data = leg_data(of=corpus, stages=[STAGE | {"latents": "latents/bad-32", "steps": 9}], max_broken=0.2)
    names = {name for batch in keys([data], 0, 4) for name in batch}
    assert len(names) == 28 and not any(name.endswith(("/5", "/6")) for name in names)
    assert [line[3] for line in data.cache.broken.listed()] == [5, 6, 5, 6]


def test_uneven_shards_and_the_end_of_an_epoch_stop_nobody(tmp_path, leg_data) -> None:
    corpus = build_corpus(tmp_path / "c", failed={"latents/demo-32": range(1, 16)})  # one good row of each shard
    (images, *_) = corpus.commits("images")
    write_shard(corpus, "latents/demo-32", images.ref, [images], generation=1)  # and one whole shard
    team = [leg_data(of=corpus, rank=rank, world=2, lanes=4) for rank in range(2)]
    with closing(team[0].batches_ahead(0, 0, 30)) as first, closing(team[1].batches_ahead(0, 0, 30)) as other:
        counts = [len(list(zip(first, other, strict=True)))]
    assert counts == [30] and len(team[0].index) == 21


def test_a_bucket_that_fails_in_passing_breaks_nothing(s3_server, s3_url, tmp_path, leg_data) -> None:
    remote = build_corpus(s3_url, units=1)
    seed = random.randrange(2**32)
    print("seed", seed)
    rates = {"error_500": 0.05, "reset": 0.03, "cut_answer": 0.05}
    with FaultyS3(s3_server, seed, rates) as proxy, environ(environment(proxy.url)):
        data = leg_data(of=Corpus.open(s3_url), max_bytes=80_000, lanes=1, shuffle_window=1)
        found = keys([data], 0, 12)
        assert sum(proxy.faults.values()) > 0 and not data.cache.broken.listed()
    assert found == keys([leg_data(of=remote, lanes=1, shuffle_window=1)], 0, 12)


def test_batches_ahead_are_all_batches_raise_what_was_raised_and_end_their_thread(leg_data, monkeypatch) -> None:
    data, before = leg_data(), threading.active_count()
    monkeypatch.setattr(data, "batches", lambda step, seen, count: iter(range(50)))
    assert list(data.batches_ahead(0, 0, 50)) == list(range(50))

    def broken(step, seen, count):
        yield 1
        raise RequestError("shard x is damaged")

    monkeypatch.setattr(data, "batches", broken)
    items = data.batches_ahead(0, 0, 2)
    assert next(items) == 1
    with pytest.raises(RequestError, match="shard x"):
        next(items)
    monkeypatch.setattr(data, "batches", lambda step, seen, count: iter(int, 1))
    endless = data.batches_ahead(0, 0, 1)
    next(endless)
    endless.close()
    assert threading.active_count() == before
