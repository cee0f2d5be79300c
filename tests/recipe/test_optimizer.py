"""The sections `optimizer` and `schedule`: their fields, what is refused of them and in which words, and the
phases of a schedule in a run."""

import math
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import Problem, RecipeError
from lorakit.plan import make_plan
from lorakit.recipe import Recipe, dump, fingerprint, load_recipe
from lorakit.recipe.optimizer import OPTIMIZERS, Mover, elsewhere
from lorakit.recipe.schedule import SCHEDULES, Shape, phases

MINIMAL = "model: {path: m}\ndata: {train: d.jsonl}\noutput: o\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(more: str) -> Recipe:
    Path("r.yaml").write_text(MINIMAL + more)
    return load_recipe("r.yaml")


def problem(more: str) -> Problem:
    with pytest.raises(RecipeError) as caught:
        load(more)
    (found,) = caught.value.problems
    return found


# ------------------------------------------------------------------------------------------------------------
# Every type of a section

OF = {
    **{("optimizer", name): traits.section for name, traits in OPTIMIZERS.items()},
    **{("schedule", name): traits.section for name, traits in SCHEDULES.items()},
}


@pytest.mark.parametrize(("section", "name"), OF, ids=str)
def test_a_name_chooses_its_section_and_survives_resolved_yaml(section: str, name: str) -> None:
    recipe = load(f"{section}: {{name: {name}}}\n")
    found = getattr(recipe, section)
    assert type(found) is OF[section, name]
    assert found.name == name
    Path("resolved.yaml").write_text(dump(recipe))
    again = load_recipe("resolved.yaml")
    assert getattr(again, section) == found
    assert fingerprint(again) == fingerprint(recipe)


def test_nothing_said_is_adamw_and_cosine() -> None:
    for more in ("", "optimizer: {}\nschedule: {}\n", "optimizer: {lr: 1e-3}\nschedule: {warmup: 2}\n"):
        recipe = load(more)
        assert (recipe.optimizer.name, recipe.schedule.name) == ("adamw", "cosine")


def test_names_are_those_of_the_design() -> None:
    assert list(OPTIMIZERS) == [
        "adamw",
        "adamw_8bit",
        "paged_adamw_8bit",
        "sgd",
        "adafactor",
        "lion",
        "sophia",
    ]
    assert set(SCHEDULES) == {"constant", "linear", "cosine", "inverse-sqrt", "wsd"}


def test_a_type_has_its_own_fields_and_no_other() -> None:
    shared = set(Mover.model_fields)
    own = {name: set(traits.section.model_fields) - shared for name, traits in OPTIMIZERS.items()}
    adam = {"betas", "eps"}
    assert own == {
        "adamw": adam,
        "adamw_8bit": adam,
        "paged_adamw_8bit": adam,
        "sgd": {"momentum", "nesterov"},
        "adafactor": {"beta2_decay", "eps2"},
        "lion": {"betas"},
        "sophia": {"betas", "rho", "every", "eps"},
    }
    falls = {
        name: set(traits.section.model_fields) - set(Shape.model_fields) for name, traits in SCHEDULES.items()
    }
    assert falls == {
        "cosine": {"floor"},
        "linear": {"floor"},
        "constant": set(),
        "inverse-sqrt": set(),
        "wsd": {"floor", "decay"},
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_of_an_optimizer_says_why_it_is_what_it_is(name: str) -> None:
    field = OPTIMIZERS[name].section.model_fields["lr"]
    assert field.default > 0
    assert name == "adamw" or len((field.description or "").split(". ", 1)[-1]) > 3


def test_the_fingerprint_tells_optimizers_and_schedules_apart() -> None:
    texts = [f"{section}: {{name: {name}}}\n" for section, name in OF]
    texts += ["schedule: {floor: 0.1}\n", "optimizer: {name: sophia, every: 5}\n"]
    assert len({fingerprint(load(text)) for text in texts}) == len(texts) - 1  # two are the defaults


# ------------------------------------------------------------------------------------------------------------
# What is refused

NAMES = {section: " or ".join(f'"{name}"' for kind, name in OF if kind == section) for section, _ in OF}
REFUSED = [
    # (recipe, place, field, message)
    ("optimizer: {name: zzz}", "4:13", "optimizer.name", f'expected {NAMES["optimizer"]}, got "zzz".'),
    ("optimizer: {name: 3}", "4:13", "optimizer.name", f"expected {NAMES['optimizer']}, got 3."),
    ("optimizer: {name: [sgd]}", "4:13", "optimizer.name", f'expected {NAMES["optimizer"]}, got ["sgd"].'),
    ("schedule: {name: null}", "4:12", "schedule.name", f"expected {NAMES['schedule']}, got null."),
    ("schedule: {name: cosin}", "4:12", "schedule.name", 'got "cosin". Did you mean "cosine"?'),
    ("optimizer: {name: lions}", "4:13", "optimizer.name", 'got "lions". Did you mean "lion"?'),
    (
        "optimizer: {learning_rate: 1}",
        "4:13",
        "optimizer.learning_rate",
        'not a field of optimizer "adamw". Write lr.',
    ),
    (
        "optimizer: {zzz: 1}",
        "4:13",
        "optimizer.zzz",
        'not a field of optimizer "adamw". Fields: name, lr, weight_decay, lr_ratio, max_grad_norm, betas,'
        " eps.",
    ),
    (
        "optimizer: {name: lion, beta: [0.9, 0.9]}",
        "4:25",
        "optimizer.beta",
        'not a field of optimizer "lion". Did you mean "betas"?',
    ),
    (
        "optimizer: {momentum: 0.9}",
        "4:13",
        "optimizer.momentum",
        'not a field of optimizer "adamw". It is a field of optimizer "sgd"; delete it, or write another'
        " optimizer.name.",
    ),
    (
        "optimizer: {name: sgd, rho: 0.9}",
        "4:24",
        "optimizer.rho",
        'not a field of optimizer "sgd". It is a field of optimizer "sophia"; delete it, or write another'
        " optimizer.name.",
    ),
    (
        "optimizer: {every: 3}",
        "4:13",
        "optimizer.every",
        'not a field of optimizer "adamw". It is a field of optimizer "sophia"; delete it, or write another'
        " optimizer.name.",
    ),
    (
        "optimizer: {warmup: 3}",
        "4:13",
        "optimizer.warmup",
        'not a field of optimizer "adamw". It is a field of section "schedule".',
    ),
    (
        "schedule: {name: constant, floor: 0.1}",
        "4:28",
        "schedule.floor",
        'not a field of schedule "constant". It is a field of schedule "cosine", "linear" and "wsd"; delete'
        " it, or write another schedule.name.",
    ),
    (
        "schedule: {decay: 0.1}",
        "4:12",
        "schedule.decay",
        'not a field of schedule "cosine". It is a field of schedule "wsd"; delete it, or write another'
        " schedule.name.",
    ),
    ("schedule: {floor: 1}", "4:12", "schedule.floor", "expected a number >= 0 and < 1, got 1."),
    ("schedule: {name: wsd, decay: -1}", "4:23", "schedule.decay", "or a whole number >= 0, got -1."),
    (
        "optimizer: {name: sophia, every: 0}",
        "4:27",
        "optimizer.every",
        "expected a whole number >= 1, got 0.",
    ),
    ("optimizer: {name: sophia, rho: 0}", "4:27", "optimizer.rho", "expected a number > 0, got 0."),
    ("optimizer: {name: sgd, momentum: 1}", "4:24", "optimizer.momentum", "a number >= 0 and < 1, got 1."),
    ("optimizer: {name: adafactor, eps2: -1}", "4:30", "optimizer.eps2", "expected a number >= 0, got -1."),
]


@pytest.mark.parametrize(("more", "place", "field", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_not_a_field_or_a_value_is_told_where_it_stands(
    more: str, place: str, field: str, message: str
) -> None:
    found = problem(more + "\n")
    assert (found.where, found.field) == (f"r.yaml:{place}", field)
    assert found.message.rstrip(".?").endswith(message.rstrip(".?"))


# What the options --optim and --lr_scheduler_type of transformers' Trainer call what is here.
CALLED = {
    "optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_32bit": "paged_adamw_8bit",
        "lion_8bit": "lion",
        "lion_32bit": "lion",
        "paged_lion_8bit": "lion",
        "SophiaG": "sophia",
    },
    "schedule": {
        "cosine_with_min_lr": "cosine",
        "constant_with_warmup": "constant",
        "inverse_sqrt": "inverse-sqrt",
        "warmup_stable_decay": "wsd",
        "polynomial": "linear",
    },
}


@pytest.mark.parametrize(
    ("section", "name", "ours"),
    [(s, name, ours) for s, names in CALLED.items() for name, ours in names.items()],
)
def test_a_name_from_elsewhere_is_answered_with_ours(section: str, name: str, ours: str) -> None:
    found = problem(f"{section}: {{name: {name}}}\n")
    hint = found.message.split(f'got "{name}". ')[1]
    assert ours in hint.rstrip(".").replace(";", " ").split()
    load(f"{section}: {{name: {ours}}}\n")


def test_the_other_fields_of_a_section_with_an_unknown_name_are_checked_all_the_same() -> None:
    with pytest.raises(RecipeError) as caught:
        load("optimizer: {name: lions}\nschedule: {name: wsd, warmup: 0.95, decay: 0.2}\n")
    assert [found.field for found in caught.value.problems] == ["optimizer.name", "schedule.decay"]


CONFLICTS = [
    ("optimizer: {name: sgd, momentum: 0, nesterov: true}\n", "optimizer.nesterov", "write a momentum"),
    (
        "adapter: {method: lora-fa, projected: true}\noptimizer: {name: sophia}\n",
        "optimizer.name",
        "write projected: false",
    ),
    (
        "adapter: {method: delta-lora}\noptimizer: {name: sophia}\n",
        "optimizer.name",
        "write another optimizer, or lora with a larger alpha",
    ),
    ("training: {max_steps: 3}\nschedule: {name: wsd, decay: 4}\n", "schedule.decay", "max_steps: 3"),
    (
        "training: {max_steps: 9}\nschedule: {name: wsd, warmup: 5, decay: 5}\n",
        "schedule.decay",
        "5 steps of decay after 5 of warm-up",
    ),
    ("schedule: {name: wsd, warmup: 0.6, decay: 0.5}\n", "schedule.decay", "more than all steps"),
]


@pytest.mark.parametrize(("more", "field", "words"), CONFLICTS, ids=[case[0] for case in CONFLICTS])
def test_a_conflict_names_both_sides_or_the_cure(more: str, field: str, words: str) -> None:
    found = problem(more)
    assert found.field == field
    assert words in found.message


@pytest.mark.parametrize(
    "more",
    [
        "optimizer: {name: sgd, momentum: 0}\n",
        "optimizer: {name: sgd, nesterov: true}\n",
        "adapter: {method: lora-fa}\noptimizer: {name: sophia}\n",
        "adapter: {method: lora-fa, projected: true}\noptimizer: {name: lion}\n",
        "adapter: {method: delta-lora}\noptimizer: {name: lion}\n",
        *(f"training: {{max_steps: {steps}}}\nschedule: {{name: wsd}}\n" for steps in (1, 2, 3, 7)),
        "training: {max_steps: 10}\nschedule: {name: wsd, warmup: 5, decay: 5}\n",
    ],
)
def test_what_fits_together_is_left_alone(more: str) -> None:
    load(more)


def test_paging_is_refused_where_there_is_nothing_to_page_out_of() -> None:
    for name in OPTIMIZERS:
        section: Any = load(f"optimizer: {{name: {name}}}\n").optimizer
        found = list(elsewhere(section, "cpu"))
        assert [field for field, _ in found] == (["optimizer.name"] if name.startswith("paged") else [])
        assert list(elsewhere(section, "cuda")) == []


# ------------------------------------------------------------------------------------------------------------
# The phases of a schedule


@pytest.mark.parametrize(
    ("warmup", "decay", "total", "expected"),
    [
        (0.03, 0.1, 1000, (30, 100)),
        (0.03, 0.1, 1, (1, 0)),  # the warm-up comes first
        (0.03, 0.1, 10, (1, 1)),
        (0.0, 0.1, 19, (0, 2)),
        (0.0, 0.1, 3, (0, 1)),  # no run is too short to end lower
        (7, 0.5, 10, (7, 3)),  # a share takes no more than is left
        (0, 10, 10, (0, 10)),
        (0.5, 0.5, 3, (2, 1)),
        (0.07, 0.29, 100, (7, 29)),  # as floats 7.000000000000001 and 28.999999999999996
        (0.14, 0.58, 50, (7, 29)),
        (0.0, 1e-05, 100_000, (0, 1)),
    ],
)
def test_phases_of_a_run(warmup: Any, decay: Any, total: int, expected: tuple[int, int]) -> None:
    section = load(f"schedule: {{name: wsd, warmup: {warmup}, decay: {decay}}}\n").schedule
    assert phases(section, total) == expected


@pytest.mark.parametrize("total", range(1, 60))
def test_shares_of_a_run_fit_into_it_whatever_its_length(total: int) -> None:
    for warmup in (0.0, 0.03, 0.3, 0.7, 0.9):
        for decay in (0.0, 0.1, 1 - warmup - 1e-9):
            section = load_section(warmup, decay)
            rise, fall = phases(section, total)
            assert rise == math.ceil(warmup * total)
            assert 0 <= fall <= total - rise


def load_section(warmup: float, decay: float) -> Any:
    return SCHEDULES["wsd"].section(name="wsd", warmup=warmup, decay=decay)


def test_a_plan_has_the_phases_and_refuses_those_that_do_not_fit() -> None:
    recipe = load("training: {epochs: 1, batch_size: 1}\nschedule: {name: wsd, warmup: 2, decay: 5}\n")
    plan = make_plan(recipe, 20, {})
    assert (plan.total_steps, plan.warmup_steps, plan.decay_steps) == (20, 2, 5)
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe, 6, {})
    (found,) = caught.value.problems
    assert found.field == "schedule.decay"
    assert found.message == "5 steps of decay after 2 of warm-up do not fit into the 6 steps of this run"
    assert found.where == "r.yaml:5:34"
