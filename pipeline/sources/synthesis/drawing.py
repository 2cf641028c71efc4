"""Draw pictures in batches with a loaded model: halve the batch where memory is short, and name what went wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.liveness import alive

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""In the words of torch on a CPU, which has no exception of its own for it."""


@dataclass(frozen=True)
class Order:
    """A picture to draw."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class NoPicture:
    """Why there is no picture."""

    reason: str
    detail: str


Drawn = np.ndarray | NoPicture
"""Pixels (H, W, 3) uint8, or why there are none."""
Call = Callable[[Sequence[Order]], list[Drawn]]


class Drawer:
    """Draws with one loaded maker.

    Args:
        what: the maker, for messages.
        call: draws a batch.
        size: pictures of a batch at most; halved for good when the memory runs out.
    """

    def __init__(self, what: str, call: Call, size: int):
        self.size = size
        self._what, self._call = what, call
        self._sound = False  # it has drawn something

    def draw(self, orders: Sequence[Order]) -> list[Drawn]:
        """Draw pictures, in order.

        Raises:
            RequestError: the memory is too small for one picture, or the model has drawn nothing yet and fails.
            torch.AcceleratorError: the GPU is broken.
        """
        drawn: list[Drawn] = []
        while len(drawn) < len(orders):
            batch = orders[len(drawn) : len(drawn) + self.size]
            alive()
            error = None
            try:
                drawn += self._called(batch)
                self._sound = True
                continue
            except Exception as raised:
                error = raised.with_traceback(None)  # whose frames hold the tensors of the call
            if is_out_of_memory(error):
                self._halve(len(batch), error)
            else:
                drawn += self._one_by_one(batch, error)
        return drawn

    def _called(self, batch: Sequence[Order]) -> list[Drawn]:
        pictures = self._call(batch)
        if len(pictures) != len(batch):
            raise RequestError(f"{self._what}: it gives {len(pictures)} pictures for {len(batch)} prompts")
        return pictures

    def _halve(self, count: int, error: Exception) -> None:
        import torch

        if count == 1:
            raise RequestError(
                f"{self._what}: the memory is too small for one picture ({first_line(error)}). Give it a smaller size "
                "or dtype, or the whole GPU (resources.gpus_per_actor=1, and columns that need a model in a later "
                "build: --columns images)"
            ) from None
        self.size = (count + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _one_by_one(self, batch: Sequence[Order], error: Exception) -> list[Drawn]:
        """Draw the pictures of a batch that failed alone, to find those that are at fault."""
        import torch

        if isinstance(error, torch.AcceleratorError | RequestError):
            raise error
        if len(batch) == 1 and self._sound:
            return [NoPicture("drawing_failed", f"{type(error).__name__}: {first_line(error)}")]
        drawn: list[Drawn] = []
        for order in batch if len(batch) > 1 else ():
            alive()
            try:
                drawn += self._called([order])
                self._sound = True
            except Exception as alone:
                if isinstance(alone, torch.AcceleratorError | RequestError):
                    raise
                if is_out_of_memory(alone):
                    self._halve(1, alone)
                drawn.append(NoPicture("drawing_failed", f"{type(alone).__name__}: {first_line(alone)}"))
        if not self._sound:
            raise RequestError(
                f"{self._what}: it cannot draw with these settings: {type(error).__name__}: {first_line(error)}"
            ) from None
        return drawn


def is_out_of_memory(error: Exception) -> bool:
    """Return True for a lack of memory, on a GPU or on a CPU."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def diffusers_call(pipeline: Any, arguments: dict[str, Any]) -> Call:
    """Return the call of a loaded pipeline of diffusers.

    The noise is made on the CPU, so that it is the same on every device.
    """
    import torch

    pipeline.set_progress_bar_config(disable=True)

    def call(batch: Sequence[Order]) -> list[Drawn]:
        given = dict(arguments)
        if "negative_prompt" in given:  # some pipelines take one for each prompt alone
            given["negative_prompt"] = [given["negative_prompt"]] * len(batch)
        generators = [torch.Generator("cpu").manual_seed(order.seed) for order in batch]
        prompts = [order.prompt for order in batch]
        with torch.inference_mode():
            output = pipeline(prompt=prompts, generator=generators, output_type="pt", **given)
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(batch)
        pictures = to_pixels(output.images)
        return [
            NoPicture("nsfw", "the model's safety checker flags it") if flag else picture
            for flag, picture in zip(flags, pictures, strict=True)
        ]

    return call


def microdit_call(pipeline: Any, arguments: dict[str, Any]) -> Call:
    """Return the call of a loaded `MicroDiTPipeline`."""
    import torch

    pipeline.set_progress_bar_config(disable=True)

    def call(batch: Sequence[Order]) -> list[Drawn]:
        prompts, seeds = [order.prompt for order in batch], [order.seed for order in batch]
        latents = pipeline(prompts, seed=seeds, output_type="latent", batch_size=len(batch), **arguments).images
        pictures: list[Drawn] = []
        for latent in latents:  # one by one, so that what shares their batch does not matter
            if not bool(torch.isfinite(latent).all()):
                pictures.append(NoPicture("not_finite", "the network gives NaN or infinity"))
            else:
                pictures.append(pipeline.vae.decode(latent[None].to(pipeline.device))[0].cpu().numpy())
        return pictures

    return call


def to_pixels(images: Any) -> list[Drawn]:
    """Turn what a pipeline gives into pixels: numbers of 0 to 1 as (B, 3, H, W) or (B, H, W, 3), or PIL images."""
    import torch

    if isinstance(images, list | tuple) and images and torch.is_tensor(images[0]):
        return [picture for one in images for picture in to_pixels(one[None] if one.ndim == 3 else one)]
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    if not torch.is_tensor(images):
        return [np.asarray(image.convert("RGB")) for image in images]
    if images.ndim != 4 or images.shape[1] != 3:
        raise RequestError(f"a pipeline gives {tuple(images.shape)}, which are no pictures of three colours")
    values = images.detach().float()
    finite = torch.isfinite(values).flatten(1).all(1).tolist()
    bytes_ = (values.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = bytes_.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [
        picture if sound else NoPicture("not_finite", "the model gives NaN or infinity")
        for picture, sound in zip(pixels, finite, strict=True)
    ]
