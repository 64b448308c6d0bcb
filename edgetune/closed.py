"""What every part of a recipe is built on."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict

M = TypeVar("M", bound=BaseModel)


class Closed(BaseModel):
    """A model that knows all its keys and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def exactly_one(model: M) -> M:
    given = [name for name in type(model).model_fields if getattr(model, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(type(model).model_fields)}; found {given or 'none'}")
    return model
