"""What targets select among the layers of a model, and which rank and alpha each of them gets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.shapes import Layer
from lorakit.targets import (
    PRESETS,
    assign,
    bad_pattern,
    is_attention,
    matches,
    select,
    select_parameters,
    twice,
)


def layer(name: str, inside: int = 64, outside: int = 64, **more: Any) -> Layer:
    return Layer(name, more.pop("kind", "linear"), inside, outside, **more)


def blocks(prefix: str, kind: str, **shapes: tuple[int, int]) -> list[Layer]:
    """Two decoder blocks; `__` in a name stands for a dot."""
    return [
        layer(f"{prefix}.{number}.{name.replace('__', '.')}", *shape, kind=kind)
        for number in range(2)
        for name, shape in shapes.items()
    ]


LLAMA = [
    layer("model.embed_tokens", 1000, 64, kind="embedding"),
    *blocks(
        "model.layers",
        "linear",
        self_attn__q_proj=(64, 64),
        self_attn__k_proj=(64, 16),
        self_attn__v_proj=(64, 16),
        self_attn__o_proj=(64, 64),
        mlp__gate_proj=(64, 128),
        mlp__up_proj=(64, 128),
        mlp__down_proj=(128, 64),
    ),
    layer("lm_head", 64, 1000, role="head"),
]
GPT2 = [
    layer("transformer.wte", 1000, 64, kind="embedding"),
    layer("transformer.wpe", 256, 64, kind="embedding"),
    *blocks(
        "transformer.h",
        "conv1d",
        attn__c_attn=(64, 192),
        attn__c_proj=(64, 64),
        mlp__c_fc=(64, 256),
        mlp__c_proj=(256, 64),
    ),
    layer("lm_head", 64, 1000, role="head"),
]
OPT = [
    layer("model.decoder.embed_tokens", 1000, 32, kind="embedding"),
    layer("model.decoder.project_in", 32, 64),
    *blocks(
        "model.decoder.layers",
        "linear",
        self_attn__q_proj=(64, 64),
        self_attn__k_proj=(64, 64),
        self_attn__v_proj=(64, 64),
        self_attn__out_proj=(64, 64),
        fc1=(64, 256),
        fc2=(256, 64),
    ),
    layer("model.decoder.project_out", 64, 32),
    layer("lm_head", 32, 1000, role="head"),
]
MIXTURE = [
    layer("model.embed_tokens", 1000, 64, kind="embedding"),
    *blocks("model.layers", "linear", self_attn__q_proj=(64, 64), self_attn__o_proj=(64, 64)),
    layer("model.layers.0.mlp.gate", 64, 4, role="router"),
    layer("model.layers.1.mlp.gate", 64, 4, role="router"),
    layer("model.layers.0.mlp.experts.0.up_proj", 64, 128),
    layer("model.layers.0.mlp.experts.1.up_proj", 64, 128),
    layer("model.layers.1.mlp.shared_expert.up_proj", 64, 128),
    layer("lm_head", 64, 1000, role="head"),
]


def chosen(layers: list[Layer], targets: str | list[str]) -> list[str]:
    found, problems = select(layers, targets)
    assert problems == []
    names = [one.name for one in found]
    assert names == [one.name for one in layers if one.name in names]  # in model order, each once
    return names


def last(names: list[str]) -> list[str]:
    """The distinct last parts of names."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


# ------------------------------------------------------------------------------------------------------------
# Names and patterns


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),  # whole parts only
        ("q", "model.layers.0.self_attn.q_proj", False),
        ("attn.q_proj", "model.layers.0.self_attn.q_proj", False),
        ("self_attn", "model.layers.0.self_attn.q_proj", False),  # the end of the path only
        ("model", "model.layers.0.self_attn.q_proj", False),
        ("0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", False),
        ("Q_proj", "model.layers.0.self_attn.q_proj", False),
        ("my-layer", "model.my-layer", True),
        (".*q_proj", "model.layers.0.self_attn.q_proj", True),
        (".*proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj$", "model.layers.0.self_attn.q_proj", False),  # a regular expression is for the whole path
        (r"model\.layers\.[01]\..*", "model.layers.1.mlp.up_proj", True),
        (r"model\.layers\.[01]\..*", "model.layers.10.mlp.up_proj", False),
        (r".*\.(q|v)_proj", "model.layers.0.self_attn.v_proj", True),
        (r".*\.(q|v)_proj", "model.layers.0.self_attn.k_proj", False),
        ("", "model", False),
    ],
)
def test_a_name_is_the_end_of_a_path_and_a_regular_expression_is_all_of_it(
    pattern: str, name: str, expected: bool
) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("transformer.h.0.attn.c_proj", True),
        ("encoder.layer.0.attention.self.query", True),
        ("decoder.block.0.layer.0.SelfAttention.q", True),
        ("gpt_neox.layers.0.attention.query_key_value", True),
        ("model.layers.0.mlp.up_proj", False),
        ("model.decoder.layers.0.fc1", False),
    ],
)
def test_attention_is_told_by_the_path(name: str, expected: bool) -> None:
    assert is_attention(name) is expected


def test_a_bad_pattern_is_told_in_words_and_a_good_one_is_silent() -> None:
    assert bad_pattern("q_proj") == bad_pattern(".*") == ""
    assert bad_pattern("(q|v").startswith('"(q|v" is no regular expression: ')
    assert bad_pattern("a" * 500) == ""
    assert "500" in bad_pattern("a" * 501)


# ------------------------------------------------------------------------------------------------------------
# Presets


@pytest.mark.parametrize(
    ("layers", "preset", "expected", "count"),
    [
        (LLAMA, "all-linear", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", 14),
        (LLAMA, "attention", "q_proj k_proj v_proj o_proj", 8),
        (LLAMA, "mlp", "gate_proj up_proj down_proj", 6),
        (GPT2, "all-linear", "c_attn c_proj c_fc", 8),
        (GPT2, "attention", "c_attn c_proj", 4),
        (GPT2, "mlp", "c_fc c_proj", 4),
        (OPT, "all-linear", "project_in q_proj k_proj v_proj out_proj fc1 fc2 project_out", 14),
        (OPT, "attention", "q_proj k_proj v_proj out_proj", 8),
        (OPT, "mlp", "fc1 fc2", 4),
        (MIXTURE, "all-linear", "q_proj o_proj up_proj", 7),
        (MIXTURE, "attention", "q_proj o_proj", 4),
        (MIXTURE, "mlp", "up_proj", 3),
    ],
)
def test_a_preset_takes_neither_head_nor_router_nor_embedding(
    layers: list[Layer], preset: str, expected: str, count: int
) -> None:
    names = chosen(layers, preset)
    assert last(names) == expected.split()
    assert len(names) == count


@pytest.mark.parametrize("layers", [LLAMA, GPT2, OPT, MIXTURE], ids=["llama", "gpt2", "opt", "mixture"])
def test_attention_and_mlp_share_nothing_and_both_lie_in_all_linear(layers: list[Layer]) -> None:
    everything, attention, mlp = (set(chosen(layers, preset)) for preset in PRESETS)
    assert not attention & mlp
    assert attention | mlp <= everything


def test_a_c_proj_of_gpt2_belongs_to_the_block_it_lies_in() -> None:
    assert "transformer.h.0.attn.c_proj" in chosen(GPT2, "attention")
    assert "transformer.h.0.mlp.c_proj" not in chosen(GPT2, "attention")
    assert "transformer.h.0.mlp.c_proj" in chosen(GPT2, "mlp")
    assert "transformer.h.0.attn.c_proj" not in chosen(GPT2, "mlp")


# ------------------------------------------------------------------------------------------------------------
# Lists


@pytest.mark.parametrize(
    ("layers", "targets", "expected"),
    [
        (LLAMA, "q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (LLAMA, ["lm_head"], ["lm_head"]),  # by name, also what presets leave out
        (LLAMA, ["embed_tokens"], ["model.embed_tokens"]),
        (MIXTURE, ["mlp.gate"], ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]),
        (GPT2, ["mlp.c_proj"], ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]),
        (
            LLAMA,
            [r".*\.1\..*(q|k)_proj"],
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"],
        ),
        (
            MIXTURE,
            ["up_proj", "0.self_attn.q_proj", "up_proj", r".*experts\.0.*"],
            [
                "model.layers.0.self_attn.q_proj",
                "model.layers.0.mlp.experts.0.up_proj",
                "model.layers.0.mlp.experts.1.up_proj",
                "model.layers.1.mlp.shared_expert.up_proj",
            ],
        ),
    ],
)
def test_names_and_patterns_select_in_model_order_and_each_layer_once(
    layers: list[Layer], targets: str | list[str], expected: list[str]
) -> None:
    assert chosen(layers, targets) == expected


def test_a_preset_can_stand_in_a_list_beside_names() -> None:
    names = chosen(LLAMA, ["attention", "lm_head"])
    assert last(names) == ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]


@pytest.mark.parametrize(
    ("layers", "target", "message"),
    [
        (
            GPT2,
            "q_proj",
            '"q_proj" matches nothing. Did you mean "c_proj"? Layers of this model:'
            " wte, wpe, c_attn, c_proj, c_fc, lm_head",
        ),
        (
            LLAMA,
            "gateproj",
            '"gateproj" matches nothing. Did you mean "gate_proj"? Layers of this model: embed_tokens,'
            " q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head",
        ),
        (
            OPT[-2:],
            "zzz",
            '"zzz" matches nothing. Layers of this model: project_out, lm_head',
        ),
        (OPT[-2:], "attention", '"attention" matches nothing. Layers of this model: project_out, lm_head'),
        (OPT[-2:], "zzz.*", '"zzz.*" matches nothing. Layers of this model: project_out, lm_head'),
        (OPT[-2:], "", '"" matches nothing. Layers of this model: project_out, lm_head'),
    ],
)
def test_a_target_that_matches_nothing_is_told_the_nearest_and_all(
    layers: list[Layer], target: str, message: str
) -> None:
    assert select(layers, target) == ([], [message])


def test_every_bad_target_is_a_problem_of_its_own_and_the_good_ones_are_found() -> None:
    found, problems = select(LLAMA, ["q_proj", "(", "nosuch", "attention", "w_proj"])
    assert len(found) == 8
    assert [problem.split(" ")[0] for problem in problems] == ['"("', '"nosuch"', '"w_proj"']
    assert "is no regular expression" in problems[0]


# ------------------------------------------------------------------------------------------------------------
# Rank and alpha

ATTENTION = select(LLAMA, "attention")[0]


def assigned(
    rank: int, alpha: Any = "auto", ranks: Any = None, alphas: Any = None
) -> dict[str, tuple[int, float]]:
    """Last name -> (rank, alpha), the same in every block."""
    targets, problems = assign(ATTENTION, rank, alpha, ranks or {}, alphas or {})
    assert problems == []
    assert [target.layer for target in targets] == ATTENTION
    found: dict[str, set[tuple[int, float]]] = {}
    for target in targets:
        found.setdefault(target.layer.name.rsplit(".", 1)[-1], set()).add((target.rank, target.alpha))
    return {name: both.pop() for name, both in found.items() if len(both) == 1}


def test_alpha_auto_is_twice_the_rank_of_each_layer() -> None:
    assert assigned(8) == dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], (8, 16.0))
    assert assigned(8, ranks={"k_proj": 4, "o_proj": 32}) == {
        "q_proj": (8, 16.0),
        "k_proj": (4, 8.0),
        "v_proj": (8, 16.0),
        "o_proj": (32, 64.0),
    }


def test_a_number_for_alpha_is_the_alpha_of_every_layer_whatever_its_rank() -> None:
    found = assigned(8, 5.0, ranks={"k_proj": 4})
    assert found == {"q_proj": (8, 5.0), "k_proj": (4, 5.0), "v_proj": (8, 5.0), "o_proj": (8, 5.0)}


def test_alpha_patterns_win_over_alpha_and_over_auto() -> None:
    found = assigned(8, ranks={"k_proj": 4}, alphas={"k_proj": 1.5, "v_proj": 3})
    assert found == {"q_proj": (8, 16.0), "k_proj": (4, 1.5), "v_proj": (8, 3), "o_proj": (8, 16.0)}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({".*": 2, "k_proj": 4}, {"q_proj": 2, "k_proj": 4, "v_proj": 2, "o_proj": 2}),
        ({"k_proj": 4, ".*": 2}, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
        ({r".*[kv]_proj": 4, "v_proj": 6}, {"q_proj": 8, "k_proj": 4, "v_proj": 6, "o_proj": 8}),
    ],
)
def test_the_last_of_the_patterns_that_match_counts(
    patterns: dict[str, int], expected: dict[str, int]
) -> None:
    assert {name: rank for name, (rank, _) in assigned(8, ranks=patterns).items()} == expected
    assert {name: alpha for name, (_, alpha) in assigned(1, 8, alphas=patterns).items()} == expected


def test_a_pattern_can_single_out_one_layer() -> None:
    targets, _ = assign(ATTENTION, 8, "auto", {"layers.1.self_attn.q_proj": 2}, {})
    assert [target.rank for target in targets] == [8, 8, 8, 8, 2, 8, 8, 8]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("qproj", 'matches none of the adapted layers. Did you mean "q_proj"?'),
        ("up_proj", "Layers of this model: q_proj, k_proj, v_proj, o_proj"),  # there, but not adapted
        ("(", "is no regular expression"),
    ],
)
def test_a_pattern_without_effect_is_a_problem_of_its_field(field: str, pattern: str, words: str) -> None:
    patterns: dict[str, dict[str, int]] = {"rank_pattern": {}, "alpha_pattern": {}}
    patterns[field] = {pattern: 4}
    targets, problems = assign(ATTENTION, 8, "auto", patterns["rank_pattern"], patterns["alpha_pattern"])
    assert targets == []
    ((named, message),) = problems
    assert named == f"adapter.{field}"
    assert message.startswith(f'"{pattern}" ')
    assert words in message


def test_all_patterns_without_effect_come_out_together() -> None:
    _, problems = assign(ATTENTION, 8, "auto", {"a_proj": 1, "q_proj": 2, "(": 3}, {"b_proj": 1})
    assert [field for field, _ in problems] == ["adapter.rank_pattern"] * 2 + ["adapter.alpha_pattern"]


def cure(message: str) -> dict[str, int]:
    """The rank_pattern that a message proposes, read as a user's recipe would be."""
    (line,) = re.findall(r"adapter\.(rank_pattern: \{.*?\})", message)
    return dict(yaml.safe_load(line)["rank_pattern"])


def test_a_rank_above_the_smaller_side_is_refused_with_the_line_that_cures_it() -> None:
    _, problems = assign(ATTENTION, 32, "auto", {}, {})
    ((field, message),) = problems
    assert field == "adapter.rank"
    assert message == (
        "32 is above the smaller side of model.layers.0.self_attn.k_proj (16 x 64);"
        " write adapter.rank_pattern: {k_proj: 16, v_proj: 16}"
    )
    targets, problems = assign(ATTENTION, 32, "auto", cure(message), {})
    assert problems == []
    assert [target.rank for target in targets] == [32, 16, 16, 32] * 2
    assert [target.alpha for target in targets] == [64.0, 32.0, 32.0, 64.0] * 2


@pytest.mark.parametrize("rank", [16, 1])
def test_a_rank_of_the_smaller_side_is_accepted(rank: int) -> None:
    _, problems = assign(ATTENTION, rank, "auto", {}, {})
    assert problems == []


@pytest.mark.parametrize("layers", [LLAMA, GPT2, OPT, MIXTURE], ids=["llama", "gpt2", "opt", "mixture"])
@pytest.mark.parametrize("rank", [65, 200])
def test_following_the_line_is_enough_for_every_kind_of_model(layers: list[Layer], rank: int) -> None:
    found, _ = select(layers, "all-linear")
    _, problems = assign(found, rank, "auto", {}, {})
    targets, problems = assign(found, rank, "auto", cure(problems[0][1]), {})
    assert problems == []
    assert len(targets) == len(found)


def test_following_the_line_is_enough_when_layers_of_one_name_differ_in_size() -> None:
    layers = [layer("h.0.attn.proj", 64, 8), layer("h.0.mlp.proj", 64, 4), layer("h.0.mlp.up", 64, 64)]
    _, problems = assign(layers, 16, "auto", {}, {})
    targets, problems = assign(layers, 16, "auto", cure(problems[0][1]), {})
    assert problems == []
    assert targets[-1].rank == 16


def test_a_rank_of_a_pattern_that_is_too_large_is_a_problem_of_the_pattern() -> None:
    _, problems = assign(ATTENTION, 8, "auto", {"k_proj": 32}, {})
    assert [field for field, _ in problems] == ["adapter.rank_pattern"]


def test_the_line_keeps_the_patterns_that_the_recipe_has() -> None:
    _, problems = assign(ATTENTION, 32, "auto", {"q_proj": 2}, {})
    assert cure(problems[0][1]) == {"q_proj": 2, "k_proj": 16, "v_proj": 16}


def test_options_that_embeddings_have_no_use_for_are_refused(write_recipe, cli) -> None:
    section = {"targets": ["embed_tokens"], "dropout": 0.1, "init": "gaussian"}
    code, out, _ = cli("validate", write_recipe(adapter=section))
    assert code == 2
    assert "adapter.dropout: has no effect on embeddings" in out
    assert "adapter.init: has no effect on embeddings" in out
    assert cli("validate", write_recipe(adapter=section | {"targets": ["embed_tokens", "q_proj"]}))[0] == 0


@pytest.mark.parametrize("rank", [4, 16])
def test_the_alpha_of_rslora_does_not_grow_with_the_rank(
    rank: int, write_recipe, cli, tmp_path: Path
) -> None:
    """Its scale would, and with it what rsLoRA is for."""
    section = {"rank": rank, "scaling": "rank_stabilized", "targets": ["q_proj"]}
    code, _, err = cli("train", write_recipe(adapter=section, training={"max_steps": 1, "batch_size": 2}))
    assert code == 0
    assert "adapter.alpha: 16.0 (the same for every rank" in err
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, 16, True)


def test_a_module_around_adapted_experts_is_not_trained_whole() -> None:
    experts = layer("model.layers.1.mlp.experts.down_proj", kind="experts")
    assert twice([experts], ["model.layers.1.mlp.gate", "model.layers.10", "model.norm"]) == ""
    message = (
        "model.layers.1.mlp.experts.down_proj in model.layers.1.mlp is adapted (adapter.target_parameters)"
    )
    assert twice([layer("model.head"), experts], ["model.layers.1.mlp"]).startswith(message)


def test_parameters_are_selected_by_name_by_module_and_by_the_name_they_share() -> None:
    names = [
        "embed.weight",
        "layers.0.norm.weight",
        "layers.0.fc.weight",
        "layers.0.fc.bias",
        "layers.1.fc.bias",
    ]
    tied = {"head.weight": "embed.weight"}
    assert select_parameters(names, [], tied) == (names, [])
    assert select_parameters(names, ["bias"], tied) == (names[3:], [])
    assert select_parameters(names, ["fc", "norm"], tied) == (names[1:], [])
    assert select_parameters(names, ["head"], tied) == (names[:1], [])
    assert select_parameters(names, [r"layers\.0\..*"], tied)[0] == names[1:4]
    assert select_parameters(names, ["head"], {})[1] == ['"head" matches no module and no parameter.']
    assert "no regular expression" in select_parameters(names, ["(fc"], tied)[1][0]
