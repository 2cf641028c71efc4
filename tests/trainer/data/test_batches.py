import random
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.arrays import array_bytes, array_from_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.trainer.data import shard_cache as shards
from microdit.trainer.data.ahead import in_thread
from microdit.trainer.data.batch import pad_text
from microdit.trainer.data.batches import StageData
from microdit.trainer.data.disk_cache import DiskCache
from microdit.trainer.data.order import Lanes, shuffle_quality
from microdit.trainer.data.randomness import Draw, Noise
from microdit.trainer.data.sample_index import SampleIndex, open_samples
from microdit.trainer.data.shard_cache import ShardCache
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3 import environ, environment
from tests.trainer.conftest import STAGE, build_corpus, build_recipe, write_shard


def made_up_index(sizes: list[int]) -> SampleIndex:
    rows = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return SampleIndex([("art", f"s{i}") for i in range(len(sizes))], shard, rows)


def sequence(lanes: Lanes, batch: int, steps: int, world: int = 1, start: int = 0) -> list[list[int]]:
    """The global batches from step `start`, put together from the parts of `world` processes."""
    batches = []
    for step in range(start, start + steps):
        whole = [-1] * batch
        for rank in range(world):
            for row, position in zip(*lanes.batch(step * batch, batch, rank, world), strict=True):
                assert whole[row] == -1
                whole[row] = int(position)
        batches.append(whole)
    return batches


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda s: sum(s) > 0),
    lanes=st.sampled_from([1, 4, 8, 12]),
    each=st.integers(1, 3),
    window=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_every_epoch_of_a_lane_has_each_of_its_samples_once(sizes, lanes, each, window, seed) -> None:
    index = made_up_index(sizes)
    order = Lanes(index, lanes, seed, window)
    assert lanes % order.count == 0 and order.count <= len(index)
    owned = []
    for lane in range(order.count):
        size = len(index) * (lane + 1) // order.count - len(index) * lane // order.count
        first, second = order.samples(lane, 0, size).tolist(), order.samples(lane, size, size).tolist()
        assert sorted(first) == sorted(second)
        owned += first
        # any stretch, whatever was asked before, is the same
        stretch = Lanes(index, lanes, seed, window).samples(lane, 3, 2 * size).tolist()
        assert order.samples(lane, 3, 2 * size).tolist() == stretch
        assert stretch[: max(2 * size - 3, 0)] == (first + second)[3:]
    assert sorted(owned) == list(range(len(index)))  # lanes own all, and nothing twice
    batch = order.count * each
    assert sequence(order, batch, 3, start=2) == sequence(Lanes(index, lanes, seed, window), batch, 5)[2:]


@pytest.mark.parametrize("world", [2, 4])
def test_sequence_is_the_same_for_any_number_of_processes(world: int) -> None:
    index = made_up_index([30, 50, 17, 41])
    assert sequence(Lanes(index, 8, 7, 2), 16, 12, world) == sequence(Lanes(index, 8, 7, 2), 16, 12)


def test_lane_sizes_differ_by_one_at_most_and_row_i_is_of_lane_i_mod_lanes() -> None:
    index = made_up_index([30, 50, 17, 41])
    lanes = Lanes(index, 8, 7, 2)
    owner = {}
    for lane in range(8):
        for position in lanes.samples(lane, 0, 138 // 8).tolist():
            owner[position] = lane
    assert set(Counter(owner.values()).values()) == {17}
    for batch in sequence(lanes, 16, 8):
        assert all(owner.get(position, i % 8) == i % 8 for i, position in enumerate(batch))


def test_seed_and_epoch_change_the_order_and_the_window_bounds_the_shuffle() -> None:
    index = made_up_index([20] * 12)
    lanes = Lanes(index, 2, 1, 3)
    first, second = lanes.samples(0, 0, 120), lanes.samples(0, 120, 120)
    assert first.tolist() != second.tolist()
    assert first.tolist() != Lanes(index, 2, 2, 3).samples(0, 0, 120).tolist()
    for start in range(0, 120, 60):  # three whole shards of 20 rows, mixed
        part = first[start : start + 60]
        assert len(set(index.shard[part])) == 3
        assert len(set(index.shard[part[:20]])) > 1


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 50), min_size=8, max_size=120),
    shards=st.integers(1, 6),
    lanes=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**40),
)
def test_samples_come_as_often_as_their_weights_say(weights, shards, lanes, seed) -> None:
    rows = np.arange(len(weights), dtype=np.int32)
    index = SampleIndex(
        [("art", f"s{i}") for i in range(shards)],
        (rows * shards // len(rows)).astype(np.int32),
        rows,
        np.array(weights, dtype=np.float32),
    )
    order = Lanes(index, lanes, seed, 2)
    size, epochs = order.size(0), 60
    seen = np.zeros(len(rows))
    for lane in range(order.count):
        assert order.size(lane) == size
        each = np.stack([np.bincount(order.samples(lane, e * size, size), minlength=len(rows)) for e in range(epochs)])
        assert (each.max(0) - each.min(0) <= 1).all()  # floor(r) times or once more
        seen += each.sum(0)
    wanted = index.weight / index.weight.sum() * epochs * size * order.count
    spread = 5 * np.sqrt(epochs * order.count / 4) + 1e-3 * wanted  # five deviations of a coin's
    assert (np.abs(seen - wanted) <= spread).all()
    batch = 2 * order.count
    assert sequence(order, batch, 3, start=2) == sequence(Lanes(index, lanes, seed, 2), batch, 5)[2:]
    assert sequence(order, batch, 5, world=order.count) == sequence(order, batch, 5)


def test_the_shuffle_measured_against_a_uniform_one() -> None:
    index = made_up_index([64] * 64)
    uniform = np.random.default_rng(5).permutation(len(index))
    assert shuffle_quality(uniform, index.shard) == pytest.approx(1, abs=0.05)
    assert shuffle_quality(np.arange(len(index)), index.shard) < 0.03
    lanes = Lanes(index, 8, 7, 4)
    ours = np.concatenate([lanes.batch(8 * n, 8)[1] for n in range(len(index) // 8)])
    assert 0.1 < shuffle_quality(ours, index.shard) < 1


def test_order_is_pinned() -> None:
    """A change of this order breaks every run that is resumed: it must be meant, and told."""
    lanes = Lanes(made_up_index([5, 9, 6]), 4, 11, 2)
    assert sequence(lanes, 4, 6) == [
        [4, 6, 12, 16], [1, 9, 14, 19], [2, 7, 10, 17], [3, 5, 11, 15], [0, 8, 13, 18], [1, 9, 11, 17],
    ]  # fmt: skip


def test_fewer_samples_than_lanes() -> None:
    assert Lanes(made_up_index([5]), 128, 0, 4).count == 4
    assert Lanes(made_up_index([7]), 12, 0, 4).count == 6


@pytest.fixture
def stage_data(corpus: Corpus, tmp_path):
    opened = []

    def make(rank: int = 0, world: int = 1, number: int = 0, max_bytes: int = 1 << 30, of: Corpus = corpus, **fields):
        recipe = build_recipe(of, tmp_path / "run", **fields)
        found = open_samples(recipe)
        cache = ShardCache(of, found.columns, max_bytes)
        opened.append(cache)
        return StageData(recipe, recipe.stages[number], found.stages[number], cache, 2, rank, world)

    yield make
    for cache in opened:
        cache.close()


def stored(corpus: Corpus, column: str, where: tuple[str, str], row: int) -> np.ndarray:
    """The slow and plain way to one array."""
    commit = next(c for c in corpus.commits(column) if (c.source, c.shard) == where)
    line = corpus.sidecar(commit).slice(row, 1).to_pylist()[0]
    assert line["row"] == row
    return array_from_bytes(corpus.store.get_range(commit.object.name, line["offset"], line["size"]))


def test_batches_hold_what_the_columns_hold_joined_by_row(corpus: Corpus, stage_data) -> None:
    data = stage_data(caption_dropout=0.3)
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


def test_of_moments_each_step_draws_a_sample(tmp_path: Path, stage_data) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=1)
    corpus.declare_column("latents/moments-32", {"stage": "latents", "resolution": 32, "posterior": "moments"})
    (images,) = corpus.commits("images")
    write_shard(corpus, "latents/moments-32", images.ref, [images])
    stages = [STAGE | {"latents": "latents/moments-32", "steps": 5, "mask_ratio": 0.5}]
    data = stage_data(of=corpus, stages=stages)
    assert data.latent_shape == (2, 4, 4)
    plain = stage_data(of=corpus)
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


def test_batches_are_the_same_for_any_number_of_processes_micro_batches_and_start(stage_data) -> None:
    def rows(data: StageData, step: int, count: int) -> dict:
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

    alone = rows(stage_data(), 0, 6)
    stage = {"latents": "latents/demo-32", "batch": 16, "learning_rate": 1e-3, "steps": 9, "mask_ratio": 0.5}
    others = [
        rows(stage_data(rank=0, world=2), 0, 6) | rows(stage_data(rank=1, world=2), 0, 6),
        {k: v for rank in range(4) for k, v in rows(stage_data(rank=rank, world=4), 0, 6).items()},
        rows(stage_data(stages=[stage | {"micro_batch": 5}]), 0, 6),
        {k: v for k, v in alone.items() if k[0] < 2} | rows(stage_data(), 2, 4),
    ]
    for other in others:
        assert other.keys() == alone.keys() and len(alone) == 96
        for key, parts in alone.items():
            assert all(torch.equal(a, b) for a, b in zip(parts, other[key], strict=True)), key


def test_a_folder_is_read_where_it_is_and_each_object_is_checked_once(stage_data, monkeypatch) -> None:
    plenty = stage_data(max_bytes=1)
    digested: list[str] = []
    monkeypatch.setattr(shards, "_digest", lambda file, real=shards._digest: digested.append(file.name) or real(file))
    monkeypatch.setattr(plenty.cache, "_most_files", 4)
    tight = [batch.positions.tolist() for batch in plenty.batches(0, 0, 12)]
    assert (
        plenty.cache.reads > 18 and len(digested) == len(set(digested)) == 30
    )  # 6 shards of 3 columns, and sidecars; one was open
    assert len(plenty.cache._shards) <= 4 and not any(map(plenty.cache._memory, plenty.cache._shards))
    other = stage_data()
    assert [batch.positions.tolist() for batch in other.batches(0, 0, 12)] == tight and other.cache.reads == 18


def test_a_small_cache_of_a_bucket_gives_the_same_batches_and_stays_small(s3_url, stage_data) -> None:
    of = build_corpus(s3_url, units=1)
    slow = {"lanes": 1, "shuffle_window": 1}
    plenty = stage_data(of=of, **slow)
    size = max(c.size for name in (plenty.stage.latents, *plenty.text) for c in of.commits(name))
    tight = stage_data(of=of, max_bytes=4 * size, **slow)
    for a, b in zip(plenty.batches(0, 0, 12), tight.batches(0, 0, 12), strict=True):
        assert torch.equal(a.micro_batches[0].latents, b.micro_batches[0].latents)
        assert torch.equal(a.micro_batches[0].text, b.micro_batches[0].text)
    tight.cache.trim()
    assert 0 < sum(map(tight.cache._memory, tight.cache._shards)) <= 4 * size
    assert plenty.cache.reads == 9 < tight.cache.reads


def test_what_would_be_fetched_again_and_again_is_refused(s3_url, tmp_path, stage_data) -> None:
    of = build_corpus(s3_url, units=1)
    with pytest.raises(RequestError, match=r"cache_mb = 0.047.*8 lanes.* give cache_folder.*set cache_mb to 1 or more"):
        stage_data(of=of, max_bytes=50_000)
    data = stage_data(of=of)
    data.cache.disk = DiskCache(tmp_path, 50_000)
    with pytest.raises(RequestError, match=r"cache_gb = 5e-05.* set cache_gb to 1 or more"):
        StageData(data.recipe, data.stage, data.index, data.cache, 2)


def test_lanes_ask_for_their_shards_one_after_the_other_and_before_they_need_them(tmp_path, stage_data) -> None:
    of = build_corpus(tmp_path / "c", units=8, shards=4)
    data = stage_data(of=of, lanes=4)
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


def test_micro_batches_put_texts_of_like_length_together(stage_data) -> None:
    stage = {"latents": "latents/demo-32", "batch": 16, "learning_rate": 1e-3, "steps": 9}
    whole = next(stage_data(stages=[stage]).batches(0, 0, 1)).micro_batches
    parts = next(stage_data(stages=[stage | {"micro_batch": 6}]).batches(0, 0, 1)).micro_batches
    assert [len(p.latents) for p in whole] == [16] and [len(p.latents) for p in parts] == [6, 6, 4]
    lengths = [p.text_mask.sum(dim=1).tolist() for p in parts]
    assert [n for part in lengths for n in part] == sorted(whole[0].text_mask.sum(dim=1).tolist())
    assert parts[0].text.shape[1] < parts[2].text.shape[1] == whole[0].text.shape[1]


def test_masks_are_drawn_only_where_they_are_used(stage_data) -> None:
    masked, plain = stage_data(number=0), stage_data(number=1)
    a, b = next(masked.batches(0, 0, 1)), next(plain.batches(0, 0, 1))
    assert a.micro_batches[0].permutation is not None and b.micro_batches[0].permutation is None
    assert torch.equal(a.micro_batches[0].noise, b.micro_batches[0].noise)


def test_processes_must_divide_the_lanes(stage_data) -> None:
    with pytest.raises(RequestError, match="3 processes share 8 lanes"):
        stage_data(world=3)


def test_text_columns_of_different_widths_are_refused(tmp_path, stage_data) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=1)
    corpus.declare_column("text/wide@source", {"stage": "text"})
    (source,) = corpus.commits("captions/source")
    with begin_attempt(corpus, "text/wide@source", source.ref, [source]) as attempt:
        for row in range(16):
            attempt.add(row, f"k0-{row}", {"npy": array_bytes(np.zeros((2, 24), np.float16))})
        attempt.commit()
    with pytest.raises(RequestError, match="differ in width"):
        stage_data(of=corpus, text={"text/tiny@source": 1, "text/wide@source": 1})


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


def keys(data: list[StageData], step: int, count: int) -> list[list[str]]:
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
def test_a_broken_shard_is_named_and_replaced_from_its_lane(how, said, tmp_path, stage_data, capsys) -> None:
    corpus = build_corpus(tmp_path / "c")
    lost = "art-000000-01"
    damage(corpus, "latents/demo-32", lost, how)
    whole, data = stage_data(), stage_data(of=corpus, max_broken=0.2, lanes=4)
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
    assert data.cache.broken.samples(data.index, ["latents/demo-32"]) == 16
    assert not whole.cache.broken.listed()
    with pytest.raises(RequestError, match=r"16 of 96 samples are broken, more than max_broken = 0.1 allows.*-01: "):
        list(stage_data(of=corpus, max_broken=0.1, lanes=4).batches(0, 0, 18))


def test_the_sequence_with_broken_samples_is_the_same_for_any_processes_and_resumes(tmp_path, stage_data) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=9)
    mended = {c.shard: c.object.name for c in corpus.commits("text/tiny@source")}
    kept = (tmp_path / "c" / mended["art-000000-05"]).read_bytes()
    damage(corpus, "text/tiny@source", "art-000000-05", "cut")
    damage(corpus, "latents/demo-32", "art-000000-02", "missing")
    fields = {"of": corpus, "max_broken": 0.4, "lanes": 4}
    alone = keys([stage_data(**fields)], 0, 14)
    for world in (2, 4):
        team = [stage_data(rank=rank, world=world, **fields) for rank in range(world)]
        assert keys(team, 0, 5) == alone[:5]
        listed = [line for d in team for line in d.cache.broken.listed()]  # as a checkpoint gathers it
    # killed, the shard mended meanwhile, and resumed on another number: what was broken stays replaced
    (tmp_path / "c" / mended["art-000000-05"]).write_bytes(kept)
    team = [stage_data(rank=rank, world=2, **fields) for rank in range(2)]
    for d in team:
        d.cache.broken.restore(listed)
    assert keys(team, 5, 9) == alone[5:]
    assert keys([stage_data(**fields)], 5, 9) != alone[5:]  # without the list


def test_a_row_that_is_no_array_is_replaced_alone(tmp_path, stage_data) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=2)
    corpus.declare_column("latents/bad-32", {"stage": "latents", "resolution": 32})
    for images in corpus.commits("images"):
        with begin_attempt(corpus, "latents/bad-32", images.ref, [images]) as attempt:
            for row in range(16):
                good = array_bytes(np.ones((4, 4, 4), np.float16))
                bad = {5: b"no array", 6: array_bytes(np.ones((4, 2, 4), np.float16))}.get(row, good)
                attempt.add(row, f"k-{row}", {"npy": bad})
            attempt.commit()
    data = stage_data(of=corpus, stages=[STAGE | {"latents": "latents/bad-32", "steps": 9}], max_broken=0.2)
    names = {name for batch in keys([data], 0, 4) for name in batch}
    assert len(names) == 28 and not any(name.endswith(("/5", "/6")) for name in names)
    assert [line[3] for line in data.cache.broken.listed()] == [5, 6, 5, 6]


def test_uneven_shards_and_the_end_of_an_epoch_stop_nobody(tmp_path, stage_data) -> None:
    corpus = build_corpus(tmp_path / "c", failed={"latents/demo-32": range(1, 16)})  # one good row of each shard
    (images, *_) = corpus.commits("images")
    write_shard(corpus, "latents/demo-32", images.ref, [images], generation=1)  # and one whole shard
    team = [stage_data(of=corpus, rank=rank, world=2, lanes=4) for rank in range(2)]
    with closing(in_thread(team[0].batches(0, 0, 30))) as first, closing(in_thread(team[1].batches(0, 0, 30))) as other:
        counts = [len(list(zip(first, other, strict=True)))]
    assert counts == [30] and len(team[0].index) == 21


def test_a_bucket_that_fails_in_passing_breaks_nothing(s3_server, s3_url, tmp_path, stage_data) -> None:
    remote = build_corpus(s3_url, units=1)
    seed = random.randrange(2**32)
    print("seed", seed)
    rates = {"error_500": 0.05, "reset": 0.03, "cut_answer": 0.05}
    with FaultyS3(s3_server, seed, rates) as proxy, environ(environment(proxy.url)):
        data = stage_data(of=Corpus.open(s3_url), max_bytes=80_000, lanes=1, shuffle_window=1)
        found = keys([data], 0, 12)
        assert sum(proxy.faults.values()) > 0 and not data.cache.broken.listed()
    assert found == keys([stage_data(of=remote, lanes=1, shuffle_window=1)], 0, 12)


def test_padding() -> None:
    texts = [np.ones((n, 3), np.float16) for n in (2, 5, 1)]
    padded, mask = pad_text(texts, [4, 8, 16])
    assert padded.shape == (3, 8, 3) and mask.sum(axis=1).tolist() == [2, 5, 1]
    assert padded.sum() == 3 * 8
    with pytest.raises(RequestError, match="17 tokens, the last length is 16; add 17"):
        pad_text([np.ones((17, 3), np.float16)], [4, 8, 16])


def test_draws_depend_on_seed_step_and_row_alone() -> None:
    rows = np.arange(8)
    a, b = Draw.of(1, 5, 8, rows), Draw.of(1, 5, 8, np.array([6, 3]))
    assert torch.equal(a.sigma_normal[[6, 3]], b.sigma_normal) and np.array_equal(a.caption[[6, 3]], b.caption)
    assert not np.array_equal(a.caption, a.dropout)
    for other in (Draw.of(1, 6, 8, rows), Draw.of(2, 5, 8, rows)):
        assert not torch.equal(a.sigma_normal, other.sigma_normal)
        assert not np.array_equal(a.caption, other.caption)


def test_noise_depends_on_seed_step_and_row_alone() -> None:
    rows = np.arange(512)
    a, b = Noise.of(1, 5, rows, (4, 2, 2), 4), Noise.of(1, 5, np.array([6, 300]), (4, 2, 2), None)
    assert torch.equal(a.noise[[6, 300]], b.noise) and b.permutation is None
    assert a.permutation is not None and a.permutation.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * len(rows)
    assert len({tuple(row) for row in a.noise.flatten(1).tolist()}) == len(rows)
    assert abs(a.noise.mean()) < 0.05 and abs(a.noise.std() - 1) < 0.05  # 8,192 numbers: four standard errors
    assert abs(np.corrcoef(a.noise.flatten(1)[:-1].ravel(), a.noise.flatten(1)[1:].ravel())[0, 1]) < 0.05
    for other in (Noise.of(1, 6, rows, (4, 2, 2), 4), Noise.of(2, 5, rows, (4, 2, 2), 4)):
        assert not torch.equal(a.noise, other.noise)


def test_in_thread_gives_all_raises_what_was_raised_and_ends_its_thread() -> None:
    assert list(in_thread(iter(range(50)))) == list(range(50))  # type: ignore[arg-type]

    def broken():
        yield 1
        raise RequestError("shard x is damaged")

    items = in_thread(broken())
    assert next(items) == 1
    with pytest.raises(RequestError, match="shard x"):
        next(items)
    endless = in_thread(iter(int, 1))  # type: ignore[arg-type]
    next(endless)
    endless.close()
    assert not [t for t in threading.enumerate() if t.name == "batches"]
