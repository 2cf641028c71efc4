"""Options of sources that contradict each other."""

from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import load_config


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{adapter: sa1b}", ["sources.web.links", "either links"]),
        ("{adapter: sa1b, links: a, files: b}", ["sources.web.links", "either links"]),
        ("{adapter: sa1b, links: a, captions: null}", ["sources.web.caption", "caption: txt"]),
        ("{adapter: cc12m, caption: llavanext_long}", ["sources.web.caption", "give llavanext"]),
        ("{adapter: cc12m, caption: long}", ["sources.web.caption", "'long'", "llavanext_short"]),
        ("{adapter: cc12m, units: 0}", ["sources.web.units", "number of files"]),
        ("{adapter: cc12m, units: yes}", ["sources.web.units", "expected a number"]),
        ("{adapter: journeydb, splits: [train, train]}", ["sources.web.splits", "once"]),
        ("{adapter: journeydb, splits: [test]}", ["sources.web.splits.0", "'test'"]),
        ("{adapter: diffusiondb, image_nsfw: yes}", ["sources.web.image_nsfw", "expected a number"]),
    ],
)
def test_options_of_datasets_that_do_not_fit(path: Path, source: str, words: list[str]):
    with pytest.raises(RequestError) as error:
        load_config(path, [f"sources.web={source}"])
    assert all(word in str(error.value) for word in words), error.value
