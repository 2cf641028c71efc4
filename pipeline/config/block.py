"""What the blocks of a config have in common."""

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class At(ValueError):
    """A fault at a place deeper than the validator that found it."""

    def __init__(self, where: Sequence[str | int], message: str, value: Any):
        super().__init__(message)
        self.where, self.value = tuple(where), value


class Options(BaseModel):
    """A block of a config: unknown keys are refused, and `yes` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_as_number(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None:
                kinds = {field.annotation, *get_args(field.annotation)}
                if kinds & {int, float} and bool not in kinds:
                    raise At((name,), "expected a number", value)
        return given
