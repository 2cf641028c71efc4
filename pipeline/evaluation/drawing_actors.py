"""Draw with several Ray actors: of the pictures that are missing each draws every n-th batch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.evaluation.drawing import draw_missing

if TYPE_CHECKING:
    from microdit.model.text_to_image import MicroDiTPipeline


def draw_on_actors(
    count: int,
    load: Callable[[str, str | None], "MicroDiTPipeline"],
    what: str,
    device: str | None,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int,
    options: Mapping[str, Any],
) -> None:
    """Draw as `draw_missing`, in `count` actors; with GPUs each has one. All must see the folder.

    Raises:
        RequestError: the request is wrong, or an actor died.
    """
    import ray

    from microdit.pipeline.engine import local_ray

    own = None if ray.is_initialized() else local_ray.start({}, num_cpus=count)
    try:
        gpus = 0 if device == "cpu" else min(1, ray.cluster_resources().get("GPU", 0))

        @ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)
        def draw(rank: int) -> None:
            pipe = load(what, device)
            draw_missing(pipe, prompts, folder, seed=seed, options=options, part=(rank, count))

        ray.get([draw.remote(rank) for rank in range(count)])
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise RequestError(str(cause) if isinstance(cause, RequestError) else f"an actor failed: {cause}") from error
    except ray.exceptions.RayError as error:
        raise RequestError(f"an actor died: {first_line(error)}; the same command goes on") from error
    finally:
        if own is not None:
            local_ray.stop(own)
