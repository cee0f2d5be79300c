"""`lorakit advise`: every rule speaks where it should, is silent where it should be, and its figures are
right."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit import advise as advise_module
from lorakit.advice import change
from lorakit.advice.facts import Base, Facts, Rows
from lorakit.advice.primer import PRIMER
from lorakit.advice.rates import centre
from lorakit.advise import RULES, Advised, advise, settled, taken_by
from lorakit.errors import LorakitError, RecipeError
from lorakit.recipe import load_recipe
from lorakit.shapes import shapes_of
from lorakit.validate import problems_of
from tests.test_startup import facts_of

LLAMA = {  # Llama 3.2 3B
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
NARROW = LLAMA | {  # its layers have 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128) sides: 1,024
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 1024,
}
GOOD: dict[str, Any] = {  # nothing is to be said of it
    "model": {"path": "owner/name"},
    "adapter": {"method": "lora", "rank": 16},
    "data": {"train": "owner/rows", "eval": "owner/rows:test", "max_length": 1024},
    "optimizer": {"lr": 3e-4},
    "training": {"epochs": 2},
    "output": "runs/x",
}


def samples(number: int = 10_000, length: int = 100, longest: int = 120, trained: int = 50) -> Rows:
    lengths = np.full(number, length)
    lengths[0] = longest
    return Rows(lengths, np.full(number, trained), 1.0, number, None, False)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Facts]:
    """make(section={field: value}, config=..., rows=...) -> Facts of GOOD with these fields written too."""

    def build(config: dict[str, Any] | None = LLAMA, rows: Rows | None = None, **sections: Any) -> Facts:
        values = {name: dict(value) if isinstance(value, dict) else value for name, value in GOOD.items()}
        for name, fields in sections.items():
            other = name == "adapter" and fields.get("method", "lora") != "lora"
            merged = fields if other else values.get(name, {}) | fields
            values[name] = {key: value for key, value in merged.items() if value is not None}
        if "max_steps" in values["training"]:
            values["training"].pop("epochs")
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(values))
        base = None
        if config is not None:
            shapes = shapes_of(config)
            assert shapes is not None
            size, context = config["hidden_size"], config["max_position_embeddings"]
            base = Base(config["model_type"], size, context, config.get("dtype", "bfloat16"), shapes)
        return Facts(path, (), load_recipe(path), base, samples() if rows is None else rows, ())

    return build


def test_nothing_is_said_of_a_recipe_that_has_what_the_evidence_has(make: Callable[..., Facts]) -> None:
    assert [item.knob for rule in RULES if (item := rule(make()))] == []


LONG = samples(longest=1100)  # one of 10,000 is longer
FEW = samples(number=400)
ADALORA = {"method": "adalora"}

# Rule -> (what is written, knob, what is advised). An advice that equals what is written is a word on it.
PLANTED: dict[str, tuple[dict[str, Any], str, Any]] = {
    "full_on_few_rows": ({"adapter": {"method": "full"}, "rows": FEW}, "adapter.method", "lora"),
    "dora_of_high_rank": ({"adapter": {"method": "dora", "rank": 32}}, "adapter.method", "lora"),
    "lora_fa_saves_little": ({"adapter": {"method": "lora-fa", "projected": True}}, "adapter.method", "lora"),
    "vera_for_size_alone": ({"adapter": {"method": "vera"}}, "adapter.method", "vera"),
    "delta_lora_is_a_scale": ({"adapter": {"method": "delta-lora"}}, "adapter.method", "delta-lora"),
    "adalora_in_few_steps": (
        {"adapter": ADALORA, "training": {"max_steps": 199}},
        "adapter.method",
        "lora",
    ),
    "targets_without_mlp": ({"adapter": {"targets": ["q_proj", "k_proj"]}}, "adapter.targets", "all-linear"),
    "rank_for_the_data": ({"adapter": {"rank": 1}, "rows": samples(trained=1000)}, "adapter.rank", 4),
    "more_data_than_rank": (
        {"config": NARROW, "adapter": {"rank": 32}, "rows": samples(trained=1000)},
        "adapter.method",
        "full",
    ),
    "rank_beyond_the_data": ({"adapter": {"rank": 64, "alpha": 256}, "rows": FEW}, "adapter.rank", 64),
    "adalora_with_nothing_to_take": (
        {"adapter": ADALORA | {"init_rank": 8, "target_rank": 8}},
        "adapter.init_rank",
        12,
    ),
    "adalora_decides_seldom": (
        {"adapter": ADALORA | {"interval": 500}},  # 1,250 steps, of which 750 prune
        "adapter.interval",
        75,
    ),
    "alpha_out_of_range": ({"adapter": {"rank": 16, "alpha": 4}}, "adapter.alpha", "auto"),
    "adalora_scale": ({"adapter": ADALORA | {"init_rank": 64, "alpha": 8}}, "adapter.alpha", "auto"),
    "adalora_penalty": ({"adapter": ADALORA | {"orthogonal_weight": 0}}, "adapter.orthogonal_weight", 0.1),
    "dropout_on_few_rows": ({"rows": FEW}, "adapter.dropout", 0.05),
    "dropout_too_high": ({"adapter": {"dropout": 0.3}}, "adapter.dropout", 0.1),
    "gaussian_is_a_larger_start": ({"adapter": {"init": "gaussian"}}, "adapter.init", "gaussian"),
    "orthogonal_matters_little": ({"adapter": {"init": "orthogonal"}}, "adapter.init", "orthogonal"),
    "pissa_scale": ({"adapter": {"init": "pissa", "rank": 64}}, "adapter.alpha", 64.0),
    "loftq_gains_little": (
        {"adapter": {"init": "loftq"}, "model": {"quantize": "nf4"}},
        "adapter.init",
        "loftq",
    ),
    "fp4_instead_of_nf4": ({"model": {"quantize": "fp4"}}, "model.quantize", "nf4"),
    "constants_not_quantized": (
        {"model": {"quantize": "nf4", "double_quant": False}},
        "model.double_quant",
        True,
    ),
    "small_base_quantized": ({"config": NARROW, "model": {"quantize": "nf4"}}, "model.quantize", "none"),
    "base_held_in_fp32": ({"model": {"dtype": "fp32"}}, "model.dtype", "auto"),
    "rows_longer_than_allowed": ({"rows": LONG}, "data.max_length", 1152),
    "rows_padded": ({"data": {"packing": False}, "rows": samples(longest=1000)}, "data.packing", True),
    "nothing_held_out": ({"data": {"eval": None}}, "data.eval", 0.05),
    "large_batch": ({"training": {"batch_size": 65}}, "training.batch_size", 32),
    "more_passes_than_helped": ({"training": {"epochs": 50}, "rows": FEW}, "training.epochs", 5),
    "seen_often_unwatched": (
        {"training": {"epochs": 4}, "rows": samples(number=4999)},
        "eval.early_stopping",
        3,
    ),
    "few_steps": ({"rows": samples(number=128), "adapter": {"dropout": 0.1}}, "training.batch_size", 4),
    "stopping_that_cannot_happen": (
        {"eval": {"early_stopping": 5, "every": 250}},  # 1,250 steps
        "eval.every",
        62,
    ),
    "learning_rate": ({"optimizer": {"lr": 1e-5}}, "optimizer.lr", 3.6e-4),
    "learning_rate_of_ia3": (
        {
            "adapter": {"method": "peft", "type": "IA3", "config": {"feedforward_modules": []}},
            "optimizer": {"lr": 2e-4},
        },
        "optimizer.lr",
        5e-3,
    ),
    "rate_of_b_over_a": ({"optimizer": {"lr_ratio": 16}}, "optimizer.lr_ratio", "lora+"),
    "optimizer_matters_little": ({"optimizer": {"name": "sophia"}}, "optimizer.name", "sophia"),
    "state_that_is_small_already": ({"optimizer": {"name": "adamw_8bit"}}, "optimizer.name", "adamw"),
    "strong_decay": ({"optimizer": {"weight_decay": 0.2}}, "optimizer.weight_decay", 0.0),
    "clipping": ({"optimizer": {"max_grad_norm": 0.01}}, "optimizer.max_grad_norm", 1.0),
    "long_warmup": ({"schedule": {"warmup": 400}}, "schedule.warmup", 0.03),
    "schedule_matters_little": ({"schedule": {"name": "constant"}}, "schedule.name", "constant"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_speaks_on_a_planted_recipe_and_not_on_the_one_that_takes_its_advice(
    rule: Any, make: Callable[..., Facts]
) -> None:
    """A rule without a planted recipe fails here."""
    written, knob, advised = PLANTED[rule.__name__]
    facts = make(**written)
    item = rule(facts)
    assert item is not None
    assert (item.knob, item.advised) == (knob, advised)
    assert item.yours == facts.value(knob)
    assert item.why and item.source and item.confidence in ("high", "medium", "low")
    if item.yours == advised or rule.__name__ == "more_data_than_rank":
        assert not item.settings
        return
    after = facts.taken(item.settings)
    assert after.value(knob) == advised
    assert rule(after) is None
    everything = settled(facts)
    assert item.knob in {found.knob for found in everything}
    sure = [found for found in everything if found.confidence != "low"]
    taken = facts.taken({name: value for found in sure for name, value in found.settings.items()})
    assert [found.knob for found in settled(taken) if found.settings and found.confidence != "low"] == []


def test_no_planted_recipe_is_of_a_rule_that_is_not_there() -> None:
    names = [rule.__name__ for rule in RULES]
    assert sorted(names) == sorted(PLANTED)
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------------------------
# Figures


def said(facts: Facts, name: str) -> Any:
    (rule,) = [rule for rule in RULES if rule.__name__ == name]
    return rule(facts)


def test_the_capacity_is_that_of_published_counts(make: Callable[..., Facts]) -> None:
    """Llama 3.2 3B has 946,176 parameters per rank in its MLP and 573,440 in its attention (tinker-cookbook);
    a parameter holds 2 bits, a token brings 1."""
    per_rank = 946_176 + 573_440
    facts = make(adapter={"rank": 8}, rows=samples(number=100_000, trained=500))  # 50M bits
    assert facts.trained_tokens == 50_000_000
    assert facts.trainable == 8 * per_rank
    assert facts.per_rank == per_rank
    item = said(facts, "rank_for_the_data")
    assert 50_000_000 / 2 / per_rank == pytest.approx(16.45, abs=0.01)
    assert item.advised == 32
    assert f"{2 * 8 * per_rank:,}" in item.why and "16 would do" in item.why
    enough = make(adapter={"rank": 17}, rows=samples(number=100_000, trained=500))
    assert said(enough, "rank_for_the_data") is None


@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa", "delta-lora", "lora-drop"])
def test_the_advised_rank_holds_the_data_whatever_the_method(method: str, make: Callable[..., Facts]) -> None:
    sides = {"lora-fa": 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)}.get(method, 2 * 1024)
    facts = make(NARROW, samples(number=1000, trained=40), adapter={"method": method, "rank": 1})
    assert facts.per_rank == sides
    item = said(facts, "rank_for_the_data")
    after = facts.taken(item.settings)
    assert 2 * after.trainable >= 40_000
    half = facts.taken({"adapter.rank": item.advised // 2})
    assert 2 * half.trainable < 40_000


def test_layers_with_a_rank_of_their_own_keep_it(make: Callable[..., Facts]) -> None:
    """Of 2,048 sides q_proj has 2 * 128; at rank 4 of its own the others must hold the rest of 20,000."""
    adapter = {"rank": 2, "rank_pattern": {"q_proj": 4}}
    facts = make(NARROW, samples(number=1000, trained=40), adapter=adapter)
    assert facts.per_rank == 2048 - 256
    assert facts.trainable == 2 * (2048 - 256) + 4 * 256
    needed = (20_000 - 4 * 256) / (2048 - 256)
    assert 8 < needed < 16
    assert said(facts, "rank_for_the_data").advised == 16


def test_no_rank_is_above_the_narrowest_layer(make: Callable[..., Facts]) -> None:
    facts = make(NARROW, samples(trained=1000), adapter={"rank": 8})
    assert said(facts, "rank_for_the_data").advised == 32  # k_proj: 64 to 32


@pytest.mark.parametrize(
    ("family", "hidden", "expected"),
    [
        ("llama", 2048, 5e-4 * (2000 / 2048) ** 0.781),
        ("llama", 4096, 2.857e-4),
        ("qwen3", 4096, 4.730e-4),
        ("mistral", 4096, None),
    ],
)
def test_the_centre_of_the_learning_rate(
    family: str, hidden: int, expected: float | None, make: Callable[..., Facts]
) -> None:
    config = LLAMA | {"model_type": family, "hidden_size": hidden}
    found = centre(make(config))
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))
    short = centre(make(config, training={"max_steps": 99}))
    assert short == (None if expected is None else pytest.approx(1.5 * expected, rel=1e-3))


@pytest.mark.parametrize(
    ("method", "lr", "spoken"),
    [
        ("lora", 2.9e-5, "high"),
        ("lora", 8e-5, "low"),  # inside, but more than four times below 3.58e-4
        ("lora", 9.1e-5, None),
        ("lora", 1.75e-3, None),  # five times 3.58e-4
        ("lora", 1.85e-3, "high"),
        ("full", 9e-6, "medium"),
        ("full", 1e-5, None),
        ("full", 1.85e-4, "medium"),
        ("vera", 2e-4, "medium"),
        ("vera", 1e-3, None),
        ("adalora", 4e-4, "low"),
        ("adalora", 5e-4, None),
    ],
)
def test_the_range_of_the_learning_rate_is_the_methods(
    method: str, lr: float, spoken: str | None, make: Callable[..., Facts]
) -> None:
    item = said(make(adapter={"method": method}, optimizer={"lr": lr}), "learning_rate")
    assert (item and item.confidence) == spoken


@pytest.mark.parametrize(("name", "times"), [("lion", 0.25), ("sophia", 0.5), ("adafactor", 1.0)])
def test_other_optimizers_have_a_range_of_their_own(
    name: str, times: float, make: Callable[..., Facts]
) -> None:
    """AdamW's is 3e-5 to five times 3.58e-4."""
    spoken = [
        said(make(optimizer={"name": name, "lr": times * lr}), "learning_rate") is not None
        for lr in (2.9e-5, 9.1e-5, 1.75e-3, 1.85e-3)
    ]
    assert spoken == [True, False, False, True]


def test_no_range_is_known_for_sgd(make: Callable[..., Facts]) -> None:
    assert said(make(optimizer={"name": "sgd", "lr": 10.0}), "learning_rate") is None


def test_how_much_larger_a_gaussian_start_is(make: Callable[..., Facts]) -> None:
    """Rank 16, 3,072 inputs: 1/16 against 1/sqrt(3 * 3,072) = 1/96."""
    facts = make(adapter={"init": "gaussian"})
    assert "A starts 6 times as large" in said(facts, "gaussian_is_a_larger_start").why


def test_a_start_that_cannot_have_dropout_is_not_told_of_it(make: Callable[..., Facts]) -> None:
    for init, spoken in (("default", True), ("olora", False), ("pissa", False)):
        item = said(make(rows=FEW, adapter={"init": init}), "dropout_on_few_rows")
        assert (item is not None) == spoken


def test_a_mixture_whose_experts_are_no_layers_is_adapted_as_far_as_targets_reach(
    make: Callable[..., Facts],
) -> None:
    """Mixtral's all-linear is its attention: there is no more to advise."""
    mixture = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
    assert said(make(mixture, adapter={"targets": "attention"}), "targets_without_mlp") is None


def per_step(facts: Facts) -> dict[str, float]:
    """Layer -> its scale * rank * lr, by the ranks and alphas that a run would have."""
    root = facts.adapter.scaling == "rank_stabilized"
    lr: Any = facts.value("optimizer.lr")
    return {t.layer.name: t.alpha * (t.rank**0.5 if root else 1) * lr for t in facts.targets}


@pytest.mark.parametrize("init", ["default", "orthogonal"])
@pytest.mark.parametrize("pattern", [{}, {"q_proj": 4, "mlp.down_proj": 8}])
@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
@pytest.mark.parametrize("alpha", ["auto", 24])
@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa", "delta-lora"])
def test_an_advised_rank_leaves_the_steps_as_they_are(
    method: str, alpha: Any, scaling: str, pattern: Any, init: str, make: Callable[..., Facts]
) -> None:
    if scaling == "rank_stabilized" and pattern:
        pattern = {}  # whose layers keep the alpha that all have
    adapter = {"method": method, "rank": 6, "alpha": alpha, "scaling": scaling, "rank_pattern": pattern}
    facts = make(NARROW, samples(number=1000, trained=40), adapter=adapter | {"init": init})
    after = facts.taken(said(facts, "rank_for_the_data").settings)
    assert after.value("adapter.rank") > 6
    assert per_step(after) == pytest.approx(per_step(facts), rel=1e-4)
    assert after.step_alpha == pytest.approx(facts.step_alpha, rel=1e-4)


def test_all_advice_together_leaves_the_steps_where_the_rate_is_right(make: Callable[..., Facts]) -> None:
    """8,000 rows at rank 4, alpha * lr = 32 * 3.6e-4: the rank grows, and what was tuned stays."""
    facts = make(rows=samples(8000, trained=2000), adapter={"rank": 4}, optimizer={"lr": 1.43e-3})
    found = settled(facts)
    assert {item.knob: item.settings for item in found} == {
        "adapter.rank": {"adapter.rank": 8, "adapter.alpha": 8.0}
    }
    after = facts.taken(found[0].settings)
    assert per_step(after) == pytest.approx(per_step(facts))


@pytest.mark.parametrize(("alpha", "expected"), [("auto", "auto"), (3.0, 12.0)])
def test_factors_that_start_in_the_weight_keep_their_scale(
    alpha: Any, expected: Any, make: Callable[..., Facts]
) -> None:
    adapter = {"rank": 1, "alpha": alpha, "init": "olora"}
    facts = make(NARROW, samples(number=400, trained=40), adapter=adapter)
    after = facts.taken(said(facts, "rank_for_the_data").settings)
    assert (after.value("adapter.rank"), after.value("adapter.alpha")) == (4, expected)
    assert after.scale == facts.scale
    assert facts.step_alpha is None


def test_adalora_gets_ranks_to_take_away_and_no_scale_below_one(make: Callable[..., Facts]) -> None:
    for alpha, expected in (("auto", 16.0), (16, 16), (9, 12.0)):
        facts = make(adapter=ADALORA | {"init_rank": 8, "target_rank": 8, "alpha": alpha})
        after = facts.taken(said(facts, "adalora_with_nothing_to_take").settings)
        assert (after.value("adapter.init_rank"), after.value("adapter.alpha")) == (12, expected)


def test_a_step_of_adam_goes_with_scale_times_rank() -> None:
    """From B = 0, Adam's first step is lr * sign(G A^T) whatever scale and rank; how far W then goes down
    its gradient G (64, 96), over scale * rank * lr, is the same for every rank."""
    random = np.random.default_rng(0)
    gradient = random.normal(size=(64, 96))
    down = []
    for rank, scale in ((4, 8.0), (16, 2.0), (64, 0.5), (64, 2.0)):
        starts = random.uniform(-1, 1, size=(100, rank, 96)) / 96**0.5
        moved = [scale * 1e-3 * np.sign(gradient @ factor.T) @ factor for factor in starts]
        down.append((np.mean(moved, axis=0) * gradient).sum() / (scale * rank * 1e-3))
    assert down == pytest.approx([np.mean(down)] * 4, rel=0.02)


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
@pytest.mark.parametrize("method", ["lora", "dora", "delta-lora"])
@pytest.mark.parametrize("rank", [1, 2, 16, 128])
@pytest.mark.parametrize("alpha", [0.1, 3000])
def test_an_advised_alpha_is_the_one_that_was_swept(
    scaling: str, method: str, rank: int, alpha: float, make: Callable[..., Facts]
) -> None:
    facts = make(adapter={"method": method, "rank": rank, "alpha": alpha, "scaling": scaling})
    factor = 3 if method == "delta-lora" else 1
    own = alpha * factor * (rank**0.5 if scaling == "rank_stabilized" else 1)
    assert facts.step_alpha == pytest.approx(own)
    item = said(facts, "alpha_out_of_range")
    assert f"scale times rank is {own:.4g}" in item.why
    assert facts.taken(item.settings).step_alpha == pytest.approx(32, rel=1e-4)
    for inside in (8.01, 511):
        written = {"method": method, "rank": rank, "scaling": scaling, "alpha": inside / own * alpha}
        assert said(make(adapter=written), "alpha_out_of_range") is None


@pytest.mark.parametrize(("rank", "alpha"), [(16, "auto"), (4, 32), (64, 32), (4, "auto"), (64, "auto")])
def test_the_learning_rate_is_read_beside_alpha(rank: int, alpha: Any, make: Callable[..., Facts]) -> None:
    """3.58e-4 at alpha 32 is the centre: alpha auto, twice the rank, moves it."""
    own = 2 * rank if alpha == "auto" else alpha
    adapter = {"rank": rank, "alpha": alpha}
    spoken = [
        said(make(adapter=adapter, optimizer={"lr": lr * 32 / own}), "learning_rate")
        for lr in (2.9e-5, 9.1e-5, 1.75e-3, 1.85e-3)
    ]
    assert [item is not None for item in spoken] == [True, False, False, True]
    assert spoken[0].advised == pytest.approx(3.58e-4 * 32 / own, rel=0.03)
    assert ("scale times rank is" in spoken[0].why) == (own != 32)


def test_what_alpha_alone_puts_out_of_range_is_unsure(make: Callable[..., Facts]) -> None:
    item = said(make(adapter={"rank": 128}, optimizer={"lr": 3e-4}), "learning_rate")
    assert item.confidence == "low"  # as 2.4e-3 with alpha 32
    assert said(make(adapter={"rank": 128}, optimizer={"lr": 3e-3}), "learning_rate").confidence == "high"


def test_sizes_that_nobody_swept_have_no_centre_to_keep_to(make: Callable[..., Facts]) -> None:
    """Hidden size 64: the formula says 5e-4 * (2000 / 64)^0.781 = 7.36e-3; A starts within 1 / sqrt(192)."""
    spoken = {
        lr: said(make(NARROW, optimizer={"lr": lr}), "learning_rate") for lr in (1e-5, 2e-3, 7e-2, 8e-2)
    }
    assert {lr for lr, item in spoken.items() if item} == {1e-5, 8e-2}
    assert spoken[1e-5].advised == pytest.approx(7.4e-3)
    for item in (spoken[1e-5], spoken[8e-2]):
        assert item.confidence == "low"
        assert "narrow as 64 was swept (the smallest: 2,048): 0.0074 is the formula, extrap" in item.why
        assert "what to search" not in item.why
    unknown = NARROW | {"model_type": "mistral"}
    assert said(make(unknown, optimizer={"lr": 1e-2}), "learning_rate") is None


def test_delta_lora_is_lora_only_where_w_follows_from_the_first_step(make: Callable[..., Facts]) -> None:
    for start, spoken in ((0, True), (0.5, False), (10, False)):
        facts = make(adapter={"method": "delta-lora", "start": start})
        assert (said(facts, "delta_lora_is_a_scale") is not None) == spoken


def test_the_last_evaluation_is_counted(make: Callable[..., Facts]) -> None:
    """125 steps: one at 100, one at the end. A third that fails must come before the end to stop a run."""
    early = {"early_stopping": 3, "every": 100}
    facts = make(eval=early, training={"max_steps": 125})
    assert "of 125 steps 2 end in an evaluation" in said(facts, "stopping_that_cannot_happen").why
    four = make(eval=early, training={"max_steps": 400})
    assert "of 400 steps 4 end in an evaluation" in said(four, "stopping_that_cannot_happen").why
    assert said(make(eval=early, training={"max_steps": 401}), "stopping_that_cannot_happen") is None


def test_one_advice_for_a_knob_and_none_that_is_written(make: Callable[..., Facts]) -> None:
    """PiSSA at rank 1: the rank grows, and alpha with it to a scale of 1; what is said of either is said of
    the recipe that was written. Where alpha ends as it was written, nothing is said of it."""
    rows = samples(trained=1000)
    pissa = settled(make(rows=rows, adapter={"rank": 1, "init": "pissa", "init_svd": "exact"}))
    alphas = [item for item in pissa if item.knob == "adapter.alpha"]
    assert [(item.yours, item.advised) for item in alphas] == [("auto", 4.0)]
    assert "with 2 a step" in alphas[0].why
    for adapter in ({"rank": 1}, {"rank": 1, "init": "pissa"}, {"rank": 4}, {"rank": 1, "alpha": 32}):
        for length in (64, 8):
            sections: dict[str, Any] = {"adapter": adapter, "data": {"max_length": length}}
            found = settled(make(rows=rows, **sections, training={"max_steps": 5000}))
            knobs = [item.knob for item in found if item.settings and item.confidence != "low"]
            assert len(set(knobs)) == len(knobs)
            assert all(item.advised != item.yours for item in found if item.settings)
            shown = {item.knob: item.advised for item in found if item.settings}
            assert shown.items() <= {k: v for item in found for k, v in item.settings.items()}.items()
    both = settled(make(rows=rows, adapter={"rank": 1, "alpha": 32}))
    assert [item.settings for item in both if item.settings] == [{"adapter.rank": 4}]


def _in_8_bits(number: int) -> int:
    """Bytes of both means: two codes, fp32 constants per block of 256, two tables of 256 fp32 numbers."""
    return 2 * number + 2 * 4 * -(-number // 256) + 2 * 1024


def test_what_8_bits_save_is_counted_matrix_by_matrix(make: Callable[..., Facts]) -> None:
    """Sides of NARROW: k, v 64 to 32; q, o 64 to 64; gate, up 64 to 128, down 128 to 64; in both layers.

    At rank 32 those of 128 have 4,096 numbers, and are the least that is rounded; at 31 none is.
    """
    nothing = make(NARROW, adapter={"rank": 31}, optimizer={"name": "adamw_8bit"})
    assert "it saves nothing here" in said(nothing, "state_that_is_small_already").why
    facts = make(NARROW, adapter={"rank": 32}, optimizer={"name": "adamw_8bit"})
    saved = 2 * 3 * (8 * 4096 - _in_8_bits(4096))
    assert f"8 bits save {saved / 1e6:.3g} MB" in said(facts, "state_that_is_small_already").why


@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa", "adalora", "vera", "delta-lora"])
def test_the_shapes_of_what_is_trained_make_up_its_count(method: str, make: Callable[..., Facts]) -> None:
    facts = make(adapter={"method": method})
    assert sum(map(math.prod, facts.trained_shapes)) == facts.trainable


# ------------------------------------------------------------------------------------------------------------
# Rows


def test_another_method_keeps_what_both_have_and_the_rank_that_was_aimed_at(
    make: Callable[..., Facts],
) -> None:
    shared = {"targets": ["q_proj", "down_proj"], "dropout": 0.1, "alpha": 24}
    short = {"max_steps": 100}
    adalora = make(adapter={"method": "adalora", "target_rank": 6, "final": 0.2} | shared, training=short)
    to_lora = said(adalora, "adalora_in_few_steps")
    after = adalora.taken(to_lora.settings).adapter
    assert (after.rank, after.alpha, after.targets, after.dropout) == (6, 24, ("q_proj", "down_proj"), 0.1)
    by_default = make(adapter={"method": "adalora"}, training=short)
    assert by_default.taken(said(by_default, "adalora_in_few_steps").settings).adapter.rank == 8
    pattern = {"method": "dora", "rank": 32, "rank_pattern": {"down_proj": 8}, "alpha_pattern": {"q_proj": 4}}
    dora = make(adapter=pattern)
    after = dora.taken(said(dora, "dora_of_high_rank").settings).adapter
    assert (after.rank, after.rank_pattern, after.alpha_pattern) == (32, {"down_proj": 8}, {"q_proj": 4})


def test_a_method_to_try_comes_with_its_rate(make: Callable[..., Facts]) -> None:
    """6e-3 is AdaLoRA's; LoRA's centre is 3.58e-4 here, half more in 99 steps, twice that at alpha 16."""
    facts = make(adapter={"method": "adalora"}, training={"max_steps": 99}, optimizer={"lr": 6e-3})
    found = Advised(facts, settled(facts))
    (item,) = [item for item in found.advice if item.knob == "adapter.method"]
    assert item.confidence == "low"
    assert item.settings["optimizer.lr"] == pytest.approx(2 * 1.5 * 3.58e-4, rel=0.03)
    assert facts.taken(item.settings).adapter.rank == 8
    assert [len(trial) for trial in found.trials] == [2, 1]


def test_rows_beyond_the_context_are_dropped_not_asked_for(make: Callable[..., Facts]) -> None:
    rows = samples(longest=2000)
    facts = make(NARROW, rows, data={"max_length": 512})
    item = said(facts, "rows_longer_than_allowed")
    assert item.settings == {"data.max_length": 1024, "data.on_long": "drop"}
    there = said(make(NARROW, rows, data={"max_length": 1024}), "rows_longer_than_allowed")
    assert there.settings == {"data.on_long": "drop"}


@pytest.mark.parametrize(("cut", "spoken"), [(100, False), (101, True)])
@pytest.mark.parametrize("on_long", ["truncate", "drop"])
def test_one_row_of_a_hundred_may_be_cut(
    cut: int, spoken: bool, on_long: str, make: Callable[..., Facts]
) -> None:
    rows = samples()
    rows.lengths[:cut] = 1025
    item = said(make(rows=rows, data={"on_long": on_long}), "rows_longer_than_allowed")
    assert (item is not None) == spoken
    assert not item or item.advised == 1088


def test_what_a_run_sees_of_its_rows(make: Callable[..., Facts]) -> None:
    """100 samples of 10 tokens, 4 trained, one of 30 with 20 trained at its end; max_length 20."""
    lengths, targets = np.array([10] * 100 + [30]), np.array([4] * 100 + [20])
    rows = Rows(lengths, targets, 1.0, 101, None, False)
    cut = make(rows=rows, data={"max_length": 20, "on_long": "truncate"}, training={"batch_size": 10})
    assert (cut.samples, cut.steps, cut.trained_tokens) == (101, 22, 400 + 10)
    dropped = make(rows=rows, data={"max_length": 20, "on_long": "drop"}, training={"batch_size": 10})
    assert (dropped.samples, dropped.steps, dropped.trained_tokens) == (100, 20, 400)
    part = dropped.taken({"training.max_steps": 5})
    assert (part.passes, part.trained_tokens) == (0.5, 200)
    held_out = dropped.taken({"data.eval": 0.2})
    assert (held_out.samples, held_out.trained_tokens) == (80, 320)


def test_one_advice_may_call_for_another(make: Callable[..., Facts]) -> None:
    """Samples of 2,000 tokens, cut at 64: whole, they hold more than the rank does. What is shown as
    yours is what is written, whatever was advised before."""
    rows = samples(length=2000, longest=2000, trained=2000)
    sections: dict[str, Any] = {"adapter": {"rank": 2}, "data": {"on_long": "truncate", "max_length": 64}}
    facts = make(rows=rows, **sections)
    assert said(facts, "rank_for_the_data") is None
    found = {item.knob: item for item in settled(facts)}
    assert (found["data.max_length"].yours, found["data.max_length"].advised) == (64, 2048)
    assert (found["adapter.rank"].yours, found["adapter.rank"].advised) == (2, 8)


def test_few_rows_without_enough_to_hold_out_get_fewer_passes(make: Callable[..., Facts]) -> None:
    facts = make(rows=samples(number=60), data={"eval": None}, training={"epochs": 10})
    assert said(facts, "nothing_held_out") is None
    assert said(facts, "more_passes_than_helped").settings == {"training.epochs": 3}
    assert said(facts, "seen_often_unwatched") is None
    assert "training.epochs=3" in Advised(facts, settled(facts)).settings


def test_many_passes_become_few_and_watched(make: Callable[..., Facts]) -> None:
    """50 epochs over 400 rows; 100 steps of 16 over 60 rows, of which a pass has 4."""
    facts = make(rows=FEW, training={"epochs": 50})
    taken = Advised(facts, settled(facts)).settings
    assert {"training.epochs=5", "eval.early_stopping=3"} <= set(taken)
    whys = {item.knob: item.why for item in settled(facts)}
    assert whys["training.epochs"].startswith("400 samples, seen 50 times")
    assert whys["eval.early_stopping"].startswith("once the rest is taken, 400 samples, seen 5 times")
    large = make(rows=samples(5000), training={"epochs": 6})
    taken = Advised(large, settled(large)).settings
    assert "training.epochs=5" in taken
    assert not any("early_stopping" in one for one in taken)
    by_steps = make(rows=samples(number=60), training={"max_steps": 100})
    item = said(by_steps, "more_passes_than_helped")
    assert item.settings == {"training.max_steps": 5 * 4}
    assert by_steps.taken(item.settings).passes == 5
    stops = make(rows=FEW, training={"epochs": 50}, eval={"early_stopping": 2})
    assert said(stops, "more_passes_than_helped") is None


@pytest.mark.parametrize(
    ("sections", "advised", "says"),
    [
        ({"training": {"epochs": 3}}, 3, "as it is"),
        ({"training": {"epochs": 5}, "rows": FEW}, "early stopping", "5 passes over 400 samples"),
        (
            {"training": {"epochs": 9}, "rows": FEW, "eval": {"early_stopping": 2}},
            "early stopping",
            "9 passes",
        ),
        ({"training": {"epochs": 5}}, 5, "10,000 samples bear 5 passes"),
        ({"training": {"max_steps": 1250}}, None, "training.max_steps decides: 2 passes"),
        ({"training": {"epochs": 50}, "rows": FEW}, 5, "seen 50 times"),
    ],
)
def test_epochs_are_as_they_are_only_beside_what_the_evidence_has(
    sections: dict[str, Any], advised: Any, says: str, make: Callable[..., Facts]
) -> None:
    facts = make(**sections)
    shown = Advised(facts, settled(facts), PRIMER).as_dict()["advice"]
    (row,) = [row for row in shown if row["knob"] == "training.epochs"]
    assert row["advised"] == advised
    assert says in row["why"]


# ------------------------------------------------------------------------------------------------------------
# The whole


def test_advice_is_taken_by_its_line_and_then_nothing_is_left_to_say(write_recipe: Any, tiny: Path) -> None:
    recipe = write_recipe(
        adapter={"method": "full"},
        data={"train": str(tiny / "train.jsonl"), "max_length": 8, "packing": False},
        optimizer={"lr": 0.5, "weight_decay": 0.5, "max_grad_norm": None},
        schedule={"warmup": 0.5},
        training={"epochs": 8, "batch_size": 128},
    )
    found = advise(recipe)
    knobs = {item.knob for item in found.advice}
    assert {"adapter.method", "data.max_length", "optimizer.lr", "training.batch_size"} <= knobs
    assert "data.max_length is 8" in found.facts.stops
    assert f"stops     {found.facts.stops}" in found.as_text().splitlines()
    (line,) = [line for line in found.as_text().splitlines() if line.startswith("to take it: ")]
    taken = [word for word in shlex.split(line.removeprefix("to take it: ")) if word != "--set"]
    assert taken == list(found.settings)
    assert problems_of(load_recipe(recipe, taken)) == []
    again = advise(recipe, taken)
    assert (again.settings, again.facts.missing, again.facts.stops) == ((), (), "")
    assert load_recipe(recipe).adapter.method == "full"  # the file is as it was


def test_what_is_of_low_confidence_is_to_be_tried_and_not_taken(write_recipe: Any, tiny: Path) -> None:
    """Few rows seen 5 times: dropout of 0.05 helps some; early stopping and its interval are counted."""
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    found = advise(write_recipe(data=data, training={"epochs": 5, "batch_size": 16}))
    fields = {item.knob: item.confidence for item in found.advice}
    assert fields["adapter.dropout"] == "low"
    assert {"eval.early_stopping=3", "eval.every=6"} <= set(found.settings)
    assert ("adapter.dropout=0.05",) in found.trials
    assert not set(found.settings) & {one for trial in found.trials for one in trial}
    said = found.as_text().splitlines()
    assert f"to take it: {' '.join(f'--set {one}' for one in found.settings)}" in said
    assert "to try, of low confidence: --set adapter.dropout=0.05" in said


def test_what_is_of_low_confidence_changes_no_other_advice(make: Callable[..., Facts]) -> None:
    """60 steps, if smaller batches were taken; the recipe makes 24, and that is what an interval fits."""
    facts = make(rows=samples(128), eval={"early_stopping": 2, "every": 100})
    items = {item.knob: item for item in settled(facts)}
    assert items["training.batch_size"].confidence == "low"
    assert f"of {facts.steps} steps" in items["eval.every"].why


def test_steps_that_other_advice_changes_are_told_as_such(make: Callable[..., Facts]) -> None:
    """10,000 samples in batches of 512: 40 steps; in the batches of 32 that are advised 626."""
    facts = make(training={"batch_size": 512}, eval={"early_stopping": 9, "every": 70})
    items = {item.knob: item for item in settled(facts)}
    assert items["training.batch_size"].advised == 32
    assert items["eval.every"].why.startswith("once the rest is taken, of 626 steps")


def test_the_json_has_the_shape_that_is_documented(write_recipe: Any, cli: Any) -> None:
    recipe = write_recipe(adapter={"targets": ["q_proj", "k_proj"], "rank": 4})
    code, out, _ = cli("advise", recipe, "--json", "--profile", "primer", "--set", "optimizer.lr=1e-7")
    assert code == 0
    found = json.loads(out)
    assert list(found) == ["recipe", "facts", "advice", "set", "try"]
    assert found["recipe"] == str(recipe)
    assert list(found["facts"]) == ["model", "data", "adapter", "steps", "missing", "stops"]
    by_knob = {item["knob"]: item for item in found["advice"]}
    targets = by_knob["adapter.targets"]
    names = ["knob", "yours", "advised", "why", "source", "confidence", "primer"]
    assert list(targets) == names
    assert (targets["yours"], targets["advised"]) == (["q_proj", "k_proj"], "all-linear")
    assert targets["primer"]["says"] == "Wq and Wk"
    assert {primer.knob for primer in PRIMER} <= set(by_knob)
    assert by_knob["optimizer.lr"]["yours"] == 1e-7
    assert "primer" not in by_knob["optimizer.lr"]
    assert "adapter.targets=all-linear" in found["set"]
    assert not any(name.startswith("adapter.rank=") for name in found["set"])
    plain = json.loads(cli("advise", recipe, "--json")[1])
    assert not any("primer" in item for item in plain["advice"])


def test_the_primers_stand_beside_every_knob_they_speak_of(write_recipe: Any, cli: Any) -> None:
    _, plain, _ = cli("advise", write_recipe())
    _, both, _ = cli("advise", write_recipe(), "--profile", "primer")
    assert "primers" not in plain
    for primer in PRIMER:
        (row,) = [line for line in both.splitlines() if line.startswith(primer.knob)]
        assert primer.says in row
        assert f"    on the primers: {primer.evidence} [{primer.source}]" in both.splitlines()


def test_what_is_not_here_is_not_judged_and_the_rest_is_advised(
    write_recipe: Any, tiny: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of the hub, rows of the hub, held-out rows of the hub: no hub is in reach."""

    def unreachable(*_: Any, **__: Any) -> Any:
        raise LorakitError("the hub cannot be reached")

    adapter = {"targets": "attention"}
    rows = {"train": str(tiny / "train.jsonl"), "max_length": 128}
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.model_files._download", unreachable)
        recipe = write_recipe(model={"path": "owner/name"}, adapter=adapter)
        code, out, _ = cli("advise", recipe)
    assert code == 0
    assert "not judged: model and rows: the hub cannot be reached" in out.splitlines()
    assert "--set adapter.targets=all-linear" in out
    of_here = advise(write_recipe(data=rows, adapter=adapter)).facts.rows
    real = advise_module.data.load_parts

    def local_alone(recipe: Any, tokenizer: Any) -> Any:
        section = recipe.data
        return unreachable() if "owner/name" in (section.train, section.eval) else real(recipe, tokenizer)

    monkeypatch.setattr(advise_module.data, "load_parts", local_alone)
    found = advise(write_recipe(data=rows | {"train": "owner/name"}, adapter=adapter))
    assert found.facts.missing == ("rows: the hub cannot be reached",)
    assert (found.facts.rows, found.facts.stops) == (None, "")
    assert found.facts.base is not None
    found = advise(write_recipe(data=rows | {"eval": "owner/name"}, adapter=adapter))
    assert found.facts.missing == ("held-out rows: the hub cannot be reached",)
    assert found.facts.rows is not None and of_here is not None
    assert (len(found.facts.rows.lengths), found.facts.stops) == (len(of_here.lengths), "")


def test_what_train_refuses_is_refused_with_its_place(write_recipe: Any, cli: Any, tmp_path: Path) -> None:
    """Files that are not there, and one that holds no rows; rows that advice would mend are advised."""
    nowhere = tmp_path / "nowhere.jsonl"
    code, out, err = cli("advise", write_recipe(data={"train": str(nowhere)}))
    assert (code, out) == (2, "")
    assert "recipe.yaml:1:" in err and f"data.train: no such file: {nowhere}" in err
    code, out, err = cli("advise", write_recipe(model={"path": str(tmp_path)}))
    assert (code, out) == (2, "")
    assert "model.path: no model directory" in err
    nowhere.write_text("{ no row")
    code, out, err = cli("advise", write_recipe(data={"train": str(nowhere)}))
    assert (code, out) == (2, "")
    assert f"{nowhere}:1" in err or f"{nowhere.name}:1" in err
    code, out, _ = cli("advise", write_recipe(), "--set", "data.max_length=8")
    assert code == 2
    assert "--set data.max_length=" in out
    assert not [line for line in out.splitlines() if line.startswith("nothing to advise")]


def test_a_recipe_that_cannot_train_is_refused(write_recipe: Any, cli: Any, tmp_path: Path) -> None:
    code, out, err = cli("advise", write_recipe(adapter={"rnk": 8}))
    assert (code, out) == (2, "")
    assert "adapter.rnk" in err
    with pytest.raises(RecipeError, match="matches nothing"):
        advise(write_recipe(adapter={"targets": ["nowhere_proj"]}))
    code, _, err = cli("advise", write_recipe(), "--profile", "modern")
    assert code == 2
    assert "--profile modern: expected primer" in err
    with pytest.raises(LorakitError, match="cannot read this recipe"):
        advise(tmp_path / "none.yaml")


def test_an_adapter_that_is_continued_is_not_told_what_it_has(make: Callable[..., Facts]) -> None:
    """Whatever stands in the recipe: rank, alpha, targets and method come with it."""
    rows = samples(trained=100_000)
    adapter = {"method": "dora", "rank": 64, "alpha": 10_000, "targets": "attention"}
    spoken = {item.knob for item in settled(make(rows=rows, adapter=adapter))}
    assert {"adapter.method", "adapter.rank", "adapter.alpha", "adapter.targets"} <= spoken
    facts = make(rows=rows, adapter=adapter | {"start_from": "/adapter"})
    assert [item.knob for item in settled(facts)] == []
    assert facts.trainable is None


@pytest.mark.parametrize(
    ("number", "epochs", "spoken"), [(4999, 3, False), (4999, 4, True), (5000, 5, False), (5000, 6, True)]
)
def test_large_sets_bear_more_passes(
    number: int, epochs: int, spoken: bool, make: Callable[..., Facts]
) -> None:
    item = said(make(rows=samples(number), training={"epochs": epochs}), "seen_often_unwatched")
    assert (item is not None) == spoken


def test_a_stream_is_judged_by_its_first_rows(write_recipe: Any, tiny: Path) -> None:
    train = str(tiny / "train.jsonl")
    stream = {"train": train, "max_length": 8, "on_long": "drop", "streaming": True}
    facts = advise(write_recipe(data=stream, training={"max_steps": 50, "batch_size": 8})).facts
    assert facts.rows is not None
    assert (facts.rows.stream, facts.samples, facts.passes) == (True, 400, 1.0)
    whole = advise(write_recipe(data={"train": train, "max_length": 128})).facts.rows
    assert whole is not None
    assert set(whole.lengths) == set(facts.rows.lengths)  # uncut, though 8 tokens are allowed
    assert set(whole.targets) == set(facts.rows.targets)


def test_a_models_own_code_is_not_run(write_recipe: Any, tiny: Path) -> None:
    model = {"path": str(tiny / "model"), "trust_remote_code": True, "revision": "0" * 40}
    found = advise(write_recipe(model={**model, "path": "owner/name"}))
    assert (found.facts.base, found.facts.rows) == (None, None)
    assert found.facts.missing == ("model and rows: advise does not run a model's own code",)


def test_advice_that_other_fields_stand_against_is_told_and_not_taken(make: Callable[..., Facts]) -> None:
    """NF4 of a small base is not undone where a written field would then have no effect."""
    facts = make(NARROW, model={"quantize": "fp4", "double_quant": True})
    found = Advised(facts, settled(facts))
    assert [item for item in found.settings if item.startswith("model.")] == ["model.quantize=nf4"]
    impossible = change(facts, "adapter.rank", 65, "wider than a layer", "none", "low")
    assert taken_by(facts, impossible) is None
    free = make(NARROW, model={"quantize": "fp4"})
    assert ("model.quantize=none",) in Advised(free, settled(free)).trials


def test_advise_imports_no_torch(write_recipe: Any) -> None:
    packages, _ = facts_of("advise", write_recipe())
    assert not {"torch", "peft", "accelerate", "datasets", "pandas"} & packages
