"""`synthesize`: pictures that models make of prompts. A unit is a run of prompts, drawn by one of the makers."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks, read_ahead
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.config.synthesis import SynthesizeSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import unit_name
from microdit.pipeline.sources.source import Fields, Input
from microdit.pipeline.sources.synthesis.drawing import Drawer, Drawn, NoPicture, Order
from microdit.pipeline.sources.synthesis.makers import Maker, resolve_maker
from microdit.pipeline.sources.synthesis.pictures import Repeats, check, encode_picture
from microdit.pipeline.sources.synthesis.prompts import Prompt, Prompts, open_prompts
from microdit.pipeline.sources.synthesis.seeds import Shares, picture_seed

AHEAD = 2  # batches that are drawn before they are asked for


@dataclass(frozen=True)
class PlannedPicture:
    """A picture of a unit."""

    ordinal: int
    prompt: Prompt
    variant: int
    """Its number among the pictures of its prompt."""
    seed: int


class SharedModel:
    """The model that a process has loaded, and who draws with it; a pickle leaves it behind.

    `drawing` is held by the unit that draws, until its last picture is drawn: of two units in a process the first is
    encoded and committed while the second is drawn.
    """

    def __init__(self) -> None:
        self.drawing, self.loading = Lock(), Lock()
        self.maker: int | None = None
        self.drawer: Drawer | None = None

    def __reduce__(self) -> tuple[type["SharedModel"], tuple[()]]:
        return SharedModel, ()


class Synthesize:
    """The adapter `synthesize`.

    Args:
        images: how pictures are stored; they are encoded so, once.
        threads: that encode pictures beside the drawing.
        scratch: folder for the prepared prompts.

    Raises:
        RequestError: prompts or models cannot be had, or a maker's options do not fit its model.
    """

    device = "gpu"
    at_once = 2

    def __init__(self, name: str, options: SynthesizeSource, images: ImageOptions, threads: int, scratch: Path):
        self.name, self._options, self._images = name, options, images
        self._threads, self._scratch = threads, scratch
        self._shares = Shares(options.seed, name, [maker.weight for maker in options.makers])
        self._shared = SharedModel()

    @cached_property
    def makers(self) -> list[Maker]:
        """The makers, resolved; nothing large is loaded for it."""
        return [
            resolve_maker(f"sources.{self.name}.makers.{number}", options)
            for number, options in enumerate(self._options.makers)
        ]

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts."""
        return open_prompts(self._options.prompts, self._scratch, f"sources.{self.name}.prompts")

    @property
    def terms(self) -> str:
        """The licences of the makers' models."""
        return "; ".join(f"{maker.name}: {maker.licence.describe()}" for maker in self.makers)

    def stage(self) -> dict[str, Any]:
        return {
            "adapter": "synthesize",
            "version": 1,
            "prompts": self.prompts.identity,
            "inputs": len(self.prompts) * self._options.images_per_prompt,
            "units": len(self.units()),
            "prompts_per_unit": self._options.prompts_per_unit,
            "images_per_prompt": self._options.images_per_prompt,
            "seed": self._options.seed,
            "makers": [maker.declaration() for maker in self.makers],
        }

    def units(self) -> list[str]:
        return [unit_name(self.name, number) for number in range(sum(self._unit_counts))]

    def running(self, corpus: Corpus, report: Callable[[str], None]) -> AbstractContextManager[None]:
        for maker in self.makers:
            report(f"source {self.name}: {maker.describe()}")
        return nullcontext()

    # -- the models ----------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """List the names of the makers, each of which has a model."""
        return [maker.label for maker in self._options.makers]

    def model_of(self, unit: str) -> int:
        """Return the number of the maker that draws a unit."""
        return self._run(unit)[0]

    def load(self, model: int) -> None:
        """Load the model of a maker, in place of any other one.

        Raises:
            RequestError: it cannot be loaded.
        """
        self._drawer(model)

    def _drawer(self, maker: int) -> Drawer:
        with self._shared.loading:
            if self._shared.maker != maker or self._shared.drawer is None:
                self._shared.maker = self._shared.drawer = None  # two may not fit into the memory
                self._shared.drawer, self._shared.maker = self.makers[maker].load(), maker
            return self._shared.drawer

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        maker, start, stop = self._run(unit)
        with ThreadPoolExecutor(self._threads) as pool, closing(self._batches(maker, start, stop, wanted)) as batches:
            about = self.makers[maker].fields()
            with closing(read_ahead(self._encoded(pool, batches), AHEAD)) as encoded:
                for batch in encoded:
                    for picture, made in batch:
                        result = made.result() if isinstance(made, Future) else made
                        # also drawn, but not wanted: in a repair the bytes that are there stay
                        yield self._input(picture, result if wanted(picture.ordinal) else None, about)

    def _batches(
        self, maker: int, start: int, stop: int, wanted: Callable[[int], bool]
    ) -> Generator[list[tuple[PlannedPicture, Drawn | None]]]:
        """Draw the pictures of a unit, batch by batch; None for those of a batch that nobody wants.

        The batches of a unit are always the same, and drawn whole or not at all: so a picture does not depend on which
        ones are wanted. With a batch those before it are drawn that have pictures of its first prompt, as it may repeat
        them.
        """
        pictures = self._pictures(maker, start, stop)
        batches = list(chunks(pictures, self._options.makers[maker].batch))
        repeats, drawing = Repeats(), False
        try:
            for batch in batches:
                if not any(wanted(ordinal) for ordinal in self._ordinals_of(batch, pictures)):
                    yield [(picture, None) for picture in batch]
                    continue
                if not drawing:
                    drawing = self._shared.drawing.acquire()
                orders = [Order(picture.prompt.text, picture.seed) for picture in batch]
                drawn = self._drawer(maker).draw(orders)
                if batch is batches[-1]:
                    self._shared.drawing.release()
                    drawing = False
                yield [
                    (picture, check(one, picture.prompt.row, picture.seed, repeats))
                    for picture, one in zip(batch, drawn, strict=True)
                ]
        finally:
            if drawing:
                self._shared.drawing.release()

    @staticmethod
    def _ordinals_of(batch: Sequence[PlannedPicture], pictures: Sequence[PlannedPicture]) -> range:
        """Return the ordinals of a batch, and of the pictures behind it that its last prompt has."""
        stop = batch[-1].ordinal + 1
        while stop < len(pictures) and pictures[stop].prompt.row == batch[-1].prompt.row:
            stop += 1
        return range(batch[0].ordinal, stop)

    def _encoded(
        self, pool: ThreadPoolExecutor, batches: Iterator[list[tuple[PlannedPicture, Drawn | None]]]
    ) -> Iterator[list[tuple[PlannedPicture, "Future[bytes] | NoPicture | None"]]]:
        """Encode drawn pictures in threads, while the next batch is drawn."""
        waiting: deque[list[tuple[PlannedPicture, Future[bytes] | NoPicture | None]]] = deque()
        for batch in batches:
            made: list[tuple[PlannedPicture, Future[bytes] | NoPicture | None]] = []
            for picture, one in batch:
                if one is None or isinstance(one, NoPicture):
                    made.append((picture, one))
                else:
                    made.append((picture, pool.submit(encode_picture, one, self._images)))
            waiting.append(made)
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    def _input(self, picture: PlannedPicture, made: bytes | NoPicture | None, about: Fields) -> Input:
        prompt = picture.prompt
        fields = {
            **prompt.fields,
            **about,
            "seed": picture.seed,
            "variant": picture.variant,
            "prompt_source": self._prompt_source,
            "prompt_row": prompt.row,
        }
        origin = f"{self.name}/{about['maker']}/{prompt.row}/{picture.variant}"
        key = f"{prompt.row:09d}-{picture.variant:03d}"
        fault = made if isinstance(made, NoPicture) else None
        return Input(
            picture.ordinal,
            key,
            made if isinstance(made, bytes) else None,
            origin,
            prompt.text,
            str(about.get("license", "")),
            fields,
            fault.reason if fault else None,
            fault.detail if fault else "",
        )

    @cached_property
    def _prompt_source(self) -> str:
        prompts = self._options.prompts
        return (prompts.path or prompts.corpus or "templates").rstrip("/").rpartition("/")[2]

    # -- units ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _run_lengths(self) -> list[int]:
        """Prompts of a unit of each maker: of a maker with a third of the pictures three times as many."""
        return [max(1, round(self._options.prompts_per_unit / share)) for share in self._shares.shares]

    @cached_property
    def _unit_counts(self) -> list[int]:
        return [-(-len(self.prompts) // length) for length in self._run_lengths]

    def _run(self, unit: str) -> tuple[int, int, int]:
        """Return the maker of a unit, and the prompts from which to before which it draws."""
        number, maker = int(unit.rpartition("-")[2]), 0
        while number >= self._unit_counts[maker]:
            number -= self._unit_counts[maker]
            maker += 1
        length = self._run_lengths[maker]
        return maker, number * length, min((number + 1) * length, len(self.prompts))

    def _pictures(self, maker: int, start: int, stop: int) -> list[PlannedPicture]:
        """List the pictures of a run of prompts that a maker makes."""
        with self._shared.loading:
            prompts = self._here().read(start, stop)
        chosen = [
            (prompt, variant)
            for prompt in prompts
            for variant in range(self._options.images_per_prompt)
            if self._shares.maker(prompt.row, variant) == maker
        ]
        name = self._options.makers[maker].label
        return [
            PlannedPicture(
                ordinal, prompt, variant, picture_seed(self._options.seed, self.name, prompt.row, variant, name)
            )
            for ordinal, (prompt, variant) in enumerate(chosen)
        ]

    def _here(self) -> Prompts:
        """Return the prompts as this machine has them.

        Raises:
            RequestError: they are others here.
        """
        if not self.prompts.path.exists():  # prepared on the driver's machine
            here = open_prompts(self._options.prompts, self._scratch, f"sources.{self.name}.prompts")
            if here.identity != self.prompts.identity:
                raise RequestError(f"sources.{self.name}.prompts: they are others on this node than on the driver's")
            self.__dict__["prompts"] = here
        return self.prompts
