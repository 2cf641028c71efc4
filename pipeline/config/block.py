"""The base of every block of a config."""

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class FieldError(ValueError):
    """A fault of a field below the one whose validator raises it; `path` leads there."""

    def __init__(self, path: Sequence[str | int], message: str, value: Any):
        super().__init__(message)
        self.path, self.value = tuple(path), value


class Options(BaseModel):
    """A block of a config: unknown keys are refused, and `yes` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None:
                kinds = {field.annotation, *get_args(field.annotation)}
                if kinds & {int, float} and bool not in kinds:
                    raise FieldError((name,), "expected a number", value)
        return given
