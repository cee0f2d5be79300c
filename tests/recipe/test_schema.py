"""The JSON Schema of a recipe: what editors complete and check with, and the manual of every field."""

import json
import subprocess
import sys
from typing import Any

import pytest

from lorakit.recipe import Recipe, json_schema
from lorakit.recipe.adapter import METHOD_SECTIONS
from lorakit.recipe.data import FORMAT_FIELDS, Data, Source
from lorakit.recipe.methods import AdaLora, Full, Lora
from lorakit.recipe.model import Model
from lorakit.recipe.optimizer import OPTIMIZERS
from lorakit.recipe.schedule import SCHEDULES
from lorakit.recipe.section import Section
from lorakit.recipe.task import CausalLm
from lorakit.recipe.training import Checkpoint, Eval, Log, Training
from lorakit.recipe.traits import TRAITS

SECTIONS: list[type[Section]] = [
    Recipe,
    Model,
    Lora,
    AdaLora,
    *(traits.section for name, traits in TRAITS.items() if name not in ("lora", "adalora", "full")),
    Full,
    CausalLm,
    Source,
    Data,
    *(traits.section for traits in OPTIMIZERS.values()),
    *(traits.section for traits in SCHEDULES.values()),
    Training,
    Eval,
    Checkpoint,
    Log,
]


def objects(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Section name -> its schema, the recipe itself included."""
    return {"Recipe": schema, **schema["$defs"]}


def test_the_schema_has_all_sections_and_none_without_a_test_here() -> None:
    assert set(objects(json_schema())) == {section.__name__ for section in SECTIONS}
    assert set(METHOD_SECTIONS.values()) <= set(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_description_in_the_schema(section: type[Section]) -> None:
    properties = objects(json_schema())[section.__name__]["properties"]
    assert set(section.model_fields) <= set(properties)
    for name, field in properties.items():
        assert len(field.get("description", "").strip()) > 10, name


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_docstring_that_ends_as_a_sentence_does(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.strip().endswith((".", ")")), name


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_no_section_takes_a_key_that_it_does_not_know(section: type[Section]) -> None:
    assert objects(json_schema())[section.__name__]["additionalProperties"] is False


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_is_strict_frozen_and_closed(section: type[Section]) -> None:
    config = section.model_config
    assert (config["strict"], config["frozen"], config["extra"]) == (True, True, "forbid")
    assert config["allow_inf_nan"] is False


def test_every_default_is_in_the_schema_so_that_an_editor_can_show_it() -> None:
    for section in SECTIONS[1:]:
        properties = objects(json_schema())[section.__name__]["properties"]
        for name, field in section.model_fields.items():
            if not field.is_required():
                assert properties[name]["default"] == json.loads(json.dumps(field.default)), name


def test_extends_is_part_of_the_schema_although_it_is_no_section() -> None:
    extends = json_schema()["properties"]["extends"]
    assert extends["type"] == "string"
    assert "merged over" in extends["description"]


def test_nothing_is_required_because_it_may_stand_in_the_recipe_that_is_extended() -> None:
    assert "required" not in json_schema()


def test_nothing_is_required_of_a_section_either() -> None:
    sections = json_schema()["$defs"]
    assert [name for name, section in sections.items() if "required" in section] == []


def test_the_schema_names_its_dialect_and_is_json() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "lorakit recipe"
    assert json.loads(json.dumps(schema)) == schema
    assert json_schema() == schema


def test_the_values_of_a_choice_are_listed() -> None:
    data = json_schema()["$defs"]["Data"]["properties"]
    assert data["on_long"]["enum"] == ["error", "truncate", "drop"]
    assert data["format"]["enum"] == ["auto", *FORMAT_FIELDS]


def test_reading_recipes_imports_no_torch() -> None:
    code = "import sys; import lorakit.recipe, lorakit.shapes; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
