"""The validation loss: what the network makes of the samples that are held out, measured in a way that never changes.

    held-out samples --ranges of their shards, read once--> rows of this process --network--> loss by noise, over all

Everything random about a sample (noise, sigma, caption, posterior) is a function of the recipe's seed and the sample's
name, so that neither the step nor the number of processes matters. The noise levels are spread evenly over the stage's
distribution. No caption is dropped and no patch is masked: it is the loss of what generation runs.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from obstore.exceptions import BaseError
from torch import Tensor

from microdit.model.edm import EDM
from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.arrays import array_view
from microdit.trainer.data.batch import Field, pad_text
from microdit.trainer.data.batches import StageData
from microdit.trainer.data.sample_index import RunSamples, Where
from microdit.trainer.data.shard_cache import BrokenError
from microdit.trainer.learner import Learner
from microdit.trainer.monitoring.log import Log, by_noise
from microdit.trainer.objective import NOISE_BINS, NOISE_EDGES
from microdit.trainer.processes import Team

THREADS = 16  # that read samples


@dataclass(frozen=True)
class Rows:
    """Samples of one process, on the CPU; rows of weight 0 stand for what cannot be read."""

    latents: Tensor  # (n, C, H, W)
    texts: list[Field]
    sigma_normal: Tensor  # (n,)
    noise: Tensor  # (n, C, H, W)
    weight: Tensor  # (n,), 0 or 1


class Validation:
    """Measures the loss of what is held out, all processes together; nothing is measured if that is nothing."""

    def __init__(self, samples: RunSamples, team: Team, log: Log):
        self.samples, self.team, self.log = samples, team, log
        self._rows: tuple[StageData, Rows] | None = None  # of the stage that was measured last

    def measure(self, learner: Learner, data: StageData, stage: int) -> dict[str, Any] | None:
        """The figures of stage number `stage`, whose data are given; every process must call it.

        loss, by_noise: of the weights as they are; ema_loss, ema_by_noise: of the first moving average, null if there
        is none. samples: how many were measured; left_out: how many cannot be read, or not in this stage's column.

        Raises:
            RequestError: the storage fails, or a caption is longer than the recipe's text_lengths.
        """
        if not len(self.samples.held):
            return None
        began = time.monotonic()
        if self._rows is None or self._rows[0] is not data:
            self._rows = data, self._read(data, stage)
        rows = self._rows[1]
        loss, noise, count = self._loss(learner, data, rows)
        ema_loss, ema_noise = None, None
        if learner.averages:
            with learner.averaged():
                ema_loss, ema_noise, _ = self._loss(learner, data, rows)
        return {
            "loss": loss, "ema_loss": ema_loss, "by_noise": noise, "ema_by_noise": ema_noise, "samples": count,
            "left_out": len(self.samples.held) - count, "seconds": round(time.monotonic() - began, 3),
        }  # fmt: skip

    @torch.no_grad()
    def _loss(self, learner: Learner, data: StageData, rows: Rows) -> tuple[float | None, dict[str, Any], int]:
        """The mean loss, the same by noise, and the number of samples."""
        stage, device = data.stage, learner.device
        edm, edges = EDM(sigma_data=data.recipe.sigma_data), torch.tensor(NOISE_EDGES, device=device)
        sums = torch.zeros(2, NOISE_BINS, dtype=torch.float64, device=device)
        # eager, because the blocks would be compiled anew for these shapes and without gradients
        with torch.compiler.set_stance("force_eager"):
            size = stage.micro_batch or stage.batch // self.team.world
            for part in torch.arange(len(rows.weight)).split(size) if len(rows.weight) else ():
                text, mask = pad_text([rows.texts[i] for i in part.tolist()], data.recipe.text_lengths)
                sigma = edm.sigma_from_normal(rows.sigma_normal[part].to(device), stage.p_mean, stage.p_std)
                weight = rows.weight[part].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=learner.bf16):
                    loss = edm.loss(
                        learner.net, rows.latents[part].to(device), text.to(device), sigma=sigma,
                        noise=rows.noise[part].to(device), text_mask=mask.to(device), reduction="none",
                    )  # fmt: skip
                found = torch.stack([torch.where(weight > 0, loss, 0.0), weight]).double()
                sums.index_add_(1, torch.bucketize(sigma.log(), edges), found)
        means = self.team.means(sums.flatten())
        losses, counts = means[:NOISE_BINS], means[NOISE_BINS:]
        count = round(sum(counts) * self.team.world)
        return sum(losses) / sum(counts) if count else None, by_noise(losses, counts), count

    def _read(self, data: StageData, stage: int) -> Rows:
        """This process's part of a stage's held-out samples: every `world`-th, and as many as every other has."""
        everything, held = self.samples.held.hashes(data.recipe.seed), self.samples.held_by_stage[stage]
        own = held.hashes(data.recipe.seed)
        # the order of hashes is a random one; the middles of equal parts of the distribution
        share = (np.searchsorted(np.sort(everything), own) + 0.5) / len(everything)
        sigma_normal = torch.special.ndtri(torch.from_numpy(share)).float()
        mine = list(range(self.team.rank, len(held), self.team.world))
        draws = [_Draw.of(int(own[i]), data) for i in mine]
        places = [(held.shards[held.shard[i]], int(held.row[i])) for i in mine]
        found = _Reader(self.samples, data).read(
            [(data.text[draw.column], where, row) for draw, (where, row) in zip(draws, places, strict=True)]
        )
        broken = [f"{held.name(i)}: {one}" for i, one in zip(mine, found, strict=True) if isinstance(one, BrokenError)]
        if broken := [line for lines in self.team.gathered(broken) for line in lines]:
            self.log.say(f"{len(broken)} of {len(held)} held-out samples cannot be read, and are left out: {broken[0]}")
        count = -(-len(held) // self.team.world)
        rows = Rows(
            torch.zeros(count, *data.latent_shape), [np.zeros((1, data.text_width), np.float16)] * count,
            torch.zeros(count), torch.zeros(count, *data.latent_shape), torch.zeros(count),
        )  # fmt: skip
        for n, (i, draw, one) in enumerate(zip(mine, draws, found, strict=True)):
            if not isinstance(one, BrokenError):
                latents = torch.from_numpy(one[0].astype(np.float32))
                if data.moments:
                    mean, deviation = latents.chunk(2)
                    latents = mean + deviation * draw.posterior
                rows.latents[n], rows.texts[n], rows.noise[n] = latents, one[1], draw.noise
                rows.sigma_normal[n], rows.weight[n] = sigma_normal[i], 1.0
        return rows


@dataclass(frozen=True)
class _Draw:
    """What is random about a held-out sample but its noise level; `column` counts in `StageData.text`."""

    column: int
    noise: Tensor
    posterior: Tensor

    @classmethod
    def of(cls, name: int, data: StageData) -> "_Draw":
        """name: the sample's hash."""
        words = np.random.SeedSequence((name, 6)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        caption = torch.rand(1, generator=generator).item()
        return cls(
            min(int(np.searchsorted(data.text_bounds, caption, side="right")), len(data.text) - 1),
            torch.randn(*data.latent_shape, generator=generator),
            torch.randn(*data.latent_shape, generator=generator),
        )


class _Reader:
    """Reads single samples: what is held out lies scattered over all shards, which are not read whole for it."""

    def __init__(self, samples: RunSamples, data: StageData):
        self.corpus, self.columns, self.data = samples.corpus, samples.columns, data
        self._sidecars: dict[tuple[str, Where], pa.Table | BrokenError] = {}

    def read(self, wanted: Sequence[tuple[str, Where, int]]) -> list[tuple[np.ndarray, Field] | BrokenError]:
        """Latents and text of samples, each named by text column, shard and row; or why one cannot be read."""
        latents = self.data.stage.latents
        shards = list(dict.fromkeys((column, where) for text, where, _ in wanted for column in (latents, text)))
        with ThreadPoolExecutor(THREADS) as pool:
            self._sidecars = dict(zip(shards, pool.map(lambda one: self._sidecar(*one), shards), strict=True))
            return list(pool.map(lambda one: self._sample(*one), wanted))

    def _sample(self, text: str, where: Where, row: int) -> tuple[np.ndarray, Field] | BrokenError:
        channels, *sides = self.data.latent_shape
        try:
            latents, embeddings = self._field(self.data.stage.latents, where, row), self._field(text, where, row)
        except BrokenError as error:
            return error
        if not isinstance(latents, np.ndarray) or latents.shape != (channels * (1 + self.data.moments), *sides):
            return BrokenError(f"{self.data.stage.latents} has shape {latents.shape}")
        if not np.isfinite(latents).all():
            return BrokenError(f"{self.data.stage.latents} is not finite")
        if len(embeddings.shape) != 2 or not len(embeddings) or embeddings.shape[1] != self.data.text_width:
            return BrokenError(f"{text} has shape {embeddings.shape}")
        return latents, embeddings

    def _sidecar(self, column: str, where: Where) -> pa.Table | BrokenError:
        commit = self.columns[column][where]
        try:
            return self.corpus.sidecar(commit).select(["offset", "size"])
        except (FileNotFoundError, pa.ArrowException) as error:
            return BrokenError(f"{commit.sidecar.name}: {first_line(error)}")
        except (OSError, BaseError) as error:
            raise RequestError(f"{commit.sidecar.name} cannot be read: {error}") from error

    def _field(self, column: str, where: Where, row: int) -> Field:
        sidecar, name = self._sidecars[column, where], self.columns[column][where].object.name
        if isinstance(sidecar, BrokenError):
            raise sidecar
        try:
            start, size = (sidecar[key][row].as_py() for key in ("offset", "size"))
            return array_view(memoryview(self.corpus.store.get_range(name, start, size)))
        except FileNotFoundError:
            raise BrokenError(f"{name} is not there") from None
        except ValueError as error:
            raise BrokenError(f"{name}: {error}") from None
        except (OSError, BaseError) as error:
            raise RequestError(f"{name} cannot be read: {error}") from error
