"""What every section of a recipe is: strict (no coercion), closed (no unknown key), frozen, documented."""

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections; the docstring under a field is its description in the JSON Schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


# A conflict rule yields (field, message). It is given the recipe and `written(field)`: whether the user wrote
# that
# field with a value other than null. Only what the user wrote can conflict; a default never does.
Conflicts = Iterator[tuple[str, str]]
Written = Callable[[str], Any]
