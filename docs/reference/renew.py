"""Write the generated pages of this folder: `python docs/reference/renew.py`, in a checkout.

config.md and recipe.md come from the pydantic models and the docstrings below their fields, cli.md from typer.
tests/test_pages.py compares what lies here with what this program would write.
"""

import ast
import inspect
import json
import textwrap
import types
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo

from microdit.pipeline.cli.app import app
from microdit.pipeline.config.build import BuildConfig, Resources
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.files import JoinOptions
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.config.prompts import PromptsConfig
from microdit.pipeline.config.scores import SCORERS
from microdit.pipeline.config.sources import FetchOptions, SourceOptions
from microdit.pipeline.config.synthesis import LoraOptions, MakerOptions
from microdit.trainer.recipe import LegRecipe, OptimizerRecipe, Recipe

FOLDER = Path(__file__).parent
COMMAND = "python docs/reference/renew.py"
NOTE = f"<!-- Written by `{COMMAND}`: change the code, and run it again. -->"
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Path: "path"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
SOURCES = get_args(get_args(SourceOptions)[0])
CONFIG = [
    ("sources", [*SOURCES, FetchOptions, JoinOptions, PromptsConfig, MakerOptions, LoraOptions]),
    ("images", [ImageOptions]),
    ("columns", [CaptionsColumn, *SCORERS.values(), LatentsColumn, TextColumn]),
    ("resources", [Resources]),
]


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Collect the description of each field: its docstring, or what `Field` says; those of base classes too."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as said)):
                    found[name] = " ".join(said.split())
    found |= {name: field.description for name, field in model.model_fields.items() if field.description}
    return found


def kind_of(annotation: Any) -> str:
    """Say an annotation in words: `integer or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(argument) for argument in arguments))
    if origin is list:
        return f"list of {kind_of(arguments[0])}"
    if origin is dict:
        return f"map of {kind_of(arguments[0])} to {kind_of(arguments[1])}"
    if origin is tuple:
        return f"list of {len(arguments)} {kind_of(arguments[0])}s"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "block"
    return WORDS.get(annotation, "any value")


def bounds_of(field: FieldInfo) -> str:
    """Say the bounds of a number: `, at least 1, at most 64`."""
    said = ((BOUNDS[name], getattr(limit, name)) for limit in field.metadata for name in BOUNDS if hasattr(limit, name))
    return "".join(f", {word} {value:,}" for word, value in said)


def default_of(field: FieldInfo) -> str:
    """Write a default as YAML would; `required` if there is none."""
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        set_here = field.default.model_dump(mode="json", exclude_unset=True)
        return ", ".join(f"`{name}: {value}`" for name, value in set_here.items())
    return f"`{json.dumps(field.default, default=str)}`"


def table_of(model: type[BaseModel]) -> Iterator[str]:
    """Write the fields of a model as a table.

    Raises:
        ValueError: a field has no description.
    """
    said = descriptions(model)
    fields = {name: field for name, field in model.model_fields.items() if name != "adapter"}
    if missing := [name for name in fields if name not in said]:
        raise ValueError(f"{model.__module__}.{model.__name__}: no docstring below {', '.join(missing)}")
    if not fields:
        return
    yield from ("| field | value | default | meaning |", "|---|---|---|---|")
    for name, field in fields.items():
        kind = kind_of(field.annotation) + bounds_of(field)
        yield "| " + " | ".join(cell(text) for text in (f"`{name}`", kind, default_of(field), said[name])) + " |"
    yield ""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def block_name(model: type[BaseModel]) -> str:
    if "adapter" in model.model_fields:
        return f"`adapter: {get_args(model.model_fields['adapter'].annotation)[0]}`"
    scorer = next((name for name, options in SCORERS.items() if options is model), None)
    if scorer is not None:
        return f"`scores/{scorer}`"
    names = {CaptionsColumn: "`captions/<name>`", LatentsColumn: "`latents/<name>`", JoinOptions: "an entry of `joins`"}
    names |= {TextColumn: "`text/<name>@<captions>`", FetchOptions: "the block `fetch`"}
    names |= {PromptsConfig: "the block `prompts`", MakerOptions: "an entry of `makers`"}
    names |= {LoraOptions: "an entry of a maker's `lora`"}
    return names[model]


def config_page() -> Iterable[str]:
    """Write config.md."""
    yield from (NOTE, "", "# The config of a build", "")
    yield paragraph(
        "A YAML file, as those in `configs/`. `microdit build CONFIG KEY=VALUE` overrides a value: "
        "`sources.sa1b.units=10`, `shard_samples=64`. Unknown keys are refused."
    )
    yield from ("", *table_of(BuildConfig))
    for title, models in CONFIG:
        yield from (f"## `{title}`", "")
        for model in models:
            if len(models) > 1:
                yield from (f"### {block_name(model)}", "")
            yield from (paragraph(inspect.getdoc(model) or ""), "", *table_of(model))


def recipe_page() -> Iterable[str]:
    """Write recipe.md."""
    yield from (NOTE, "", "# The recipe of a training", "")
    yield paragraph(
        "A YAML file, as those in `configs/recipes/`. `microdit train RECIPE KEY=VALUE` overrides a value: "
        "`stages.0.images=1000`, `optimizer.eps=1e-6`. Unknown keys are refused."
    )
    yield from ("", *table_of(Recipe))
    for title, model in (("An entry of `stages`", LegRecipe), ("The block `optimizer`", OptimizerRecipe)):
        yield from (f"## {title}", "", paragraph(inspect.getdoc(model) or ""), "", *table_of(model))


def cli_page() -> Iterable[str]:
    """Write cli.md."""
    yield from (NOTE, "", "# The command line", "", *help_of(app.info.help))
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        parameters = [parameter(value) for value in inspect.signature(function, eval_str=True).parameters.values()]
        usage = [f"microdit {function.__name__}", *(name for name, is_argument, *_ in parameters if is_argument)]
        yield from (f"## `{usage[0]}`", "", f"    {' '.join(usage)} [OPTIONS]", "")
        yield from help_of(function.__doc__)
        yield from ("| argument or option | default | meaning |", "|---|---|---|")
        for name, _, default, meaning in parameters:
            yield f"| `{cell(name)}` | {default} | {cell(meaning)} |"
        yield ""


def parameter(param: inspect.Parameter) -> tuple[str, bool, str, str]:
    """Return a parameter as it is typed, whether it is an argument, its default and its meaning."""
    kind, said = get_args(param.annotation)
    required = param.default is inspect.Parameter.empty
    if isinstance(said, ArgumentInfo):
        return said.metavar or param.name.upper(), True, "required" if required else "", said.help or ""
    default = "required" if required else "" if param.default in (None, "") or kind is bool else f"`{param.default}`"
    given = [name for name in (said.default, *(said.param_decls or ())) if isinstance(name, str)]
    names = ", ".join(given or ["--" + param.name.replace("_", "-")])
    value = said.metavar or "|".join(map(str, get_args(kind)) if get_origin(kind) is Literal else [words_of(kind)])
    return names if kind is bool else f"{names} {value}", False, default, said.help or ""


def words_of(kind: Any) -> str:
    return kind_of(kind).removesuffix(" or null").upper()


def help_of(text: str | None) -> Iterator[str]:
    """Write a command's help, its paragraphs filled."""
    for part in inspect.cleandoc(text or "").split("\n\n"):
        yield from (paragraph(part), "")


def pages() -> dict[str, str]:
    """Write all generated pages, by file name."""
    made = {"config.md": config_page(), "recipe.md": recipe_page(), "cli.md": cli_page()}
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in made.items()}


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
