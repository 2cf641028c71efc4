"""The validation loss: what the network makes of the samples that are held out, measured in a way that never changes.

    held-out samples --ranges of their shards, read once--> rows of this process --network--> loss by noise, over all

Everything random about a sample (noise, sigma, caption, posterior) is a function of the recipe's seed and the sample's
name, so that neither the step nor the number of processes matters. The noise levels are spread evenly over the leg's
distribution. No caption is dropped and no patch is masked: it is the loss of what generation runs.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microdit.model.edm import EDM
from microdit.pipeline.corpus.open_shard import BrokenError, ShardReader, read_scattered
from microdit.pipeline.corpus.quantised import Field
from microdit.pipeline.selection.run_samples import RunSamples
from microdit.trainer.data.batch import pad_text
from microdit.trainer.data.batches import LegData
from microdit.trainer.data.randomness import HeldOutDraw
from microdit.trainer.learner import Learner
from microdit.trainer.monitoring.log import Log, by_noise
from microdit.trainer.objective import NOISE_BINS, NOISE_EDGES
from microdit.trainer.processes import Team


@dataclass(frozen=True)
class HeldOutRows:
    """Held-out samples of one process, on the CPU; rows of weight 0 stand for what cannot be read."""

    latents: Tensor  # (n, C, H, W)
    texts: list[Field]
    sigma_normal: Tensor  # (n,)
    noise: Tensor  # (n, C, H, W)
    weight: Tensor  # (n,), 0 or 1


class Validation:
    """Measures the loss of what is held out, all processes together; nothing is measured if that is nothing."""

    def __init__(self, samples: RunSamples, team: Team, log: Log):
        self.samples, self.team, self.log = samples, team, log
        self._rows: tuple[LegData, HeldOutRows] | None = None  # of the leg that was measured last

    def measure(self, learner: Learner, data: LegData, leg: int) -> dict[str, Any] | None:
        """Measure the figures of leg number `leg`, whose data are given; every process must call it.

        loss, by_noise: of the weights as they are; ema_loss, ema_by_noise: of the first moving average, null if there
        is none. samples: how many were measured; left_out: how many cannot be read, or not in this leg's column.

        Raises:
            RequestError: the storage fails, or a caption is longer than the recipe's text_lengths.
        """
        if not len(self.samples.held):
            return None
        began = time.monotonic()
        if self._rows is None or self._rows[0] is not data:
            self._rows = data, self._read(data, leg)
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
    def _loss(self, learner: Learner, data: LegData, rows: HeldOutRows) -> tuple[float | None, dict[str, Any], int]:
        """Measure the mean loss, the same by noise, and the number of samples."""
        leg, device = data.leg, learner.device
        edm, edges = EDM(sigma_data=data.recipe.sigma_data), torch.tensor(NOISE_EDGES, device=device)
        sums = torch.zeros(2, NOISE_BINS, dtype=torch.float64, device=device)
        # eager, because the blocks would be compiled again for these shapes and without gradients
        with torch.compiler.set_stance("force_eager"):
            size = leg.micro_batch or leg.batch // self.team.world
            for part in torch.arange(len(rows.weight)).split(size) if len(rows.weight) else ():
                text, mask = pad_text([rows.texts[i] for i in part.tolist()], data.recipe.text_lengths)
                sigma = edm.sigma_from_normal(rows.sigma_normal[part].to(device), leg.p_mean, leg.p_std)
                weight = rows.weight[part].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=learner.bf16):
                    loss = edm.loss(
                        learner.net, rows.latents[part].to(device), text.to(device), sigma=sigma,
                        noise=rows.noise[part].to(device), text_mask=mask.to(device), reduction="none",
                    )  # fmt: skip
                counted = torch.stack([torch.where(weight > 0, loss, 0.0), weight]).double()
                sums.index_add_(1, torch.bucketize(sigma.log(), edges), counted)
        means = self.team.means(sums.flatten())
        losses, counts = means[:NOISE_BINS], means[NOISE_BINS:]
        count = round(sum(counts) * self.team.world)
        return sum(losses) / sum(counts) if count else None, by_noise(losses, counts), count

    def _read(self, data: LegData, leg: int) -> HeldOutRows:
        """Read this process's part of a leg's held-out samples: every `world`-th, and as many as every other has."""
        everything, held = self.samples.held.hashes(data.recipe.seed), self.samples.held_by_leg[leg]
        own = held.hashes(data.recipe.seed)
        # the order of hashes is a random one; the middles of equal parts of the distribution
        share = (np.searchsorted(np.sort(everything), own) + 0.5) / len(everything)
        sigma_normal = torch.special.ndtri(torch.from_numpy(share)).float()
        mine = list(range(self.team.rank, len(held), self.team.world))
        draws = [HeldOutDraw.of(int(own[i]), data.text_bounds, data.latent_shape) for i in mine]
        columns = [(data.leg.latents, data.text[draw.column]) for draw in draws]
        located = [(column, *held.locate(i)) for i, pair in zip(mine, columns, strict=True) for column in pair]
        wanted = [(self.samples.columns[column][shard], row) for column, shard, row in located]
        fields = read_scattered(ShardReader(self.samples.corpus.store), wanted)
        count, broken = -(-len(held) // self.team.world), []
        rows = HeldOutRows(
            torch.zeros(count, *data.latent_shape), [np.zeros((1, data.text_width), np.float16)] * count,
            torch.zeros(count), torch.zeros(count, *data.latent_shape), torch.zeros(count),
        )  # fmt: skip
        for n, (i, draw, pair) in enumerate(zip(mine, draws, columns, strict=True)):
            try:
                array, text = (data.checked(*field) for field in zip(pair, fields[2 * n : 2 * n + 2], strict=True))
                latents = torch.from_numpy(np.asarray(array, np.float32))
            except BrokenError as error:
                broken.append(f"{held.name(i)}: {error}")
                continue
            if data.moments:
                mean, deviation = latents.chunk(2)
                latents = mean + deviation * draw.posterior
            rows.latents[n], rows.texts[n], rows.noise[n] = latents, text, draw.noise
            rows.sigma_normal[n], rows.weight[n] = sigma_normal[i], 1.0
        if broken := [line for lines in self.team.gathered(broken) for line in lines]:
            self.log.say(f"{len(broken)} of {len(held)} held-out samples cannot be read, and are left out: {broken[0]}")
        return rows
