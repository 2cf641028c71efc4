"""Latents of several autoencoders and resolutions: made together, one by one, again, and with what goes wrong."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.encoders import LatentsColumn
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content import crop
from microdit.pipeline.content.crop import square, squares
from microdit.pipeline.content.images import decode, encode
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.corpus.rows import Row, read_rows
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.report.pictures import pictures
from microdit.pipeline.report.sample_view import open_samples
from microdit.pipeline.stages import latents as latents_stage
from microdit.pipeline.stages.batch_line import WRITING
from microdit.pipeline.stages.latents import Latents
from microdit.pipeline.stages.rows import image_bytes
from microdit.pipeline.stages.stage import Task, seed_of
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS, write_images

ROOT = Path(__file__).parents[3]
REF = ShardRef(source="demo", unit="demo-000000", shard="demo-000000-00")
ROWS = 30  # sides of 64 to 93 pixels
FAILED = (2, 11)
KEYS = [f"{REF.shard}-{row}" for row in range(ROWS)]


def kl(folder: Path, seed: int, spread: float = 20.0, gain: float = 1.0) -> str:
    """A random autoencoder of the real class, f8 with 4 channels, whose posterior has a width that matters."""
    torch.manual_seed(seed)
    module = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        module.encoder.conv_out.weight.mul_(spread)
        module.quant_conv.weight[:4].mul_(gain)
        module.quant_conv.bias[:4].mul_(gain)
    module.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kl(tmp_path_factory.mktemp("models") / "one", 0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kl(tmp_path_factory.mktemp("models") / "two", 1)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return start(tmp_path / "corpus")


def start(root: Path) -> Corpus:
    corpus = Corpus.create(root, "latents", ROWS)
    corpus.declare_source("demo", {"adapter": "made"})
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, IMAGE_SCALARS)
    write_images(corpus, REF, FAILED, rows=ROWS)
    return corpus


def columns(**given: tuple[str, int] | tuple[str, int, str]) -> dict[str, LatentsColumn]:
    """`a=(autoencoder, resolution[, posterior])` is the column `latents/a`."""
    names = ("autoencoder", "resolution", "posterior")
    return {
        f"latents/{name}": LatentsColumn(**dict(zip(names, values, strict=False)))  # type: ignore[arg-type]
        for name, values in given.items()
    }


def stage_of(corpus: Corpus, asked: dict[str, LatentsColumn], **resources: Any) -> Latents:
    stage = Latents(asked, 10**8, Resources(**{"latents_batch": 4} | resources))
    for name, spec in stage.columns.items():
        corpus.declare_column(name, spec.stage, spec.scalars)
    stage.load()
    return stage


def run(stage: Latents, corpus: Corpus, wanted: Sequence[str] | None = None, **more: Any) -> dict[str, Commit]:
    task = Task(REF, dict.fromkeys(stage.columns if wanted is None else wanted, 0), **more)
    return {commit.column: commit for commit in stage.run(corpus, task)}


def arrays(corpus: Corpus, commit: Commit) -> dict[str, np.ndarray]:
    with corpus.open_object(commit) as file:
        return {key: array_from_bytes(members["npy"]) for key, members in read_tar(file)}


def reasons(corpus: Corpus, commit: Commit) -> dict[str, str | None]:
    return {line["key"]: line["reason"] for line in corpus.sidecar(commit).to_pylist()}


def rows_of(corpus: Corpus) -> dict[str, Row]:
    [images] = corpus.commits("images")
    return {row.key: row for row in read_rows(corpus, images) if row.ok}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What every decode was asked to shrink to."""
    calls: list[int | None] = []

    def counting(data: bytes, max_pixels: int, shrink_to: int | None = None) -> Any:
        calls.append(shrink_to)
        return decode(data, max_pixels, shrink_to)

    monkeypatch.setattr(crop, "decode", counting)
    return calls


# -- one decode ------------------------------------------------------------------------------------------------------
def test_all_autoencoders_and_resolutions_share_a_decode_and_one_more_touches_nothing(
    corpus: Corpus, one: str, two: str, decoded: list[int | None]
) -> None:
    asked = columns(one64=(one, 64), one48=(one, 48), two64=(two, 64))
    stage = stage_of(corpus, asked)
    assert stage.models["latents/one64"] is stage.models["latents/one48"] is not stage.models["latents/two64"]
    made = run(stage, corpus)
    assert made.keys() == asked.keys()
    assert len(decoded) == ROWS - len(FAILED)
    before = {name: corpus.store.get(name) for name in corpus.store.names()}

    decoded.clear()
    later = stage_of(corpus, asked | columns(two48=(two, 48), mean=(one, 56, "mode")))
    added = run(later, corpus, ["latents/two48", "latents/mean"])
    assert added.keys() == {"latents/two48", "latents/mean"}
    assert len(decoded) == ROWS - len(FAILED)
    assert {name: corpus.store.get(name) for name in before} == before
    for column, commit in (made | added).items():
        options = (later._options)[column]
        found, model = arrays(corpus, commit), load_autoencoder(options.autoencoder)
        assert list(found) == [key for row, key in enumerate(KEYS) if row not in FAILED]
        for key in (KEYS[0], KEYS[29]):
            pixels = square(decode(image_bytes(rows_of(corpus)[key].members), 10**8).pixels, options.resolution)
            seeds = [seed_of(column, "demo", key)]
            wanted = model.encode(pixels[None].copy(), posterior=options.posterior, seeds=seeds)[0].numpy()
            assert np.abs(found[key] - wanted).max() <= 4e-3 * np.abs(wanted).max()
        lines = {line["key"]: line for line in corpus.sidecar(commit).to_pylist()}
        assert all(lines[key]["absmax"] == np.abs(latent).max() for key, latent in found.items())
        assert commit.timings["encode_seconds"] > 0
        assert {key for key, reason in reasons(corpus, commit).items() if reason} == {KEYS[row] for row in FAILED}


def test_a_column_does_not_depend_on_what_is_made_with_it(tmp_path: Path, one: str, two: str) -> None:
    """Nor on the threads: of these images the resolution of 16 is decoded at a fraction, that of 64 whole."""
    asked = columns(a=(one, 64), b=(one, 16), c=(two, 32, "mode"))
    corpus = start(tmp_path / "together")
    together = run(stage_of(corpus, asked), corpus)
    for column in asked:
        other = start(tmp_path / column.replace("/", "-"))
        alone = run(stage_of(other, {column: asked[column]}, decode_threads=5), other)
        assert alone[column].object.sha256 == together[column].object.sha256
        assert alone[column].fingerprint == together[column].fingerprint


def cut(data: bytes, sides: Iterable[int]) -> dict[int, np.ndarray]:
    out = {side: np.full((side, side, 3), 77, np.uint8) for side in sides}
    squares(data, out, 10**8)
    return out


def jpeg(width: int, height: int) -> bytes:
    noise = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encode(noise, ImageOptions(quality=70))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(8, 420),
    height=st.integers(8, 420),
    sides=st.sets(st.sampled_from([8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 256]), min_size=1, max_size=5),
)
def test_what_is_cut_for_a_side_is_the_same_whatever_the_other_sides(width: int, height: int, sides: set[int]) -> None:
    data = jpeg(width, height)
    together = cut(data, sides)
    for side in sides:
        alone = cut(data, [side])[side]
        assert alone.shape == (side, side, 3) and alone.dtype == np.uint8
        assert np.array_equal(together[side], alone)


def test_fractions_are_decoded_once_and_show_the_same_picture(decoded: list[int | None]) -> None:
    """A smooth picture of odd size, of which the fraction's last row and column are half beyond it."""
    y, x = np.mgrid[0:751, 0:1003]
    pixels = np.stack([127 + 120 * np.sin(x / 61), 127 + 120 * np.cos(y / 47), (x + y) % 256 // 2], 2).astype(np.uint8)
    data = encode(pixels, ImageOptions(quality=95))
    found = cut(data, [64, 60, 56, 512, 448])
    assert len(decoded) == 2  # whole, and a quarter for what is small
    for side, cropped in found.items():
        whole = square(pixels, side).astype(int)
        assert np.abs(cropped - whole)[2:-2, 2:-2].mean() < 2.5
        # moved by as little as a third of a pixel it would be further off
        assert abs((cropped.astype(int) - whole).mean()) < 0.5


# -- posteriors ------------------------------------------------------------------------------------------------------
def test_moments_give_the_mode_and_the_sample(corpus: Corpus, one: str) -> None:
    asked = columns(moments=(one, 64, "moments"), mode=(one, 64, "mode"), sample=(one, 64))
    found = {column: arrays(corpus, commit) for column, commit in run(stage_of(corpus, asked), corpus).items()}
    model = load_autoencoder(one)
    for key, both in found["latents/moments"].items():
        assert both.shape == (8, 8, 8) and both.dtype == np.float16
        mean, deviation = np.split(both.astype(np.float32), 2)
        assert np.array_equal(mean, found["latents/mode"][key])
        assert (deviation >= 0).all() and deviation.max() > 0.01
        noise = model.noise([seed_of("latents/sample", "demo", key)], 64, 64)[0].numpy()
        wanted = found["latents/sample"][key]
        assert np.abs(mean + deviation * noise - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_the_report_shows_the_means_of_moments(corpus: Corpus, one: str) -> None:
    made = run(stage_of(corpus, columns(moments=(one, 64, "moments"), mode=(one, 64, "mode"))), corpus)
    commits = {column: [commit] for column, commit in made.items()} | {"images": corpus.commits("images")}
    with open_samples(corpus, commits, []) as view:
        shown = pictures(view, {column: corpus.column(column) for column in made}, commits, [], ["status = 'ok'"])
    assert shown.problems == [] and len(shown.samples) > 5
    assert shown.psnr["latents/moments"] == shown.psnr["latents/mode"]
    for sample in shown.samples:
        first, second = (view.uri for view in sample.views[1:])
        assert first == second


def test_a_deterministic_autoencoder_has_no_moments(corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    ).save_pretrained(tmp_path / "dc")
    dc = str(tmp_path / "dc")
    with pytest.raises(RequestError, match=r"columns\.latents/x\.posterior = 'moments': .*deterministic.*'mode'"):
        stage_of(start(tmp_path / "other"), columns(x=(dc, 64, "moments")))
    made = run(stage_of(corpus, columns(sample=(dc, 64), mode=(dc, 64, "mode"))), corpus)
    assert made["latents/sample"].object.sha256 == made["latents/mode"].object.sha256


# -- numbers that are none -------------------------------------------------------------------------------------------
def test_images_whose_latents_are_no_numbers_fail_and_those_beside_them_do_not(
    corpus: Corpus, one: str, tmp_path: Path
) -> None:
    """An autoencoder whose means are beyond float16 for some of the images, and one that gives NaN for others."""
    plain = arrays(corpus, run(stage_of(corpus, columns(plain=(one, 64, "mode"))), corpus)["latents/plain"])
    largest = {key: float(np.abs(latent).max()) for key, latent in plain.items()}
    middle = float(np.median(list(largest.values())))
    large = kl(tmp_path / "large", 0, gain=65504 / middle)
    commit = run(stage_of(corpus, columns(large=(large, 64, "mode"))), corpus)["latents/large"]
    failed = {key for key, reason in reasons(corpus, commit).items() if reason == "not_finite"}
    assert {key for key, value in largest.items() if value > 1.02 * middle} <= failed
    assert not failed & {key for key, value in largest.items() if value < 0.98 * middle}
    assert 5 < len(failed) < ROWS - 5
    found = arrays(corpus, commit)
    assert found.keys() == plain.keys() - failed and all(np.isfinite(latent).all() for latent in found.values())
    assert commit.counts == {"in": ROWS, "out": len(found), "failed": len(failed) + len(FAILED)}

    stage = stage_of(corpus, columns(nan=(one, 64, "mode")))
    row, column = 9, "latents/nan"
    spoiled = cut(image_bytes(rows_of(corpus)[KEYS[row]].members), [64])[64]

    def spoil(module: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        wanted = torch.from_numpy(spoiled.copy()).permute(2, 0, 1).float() / 127.5 - 1
        pixels = arguments[0].clone()
        for i, image in enumerate(pixels):
            if (image.float() - wanted).abs().max() < 0.02:
                pixels[i, 0, 5, 5] = torch.nan
        return (pixels,)

    handle = stage.models[column]._module.encoder.register_forward_pre_hook(spoil)
    commit = run(stage, corpus)[column]
    handle.remove()
    assert {key for key, reason in reasons(corpus, commit).items() if reason == "not_finite"} == {KEYS[row]}
    found = arrays(corpus, commit)
    assert found.keys() == plain.keys() - {KEYS[row]}
    assert all(np.array_equal(found[key], plain[key]) for key in found)


# -- what goes wrong around it ---------------------------------------------------------------------------------------
def test_memory_that_one_column_lacks_halves_its_batches_alone(corpus: Corpus, one: str, tmp_path: Path) -> None:
    asked = columns(a=(one, 64), b=(one, 32))
    whole = {column: arrays(corpus, commit) for column, commit in run(stage_of(corpus, asked), corpus).items()}
    other = start(tmp_path / "other")
    stage = stage_of(other, asked)
    sizes = []

    class LittleRoom:
        def __init__(self, model: Any):
            self.model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)

        def encode(self, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
            sizes.append(len(pixels))
            if len(pixels) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.model.encode(pixels, **options)

    stage.models["latents/a"] = LittleRoom(stage.models["latents/a"])
    made = run(stage, other)
    assert sizes == [4] + [2] * 14
    assert (made["latents/a"].timings["batch"], made["latents/b"].timings["batch"]) == (2, 4)
    for column, commit in made.items():
        for key, latent in arrays(other, commit).items():
            assert np.abs(latent - whole[column][key]).max() <= 4e-3 * np.abs(whole[column][key]).max()


@pytest.mark.parametrize("where", ["reading", "encoding", "writing"])
def test_an_error_anywhere_ends_the_shard_and_leaves_nothing(
    where: str, corpus: Corpus, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(corpus, columns(a=(one, 32)))
    count = 0

    def broken(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > (ROWS // 2 if where == "writing" else 2):
            raise OSError("the disk is full")
        return working(*arguments, **options)

    if where == "reading":
        [images] = corpus.commits("images")
        path = Path(corpus.url, images.object.name)
        path.write_bytes(path.read_bytes()[: images.object.size // 2])
    elif where == "encoding":
        working: Any = stage.models["latents/a"].encode
        monkeypatch.setattr(stage.models["latents/a"], "encode", broken)
    else:
        working = latents_stage.array_bytes
        monkeypatch.setattr(latents_stage, "array_bytes", broken)
    before = threading.active_count()
    with pytest.raises(Exception, match=r"disk is full|unexpected end of data"):
        run(stage, corpus)
    assert threading.active_count() == before
    assert corpus.committed("latents/a") == {}
    assert not list(corpus.store.unfinished()) and not list(corpus.store.names("latents"))


def test_a_model_that_is_faster_than_the_disk_does_not_fill_the_memory(
    corpus: Corpus, one: str, decoded: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, free, written = stage_of(corpus, columns(a=(one, 32)), latents_batch=2), threading.Event(), 0

    def slow(array: np.ndarray) -> bytes:
        nonlocal written
        free.wait()
        written += 1
        return working(array)

    working = latents_stage.array_bytes
    monkeypatch.setattr(latents_stage, "array_bytes", slow)
    worker = threading.Thread(target=run, args=(stage, corpus))
    worker.start()
    before = -1
    while len(decoded) != before or not decoded:
        before = len(decoded)
        time.sleep(0.3)
    # batches that wait to be written, the one that is written, the one that has no place, those that are decoded ahead
    assert len(decoded) <= 2 * (WRITING + 2) + (2 + 2 * 2) < ROWS - len(FAILED)
    assert written == 0
    free.set()
    worker.join()
    assert written == ROWS - len(FAILED) == len(decoded)
    assert len(corpus.committed("latents/a")) == 1


def test_the_next_shard_is_decoded_while_the_last_of_one_is_encoded(
    corpus: Corpus, one: str, decoded: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, refs = columns(a=(one, 32), b=(one, 64)), [REF, REF.model_copy(update={"shard": "demo-000000-01"})]
    roots = [corpus, start(tmp_path / "alone")]
    for root in roots:
        write_images(root, refs[1], FAILED, rows=ROWS)
    stage, gate, encoding = stage_of(corpus, asked), threading.Event(), []

    def slow(*arguments: Any, **options: Any) -> Any:
        encoding.append(threading.get_ident())
        if len(encoding) == 12:  # of 14: seven batches for each column
            gate.wait()
        return working(*arguments, **options)

    working = stage.models["latents/a"].encode
    monkeypatch.setattr(stage.models["latents/a"], "encode", slow)
    found: list[Commit] = []

    def work(ref: ShardRef) -> None:
        found.extend(stage.run(corpus, Task(ref, dict.fromkeys(asked, 0))))

    workers = [threading.Thread(target=work, args=(ref,)) for ref in refs]
    workers[0].start()
    while not encoding:  # the first one is the first
        time.sleep(0.01)
    workers[1].start()
    deadline = time.monotonic() + 60
    while (len(encoding) < 12 or len(decoded) < ROWS - len(FAILED) + 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(encoding) == 12 and len(decoded) >= ROWS - len(FAILED) + 4
    assert corpus.committed("latents/a") == {}
    gate.set()
    for worker in workers:
        worker.join()
    assert len(encoding) == 28 and len(set(encoding[:14])) == len(set(encoding[14:])) == 1  # one after the other
    monkeypatch.undo()
    other = stage_of(roots[1], asked)
    alone = [commit for ref in refs for commit in other.run(roots[1], Task(ref, dict.fromkeys(asked, 0)))]
    bytes_of = [{(c.column, c.shard): c.object.sha256 for c in commits} for commits in (found, alone)]
    assert len(bytes_of[0]) == 4 and bytes_of[0] == bytes_of[1]


HANG = """
import sys, time
import torch
import microdit.pipeline.stages.latents as stage
from microdit.pipeline.content import crop
from microdit.pipeline.config.encoders import LatentsColumn
from microdit.pipeline.config.build import Resources
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.content.images import decode
from microdit.pipeline.stages.stage import Task
from microdit.pipeline.stages.encoding import Batches
from microdit.pipeline.base.liveness import watched
class Flat:
    device, deterministic = torch.device("cpu"), True
    def encode(self, pixels, **options):
        return torch.zeros(len(pixels), 4, 8, 8)
count = 0
def hanging(data, max_pixels, shrink_to=None):
    global count
    count += 1
    if count == 20:
        time.sleep(600)
    return decode(data, max_pixels, shrink_to)
crop.decode = hanging
corpus = Corpus.open(sys.argv[1])
[images] = corpus.commits("images")
made = stage.Latents({"latents/a": LatentsColumn(autoencoder="demo", resolution=64)}, 10**8, Resources(latents_batch=4))
corpus.declare_column("latents/a", made.columns["latents/a"].stage, {"absmax": "float32"})
made.models, made._batches = {"latents/a": Flat()}, {"latents/a": Batches(4)}
with watched(4.0):
    made.run(corpus, Task(images.ref, {"latents/a": 0}))
"""


def test_an_image_that_hangs_the_decoder_ends_the_process(corpus: Corpus) -> None:
    """The threads that wait for it keep nothing alive."""
    command = [sys.executable, "-c", HANG, corpus.url]
    found = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert found.returncode == 1 and "in hanging" in found.stderr, found.stderr
    assert corpus.committed("latents/a") == {}


# -- devices ---------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(corpus: Corpus, one: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Within 2% of the largest number of an image: bfloat16 has three digits. Made again, the same bytes."""
    asked = columns(a=(one, 64), moments=(one, 32, "moments"))
    found = []
    for name in ("gpu", "again", "cpu"):
        root = start(tmp_path / name)
        if name == "cpu":
            monkeypatch.setattr(latents_stage, "best_device", lambda: "cpu")
        stage = stage_of(root, asked)
        assert {model.device.type for model in stage.models.values()} == {"cpu" if name == "cpu" else "cuda"}
        found.append(run(stage, root))
        assert all(commit.timings["encode_seconds"] > 0 for commit in found[-1].values())
    for column in asked:
        assert found[0][column].object.sha256 == found[1][column].object.sha256
        gpu, cpu = arrays(Corpus.open(tmp_path / "gpu"), found[0][column]), arrays(root, found[2][column])
        assert gpu.keys() == cpu.keys()
        for key, latent in gpu.items():
            assert np.abs(latent.astype(np.float32) - cpu[key]).max() <= 0.02 * np.abs(cpu[key]).max()
