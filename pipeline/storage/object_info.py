"""Describe one object of a listing."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: its name under the root, its size in bytes, and when it was written."""

    name: str
    size: int
    modified: datetime
