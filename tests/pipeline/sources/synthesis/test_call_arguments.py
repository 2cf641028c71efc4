"""How pipelines are called: checked against their signatures, without loading anything."""

from typing import Any

import pytest

from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.config.synthesis import MakerOptions
from microdit.pipeline.sources.synthesis.call_arguments import ArgumentError, call_arguments


def arguments(class_name: str, known: tuple[Any, Any] = (None, None), **options: Any) -> dict[str, Any]:
    import diffusers

    cls = MicroDiTPipeline if class_name == "MicroDiTPipeline" else getattr(diffusers, class_name)
    return call_arguments(cls.__call__, class_name, MakerOptions(model="m", **options), *known)


def test_the_config_comes_before_what_is_known_and_that_before_the_pipeline() -> None:
    assert arguments("FluxPipeline") == {"num_inference_steps": 28, "guidance_scale": 3.5}
    assert arguments("FluxPipeline", (4, 0.0)) == {"num_inference_steps": 4, "guidance_scale": 0.0}
    given = arguments("FluxPipeline", (4, 0.0), steps=2, guidance=1.5, size=(64, 32), arguments={"true_cfg_scale": 2})
    assert given == {
        "num_inference_steps": 2, "guidance_scale": 1.5, "width": 64, "height": 32, "true_cfg_scale": 2,
    }  # fmt: skip
    own = arguments("MicroDiTPipeline", negative_prompt="gray", arguments={"sampler": "unipc"})
    assert own == {"num_inference_steps": 30, "negative_prompt": "gray", "sampler": "unipc"}


@pytest.mark.parametrize(
    ("class_name", "options", "field", "words"),
    [
        ("FluxPipeline", {"arguments": {"cfg": 2}}, "arguments.cfg", "takes no such argument of a config; it takes"),
        ("FluxPipeline", {"arguments": {"prompt": "x"}}, "arguments.prompt", "takes no such argument"),
        ("FluxPipeline", {"arguments": {"prompt_embeds": 1}}, "arguments.prompt_embeds", "takes no such argument"),
        ("FluxPipeline", {"arguments": {"height": 64}}, "arguments.height", "give it as size"),
        ("Flux2KleinPipeline", {"negative_prompt": "x"}, "negative_prompt", "takes no negative_prompt; leave it out"),
        ("Flux2KleinKVPipeline", {"guidance": 2.0}, "guidance", "takes no guidance_scale"),
        ("MicroDiTPipeline", {"arguments": {"seed": 1}}, "arguments.seed", "it takes guidance_interval, sampler"),
    ],
)
def test_one_message_for_what_a_pipeline_does_not_take(
    class_name: str, options: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        arguments(class_name, **options)
    assert caught.value.field == field
