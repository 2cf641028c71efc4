"""Read YAML into pydantic models, with `key=value` overrides and one message per mistake."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

import microdit.pipeline
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.block import FieldError
from microdit.pipeline.config.sources import ADAPTERS

HOME = Path(microdit.__file__).parent  # the folder of `configs/`, in a checkout and in an installed wheel
MISSING = object()
MOST_NODES = 100_000  # of a file, each alias counted as all that it stands for, a long text as several
Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Read YAML's plain types only; a key that is given twice is an error, and so are aliases that unfold too far."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_nodes(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count_nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the nodes below one, its aliases unfolded; `counts` holds those known, by id, and 0 of those begun.

    Raises:
        yaml.constructor.ConstructorError: there are more than `MOST_NODES`, or a node holds itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) // 1000
    known = counts.get(id(node))
    if known == 0:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands within what it names", node.start_mark)
    if known is None:
        counts[id(node)] = 0
        pairs = isinstance(node, yaml.MappingNode)
        below = (item for pair in node.value for item in pair) if pairs else iter(node.value)
        known = counts[id(node)] = 1 + sum(_count_nodes(item, counts) for item in below)
    if known > MOST_NODES:
        fault = f"with its aliases unfolded this has more than {MOST_NODES:,} values; write fewer aliases"
        raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark)
    return known


def find_file(path: str | Path) -> Path:
    """Resolve a file's path; a relative one that does not exist below the current folder is taken in `HOME`.

    Raises:
        RequestError: there is neither.
    """
    given = Path(path).expanduser()
    for candidate in (given, HOME / given):
        if candidate.is_file():
            return candidate
    also = "" if given.is_absolute() else f", nor in {HOME}"
    raise RequestError(f"config {path}: there is no such file{also}; give the path of a YAML file")


def load_yaml(path: str | Path, model_class: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Load a YAML file as a pydantic model, with overrides.

    Args:
        overrides: `key=value`; the key is dotted (`columns.latents/demo-64.resolution=32`, `stages.0.steps=10`), the
            value is YAML.

    Raises:
        RequestError: no such file, bad YAML, an override that fits nowhere, or a field is unknown, missing or wrong.
    """
    file = find_file(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise RequestError(f"config {path}: it cannot be read as YAML: {_yaml_fault(error)}") from None
    if not isinstance(tree, dict):
        raise RequestError(f"config {path}: expected `key: value` lines, found {shown_value(tree)}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RequestError(f"override {shown_value(override)}: expected key=value, as in shard_samples=64")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2026-99-99 is a ValueError
            raise RequestError(
                f"override {shown_value(override)}: the value is no YAML: {_yaml_fault(error)}"
            ) from None
        try:
            _set(tree, key.strip(), value)
        except LookupError as error:
            raise RequestError(f"override {shown_value(override)}: {error.args[0]}") from None
    try:
        return model_class.model_validate(tree)
    except ValidationError as error:
        lines = [f"config {path}: {fault}" for fault in map(fault_of, error.errors()[:5])]
        raise RequestError("\n".join(dict.fromkeys(lines))) from None


def _set(tree: Any, path: str, value: Any) -> None:
    """Set a dotted path; a key of the tree that has dots itself is matched before the path is split."""
    if isinstance(tree, list):
        index, _, rest = path.partition(".")
        if not index.isdigit() or int(index) >= len(tree):
            raise LookupError(f"{index!r} is no index of a list of {len(tree)}; expected 0 to {len(tree) - 1}")
        if rest:
            _set(tree[int(index)], rest, value)
        else:
            tree[int(index)] = value
        return
    if not isinstance(tree, dict):
        raise LookupError(f"there is nothing below a plain value ({shown_value(tree)}) to set {path!r} in")
    if path in tree or "." not in path:
        tree[path] = value
        return
    known = max((str(key) for key in tree if path.startswith(f"{key}.")), key=len, default=None)
    key = path.partition(".")[0] if known is None else known
    if tree.get(key) is None:
        tree[key] = {}
    _set(tree[key], path[len(key) + 1 :], value)


@dataclass(frozen=True)
class Fault:
    """A mistake in a config: the path of the field, its value, and what was expected."""

    path: list[str | int]
    value: Any
    expected: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path)) or 'all of it'} = {shown_value(self.value)}: {self.expected}"


def fault_of(error: ErrorDetails) -> Fault:
    """Translate an error of pydantic's."""
    path, value = list(error["loc"]), error["input"]
    cause = error.get("ctx", {}).get("error")
    expected = error["msg"].removeprefix("Value error, ")
    if len(path) > 2 and path[0] == "sources":
        del path[2]  # the adapter, by which pydantic chose the model
    if isinstance(cause, FieldError):
        path, value = [*path, *cause.path], cause.value
    elif error["type"] == "extra_forbidden":
        expected = "there is no such field; check the spelling"
    elif error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(error["ctx"]["discriminator"].strip("'"))
        value = value.get(path[-1], MISSING)
        expected = f"expected one of {error['ctx'].get('expected_tags', ', '.join(ADAPTERS))}"
    elif error["type"] == "missing":
        expected, value = "this field is required", MISSING
    return Fault(path, value, expected[:1].lower() + expected[1:])


def shown_value(value: Any) -> str:
    """Format a value for a message, shortened."""
    text = "nothing" if value is MISSING else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _yaml_fault(error: Exception) -> str:
    """Say what is wrong with YAML that cannot be read, and where."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
