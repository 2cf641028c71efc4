import pytest
import yaml
from pydantic import ValidationError

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.recipe import LegRecipe, identity, load_recipe
from tests.trainer.conftest import STAGE


@pytest.fixture
def path(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe().model_dump(mode="json", exclude_none=True)))
    return file


def test_a_file_with_overrides(path) -> None:
    found = load_recipe(path, ["seed=9", "stages.1.learning_rate=5e-4", "text.text/tiny@long=2", "model.depth=4"])
    assert found.seed == 9 and found.stages[1].learning_rate == 5e-4 and found.stages[0].learning_rate == 1e-3
    assert found.text["text/tiny@long"] == 2 and found.model["depth"] == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=9", "sed"),
        ("seed=9223372036854775808", "seed.*9223372036854775808.*less than 9223372036854775808"),
        ("seed=-1", "seed.*-1"),
        ("stages.0.mask=0.5", r"stages\.0\.mask"),
        ("stages.0.mask_ratio=1", r"stages\.0\.mask_ratio.*1"),
        ("stages.0.batch=12", "12 is no multiple of lanes=8"),
        ("stages.0.images=100", "either images or steps"),
        ("stages.0.schedule=exponential", r"stages\.0\.schedule.*exponential.*cosine"),
        ("text={}", "text"),
        ("text_lengths=[8,4]", "must rise"),
        ("precision=fp16", "precision.*fp16.*bf16"),
        ("name=a/b", "name"),
        ("stages.7.batch=8", "7"),
    ],
)
def test_what_is_wrong_is_named(path, override, message) -> None:
    with pytest.raises(RequestError, match=message):
        load_recipe(path, [override])


def test_length_is_in_whole_batches() -> None:
    def stage(**fields):
        return LegRecipe.model_validate({"latents": "l", "batch": 128, "learning_rate": 1e-3} | fields)

    assert stage(images=128).length == 1 and stage(images=129).length == 2 and stage(steps=7).length == 7
    with pytest.raises(ValidationError):
        stage()


def test_identity_leaves_out_what_changes_nothing(recipe) -> None:
    base = identity(recipe())
    same = recipe(out="/elsewhere", log_every=7, cache_mb=9, stages=[STAGE | {"steps": 5, "micro_batch": 4}])
    assert identity(same) == identity(recipe(stages=[STAGE | {"steps": 5}]))
    assert identity(recipe(seed=1)) != base and identity(recipe(caption_dropout=0.0)) != base
    assert "corpus" not in base and "time_budget" not in base and "selection" in base


def test_the_recipes_of_the_project_load() -> None:
    found = load_recipe("configs/recipes/demo.yaml", ["corpus=/somewhere", "out=/somewhere/run", "time_budget=200"])
    assert [stage.mask_ratio > 0 for stage in found.stages] == [True, False]
