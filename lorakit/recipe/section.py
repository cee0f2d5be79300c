"""What every section of a recipe is: strict (no coercion), closed (no unknown key), frozen, documented."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Tag


class Section(BaseModel):
    """Base of all sections; the docstring under a field is its description in the JSON Schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Tagged:
    """A section of which there are several types, chosen by one of its fields."""

    field: str  # that says which type
    default: str  # what it says where it is not written
    word: str  # how a message calls a type: method "lora"
    types: Mapping[str, type[Section]]

    def tag(self, block: Any) -> Any:
        """What a mapping, or a section, says that it is."""
        if isinstance(block, dict):
            return block.get(self.field, self.default)
        return getattr(block, self.field, self.default)

    def union(self) -> Any:
        """The type of the section in a recipe."""
        types = (Annotated[section, Tag(name)] for name, section in self.types.items())
        return Annotated[reduce(or_, types), Discriminator(self.tag)]


def share_of(share: float, whole: int) -> Fraction:
    """share * whole of the decimal that was written: as floats 0.07 * 100 is above 7, 0.29 * 100 below 29."""
    return Fraction(repr(share)) * whole


# A conflict rule yields (field, message). It is given the recipe and `written(field)`: whether the user wrote
# that field with a value other than null. Only what the user wrote can conflict; a default never does.
Conflicts = Iterator[tuple[str, str]]
Written = Callable[[str], Any]
