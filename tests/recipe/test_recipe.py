"""Values -> Recipe: defaults, problems at their place and in words, conflicts, and what is written back."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from lorakit.errors import LorakitError, Problem, RecipeError
from lorakit.recipe import Recipe, dump, fingerprint, is_hub_id, load_recipe
from lorakit.recipe.explain import TAGGED
from lorakit.recipe.known_as import FIELDS, NAMES

MINIMAL = "model: {path: m}\ndata: {train: d.jsonl}\noutput: o\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, so that places read as a user sees them: r.yaml:3:7."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(more: str = "", base: str = MINIMAL) -> Recipe:
    """A minimal recipe (three lines) followed by `more`."""
    Path("r.yaml").write_text(base + more)
    return load_recipe("r.yaml")


def problems(more: str = "", base: str = MINIMAL) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load(more, base)
    return caught.value.problems


def problem(more: str = "", base: str = MINIMAL) -> Problem:
    """The only one."""
    (found,) = problems(more, base)
    return found


# ------------------------------------------------------------------------------------------------------------
# Defaults


def test_a_minimal_recipe_has_the_defaults_of_the_design(here: Path) -> None:
    assert load().model_dump() == {
        "model": {
            "path": "m",
            "revision": None,  # the hub's main branch
            "dtype": "auto",
            "quantize": "none",
            "double_quant": True,
            "compute_dtype": "bf16",
            "attention": "auto",
            "dropout": 0.0,
            "trust_remote_code": False,
        },
        "adapter": {
            "method": "lora",
            "rank": 16,
            "alpha": "auto",
            "dropout": 0.0,
            "scaling": "standard",
            "init": "default",
            "init_svd": "exact",
            "probe": 0.1,
            "rank_spread": 2.0,
            "targets": "all-linear",
            "target_parameters": (),
            "train_tokens": (),
            "rank_pattern": {},
            "alpha_pattern": {},
            "train_also": (),
            "start_from": None,
        },
        "task": {"type": "causal-lm", "train_on": "auto"},
        "data": {
            "train": str(here / "d.jsonl"),
            "eval": None,
            "format": "auto",
            "columns": {},
            "header": None,
            "limit": None,
            "chat_template": None,
            "max_length": 1024,
            "on_long": "error",
            "on_bad_row": "error",
            "packing": True,
            "streaming": False,
        },
        "optimizer": {
            "name": "adamw",
            "lr": 2e-4,
            "weight_decay": 0.0,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "lr_ratio": 1.0,
            "max_grad_norm": 1.0,
        },
        "schedule": {"name": "cosine", "warmup": 0.03, "floor": 0.0},
        "training": {
            "epochs": 3,
            "max_steps": None,
            "batch_size": 16,
            "micro_batch_tokens": "auto",
            "seed": 0,
            "precision": "auto",
            "gradient_checkpointing": "auto",
            "fast": "auto",
            "deterministic": "auto",
        },
        "eval": {"every": 100, "at_start": True, "early_stopping": None},
        "checkpoint": {"every": 100, "keep": 2, "best": True},
        "log": {"every": 10, "trackers": ()},
        "output": "o",
    }


@pytest.mark.parametrize(
    "more",
    [
        "adapter: {}\noptimizer: {}\ntraining: {}\n",
        "adapter: {method: full}\n",
        "training: {max_steps: 5}\n",
        "training: {max_steps: 1}\nschedule: {warmup: 1}\n",
        "schedule: {warmup: 0}\n",
        "schedule: {warmup: 500}\n",
        "optimizer: {max_grad_norm: null, lr: 1}\n",
        "adapter: {alpha: 8, dropout: 0, targets: [q, k], train_also: [norm]}\n",
        "adapter: {start_from: old}\n",
        "adapter: {init: gaussian}\n",
        "eval: {early_stopping: null}\n",
        "log: {trackers: [tensorboard]}\n",
        "task: {train_on: all}\n",
    ],
)
def test_a_recipe_that_writes_nothing_contradictory_loads_because_defaults_never_conflict(more: str) -> None:
    load(more)


@pytest.mark.parametrize(
    "base",
    [
        "model: {path: m, quantize: int8}\ndata: {train: d.jsonl}\noutput: o\n",
        "model: {path: m, quantize: nf4, double_quant: false, compute_dtype: fp32}\n"
        "data: {train: d.jsonl}\noutput: o\n",
        "model: {path: m, attention: sdpa}\ndata: {train: d.jsonl, packing: false}\noutput: o\n",
        "model: {path: m, attention: eager, dtype: bf16}\ndata: {train: d.jsonl}\noutput: o\n",
        f"model: {{path: o/m, revision: {COMMIT}, trust_remote_code: true}}\n"
        "data: {train: o/d:test}\noutput: o\n",
        "model: {path: m}\ndata: {train: d.jsonl, format: messages, chat_template: '{{ x }}'}\noutput: o\n",
        "model: {path: m}\ndata: {train: d.jsonl, columns: {prompt: q, completion: a}}\noutput: o\n",
        "model: {path: m}\ndata: {train: d.jsonl, columns: {q: prompt, a: completion}}\noutput: o\n",
    ],
)
def test_options_that_fit_together_load(base: str) -> None:
    load(base=base)


def test_a_recipe_is_frozen_at_every_level() -> None:
    recipe = load("adapter: {targets: [q]}\n")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.output = "elsewhere"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.adapter.rank = 8
    assert isinstance(recipe.adapter.targets, tuple)
    assert isinstance(recipe.optimizer.betas, tuple)


def test_a_recipe_knows_what_was_written_and_where() -> None:
    recipe = load("adapter:\n  rank: 8\n")
    assert recipe.file == Path("r.yaml")
    assert recipe.written("adapter.rank") == 8
    assert recipe.written("adapter.alpha") is None
    assert recipe.written("optimizer.lr") is None
    assert recipe.where("adapter.rank") == "r.yaml:5:3"
    assert recipe.where("adapter.alpha") == "r.yaml:4:1"
    assert recipe.where("optimizer.lr") == "r.yaml"


# ------------------------------------------------------------------------------------------------------------
# One mistake, one problem

WRONG = [
    # (what follows the minimal recipe, place, field, what is expected, what stands there)
    ("adapter: {rank: true}", "4:11", "adapter.rank", "a whole number >= 1 and <= 65536", "got true"),
    (
        'adapter: {rank: "8"}',
        "4:11",
        "adapter.rank",
        "a whole number",
        'got the text "8" (delete the quotes)',
    ),
    ("adapter: {rank: 8.0}", "4:11", "adapter.rank", "a whole number", "got 8.0"),
    ("adapter: {rank: 0}", "4:11", "adapter.rank", ">= 1", "got 0"),
    ("adapter: {rank: 65537}", "4:11", "adapter.rank", "<= 65536", "got 65537"),
    ("adapter: {rank: null}", "4:11", "adapter.rank", "a whole number", "got null"),
    ("adapter:\n  rank:\n", "5:3", "adapter.rank", "a whole number", "got null"),
    ("adapter: {rank: [8]}", "4:11", "adapter.rank", "a whole number", "got [8]"),
    ("adapter: {rank: {q: 8}}", "4:11", "adapter.rank", "a whole number", "got a mapping"),
    ("adapter: {alpha: 0}", "4:11", "adapter.alpha", '"auto" or a number > 0', "got 0"),
    ("adapter: {alpha: outo}", "4:11", "adapter.alpha", '"auto" or a number > 0', 'got "outo"'),
    ("adapter: {dropout: 1.0}", "4:11", "adapter.dropout", "a number >= 0 and < 1", "got 1.0"),
    (
        "adapter: {init: pizza}",
        "4:11",
        "adapter.init",
        '"olora" or "eva" or "loftq"',
        'Did you mean "pissa"?',
    ),
    (
        "adapter: {init: pissa_niter_16}",
        "4:11",
        "adapter.init",
        "expected",
        "init: pissa with init_svd: fast",
    ),
    ("adapter: {init: true}", "4:11", "adapter.init", "got true", "Write init: default"),
    ("adapter: {targets: {q: 1}}", "4:11", "adapter.targets", "text or a list of text", "got a mapping"),
    ("adapter: {targets: [q, 1]}", "4:24", "adapter.targets.1", "text", "got 1"),
    ("adapter: {rank_pattern: {q: x}}", "4:26", "adapter.rank_pattern.q", "a whole number", 'got "x"'),
    ("adapter: {rank_pattern: [q]}", "4:11", "adapter.rank_pattern", "a mapping from text to", 'got ["q"]'),
    (
        'optimizer: {lr: "1e-4"}',
        "4:13",
        "optimizer.lr",
        "a number > 0",
        'the text "1e-4" (delete the quotes)',
    ),
    ("optimizer: {lr: 0}", "4:13", "optimizer.lr", "a number > 0", "got 0"),
    ("optimizer: {lr: .nan}", "4:13", "optimizer.lr", "a number > 0", "got NaN"),
    ("optimizer: {lr: .inf}", "4:13", "optimizer.lr", "a number > 0", "got Infinity"),
    ("optimizer: {lr: 1e999}", "4:13", "optimizer.lr", "a number > 0", "got Infinity"),
    ("optimizer: {lr: no}", "4:13", "optimizer.lr", "a number > 0", 'got "no"'),
    ("optimizer: {betas: [0.9]}", "4:13", "optimizer.betas", "a list of 2", "got [0.9]"),
    ("optimizer: {betas: [0, 0, 0]}", "4:13", "optimizer.betas", "a list of 2", "got [0, 0, 0]"),
    ("optimizer: {betas: 0.9}", "4:13", "optimizer.betas", "a list of 2", "got 0.9"),
    ("optimizer: {betas: [0.9, 1]}", "4:26", "optimizer.betas.1", "a number >= 0 and < 1", "got 1"),
    ("schedule: {warmup: 1.5}", "4:12", "schedule.warmup", "or a whole number >= 0", "got 1.5"),
    ("schedule: {warmup: -1}", "4:12", "schedule.warmup", "a number >= 0 and < 1", "got -1"),
    ("schedule: {warmup: true}", "4:12", "schedule.warmup", "a number", "got true"),
    ("training: {deterministic: yes}", "4:12", "training.deterministic", "true or false", 'got "yes"'),
    ("training: {deterministic: 1}", "4:12", "training.deterministic", '"auto" or true or false', "got 1"),
    (
        "training: {micro_batch_tokens: 0}",
        "4:12",
        "training.micro_batch_tokens",
        '"auto" or a whole',
        "got 0",
    ),
    ("training: {seed: -1}", "4:12", "training.seed", "a whole number >= 0", "got -1"),
    ("training: {precision: fp16}", "4:12", "training.precision", '"fp32" or "bf16"', 'got "fp16"'),
    ("eval: {every: 0}", "4:8", "eval.every", "a whole number >= 1", "got 0"),
    ("log: {trackers: [wandb]}", "4:18", "log.trackers.0", '"tensorboard"', 'got "wandb"'),
    ("log: {trackers: tensorboard}", "4:7", "log.trackers", "a list", 'got "tensorboard"'),
    ("task: {type: causal_lm}", "4:8", "task.type", '"causal-lm"', 'got "causal_lm"'),
    ("adapter: 3", "4:1", "adapter", "a mapping", "got 3"),
    ("adapter: [rank]", "4:1", "adapter", "a mapping", 'got ["rank"]'),
    ("adapter:", "4:1", "adapter", "a mapping", "got null"),
    ("optimizer: adamw", "4:1", "optimizer", 'a mapping, got "adamw"', "Write {name: adamw}"),
    ("optimizer: adamw_torch", "4:1", "optimizer", 'a mapping, got "adamw_torch"', "Write name: adamw"),
    ("schedule: cosine", "4:1", "schedule", 'a mapping, got "cosine"', "Write {name: cosine}"),
    ("adapter: lora-fa", "4:1", "adapter", 'a mapping, got "lora-fa"', "Write {method: lora-fa}"),
    ("adapter: qlora", "4:1", "adapter", "a mapping", "method: lora with model.quantize: nf4"),
    ("adapter: zzz", "4:1", "adapter", "a mapping", 'got "zzz"'),
    *(
        (
            f"adapter: {{method: {method}, init: {init}}}",
            f"4:{21 + len(method)}",
            "adapter.init",
            f'expected "default" or "gaussian" or "orthogonal", got "{init}". ',
            f"init: {meant} is lora's; write method: lora, or init: default",
        )
        for method in ("dora", "lora-fa", "delta-lora", "lora-drop")
        for init, meant in (("pissa", "pissa"), ("eva", "eva"), ("olroa", "olora"), ("loftq", "loftq"))
    ),
    *(
        (f"adapter: {{init: {init}}}", "4:11", "adapter.init", f'got "{init}". It is not in lorakit', "pissa")
        for init in ("lora_ga", "corda")
    ),
]


@pytest.mark.parametrize(
    ("more", "place", "field", "expected", "got"), WRONG, ids=[case[0] for case in WRONG]
)
def test_a_value_of_the_wrong_kind_is_one_problem_in_words(
    more: str, place: str, field: str, expected: str, got: str
) -> None:
    found = problem(more + "\n")
    assert (found.where, found.field) == (f"r.yaml:{place}", field)
    assert found.message.startswith("expected ")
    assert expected in found.message
    assert found.message.endswith(got) or found.message.endswith(got + ".")
    assert "pydantic" not in found.message


def test_a_long_value_is_shortened_in_the_message() -> None:
    found = problem(f"adapter: {{rank: {'x' * 500}}}\n")
    assert len(found.message) < 150
    assert found.message.endswith("...")


METHODS = (
    'expected "lora" or "dora" or "lora-fa" or "adalora" or "vera" or "delta-lora" or "lora-drop" or "full"'
    ' or "peft"'
)
UNKNOWN = [
    (
        "adapter: {method: lora-fa, dropout: 0.1}",
        "4:28",
        "adapter.dropout",
        'not a field of method "lora-fa": LoRA-FA keeps A x alone for the backward pass; dropout would need x'
        " and its mask",
    ),
    (
        "adapter: {method: lora-drop, rank_pattern: {q_proj: 4}}",
        "4:30",
        "adapter.rank_pattern",
        'not a field of method "lora-drop": layers that share an adapter have one rank',
    ),
    ("optimiser: {lr: 1}", "4:1", "optimiser", 'not a section. Did you mean "optimizer"?'),
    (
        "zzz: 1",
        "4:1",
        "zzz",
        "not a section. Sections: model, adapter, task, data, optimizer, schedule, training, eval,"
        " checkpoint, log, output, extends",
    ),
    ("adapter: {rnk: 8}", "4:11", "adapter.rnk", 'not a field of method "lora". Did you mean "rank"?'),
    (
        "adapter: {method: lora, ranks: 8}",
        "4:25",
        "adapter.ranks",
        'not a field of method "lora". Did you mean "rank"?',
    ),
    (
        "adapter: {lr: 1}",
        "4:11",
        "adapter.lr",
        'not a field of method "lora". It is a field of section "optimizer".',
    ),
    (
        "training: {\n  warmup: 1}",
        "5:3",
        "training.warmup",
        'not a field of section "training". It is a field of section "schedule".',
    ),
    (
        "adapter: {method: full, rank: 8}",
        "4:25",
        "adapter.rank",
        'not a field of method "full". It is a field of method "lora", "dora", "lora-fa", "vera",'
        ' "delta-lora" and "lora-drop"; delete it, or write another adapter.method.',
    ),
    (
        "adapter: {method: vera, init: orthogonal}",
        "4:25",
        "adapter.init",
        'not a field of method "vera". It is a field of method "lora", "dora", "lora-fa", "delta-lora" and'
        ' "lora-drop"; delete it, or write another adapter.method.',
    ),
    (
        "adapter: {method: dora, train_tokens: [1]}",
        "4:25",
        "adapter.train_tokens",
        'not a field of method "dora". It is a field of method "lora"; delete it, or write another'
        " adapter.method.",
    ),
    (
        "log: {zzz: 1}",
        "4:7",
        "log.zzz",
        'not a field of section "log". Fields: every, trackers.',
    ),
    (
        "adapter: {method: lroa}",
        "4:11",
        "adapter.method",
        METHODS + ', got "lroa". Did you mean "lora"?',
    ),
    (
        "adapter: {method: oft}",
        "4:11",
        "adapter.method",
        METHODS + ', got "oft". Write method: peft with type: OFT',
    ),
    (
        "adapter: {method: rslora}",
        "4:11",
        "adapter.method",
        METHODS + ', got "rslora". Write method: lora with scaling: rank_stabilized',
    ),
    *(
        (
            f"adapter: {{method: {name}}}",
            "4:11",
            "adapter.method",
            METHODS + f', got "{name}". Write method: lora with init: {name}.',
        )
        for name in ("pissa", "olora", "eva", "orthogonal")
    ),
    ("adapter: {method: 3}", "4:11", "adapter.method", METHODS + ", got 3"),
]


@pytest.mark.parametrize(("more", "place", "field", "message"), UNKNOWN, ids=[case[0] for case in UNKNOWN])
def test_an_unknown_name_is_refused_with_the_nearest_or_the_right_one(
    more: str, place: str, field: str, message: str
) -> None:
    found = problem(more + "\n")
    assert (found.where, found.field) == (f"r.yaml:{place}", field)
    assert found.message.rstrip(".") == message.rstrip(".")


def test_what_is_wrong_beside_an_unknown_name_is_told_with_it() -> None:
    sections = {
        "adapter": "{method: rslora, r: 8, lora_alpha: 16, dropout: 2, init_lora_weights: pissa}",
        "optimizer": "{name: adamw_torch, learning_rate: 1e-4, adam_beta1: 0.9}",
        "schedule": "{name: cosine_with_min_lr, min_lr: 1e-5, warmup_ratio: 0.1}",
        "num_train_epochs": "3",
    }
    with pytest.raises(RecipeError) as caught:
        load("".join(f"{name}: {text}\n" for name, text in sections.items()))
    found = {problem.field: problem.message.split('". ', 1)[-1] for problem in caught.value.problems}
    assert found == {
        "adapter.method": "Write method: lora with scaling: rank_stabilized.",
        "adapter.r": "Write rank.",
        "adapter.lora_alpha": "Write alpha.",
        "adapter.dropout": "expected a number >= 0 and < 1, got 2",
        "adapter.init_lora_weights": "Write init.",
        "optimizer.name": "Write name: adamw.",
        "optimizer.learning_rate": "Write lr.",
        "optimizer.adam_beta1": "Write betas: [beta1, beta2].",
        "schedule.name": "Write name: cosine with a floor above 0.",
        "schedule.min_lr": "Write floor: min_lr / lr, a share of the peak.",
        "schedule.warmup_ratio": "Write warmup.",
        "num_train_epochs": "not a section. Write training.epochs.",
    }


@pytest.mark.parametrize(
    ("more", "told"),
    [
        # what the section is meant to be cannot be had
        ("adapter: {method: loftq}", {"adapter.method": "init: loftq", "adapter.init": "write nf4 there"}),
        # meant is one of its types, which lacks what is here under another name
        ("adapter: {method: vera, lora_alpha: 8}", {"adapter.lora_alpha": "VeRA has no scale"}),
        (
            "schedule: {name: constant_with_warmup, min_lr: 0}",
            {
                "schedule.name": "name: constant",
                "schedule.min_lr": 'is called floor. It is a field of schedule "',
            },
        ),
        # nothing tells what is meant
        (
            "optimizer: {name: zzz, lr: 1, learning_rate: 1, momentun: 0, zzz: 1}",
            {
                "optimizer.name": 'got "zzz".',
                "optimizer.learning_rate": "not a field of any optimizer. Write lr.",
                "optimizer.momentun": 'Did you mean "momentum"?',
                "optimizer.zzz": "not a field of any optimizer.",
            },
        ),
        ("optimizer: {name: {a: 1}, zzz: 1}", {"optimizer.name": "", "optimizer.zzz": "of any optimizer."}),
        ("training: {r: 1}", {"training.r": "Write adapter.rank."}),
    ],
)
def test_the_fields_beside_a_name(more: str, told: dict[str, str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(more + "\n")
    found = {problem.field: problem.message for problem in caught.value.problems}
    assert found.keys() == told.keys()
    assert all(text in found[field] for field, text in told.items()), found


def test_what_is_advised_for_the_names_of_others_is_there() -> None:
    properties = {
        name: TypeAdapter(field.annotation).json_schema() for name, field in Recipe.model_fields.items()
    }
    for name, (place, _) in FIELDS.items():
        section, _, field = place.partition(".")
        assert section in properties, name
        schema = properties[section]
        kinds = schema.get("$defs", {}).values() if section in TAGGED else [schema]
        assert not field or any(field in kind.get("properties", {}) for kind in kinds), name
        assert all(name not in kind.get("properties", {}) for kind in kinds), name
    for name, (fields, hint) in NAMES.items():
        (section,) = (s for s, t in TAGGED.items() if t.field in fields and fields[t.field] in t.types)
        tag = fields[TAGGED[section].field]
        assert tag in hint, name
        TAGGED[section].types[tag].model_validate(fields)


@pytest.mark.parametrize(
    ("base", "where", "field", "words"),
    [
        ("data: {train: d}\noutput: o\n", "r.yaml", "model", "base model"),
        ("model: {}\ndata: {train: d}\noutput: o\n", "r.yaml:1:1", "model.path", "config.json"),
        ("model: {path: m}\noutput: o\n", "r.yaml", "data", "rows"),
        ("model: {path: m}\ndata: {}\noutput: o\n", "r.yaml:2:1", "data.train", ".jsonl"),
        ("model: {path: m}\ndata: {train: d}\n", "r.yaml", "output", "run directory"),
    ],
)
def test_what_is_missing_is_asked_for_with_its_meaning(base: str, where: str, field: str, words: str) -> None:
    Path("r.yaml").write_text(base)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    (found,) = caught.value.problems
    assert (found.where, found.field) == (where, field)
    assert found.message.startswith("required: ")
    assert words in found.message


def test_what_is_missing_is_asked_for_on_one_line() -> None:
    assert "\n" not in problems(base="model: {path: m}\ndata: {}\noutput: o\n")[0].message


def test_method_null_is_refused_like_any_other_method() -> None:
    found = problem("adapter: {method: null}\n")
    assert (found.where, found.field) == ("r.yaml:4:11", "adapter.method")
    assert found.message.startswith(METHODS + ", got null")


def test_a_seed_above_its_bound_is_told_the_bound() -> None:
    assert " and <" in problem(f"training: {{seed: {2**63}}}\n").message


def test_a_misspelt_extends_is_recognised() -> None:
    assert 'Did you mean "extends"?' in problem("extend: base.yaml\n").message


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("model: {path: ''}\ndata: {train: d}\noutput: o\n", "r.yaml:1:9  model.path: must not be empty"),
        ("model: {path: m}\ndata: {train: ''}\noutput: o\n", "r.yaml:2:8  data.train: must not be empty"),
        ("model: {path: m}\ndata: {train: d}\noutput: ''\n", "r.yaml:3:1  output: must not be empty"),
    ],
)
def test_an_empty_path_is_refused(base: str, message: str) -> None:
    assert str(problem(base=base)) == message


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[]", "r.yaml:4:11  adapter.targets: must not be empty"),
        ("''", "r.yaml:4:11  adapter.targets: must not be empty"),
        ("[q, '']", "r.yaml:4:24  adapter.targets.1: must not be empty"),
    ],
)
def test_targets_that_name_nothing_are_refused(targets: str, message: str) -> None:
    assert str(problem(f"adapter: {{targets: {targets}}}\n")) == message


MANY = """\
model:
  path: m
  quantise: nf4
  double_quant: true
adapter: {rank: true, dropout: 2, lr: 3}
data:
  train: d.jsonl
  max_length: "512"
  format: text
task: {train_on: completion}
optimiser: {lr: 1}
optimizer: {betas: [0.9, 1.5]}
training: {epochs: 1, max_steps: 2}
eval: {every: 3}
log: {every: 1}
log: {every: 2}
"""


def test_all_problems_of_a_file_come_out_together_and_in_the_order_of_the_file() -> None:
    found = problems(base=MANY)
    assert [(p.where, p.field) for p in found] == [
        ("r.yaml", "output"),
        ("r.yaml:3:3", "model.quantise"),
        ("r.yaml:4:3", "model.double_quant"),
        ("r.yaml:5:11", "adapter.rank"),
        ("r.yaml:5:23", "adapter.dropout"),
        ("r.yaml:5:35", "adapter.lr"),
        ("r.yaml:8:3", "data.max_length"),
        ("r.yaml:10:8", "task.train_on"),
        ("r.yaml:11:1", "optimiser"),
        ("r.yaml:12:26", "optimizer.betas.1"),
        ("r.yaml:13:12", "training.epochs"),
        ("r.yaml:14:8", "eval.every"),
        ("r.yaml:16:1", "log"),
    ]
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    assert str(caught.value).splitlines() == [str(problem) for problem in found]
    assert str(found[3]).startswith("r.yaml:5:11  adapter.rank: expected a whole number")


@pytest.mark.parametrize(
    ("base", "field"),
    [
        ("model: {double_quant: true}\ndata: {train: d}\noutput: o\n", "model.double_quant"),
        ("model: {path: m}\ndata: {columns: {x: y}}\noutput: o\n", "data.columns.x"),
    ],
)
def test_a_missing_field_hides_no_conflict_of_its_section(base: str, field: str) -> None:
    assert field in [p.field for p in problems(base=base)]


# ------------------------------------------------------------------------------------------------------------
# Conflicts

CONFLICTS = [
    # (recipe, place, field, words of the message: the other side and the cure)
    (
        MINIMAL + "training: {epochs: 1, max_steps: 2}\n",
        "4:12",
        "training.epochs",
        "training.max_steps; keep",
    ),
    (
        MINIMAL + "training: {max_steps: 3}\nschedule: {warmup: 4}\n",
        "5:12",
        "schedule.warmup",
        "max_steps: 3",
    ),
    (
        "model: {path: m, double_quant: true}\ndata: {train: d}\noutput: o\n",
        "1:18",
        "model.double_quant",
        "no effect with quantize: none; write quantize: nf4, or delete it",
    ),
    (
        "model: {path: m, quantize: int8, compute_dtype: bf16}\ndata: {train: d}\noutput: o\n",
        "1:34",
        "model.compute_dtype",
        "no effect with quantize: int8; write quantize: nf4, or delete it",
    ),
    (
        "model: {path: m, dtype: fp16}\ndata: {train: d}\noutput: o\n",
        "1:18",
        "model.dtype",
        "fp16 training needs loss scaling, which lorakit does not do; write bf16 or fp32",
    ),
    (
        "model: {path: m, quantize: nf4, compute_dtype: fp16}\ndata: {train: d}\noutput: o\n",
        "1:33",
        "model.compute_dtype",
        "write bf16 or fp32",
    ),
    (
        "model: {path: m, dtype: bf16}\ndata: {train: d}\noutput: o\ntraining: {precision: fp32}\n",
        "1:18",
        "model.dtype",
        "training.precision); delete one of the two",
    ),
    (
        "model: {path: o/m, trust_remote_code: true}\ndata: {train: d}\noutput: o\n",
        "1:20",
        "model.trust_remote_code",
        "needs model.revision: the 40-digit commit",
    ),
    (
        f"model: {{path: o/m, trust_remote_code: true, revision: {COMMIT[:-1]}}}\n"
        "data: {train: d}\noutput: o\n",
        "1:20",
        "model.trust_remote_code",
        "needs model.revision: the 40-digit commit",
    ),
    (
        "model: {path: ./m, revision: main}\ndata: {train: d}\noutput: o\n",
        "1:20",
        "model.revision",
        "no effect on a local directory; delete it",
    ),
    (
        "model: {path: m, quantize: nf4}\nadapter: {method: full}\ndata: {train: d}\noutput: o\n",
        "2:11",
        "adapter.method",
        "full fine-tuning cannot move nf4 weights; use lora",
    ),
    (
        MINIMAL + "adapter: {method: full}\noptimizer: {lr: 1, lr_ratio: 2}\n",
        "5:20",
        "optimizer.lr_ratio",
        "no effect without an adapter (method: full); delete it",
    ),
    *[
        (MINIMAL + f"adapter: {{{section}}}\noptimizer: {{lr: 1, lr_ratio: lora+}}\n", *told)
        for section, *told in (
            ("method: lora-fa", "5:20", "optimizer.lr_ratio", "here A does not move: write optimizer.lr"),
            ("method: vera", "5:20", "optimizer.lr_ratio", "here neither moves: write optimizer.lr"),
            ("method: adalora", "5:20", "optimizer.lr_ratio", "says nothing on AdaLoRA's factors"),
            ("method: peft, type: OFT", "5:20", "optimizer.lr_ratio", "which parameters of OFT are B"),
        )
    ],
    (
        MINIMAL + "adapter: {method: adalora, init_rank: 4, target_rank: 8}\n",
        "4:42",
        "adapter.target_rank",
        "target_rank 8 is above init_rank 4: ranks only fall",
    ),
    (
        MINIMAL + "adapter: {method: delta-lora, start: 20}\ntraining: {max_steps: 20}\n",
        "4:31",
        "adapter.start",
        "20 steps before W follows do not fit into the 20 steps of this run",
    ),
    (
        "model: {path: m, dtype: bf16}\nadapter: {method: full}\ndata: {train: d}\noutput: o\n",
        "1:18",
        "model.dtype",
        "full fine-tuning updates fp32 weights",
    ),
    (
        MINIMAL + "adapter: {start_from: old, init: gaussian}\n",
        "4:28",
        "adapter.init",
        "no effect with start_from: the weights come from there; delete it",
    ),
    (MINIMAL + "eval: {every: 3}\n", "4:8", "eval.every", "no effect without data.eval"),
    (MINIMAL + "eval: {at_start: true}\n", "4:8", "eval.at_start", "no effect without data.eval"),
    (MINIMAL + "eval: {early_stopping: 2}\n", "4:8", "eval.early_stopping", "no effect without data.eval"),
    (MINIMAL + "checkpoint: {best: true}\n", "4:14", "checkpoint.best", "no effect without data.eval"),
    (
        "model: {path: m}\ndata:\n  train: d\n  format: text\noutput: o\ntask: {train_on: completion}\n",
        "6:8",
        "task.train_on",
        "completion does not fit data.format: text; auto fits every one",
    ),
    (
        "model: {path: m}\ndata:\n  train: d\n  format: messages\noutput: o\ntask: {train_on: completion}\n",
        "6:8",
        "task.train_on",
        "completion does not fit data.format: messages; auto fits every one",
    ),
    (
        "model: {path: m}\ndata:\n  train: d\n  format: alpaca\noutput: o\ntask: {train_on: last-turn}\n",
        "6:8",
        "task.train_on",
        "last-turn does not fit data.format: alpaca; auto fits every one",
    ),
    (
        "model: {path: m}\ndata: {train: d, format: text, columns: {text: q, x: y}}\noutput: o\n",
        "2:51",
        "data.columns.x",
        "not a field of format text: one of text",
    ),
    (
        "model: {path: m}\ndata: {train: d, columns: {x: y}}\noutput: o\n",
        "2:28",
        "data.columns.x",
        "one of completion, conversations, input, instruction, label, messages, output, prompt, score,",
    ),
    (
        "model: {path: m}\ndata: {train: d, format: text, chat_template: t.jinja}\noutput: o\n",
        "2:32",
        "data.chat_template",
        "no effect on data.format: text; delete it",
    ),
    (
        "model: {path: m}\ndata: {train: d, streaming: true}\noutput: o\n",
        "2:18",
        "data.streaming",
        "say training.max_steps",
    ),
    (
        "model: {path: m}\ndata: {train: d, eval: 0.1, streaming: true}\n"
        "training: {max_steps: 3}\noutput: o\n",
        "2:18",
        "data.eval",
        "no share can be held out of a stream: name a file",
    ),
    (
        "model: {path: m}\ndata: {train: d.jsonl, header: [a, b]}\noutput: o\n",
        "2:24",
        "data.header",
        "has no effect: no .csv or .tsv file is read",
    ),
    (
        "model: {path: m}\ndata: {train: d.csv, header: [a, a]}\noutput: o\n",
        "2:22",
        "data.header",
        "names a column twice",
    ),
    (
        "model: {path: m}\ndata: {train: {path: ./d.csv, split: test}}\noutput: o\n",
        "2:8",
        "data.train",
        "split is for hub data sets and has no effect on",
    ),
    (
        "model: {path: m}\ndata: {train: d, eval: [{path: e, weight: 2}]}\noutput: o\n",
        "2:18",
        "data.eval",
        "weight has no effect on held-out rows: each is scored once",
    ),
    (
        "model: {path: m, attention: eager}\ndata: {train: d, packing: true}\noutput: o\n",
        "2:18",
        "data.packing",
        "need attention: auto; delete one of the two",
    ),
]


@pytest.mark.parametrize(
    ("text", "place", "field", "words"), CONFLICTS, ids=[f"{c[2]} {c[3].split()[0]}" for c in CONFLICTS]
)
def test_a_conflict_stands_at_its_own_field_and_names_the_other_side_and_the_cure(
    text: str, place: str, field: str, words: str
) -> None:
    found = problem(base=text)
    assert (found.where, found.field) == (f"r.yaml:{place}", field)
    assert words in found.message


def test_a_conflict_between_base_and_recipe_stands_at_the_field_in_its_own_file() -> None:
    Path("base.yaml").write_text("schedule: {warmup: 4}\n")
    found = problem("extends: base.yaml\ntraining: {max_steps: 2}\n")
    assert (found.where, found.field) == ("base.yaml:1:12", "schedule.warmup")
    assert "max_steps: 2" in found.message


# How long: epochs and max_steps are two ways to say one thing, and of two files the later one says it.
LENGTHS = [
    # (base.yaml, r.yaml, --set, epochs and max_steps of the recipe)
    ("epochs: 5", "max_steps: 2", [], (3, 2)),
    ("max_steps: 2", "epochs: 5", [], (5, None)),
    ("epochs: 5, max_steps: 2", "max_steps: 7", [], (3, 7)),
    ("epochs: 5", "max_steps: null", [], (5, None)),
    ("max_steps: 2", "max_steps: null", [], (3, None)),
    ("epochs: 5", "seed: 1", [], (5, None)),
    ("epochs: 5", "seed: 1", ["training.max_steps=2"], (3, 2)),
    ("seed: 1", "max_steps: 2", ["training.epochs=5"], (5, None)),
    ("seed: 1", "epochs: 5, max_steps: 2", [" training.max_steps = 7"], (3, 7)),
    ("seed: 1", "epochs: 5", ["training.max_steps="], (5, None)),
    ("seed: 1", "max_steps: 2", ["training.max_steps=null"], (3, None)),
    ("epochs: 5", "seed: 1", ["training={max_steps: 2}"], (3, 2)),
    ("seed: 1", "seed: 1", ["training.epochs=5", "training.max_steps=2"], (3, 2)),
    ("seed: 1", "seed: 1", ["training.max_steps=2", "training.epochs=5"], (5, None)),
]


@pytest.mark.parametrize(
    ("base", "mine", "overrides", "expected"), LENGTHS, ids=[" < ".join([c[0], c[1], *c[2]]) for c in LENGTHS]
)
def test_epochs_or_max_steps_written_over_the_other_replaces_it(
    base: str, mine: str, overrides: list[str], expected: tuple[int, int | None]
) -> None:
    Path("base.yaml").write_text(f"training: {{batch_size: 8, {base}}}\n")
    Path("r.yaml").write_text(MINIMAL + f"extends: base.yaml\ntraining: {{{mine}}}\n")
    training = load_recipe("r.yaml", overrides).training
    assert (training.epochs, training.max_steps) == expected
    if overrides != ["training={max_steps: 2}"]:
        assert training.batch_size == 8  # all else is merged


def test_what_was_replaced_by_its_alternative_is_written_nowhere_any_more() -> None:
    Path("base.yaml").write_text("training: {epochs: 5}\n")
    recipe = load("extends: base.yaml\ntraining:\n  max_steps: 2\n")
    assert recipe.written("training.epochs") is None
    assert recipe.where("training.epochs") == "r.yaml:5:1"
    assert recipe.where("training.max_steps") == "r.yaml:6:3"


def test_epochs_and_max_steps_replace_each_other_along_a_chain_of_recipes() -> None:
    Path("grand.yaml").write_text("training: {epochs: 5}\n")
    Path("base.yaml").write_text("extends: grand.yaml\ntraining: {max_steps: 2}\n")
    again = load("extends: base.yaml\ntraining: {epochs: 7}\n").training
    assert (again.epochs, again.max_steps) == (7, None)
    neither = load("extends: base.yaml\n").training
    assert (neither.epochs, neither.max_steps) == (3, 2)


@pytest.mark.parametrize(
    ("base", "more", "where"),
    [
        ("training: {epochs: 5, max_steps: 2}\n", "", "base.yaml:1:12"),
        ("training: {epochs: 5}\n", "training: {max_steps: 2, epochs: 5}\n", "r.yaml:5:26"),
        ("training: {max_steps: 2}\n", "training: {epochs: 5, max_steps: 2}\n", "r.yaml:5:12"),
    ],
    ids=["both in the base", "both in the recipe", "both in the recipe, one in the base"],
)
def test_epochs_and_max_steps_in_one_file_are_a_conflict_there(base: str, more: str, where: str) -> None:
    Path("base.yaml").write_text(base)
    assert str(problem("extends: base.yaml\n" + more)) == (
        f"{where}  training.epochs: conflicts with training.max_steps; keep the one you mean"
    )


def test_epochs_and_max_steps_in_one_set_are_a_conflict() -> None:
    Path("r.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"training\.epochs: conflicts with training\.max_steps"):
        load_recipe("r.yaml", ["training={epochs: 5, max_steps: 2}"])


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("model: {path: m, double_quant: false}\ndata: {train: d}\noutput: o\n", "model.double_quant"),
        (MINIMAL + "eval: {at_start: false}\n", "eval.at_start"),
        (MINIMAL + "checkpoint: {best: false}\n", "checkpoint.best"),
    ],
)
def test_false_has_no_effect_where_true_has_none(text: str, field: str) -> None:
    assert problem(base=text).field == field


def test_a_column_for_a_field_of_another_format_is_refused() -> None:
    found = problem(
        base="model: {path: m}\ndata: {train: d, format: text, columns: {prompt: q}}\noutput: o\n"
    )
    assert found.field == "data.columns.prompt"
    assert "not a field of format text: one of text" in found.message


def test_a_misspelt_field_of_data_columns_is_recognised() -> None:
    found = problem(base="model: {path: m}\ndata: {train: d, columns: {promt: q}}\noutput: o\n")
    assert found.field == "data.columns.promt"
    assert found.message.endswith('. Did you mean "prompt"?')


def test_two_columns_for_one_field_are_refused() -> None:
    problems(base="model: {path: m}\ndata: {train: d, columns: {a: text, b: text}}\noutput: o\n")


# ------------------------------------------------------------------------------------------------------------
# Paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", True),
        ("Qwen/Qwen3-0.6B", True),
        ("owner/name:test", True),
        ("owner/name:train[:10%]", True),
        ("name:test", True),
        ("", False),
        ("/absolute/dir", False),
        ("./here", False),
        ("../there", False),
        ("~/home", False),
        (".hidden", False),
        ("a/b/c", False),
        ("dir/", False),
        ("a//b", False),
        (":test", False),
        ("rows.jsonl", False),
        ("dir/rows.jsonl", False),
        ("rows.json", False),
        ("rows.csv", False),
        ("rows.tsv", False),
        ("rows.parquet", False),
        ("rows.txt", False),
        ("model.yaml", False),
    ],
)
def test_a_hub_id_is_a_name_or_owner_and_name_and_never_a_file_name(text: str, expected: bool) -> None:
    assert is_hub_id(text) is expected


def test_what_looks_like_a_hub_id_is_a_directory_when_there_is_one_beside_the_recipe(here: Path) -> None:
    base = "model: {path: owner/name}\ndata: {train: rows}\noutput: o\n"
    recipe = load(base=base)
    assert (recipe.model.path, recipe.data.train) == ("owner/name", "rows")
    (here / "owner" / "name").mkdir(parents=True)
    (here / "rows").touch()
    recipe = load(base=base)
    assert (recipe.model.path, recipe.data.train) == (str(here / "owner" / "name"), str(here / "rows"))


def test_a_tilde_is_the_home_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    recipe = load(base="model: {path: ~/m}\ndata: {train: ~/d.jsonl}\noutput: o\n")
    assert recipe.model.path == str(here / "home" / "m")
    assert recipe.data.train == str(here / "home" / "d.jsonl")


@pytest.mark.parametrize("template", ["{{ messages }}", "{% if a %}b{% endif %}"])
def test_an_inline_chat_template_is_no_path(template: str) -> None:
    assert load(
        base=MINIMAL.replace("d.jsonl", f'd.jsonl, chat_template: "{template}"')
    ).data.chat_template == (template)


# ------------------------------------------------------------------------------------------------------------
# dump


def values(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump() | {"output": str(Path(recipe.output).absolute())}


ROUND = {
    "minimal": MINIMAL,
    "eval": MINIMAL.replace("d.jsonl", "d.jsonl, eval: e.jsonl")
    + "eval: {every: 5, early_stopping: 2, at_start: false}\ncheckpoint: {best: false, keep: 1}\n",
    "nf4": MINIMAL.replace("path: m", "path: m, quantize: nf4, double_quant: false, compute_dtype: fp32"),
    "int8": MINIMAL.replace("path: m", "path: m, quantize: int8"),
    "full": MINIMAL + "adapter: {method: full}\noptimizer: {lr: 1e-5}\n",
    "max_steps": MINIMAL + "training: {max_steps: 4, seed: 7}\nschedule: {warmup: 2, name: linear}\n",
    "start_from": MINIMAL + "adapter: {start_from: old, rank: 4}\n",
    "gaussian": MINIMAL + "adapter: {init: gaussian}\n",
    "patterns": MINIMAL
    + 'adapter: {rank_pattern: {".*q": 3, "k": 4}, alpha_pattern: {"1": 0.5}, targets: [q, ".*(k|v)"],'
    + " train_also: [norm]}\n",
    "padded": MINIMAL.replace("path: m", "path: m, attention: sdpa").replace(
        "d.jsonl", "d.jsonl, packing: false"
    ),
    "template": MINIMAL.replace(
        "d.jsonl", 'd.jsonl, chat_template: "{{ a }}\\n  {% b %}\\t\\U0001F600 ü\\x85"'
    ),
    "hub": f"model: {{path: o/m, revision: {COMMIT}}}\ndata: {{train: o/d:test}}\noutput: o\n",
    "numbers": MINIMAL + "optimizer: {lr: 1e300, eps: 1e-30, betas: [0, 0.5], max_grad_norm: null}\n",
    "trackers": MINIMAL + "log: {trackers: [tensorboard]}\n",
    "words": MINIMAL.replace("d.jsonl", "d.jsonl, columns: {prompt: '', completion: 'null'}")
    + "adapter: {targets: ['no', 'true', '~', '12:30', '0x10', '.5', '3', '1_0', ' a ', '#', 'a: b']}\n",
}


@pytest.mark.parametrize("text", ROUND.values(), ids=ROUND)
def test_what_dump_writes_is_the_same_recipe_again(text: str, here: Path) -> None:
    recipe = load(base=text)
    (here / "elsewhere").mkdir()
    Path("elsewhere/resolved.yaml").write_text(dump(recipe))
    again = load_recipe("elsewhere/resolved.yaml")
    assert values(again) == values(recipe)
    assert fingerprint(again) == fingerprint(recipe)
    assert again.output == str(here / "o")
    assert dump(again) == dump(recipe)


RESOLVED = {
    "training.precision": "bf16",
    "model.dtype": "bf16",
    "data.packing": True,
    "data.format": "prompt-completion",
    "task.train_on": "completion",
    "training.micro_batch_tokens": 4096,
    "training.gradient_checkpointing": False,
    "training.deterministic": True,
}


@pytest.mark.parametrize("name", ["minimal", "eval", "nf4", "int8", "max_steps"])
def test_what_dump_resolves_is_read_back(name: str) -> None:
    recipe = load(base=ROUND[name])
    Path("resolved.yaml").write_text(dump(recipe, RESOLVED | {"adapter.alpha": 32.0}))
    again = load_recipe("resolved.yaml")
    expected = values(recipe)
    for dotted, value in (RESOLVED | {"adapter.alpha": 32.0}).items():
        section, _, field = dotted.partition(".")
        expected[section][field] = value
    assert values(again) == expected


def test_what_dump_resolves_for_full_fine_tuning_is_read_back() -> None:
    recipe = load(base=ROUND["full"])
    Path("resolved.yaml").write_text(
        dump(recipe, RESOLVED | {"training.precision": "fp32", "model.dtype": "fp32"})
    )
    again = load_recipe("resolved.yaml")
    assert (again.adapter.method, again.model.dtype, again.training.precision) == ("full", "fp32", "fp32")


def test_dump_writes_every_default_that_has_an_effect() -> None:
    written = yaml.safe_load(dump(load()))
    assert written["adapter"]["rank"] == 16
    assert written["training"]["epochs"] == 3
    assert "double_quant" not in written["model"]  # would be refused without quantize
    assert "best" not in written["checkpoint"]  # would be refused without data.eval


@pytest.mark.parametrize("text", ["1234567e1", "1e-4", "1.5e5", "0812345", "-08"])
def test_text_that_looks_like_a_number_is_dumped_as_text(text: str) -> None:
    recipe = load(base=f"model: {{path: o/m, revision: '{text}'}}\ndata: {{train: d.jsonl}}\noutput: o\n")
    Path("resolved.yaml").write_text(dump(recipe))
    assert load_recipe("resolved.yaml").model.revision == text


# ------------------------------------------------------------------------------------------------------------
# fingerprint


@pytest.mark.parametrize(
    "more",
    [
        "log: {every: 3, trackers: [tensorboard]}\n",
        "checkpoint: {every: 3}\n",
        "checkpoint: {keep: 3}\n",
        "adapter: {rank: 16}\n",  # a default, written out
    ],
)
def test_fingerprint_ignores_what_changes_no_update(more: str) -> None:
    assert fingerprint(load(more)) == fingerprint(load())


def test_fingerprint_ignores_where_things_lie() -> None:
    moved = "model: {path: ./other}\ndata: {train: moved/d.jsonl}\noutput: elsewhere\n"
    assert fingerprint(load(base=moved)) == fingerprint(load())


@pytest.mark.parametrize(
    "more",
    [
        "optimizer: {lr: 1e-3}\n",
        "optimizer: {betas: [0.9, 0.99]}\n",
        "training: {seed: 1}\n",
        "training: {batch_size: 8}\n",
        "training: {max_steps: 3}\n",
        "adapter: {rank: 8}\n",
        "adapter: {alpha: 32}\n",
        "adapter: {targets: [q]}\n",
        "adapter: {rank_pattern: {q: 1}}\n",
        "adapter: {method: full}\n",
        "schedule: {warmup: 3}\n",
        "task: {train_on: all}\n",
        "data: {train: d.jsonl, max_length: 9}\n",
        "data: {train: d.jsonl, columns: {text: a}}\n",
    ],
)
def test_fingerprint_changes_with_what_is_trained(more: str) -> None:
    base = MINIMAL if not more.startswith("data") else MINIMAL.replace("data: {train: d.jsonl}\n", "")
    assert fingerprint(load(more, base)) != fingerprint(load())


def test_fingerprint_is_a_sha_256_that_a_second_load_repeats() -> None:
    first = fingerprint(load("adapter: {rank_pattern: {q: 1, k: 2}}\n"))
    assert first == fingerprint(load("adapter: {rank_pattern: {q: 1, k: 2}}\n"))
    assert len(first) == 64
    assert int(first, 16) >= 0


def test_fingerprint_changes_with_the_order_of_patterns() -> None:
    first = load('adapter: {rank_pattern: {".*q": 1, "q": 2}}\n')
    assert fingerprint(first) != fingerprint(load('adapter: {rank_pattern: {"q": 2, ".*q": 1}}\n'))


# ------------------------------------------------------------------------------------------------------------
# Anything else

ANY = settings(max_examples=200, derandomize=True, deadline=None)
SECTIONS = {
    "model": ["path", "revision", "quantize", "double_quant", "dtype", "trust_remote_code"],
    "adapter": ["method", "rank", "alpha", "targets", "rank_pattern", "train_also", "start_from", "init"],
    "data": ["train", "eval", "columns", "format", "limit", "chat_template", "packing"],
    "optimizer": ["lr", "betas", "lr_ratio"],
    "schedule": ["warmup"],
    "training": ["epochs", "max_steps", "seed", "micro_batch_tokens"],
    "eval": ["every", "early_stopping"],
    "log": ["trackers"],
}
yamlish = st.text(alphabet="adempth: -[]{}&*!|>'\"#%@,\n\t0159.~<?eE\\")
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "full", "lora", "nf4", "text", "text: x", "a/b", "", "1e-4", "<<", "extends"])
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def only_lorakit_error(path: Path, raw: bytes, overrides: tuple[str, ...] = ()) -> None:
    path.write_bytes(raw)
    try:
        load_recipe(path, overrides)
    except LorakitError as error:
        assert str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@ANY
@given(raw=st.binary(max_size=300) | yamlish.map(str.encode) | yamlish.map(lambda t: (MINIMAL + t).encode()))
def test_no_bytes_bring_anything_but_a_recipe_or_an_error_for_the_user(folder: Path, raw: bytes) -> None:
    only_lorakit_error(folder / "r.yaml", raw)


@ANY
@given(data=st.data())
def test_no_values_bring_anything_but_a_recipe_or_an_error_for_the_user(folder: Path, data: Any) -> None:
    recipe: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output": "o"}
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from([*SECTIONS, *SECTIONS, "output", "zzz"]))
        if name in SECTIONS and data.draw(st.integers(0, 5)):
            field = data.draw(st.sampled_from(SECTIONS[name]) | st.text(max_size=8))
            block = recipe.setdefault(name, {})
            if isinstance(block, dict):
                block[field] = data.draw(trees)
        else:
            recipe[name] = data.draw(trees)
    only_lorakit_error(folder / "r.yaml", json.dumps(recipe, ensure_ascii=False).encode())


@ANY
@given(
    key=st.sampled_from(["adapter.rank", "data.columns.a", "model", "output", "training.x.y"])
    | st.text(max_size=9),
    value=yamlish | trees.map(json.dumps),
)
def test_no_override_brings_anything_but_a_recipe_or_an_error_for_the_user(
    folder: Path, key: str, value: str
) -> None:
    only_lorakit_error(folder / "r.yaml", MINIMAL.encode(), (f"{key}={value}",))
