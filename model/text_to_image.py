"""Prompts to pictures, with the calls of diffusers' pipelines.

    prompts --text encoder--> (B, L, Ccap), mask (B, L) --+
                                                          +--> sampler (network, EDM) --> latents (B, C, h, w)
    seeds --> noise (B, C, h, w) -------------------------+        --autoencoder--> uint8 (B, H, W, 3) --> pictures

It is no subclass of `diffusers.DiffusionPipeline`, which loads parts by class from the index and would need the network
to be a `ModelMixin`: here the loaders of `pretrained.autoencoder` and `pretrained.text` do it, and the network
needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from microdit.model.checkpoint import load_model
from microdit.model.edm import EDM, Sampling
from microdit.model.loading import Part, check_trained_with, find_parts, write_pipeline
from microdit.model.network import MicroDiT
from microdit.model.noise import NoiseSource, draw_noise, noise_sources
from microdit.model.pretrained.autoencoder import Autoencoder, load_autoencoder
from microdit.model.pretrained.text import TextEncoder, load_text_encoder

# Image tokens that go through the network together: a GPU is busy with them, and a CPU gains nothing from more.
GPU_TOKENS, CPU_TOKENS = 32_768, 4_096
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PromptPair = tuple[str, str | None]  # a prompt and its negative prompt; None is zero embeddings


@dataclass
class PipelineOutput:
    """Pictures, as a call of the pipeline returns them.

    images: a list of PIL images for "pil"; float32 0..1, an array (B, H, W, 3) for "np" or a tensor (B, 3, H, W) for
    "pt"; the normalised latents, float32 (B, C, h, w), for "latent". Tensors are on the CPU.
    """

    images: Any


class MicroDiTPipeline:
    """Make pictures of prompts, with a network, a text encoder and an autoencoder that fit together.

    transformer, vae, text_encoder: as `load_model`, `load_autoencoder` and `load_text_encoder` give them.
    guidance_scale: the default of a call. sample_size: default height and width of the latents; None: the size that
        the network was built for. settings: what is written into pictures.

    >>> from microdit.model.pretrained.autoencoder import load_autoencoder
    >>> from microdit.model.pretrained.text import load_text_encoder
    >>> network = MicroDiT(input_size=4, dim=32, depth=2, head_dim=16, caption_channels=384, patch_mixer_dim=32)
    >>> pipe = MicroDiTPipeline(network, load_autoencoder("demo"), load_text_encoder("minilm"))
    >>> pipe("red apple", num_inference_steps=2, seed=0).images[0].size
    (32, 32)

    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        transformer: MicroDiT,
        vae: Autoencoder,
        text_encoder: TextEncoder,
        *,
        edm: EDM | None = None,
        guidance_scale: float = 5.0,
        sample_size: tuple[int, int] | None = None,
        settings: dict[str, str] | None = None,
    ):
        if vae.channels != transformer.in_channels:
            raise ValueError(
                f"autoencoder {vae.name!r} has latents of {vae.channels} channels, the network takes "
                f"{transformer.in_channels}: name the autoencoder that it was trained with"
            )
        if text_encoder.width != transformer.caption_channels:
            raise ValueError(
                f"text encoder {text_encoder.name!r} is {text_encoder.width} wide, the network takes "
                f"{transformer.caption_channels}: name the text encoder that it was trained with"
            )
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.edm = edm or EDM()
        self.guidance_scale = guidance_scale
        side = transformer.config["input_size"]
        self.sample_size = sample_size or (side, side)
        self.settings = settings or {}
        self._progress: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        autoencoder: str | None = None,
        text_encoder: str | None = None,
        device: str | torch.device = "cpu",
    ) -> MicroDiTPipeline:
        """Load a pipeline from a folder or hub repository, a training run, a file of weights, or a released checkpoint.

        checkpoint: what `model.loading` lists. Of a run the newest checkpoint is taken, and the moving average of the
            weights where there is one. torch_dtype: of the network. Autoencoder and text encoder keep the dtype that
            their numbers had in training. revision: commit, tag or branch on the hub. autoencoder, text_encoder: names,
            folders or repositories in place of those that the checkpoint names.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or it does not say what it needs.
            ValueError: the parts do not fit together.
            microdit.model.pretrained.hub.ModelFilesError: files cannot be had.
        """
        parts = find_parts(checkpoint, revision=revision, autoencoder=autoencoder, text_encoder=text_encoder)
        text, codec = load_encoders(parts.text_encoder, parts.autoencoder, device)
        net = load_model(parts.weights, device=device, dtype=torch_dtype, **parts.config)
        names = {"autoencoder": parts.autoencoder.name, "text_encoder": parts.text_encoder.name}
        return cls(
            net,
            codec,
            text,
            edm=parts.edm,
            guidance_scale=parts.guidance_scale,
            sample_size=parts.sample_size,
            settings=parts.origin | names,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything that makes pictures into a new folder, in diffusers' layout and safetensors.

            model_index.json   the parts, and the defaults of a call
            transformer/       config.json (the arguments of `MicroDiT`), weights
            vae/               as diffusers saves it: `AutoencoderKL.from_pretrained(folder, subfolder="vae")`
            text_encoder/      model and tokenizer together, as transformers saves them

        Raises:
            FileExistsError: the folder has something in it.
        """
        write_pipeline(
            Path(folder),
            self.transformer,
            self.vae,
            self.text_encoder,
            edm=self.edm,
            guidance_scale=self.guidance_scale,
            sample_size=self.sample_size,
            names=self.settings,
        )

    @property
    def device(self) -> torch.device:
        """The device of the network, and of the other parts with it."""
        return self.transformer.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's weights."""
        return self.transformer.pos_embed.dtype

    def to(self, *args: Any, **kwargs: Any) -> MicroDiTPipeline:
        """Move all parts: `to("cuda")`, `to("cuda", torch.bfloat16)`. A dtype is the network's alone."""
        self.transformer.to(*args, **kwargs)
        self.text_encoder.to(self.device)
        self.vae.to(self.device)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of tqdm for the bar that a call shows: `disable=True` shows none."""
        self._progress = options

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        sampler: str = "heun",
        guidance_interval: tuple[float, float] | None = None,
        batch_size: int | None = None,
        on_image: Callable[[int, Any], None] | None = None,
    ) -> PipelineOutput:
        """Draw pictures of prompts: all of the first prompt, then all of the second, and so on.

        negative_prompt: what to steer away from, one for all prompts or one for each. None: zero embeddings, which is
            what the released models were trained and shown with; "" is the embedding of an empty prompt.
        height, width: pixels, default: the size of the training.
        guidance_scale: up to 1 is no guidance, and no negative prompt. None: what the checkpoint says, 5 if nothing.
            guidance_interval: (low, high), guidance only where low < sigma <= high (arXiv 2404.07724).
        seed: picture i starts from the noise of seed + i; or a seed for each picture. The noise is made on the CPU, so
            it is the same on every device. generator: torch generators instead, one for all pictures or one for each;
            latents: the noise itself, standard normal (B, C, h, w); none of the three: torch's global generator.
        sampler: of `model.samplers.SAMPLERS`: "heun" as released, or "dpmpp_2m", "unipc", with half of the network
            calls for as many steps.
        batch_size: pictures that are made together. None: as many as keep the device busy, and on a GPU fewer if its
            memory is too small. A picture does not depend on the split, but for the rounding of matrix products.
        on_image: called with each picture's number and the picture (for "np" and "pt" without the first axis) once it
            is done; `images` is then empty. For many pictures, which need not be held together.

        Raises:
            ValueError: an argument is out of range; the message names it.
        """
        _check_counts(num_images_per_prompt=num_images_per_prompt, batch_size=batch_size)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        sampling = Sampling(num_inference_steps, scale, sampler, guidance_interval)
        sampling.check()
        pairs = _prompt_pairs(prompt, negative_prompt, num_images_per_prompt, guided=scale > 1)
        shape = self._latent_shape(height, width)
        sources = noise_sources((len(pairs), *shape), seed, generator, latents)
        images = []
        for number, drawn in enumerate(self._draw(pairs, sources, shape, batch_size, sampling)):
            picture = self._picture(drawn, output_type)
            if on_image is None:
                images.append(picture)
            else:
                on_image(number, picture)
        if images and output_type != "pil":
            return PipelineOutput(np.stack(images) if output_type == "np" else torch.stack(images))
        return PipelineOutput(images)

    def _draw(
        self,
        pairs: Sequence[PromptPair],
        sources: Sequence[NoiseSource],
        shape: tuple[int, int, int],
        batch_size: int | None,
        sampling: Sampling,
    ) -> Iterator[Tensor]:
        """Yield the latents (C, h, w) of each pair of prompt and negative prompt, in order, batch by batch."""
        tokens = shape[1] * shape[2] // self.transformer.patch_size**2
        together = batch_size or max(1, (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS) // tokens)
        steps, done = sampling.num_inference_steps, 0
        noise: list[Tensor] = []  # of the pictures that are left, as far as it was drawn
        embeddings: dict[str | None, Tensor] = {}
        with tqdm(**{"total": len(pairs) * steps, "unit": "step", "desc": "drawing", **self._progress}) as bar:
            while done < len(pairs):
                batch = pairs[done : done + together]
                noise += [draw_noise(source, shape) for source in sources[done + len(noise) : done + len(batch)]]
                embeddings = {
                    text: embeddings[text] if text in embeddings else self._embed(text)
                    for text in dict.fromkeys(text for pair in batch for text in pair)
                }
                latents = self._sample(
                    torch.stack([one.to(self.device) for one in noise[: len(batch)]]),
                    callback=lambda _, x: bar.update(len(x)),
                    **_conditions(batch, embeddings),
                    **vars(sampling),
                )
                if latents is None:
                    together = len(batch) // 2
                    bar.update(done * steps - bar.n)
                    continue
                yield from latents
                done += len(batch)
                del noise[: len(batch)]

    def _sample(self, noise: Tensor, **options: Any) -> Tensor | None:
        """Sample clean latents. None if the GPU's memory is too small for this many pictures, more than one."""
        try:
            return self.edm.sample(self.transformer, noise, **options)
        except torch.OutOfMemoryError:
            if len(noise) == 1:
                raise
        torch.cuda.empty_cache()  # not in the handler, where the tensors of the failed call are still held
        return None

    def _embed(self, text: str | None) -> Tensor:
        """Embed a text: (tokens, width), without padding; (0, width) of None.

        One by one: the rounding of a text encoder, most of all in bfloat16, depends on what shares its batch.
        """
        if text is None:
            return torch.zeros(0, self.text_encoder.width, device=self.device)
        embeddings, lengths = self.text_encoder.encode([text])
        return embeddings[0, : int(lengths[0])]

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Give (C, h, w) of the latents of pictures of height x width pixels."""
        unit = self.vae.downsample * self.transformer.patch_size
        sides = []
        for name, asked, built in zip(("height", "width"), (height, width), self.sample_size, strict=True):
            side = built * self.vae.downsample if asked is None else asked
            if side < 1 or side % unit:
                raise ValueError(f"{name}={side}: expected a multiple of {unit} pixels")
            sides.append(side // self.vae.downsample)
        return self.transformer.in_channels, sides[0], sides[1]

    def _picture(self, latents: Tensor, output_type: str) -> Any:
        """Decode latents (C, h, w), alone, so that what shares their batch does not matter."""
        if output_type == "latent":
            return latents.cpu()
        pixels = self.vae.decode(latents[None])[0]
        if output_type == "pil":
            return Image.fromarray(pixels.numpy())
        values = pixels.float() / 255
        return values.numpy() if output_type == "np" else values.permute(2, 0, 1)


def load_encoders(
    text_encoder: Part, autoencoder: Part, device: str | torch.device = "cpu"
) -> tuple[TextEncoder, Autoencoder]:
    """Load text encoder and autoencoder, and refuse others than the training saw.

    Raises:
        CheckpointError: it is another one.
        ValueError, microdit.model.pretrained.hub.ModelFilesError: as their loaders.
    """
    text = load_text_encoder(text_encoder.where, device=device, **text_encoder.options)
    check_trained_with(text_encoder, text, "text_encoder")
    codec = load_autoencoder(autoencoder.where, device=device, **autoencoder.options)
    check_trained_with(autoencoder, codec, "autoencoder")
    return text, codec


def _check_counts(**counts: int | None) -> None:
    """Refuse counts below 1; None is no count."""
    for name, number in counts.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: expected at least 1")


def _prompt_pairs(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, repeats: int, guided: bool
) -> list[PromptPair]:
    """Pair each prompt, as often as it is drawn, with its negative prompt: None if there is no guidance."""
    prompts, negatives = _texts("prompt", prompt), _texts("negative_prompt", negative_prompt)
    if len(negatives) not in (1, len(prompts)):
        raise ValueError(f"negative_prompt has {len(negatives)} texts for {len(prompts)} prompts: give one, or each")
    if not guided:
        negatives = [None]
    return [pair for pair in zip(prompts, cycle(negatives), strict=False) for _ in range(repeats)]


def _texts(name: str, given: str | Sequence[str] | None) -> list[Any]:
    """List the texts given. As a negative prompt None counts as one: that of zero embeddings."""
    texts = [given] if given is None or isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) or (text is None and name == "negative_prompt") for text in texts):
        raise ValueError(f"{name}={given!r}: expected a string, or several")
    return texts


def _conditions(batch: Sequence[PromptPair], embeddings: dict[str | None, Tensor]) -> dict[str, Tensor | None]:
    """Make the arguments of `EDM.sample`: captions and negative prompts (B, L, width), masks (B, L) of real tokens.

    Without masks if every position of both is a real token, as with a CLIP text tower.
    """
    rows = [embeddings[text] for pair in batch for text in pair]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if not padded.shape[1]:  # nothing but empty texts, and a tokenizer that adds no token
        padded = padded.new_zeros(len(rows), 1, padded.shape[2])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(padded.device)
    y, negative = padded[0::2], padded[1::2]
    if all(text is None for _, text in batch):
        return {"y": y, "text_mask": None if mask[0::2].all() else mask[0::2]}
    whole = bool(mask.all())
    return {
        "y": y,
        "negative": negative,
        "text_mask": None if whole else mask[0::2],
        "negative_mask": None if whole else mask[1::2],
    }
