"""Check how a pipeline is to be called, against its signature, before anything is loaded."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from microdit.pipeline.config.synthesis import MakerOptions

OWN_FIELDS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "width": "size",
    "height": "size",
    "negative_prompt": "negative_prompt",
}
"""Arguments that have a field of their own in the config."""
GIVEN = (
    "self", "prompt", "prompts", "image", "generator", "seed", "latents", "output_type", "return_dict",
    "num_images_per_prompt", "batch_size", "on_image", "callback", "callback_steps", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)  # fmt: skip
"""Arguments that are not the user's: their values are made for each call."""
TENSORS = "_embeds"
"""Behind the names of arguments that no config can hold."""


class ArgumentError(ValueError):
    """A field of a maker does not fit its pipeline."""

    def __init__(self, field: str, value: Any, message: str):
        super().__init__(message)
        self.field, self.value = field, value


def call_arguments(
    call: Callable[..., Any], class_name: str, options: MakerOptions, steps: int | None, guidance: float | None
) -> dict[str, Any]:
    """Return the arguments of each call, and what the pipeline takes for steps and guidance where none are given.

    Args:
        steps, guidance: those that are known of the model, for a config that gives none.

    Raises:
        ArgumentError: the pipeline takes no such argument.
    """
    takes = inspect.signature(call).parameters
    free = [name for name in takes if name not in (*GIVEN, *OWN_FIELDS) and not _is_tensor(name)]
    for name in options.arguments:
        if name in OWN_FIELDS:
            raise ArgumentError(f"arguments.{name}", options.arguments[name], f"give it as {OWN_FIELDS[name]}")
        if name not in free:
            message = f"a {class_name} takes no such argument of a config; it takes {', '.join(sorted(free)) or 'none'}"
            raise ArgumentError(f"arguments.{name}", options.arguments[name], message)
    width, height = options.sides or (None, None)
    fields: Mapping[str, tuple[str, Any, Any]] = {
        "num_inference_steps": ("steps", options.steps, steps),
        "guidance_scale": ("guidance", options.guidance, guidance),
        "width": ("size", width, None),
        "height": ("size", height, None),
        "negative_prompt": ("negative_prompt", options.negative_prompt, None),
    }
    arguments = dict(options.arguments)
    for name, (field, asked, known) in fields.items():
        if asked is not None and name not in takes:
            raise ArgumentError(field, asked, f"a {class_name} takes no {name}; leave it out")
        default = takes[name].default if name in takes else None
        value = asked if asked is not None else known if known is not None and name in takes else default
        if value is not None and value is not inspect.Parameter.empty:
            arguments[name] = value
    return arguments


def _is_tensor(name: str) -> bool:
    return TENSORS in name or name.endswith("_mask") or "callback" in name
