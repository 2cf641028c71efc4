"""`microdit plan`: what a build would come to, before anybody spends: shards, bytes, time and money.

Each number says where it comes from: an earlier, smaller build's commits (best), shapes, what is written about a
dataset, the measured table (`rates.json`), arithmetic, or an assumption; what nobody measured is `None`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.estimate import rates
from microdit.pipeline.estimate.column_sizes import ColumnSizes
from microdit.pipeline.estimate.makers import MakerWork
from microdit.pipeline.estimate.past_build import PastBuild
from microdit.pipeline.estimate.result import (
    Estimate,
    EstimatedMachines,
    EstimatedMaker,
    EstimatedMoney,
    EstimatedSource,
    EstimatedTime,
)
from microdit.pipeline.estimate.source_sizes import source_sizes
from microdit.pipeline.estimate.stage_times import Cost, Hardware, StageTimes

CPUS_A_GPU = 16


@dataclass(frozen=True)
class Machines:
    """Machines of the build, and prices in dollars: of an hour, and of a TB kept for a month."""

    cpus: float | None = None
    gpus: int = 0
    gpu: str | None = None
    bandwidth: float = 10.0
    """Gbit/s of all machines together."""
    gpu_price: float | None = None
    cpu_price: float = 0.04
    storage_price: float = 23.0


class Assumptions:
    """Assumptions of an estimate: lines for people, each once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


def estimate(
    config: BuildConfig,
    machines: Machines = Machines(),
    learn_from: str | None = None,
    samples: Mapping[str, int] | None = None,
) -> Estimate:
    """Estimate a build of the whole config, whatever of it is built already.

    Args:
        learn_from: an earlier build; by default the config's own corpus, if something of it is committed.
        samples: numbers of inputs, as `microdit.pipeline.estimate.source_sizes` takes them.

    Raises:
        RequestError: nothing to learn from at `learn_from`; a GPU of no known kind; a source that nobody can size.
    """
    assumptions = Assumptions()
    past = _past_build(config, learn_from, assumptions)
    otherwise = past.otherwise(config) if past is not None else {}
    gpu = _gpu_kind(machines)
    sources = source_sizes(config, past, samples or {})
    sizes = ColumnSizes(config, sources, past, otherwise, assumptions.add)
    cpus = _cpus(config, machines, assumptions)
    hardware = Hardware(cpus, machines.gpus, gpu, machines.bandwidth)
    times = StageTimes(config, sources, sizes, past, otherwise, hardware, assumptions.add)
    columns, costs = sizes.columns(), times.costs()
    time = times.total(costs)
    money = _money(machines, hardware, time, sum(column.bytes for column in columns.values()), assumptions)
    for name, note in otherwise.items():
        assumptions.add(f"{name} was made otherwise in the earlier build ({note}): nothing is learned from it")
    return Estimate(
        name=config.name,
        corpus=config.corpus,
        shard_samples=config.shard_samples,
        learned_from=past.corpus.url if past is not None else None,
        machines=EstimatedMachines(cpus, machines.gpus, gpu),
        sources={
            name: EstimatedSource(
                units=source.units,
                inputs=source.inputs,
                shards=sizes.shards[name],
                fetched_bytes=None if source.fetched is None else round(source.fetched),
                origin=source.origin,
            )
            for name, source in sources.items()
        },
        columns=columns,
        stages={name: times.stage(cost) for name, cost in costs.items()},
        makers={maker.name: _maker(maker, costs[maker.name], machines, gpu) for maker in times.makers},
        time=time,
        money=money,
        assumptions=assumptions.lines,
    )


def _maker(work: MakerWork, cost: Cost, machines: Machines, gpu: str | None) -> EstimatedMaker:
    """Count the pictures of one maker, and price the GPUs' time for them."""
    hours = None if gpu is None or cost.gpu is None else cost.gpu / 3600
    price = machines.gpu_price if machines.gpu_price is not None or gpu is None else rates.GPUS[gpu].price
    money = None if hours is None or price is None else hours * price
    return EstimatedMaker(work.images, hours, money, cost.origins[work.source])


def _past_build(config: BuildConfig, learn_from: str | None, assumptions: Assumptions) -> PastBuild | None:
    """Open the build to learn from; None if the config's own corpus has nothing to learn from."""
    if learn_from is not None:
        return PastBuild(learn_from)
    try:
        return PastBuild(config.corpus)
    except DamagedError:
        raise
    except RequestError as error:  # most often it is not built yet
        assumptions.add(f"nothing is learned: {error}")
        return None


def _gpu_kind(machines: Machines) -> str | None:
    """Return the kind of the GPUs; None without any."""
    if machines.gpus and machines.gpu is None:
        raise RequestError(f"--gpus {machines.gpus}: of which kind? Give --gpu, one of {', '.join(rates.GPUS)}")
    if machines.gpu is not None and not machines.gpus:
        raise RequestError(f"--gpu {machines.gpu}: how many? Give --gpus")
    return rates.gpu_kind(machines.gpu) if machines.gpu is not None else None


def _cpus(config: BuildConfig, machines: Machines, assumptions: Assumptions) -> float:
    """Return the number of CPUs: as given, by the GPUs, as the config says, or those of this machine."""
    if machines.cpus is not None:
        return machines.cpus
    if machines.gpus:
        assumptions.add(f"{CPUS_A_GPU} CPUs for each GPU (--cpus)")
        return float(CPUS_A_GPU * machines.gpus)
    if config.resources.cpus is not None:
        return config.resources.cpus
    own = float(os.cpu_count() or 1)
    assumptions.add(f"as many CPUs as this machine has, {own:.0f} (--cpus)")
    return own


def _money(
    machines: Machines, hardware: Hardware, time: EstimatedTime, size: int, assumptions: Assumptions
) -> EstimatedMoney:
    """Price the machines for the time of the build, and the storage of its bytes."""
    price, gpu = machines.gpu_price, hardware.gpu
    if machines.gpus and price is None and (known := rates.GPUS[str(gpu)]).price is not None:
        price = known.price
        assumptions.add(f"${price} for an hour of one {gpu}: {known.why} (--gpu-price)")
    elif machines.gpus and price is not None:
        assumptions.add(f"${price} for an hour of one {gpu}, as given")
    elif machines.gpus:
        assumptions.add(f"the price of an hour of one {gpu} is not known: give --gpu-price")
    assumptions.add(f"${machines.cpu_price} for an hour of one CPU (--cpu-price): assumed, no quote")
    assumptions.add(f"${machines.storage_price} for a TB and month (--storage-price): assumed, no quote")
    assumptions.add("the machines are paid for as long as the build lasts, idle or not; traffic is free")
    hours = time.seconds / 3600
    gpus = 0.0 if not machines.gpus else None if price is None else hours * machines.gpus * price
    cpus = hours * hardware.cpus * machines.cpu_price
    return EstimatedMoney(
        gpus=gpus,
        cpus=cpus,
        build=None if gpus is None else gpus + cpus,
        complete=not time.not_measured and gpus is not None,
        storage_a_month=size / 1e12 * machines.storage_price,
    )
