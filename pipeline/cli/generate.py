"""`microdit generate`: prompts to PNG files."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.terminal import printable

if TYPE_CHECKING:
    from microdit.model.text_to_image import MicroDiTPipeline

MOST_SIDE = 8192  # pixels: far above what any checkpoint was trained with


# longer than 60 lines by its options and its help alone
def generate(
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="A run's folder, or where its checkpoints are on a bucket (`s3://...`); one of its checkpoints, a "
            "saved pipeline (folder or `owner/name` on the hub), a file of weights (here or `owner/name/file.pt` on "
            "the hub), or a released checkpoint by its name.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What to draw; give it several times for several.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More prompts, one a line; empty lines are passed over.")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the PNG files go; what is there already stays.")
    ] = Path("pictures"),
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to steer away from. Default: nothing in particular.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; each further one takes the next.")] = 0,
    images_per_prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures of each prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler. Fewer are faster and coarser.")] = 30,
    sampler: Annotated[
        str, typer.Option(help="`heun` (as released), or `unipc`, `dpmpp_2m`: half the time for as many steps.")
    ] = "heun",
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="How closely to follow the prompt; up to 1 is no guidance. Default: the checkpoint's, or 5."),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Guide only at noise levels above LOW and up to HIGH (of 0.002 to 80)."),
    ] = None,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", help="Default: the training's.")] = None,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", help="Default: the training's.")] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In place of the checkpoint's; must be named for a file of weights alone."),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In place of the checkpoint's; must be named for a file of weights alone."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Commit, tag or branch of a checkpoint on the hub.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="`cpu`, `cuda`, `cuda:1`. Default: a GPU if there is one.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also save the checkpoint as a pipeline, to publish or to load elsewhere."),
    ] = None,
) -> None:
    """Draw what prompts say: a PNG for each picture, and a sheet of them all.

    A picture depends on prompt, seed and settings, and on nothing else that is drawn with it. All of them are in the
    PNG's text fields `prompt` and `parameters`, so it can be drawn again.

    **Examples**

    - `microdit generate --checkpoint runs/demo/run --prompt "red apple" --prompt "a snail" --out pictures`

    - `microdit generate --checkpoint my/run --prompts prompts.txt --images-per-prompt 4 --seed 100`

    - `microdit generate --checkpoint dit_4_channel_37M_real_and_synthetic_data.pt --prompt "a lighthouse in fog"`
      downloads a released model with its text encoder and autoencoder, several GB

    - `microdit generate --checkpoint my/run --save my/pipeline` draws nothing; `--checkpoint my/pipeline` then works
    """
    texts = [*(prompt or ()), *(_read_prompts(prompts) if prompts else ())]
    _check_request(texts, out, save)
    _check_numbers(seed, len(texts) * images_per_prompt, {"height": height, "width": width})
    from microdit.model.edm import Sampling
    from microdit.model.picture_files import generate as draw

    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "sampler": sampler,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
    }
    with request_errors(out):
        Sampling(steps, 1.0 if guidance_scale is None else guidance_scale, sampler, guidance_interval).check()
        pipe = load_pipeline(checkpoint, revision, autoencoder, text_encoder, device)
        _note_cut(pipe, [*texts, *([negative_prompt] if negative_prompt else ())])
        if save:
            pipe.save_pretrained(save)
            print(printable(f"saved as a pipeline in {save}"))
        paths = draw(pipe, texts, out, seed=seed, num_images_per_prompt=images_per_prompt, **options) if texts else []
    if paths:
        print(printable(f"{len(paths)} pictures in {out}" if len(paths) > 1 else f"1 picture: {paths[0]}"))


def _check_request(texts: list[str], out: Path, save: Path | None) -> None:
    """Raise RequestError if nothing is to be done, or the pictures would have no folder."""
    if not texts and not save:
        raise RequestError("there is nothing to draw: give --prompt TEXT or --prompts FILE")
    if texts and out.exists() and not out.is_dir():
        raise RequestError(f"--out {out}: it is a file; give a folder")


def _check_numbers(seed: int, pictures: int, sides: dict[str, int | None]) -> None:
    """Raise RequestError for what no checkpoint can draw, before one is loaded."""
    if seed + max(pictures, 1) > 2**64:
        raise RequestError(
            f"--seed {seed}: expected 0 to {2**64 - max(pictures, 1)}, as {pictures:,} pictures are drawn"
        )
    for name, side in sides.items():
        if side is not None and not 0 < side <= MOST_SIDE:
            raise RequestError(f"--{name} {side}: expected 1 to {MOST_SIDE:,} pixels")


@contextmanager
def request_errors(out: Path) -> Iterator[None]:
    """Turn the errors that the model raises about a request into RequestError, and tell Ctrl-C where pictures are."""
    from microdit.model.pretrained.hub import ModelFilesError

    files = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
    try:
        yield
    except (ValueError, *files, ModelFilesError) as error:
        raise RequestError(str(error)) from error
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"stopped; what was drawn is in {out}") from stopped


def _fetch(checkpoint: str) -> str:
    """Copy a checkpoint on a bucket to this machine; returns its folder here. Other names are returned unchanged."""
    from microdit.pipeline.storage.bucket import SCHEMES

    if urlsplit(checkpoint).scheme not in SCHEMES:
        return checkpoint
    from microdit.pipeline.cli.bucket_checkpoint import on_this_machine

    return str(on_this_machine(checkpoint))


def load_pipeline(
    checkpoint: str, revision: str | None, autoencoder: str | None, text_encoder: str | None, device: str | None
) -> "MicroDiTPipeline":
    """Load the pipeline of what `--checkpoint` takes; its progress bar is drawn rarely where there is no terminal."""
    from microdit.model.text_to_image import MicroDiTPipeline

    pipe = MicroDiTPipeline.from_pretrained(
        _fetch(checkpoint),
        revision=revision,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        device=_choose_device(device),
    )
    pipe.set_progress_bar_config(mininterval=0.1 if sys.stderr.isatty() else 10)
    return pipe


def _note_cut(pipe: "MicroDiTPipeline", texts: list[str]) -> None:
    """Say how many prompts are longer than the text encoder reads."""
    if cut := pipe.text_encoder.count_cut(texts):
        most = pipe.text_encoder.max_tokens
        print(
            f"microdit: {cut} of {len(texts)} prompts have more than the {most} tokens that the text encoder reads; "
            "what is behind them is left out",
            file=sys.stderr,
        )


def _read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file in UTF-8, one a line; empty lines are left out."""
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts {path}: cannot be read as text in UTF-8 ({error})") from error
    if not texts:
        raise RequestError(f"--prompts {path}: there is no prompt in it; expected one a line")
    return texts


def _choose_device(name: str | None) -> str:
    """Choose the device that was asked for, or a GPU if there is one; raises RequestError if torch cannot use it."""
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"--device {device}: {str(error).splitlines()[0]}; --device cpu always works") from error
    return device
