"""count-params against published numbers, the report of real runs, PEFT's files, and wrong input.

Most configurations are those of the models as their makers published them; the numbers are from the papers
and from PEFT's prints, as each says.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as hf
from safetensors.torch import load_file

import lorakit
from lorakit.recipe.traits import TRAITS

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LLAMA_32_3B = {
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_32_1B = {
    **LLAMA_32_3B,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
}
LLAMA_31_8B = {
    **LLAMA_32_3B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
LLAMA_31_405B = {
    **LLAMA_31_8B,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
GPT_3 = {  # the shape of GPT-3 175B in a type with separate projections
    "model_type": "opt",
    "hidden_size": 12288,
    "ffn_dim": 49152,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
}
CHATGLM_6B = {  # its shape in a type that fuses queries, keys and values too
    "model_type": "gpt_neox",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 28,
    "num_attention_heads": 32,
    "vocab_size": 130528,
}
ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "architectures": ["RobertaForMaskedLM"]}
ROBERTA_BASE = {**ROBERTA, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
ROBERTA_LARGE = {
    **ROBERTA,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
DEBERTA = {"model_type": "deberta-v2", "vocab_size": 128100, "architectures": ["DebertaV2ForMaskedLM"]}
DEBERTA_XXL = {
    **DEBERTA,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 24,
}
DEBERTA_V3_BASE = {
    **DEBERTA,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
GPT_J_6B = {
    "model_type": "gptj",
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "n_positions": 2048,
    "rotary_dim": 64,
    "vocab_size": 50400,
    "tie_word_embeddings": False,
}
QV = "[q_proj, v_proj]"
SIX = r"['deberta\.encoder\.layer\..*(query_proj|key_proj|value_proj|dense)']"


def gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads}
    return {"model_type": "gpt2", **sizes, "n_positions": 1024, "vocab_size": 50257}


def model(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# (configuration, targets, rank, trainable)
PUBLISHED = {
    # Hu et al. 2021: table 4 (4.7M, 37.7M) and the budget of table 5 (18M), spent in three ways
    "gpt3-qv-1": (GPT_3, QV, 1, 4_718_592),
    "gpt3-qv-4": (GPT_3, QV, 4, 18_874_368),
    "gpt3-qv-8": (GPT_3, QV, 8, 37_748_736),
    "gpt3-q-8": (GPT_3, "[q_proj]", 8, 18_874_368),
    "gpt3-all-four-2": (GPT_3, "attention", 2, 18_874_368),
    # the same, table 2: 0.3M, 0.8M, 4.7M
    "roberta-base": (ROBERTA_BASE, "[query, value]", 8, 294_912),
    "roberta-large": (ROBERTA_LARGE, "[query, value]", 8, 786_432),
    "deberta-xxl": (DEBERTA_XXL, "[query_proj, value_proj]", 16, 4_718_592),
    # GPT-2 with its fused projection; 147,456 by a public replication
    "gpt2": (gpt2(768, 12, 12), "[c_attn]", 4, 147_456),
    "gpt2-medium": (gpt2(1024, 24, 16), "[c_attn]", 4, 393_216),
    "gpt2-large": (gpt2(1280, 36, 20), "[c_attn]", 4, 737_280),
    # Llama 2 7B, as PEFT prints it
    "llama-2-7b-qv": (LLAMA_2_7B, QV, 8, 4_194_304),
    "llama-2-7b-all-8": (LLAMA_2_7B, "all-linear", 8, 19_988_480),
    "llama-2-7b-all-64": (LLAMA_2_7B, "all-linear", 64, 159_907_840),
    "chatglm-6b": (CHATGLM_6B, "[query_key_value]", 8, 3_670_016),
    "gpt-j-6b": (GPT_J_6B, QV, 8, 3_670_016),
    # PEFT's own benchmark on Llama 3.2 3B
    "llama-3.2-3b-qv-32": (LLAMA_32_3B, QV, 32, 9_175_040),
    "llama-3.2-3b-qv-64": (LLAMA_32_3B, QV, 64, 18_350_080),
    "llama-3.2-3b-mlp-10": (LLAMA_32_3B, "mlp", 10, 9_461_760),
    # per rank, as the Tinker cookbook lists them
    "llama-3.2-1b-mlp": (LLAMA_32_1B, "mlp", 1, 491_520),
    "llama-3.2-1b-attention": (LLAMA_32_1B, "attention", 1, 212_992),
    "llama-3.2-1b-head": (LLAMA_32_1B, "[lm_head]", 1, 130_304),
    "llama-3.2-3b-mlp": (LLAMA_32_3B, "mlp", 1, 946_176),
    "llama-3.2-3b-attention": (LLAMA_32_3B, "attention", 1, 573_440),
    "llama-3.2-3b-head": (LLAMA_32_3B, "[lm_head]", 1, 131_328),
    "llama-3.1-8b-mlp": (LLAMA_31_8B, "mlp", 1, 1_769_472),
    "llama-3.1-8b-attention": (LLAMA_31_8B, "attention", 1, 851_968),
    "llama-3.1-8b-head": (LLAMA_31_8B, "[lm_head]", 1, 132_352),
    "qwen3-8b-mlp": (QWEN3_8B, "mlp", 1, 1_769_472),
    "qwen3-8b-attention": (QWEN3_8B, "attention", 1, 958_464),
    "qwen3-8b-head": (QWEN3_8B, "[lm_head]", 1, 156_032),
    "llama-3.1-405b": (LLAMA_31_405B, "all-linear", 16, 623_443_968),
    # Zhang et al. 2023, table 1: 1.33M and 0.33M for the six linear types of DeBERTaV3-base
    "deberta-v3-8": (DEBERTA_V3_BASE, SIX, 8, 1_327_104),
    "deberta-v3-2": (DEBERTA_V3_BASE, SIX, 2, 331_776),
}
TOTALS = {"llama-2-7b-qv": 6_742_609_920, "gpt-j-6b": 6_054_552_800}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str, tmp_path: Path) -> None:
    config, targets, rank, trainable = PUBLISHED[name]
    overrides = [f"adapter.rank={rank}", f"adapter.targets={targets}"]
    found = lorakit.count_params(model(tmp_path, config), overrides)
    assert found["trainable"] == trainable
    assert sum(module["trainable"] for module in found["modules"]) == trainable
    assert found["adapter_bytes"] == {"float32": 4 * trainable, "bfloat16": 2 * trainable}
    assert found["trainable_percent"] == 100 * trainable / found["total"]
    if name in TOTALS:  # PEFT prints base and adapter together
        assert found["total"] == TOTALS[name]


def test_the_percentage_that_peft_prints_for_llama_2(tmp_path: Path) -> None:
    found = lorakit.count_params(model(tmp_path, LLAMA_2_7B), ["adapter.rank=8", f"adapter.targets={QV}"])
    assert round(found["trainable_percent"], 7) == 0.0622059
    assert {(m["in"], m["out"], m["rank"], m["trainable"]) for m in found["modules"]} == {
        (4096, 4096, 8, 65_536)
    }


def test_adalora_adds_one_number_per_rank(tmp_path: Path) -> None:
    """PEFT's benchmark, Llama 3.2 3B: queries and values, 64 at first. Zhang et al., DeBERTaV3-base: 12."""
    assert 28 * sum(TRAITS["adalora"].num_trained(3072, out, 64) for out in (3072, 1024)) == 18_353_664
    sides = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    assert 12 * sum(TRAITS["adalora"].num_trained(*both, 12) for both in sides) == 1_991_520
    overrides = ["adapter.method=adalora", "adapter.init_rank=64", f"adapter.targets={QV}"]
    found = lorakit.count_params(model(tmp_path, LLAMA_32_3B), overrides)
    assert found["trainable"] == 18_353_664
    assert {(module["rank"], module["init_rank"]) for module in found["modules"]} == {(64, 64)}


# (what the recipe says, trainable): PEFT's own benchmark on Llama 3.2 3B, queries and values
BENCHMARK = {
    "dora": (["method=dora", "rank=32"], 9_289_728),
    "lora-fa": (["method=lora-fa", "rank=32"], 3_670_016),
    "vera": (["method=vera", "rank=256"], 129_024),
    "adalora": (["method=adalora", "init_rank=64"], 18_353_664),
    "delta-lora": (["method=delta-lora", "rank=32"], 9_175_040),  # as LoRA: what W takes over is not trained
}


@pytest.mark.parametrize("name", BENCHMARK)
def test_the_methods_of_pefts_benchmark(name: str, tmp_path: Path) -> None:
    fields, trainable = BENCHMARK[name]
    overrides = [f"adapter.{field}" for field in [*fields, f"targets={QV}"]]
    found = lorakit.count_params(model(tmp_path, LLAMA_32_3B), overrides)
    assert (found["trainable"], len(found["modules"])) == (trainable, 56)


@pytest.mark.parametrize(
    ("targets", "rank", "billions"),
    [
        ("[mlp, lm_head]", 256, 0.49),
        ("[attention, lm_head]", 256, 0.25),
        ("[all-linear, lm_head]", 256, 0.70),
        ("[mlp, lm_head]", 128, 0.24),
    ],
)
def test_the_table_of_thinking_machines(targets: str, rank: int, billions: float, tmp_path: Path) -> None:
    """Schulman et al. 2025, "LoRA Without Regret": Llama 3.1 8B, which adapts the head in every row."""
    overrides = [f"adapter.rank={rank}", f"adapter.targets={targets}"]
    found = lorakit.count_params(model(tmp_path, LLAMA_31_8B), overrides)
    assert found["trainable"] / 1e9 == pytest.approx(billions, abs=0.0051)


# ------------------------------------------------------------------------------------------------------------
# Runs


def adapter_from(write_recipe, cli, tmp_path: Path, **section: Any) -> Path:
    run = tmp_path / "first"
    recipe = write_recipe(adapter=section, training={"max_steps": 1, "batch_size": 2}, output=str(run))
    assert cli("train", recipe)[0] == 0
    return run / "adapter"


SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "rank_pattern": {"rank": 4, "rank_pattern": {"q_proj": 8, r".*layers\.0\..*down_proj": 2}},
    "attention": {"targets": "attention", "rank": 2, "scaling": "rank_stabilized"},
    "embeddings": {"targets": ["embed_tokens", "lm_head", "v_proj"], "rank": 2},
    "train_also": {"targets": ["q_proj"], "rank": 2, "train_also": ["norm", "input_layernorm", "mlp"]},
    "one in the other": {"targets": ["q_proj"], "rank": 2, "train_also": ["up_proj", "mlp"]},
    "full": {"method": "full"},
    "part": {"method": "full", "train_only": ["norm", r"model\.layers\.1\..*", "lm_head"]},
    "adalora": {"method": "adalora", "init_rank": 4, "target_rank": 2, "train_also": ["norm"]},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_count_is_the_report_of_a_run(name: str, write_recipe, cli, tmp_path: Path) -> None:
    """A recipe's count equals params.json; counting the run itself is params.json; the tables are alike."""
    steps = 20 if name == "adalora" else 1
    training = {"max_steps": steps, "batch_size": 2}
    recipe = write_recipe(adapter=SECTIONS[name], training=training, data=None)
    values = json.loads(recipe.read_text())
    values["data"] = {"train": "not/there.jsonl"}
    absent = tmp_path / "absent.yaml"
    absent.write_text(json.dumps(values))
    code, out, err = cli("count-params", absent, "--json")
    assert (code, err) == (0, "")
    counted = json.loads(out)

    assert cli("train", write_recipe(adapter=SECTIONS[name], training=training))[0] == 0
    report = json.loads((tmp_path / "run" / "params.json").read_text())
    if name == "adalora":  # its ranks are those at the end of the run
        report["modules"] = [
            module | ({"rank": module["init_rank"]} if "init_rank" in module else {})
            for module in report["modules"]
        ]
    assert counted == report
    code, out, _ = cli("count-params", tmp_path / "run", "--json")
    assert json.loads(out) == json.loads((tmp_path / "run" / "params.json").read_text())
    if name not in ("full", "part", "adalora"):
        code, out, _ = cli("count-params", tmp_path / "run" / "adapter", "--json")
        assert (code, json.loads(out)) == (0, report)


SHIPPED = {
    "vera": {"method": "vera", "rank": 8, "targets": "mlp", "train_also": ["norm"]},
    "lora-fa": {"method": "lora-fa", "rank": 4, "rank_pattern": {"q_proj": 8}},
    "delta-lora": {"method": "delta-lora", "rank": 4, "start": 2},
    "delta-lora from the start": {"method": "delta-lora", "rank": 4, "rank_pattern": {"q_proj": 8}},
    "lora-drop": {"method": "lora-drop", "rank": 4, "probe": 4},
    "pissa": {"rank": 4, "init": "pissa", "rank_pattern": {"q_proj": 8}},  # two pairs, of one rank
    "olora": {"rank": 4, "init": "olora", "train_also": ["norm"]},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_counted_where_it_is_more_than_what_is_trained(
    name: str, write_recipe, cli, tmp_path: Path
) -> None:
    recipe = write_recipe(adapter=SHIPPED[name])
    told = re.search(r"ships .* \(([\d,]+) bytes\)", cli("count-params", recipe)[1])
    assert told
    assert cli("train", recipe)[0] == 0
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert int(told[1].replace(",", "")) == sum(4 * tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_what_a_recipe_continues_from_is_counted(method: str, write_recipe, cli, tmp_path: Path) -> None:
    first = {
        "rank": 4,
        "targets": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2},
        "train_also": ["norm"],
    }
    start = adapter_from(write_recipe, cli, tmp_path, **first)
    section = {"method": method, "start_from": str(start)}
    if method == "adalora":
        section |= {"init_rank": 6, "target_rank": 3}
    recipe = write_recipe(adapter=section, training={"max_steps": 20, "batch_size": 2})
    code, out, _ = cli("count-params", recipe, "--json")
    assert code == 0
    counted = json.loads(out)
    assert cli("train", recipe)[0] == 0
    report = json.loads((tmp_path / "run" / "params.json").read_text())
    assert {key: counted[key] for key in counted if key != "modules"} == {
        key: report[key] for key in report if key != "modules"
    }
    assert [module["trainable"] for module in counted["modules"]] == [
        module["trainable"] for module in report["modules"]
    ]
    conflicting = write_recipe(adapter={"start_from": str(start), "rank": 16})
    code, _, err = cli("count-params", conflicting)
    assert code == 2
    assert "start_from has" in err


def test_an_adapter_of_peft(tiny: Path, cli, tmp_path: Path) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(tiny / "model")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "embed_tokens", "down_proj"],
        rank_pattern={"down_proj": 2},
        modules_to_save=["norm"],
        use_dora=False,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(base, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    adapted.save_pretrained(tmp_path / "adapter")
    code, out, _ = cli("count-params", tmp_path / "adapter", "--json")  # its configuration names the base
    assert code == 0
    found = json.loads(out)
    assert (found["trainable"], found["total"]) == (trainable, total)
    assert {module["rank"] for module in found["modules"]} == {0, 2, 4}
    path = tmp_path / "adapter" / "adapter_config.json"
    for gone in ("/not/there", "owner/never-heard-of", None):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": gone}))
        code, _, err = cli("count-params", tmp_path / "adapter")
        assert code == 2
        assert "--base PATH" in err
    code, out, _ = cli("count-params", tmp_path / "adapter", "--base", tiny / "model", "--json")
    assert json.loads(out) == found


def test_a_dora_of_peft_is_counted_with_its_magnitudes(tmp_path: Path, tiny: Path, cli) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(tiny / "model")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    found = lorakit.count_params(tmp_path / "adapter")
    assert (found["trainable"], found["total"]) == adapted.get_nb_trainable_parameters()


# ------------------------------------------------------------------------------------------------------------
# The command


def test_a_model_is_counted_with_an_assumed_adapter_that_can_be_changed(cli, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", LLAMA_2_7B)
    code, out, err = cli("count-params", folder)
    assert (code, err) == (0, "")
    assert "6,738,415,616 parameters" in out
    assert "lora, rank 16 (assumed; --set adapter.rank=8 changes it)" in out
    assert "trainable 39,976,960 of 6,778,392,576 parameters (0.5898 %)" in out
    assert "159.9 MB (159,907,840 bytes) in fp32, 80.0 MB (79,953,920 bytes) in bf16" in out
    line = next(line for line in out.splitlines() if "layers.*.mlp.down_proj" in line)
    assert " ".join(line.split()) == "model.layers.*.mlp.down_proj x 32 11,008 4,096 16 7,733,248"
    assert max(map(len, out.splitlines()[1:])) < 110
    assert "\x1b" not in out


def test_experts_that_are_not_adapted_are_told(cli, tmp_path: Path) -> None:
    """Mixtral 8x7B has 46.7 billion parameters, most of them in experts."""
    config = {**LLAMA_2_7B, "model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8}
    code, out, _ = cli("count-params", model(tmp_path / "m", config))
    assert code == 0
    assert "46,702,792,704 parameters" in out
    assert "64 3-D expert weights are not adapted" in out


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """What makes the answer fast, held without a clock."""
    folder = model(tmp_path / "m", LLAMA_31_405B)
    code = (
        "import sys; from lorakit.count import count; count(sys.argv[1]).as_text();"
        "print({'torch', 'transformers', 'numpy', 'peft', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_the_answer_takes_under_half_a_second_of_a_processor(tmp_path: Path) -> None:
    """The least of three: what else the machine does is no part of it."""
    folder = model(tmp_path / "m", LLAMA_31_405B)
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "lorakit", "count-params", folder], check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5


def test_a_hub_model_is_counted_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(model(tmp_path / "cached", LLAMA_2_7B))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    code, out, _ = cli("count-params", "owner/name", "--json", "--set", "adapter.rank=1")
    assert code == 0
    assert json.loads(out)["trainable"] == 2_498_560
    assert asked["name"] == "owner/name"
    assert asked["allow_patterns"] == ["config.json"]  # neither weights nor tokenizer


def test_the_base_of_an_adapter_is_found_in_the_cache(
    tiny: Path, write_recipe, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    adapter = adapter_from(write_recipe, cli, tmp_path, rank=2)
    before = lorakit.count_params(adapter)
    record = json.loads((adapter / "lorakit.json").read_text())
    record["base"] |= {"path": "owner/name", "revision": "v1"}
    (adapter / "lorakit.json").write_text(json.dumps(record))
    assert cli("count-params", adapter)[0] == 2

    def cached(name: str, file: str, revision: str | None = None) -> str:
        assert (name, file, revision) == ("owner/name", "config.json", "v1")
        return str(tiny / "model" / "config.json")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert lorakit.count_params(adapter) == before


# ------------------------------------------------------------------------------------------------------------
# Wrong input


def test_a_place_that_is_nothing(cli, tmp_path: Path) -> None:
    for place, words in (
        (tmp_path / "nowhere", "no such recipe, run, adapter or model"),
        (tmp_path, "neither an adapter (adapter_config.json) nor a model (config.json)"),
    ):
        code, out, err = cli("count-params", place)
        assert (code, out) == (2, "")
        assert words in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ({"hidden_size": 4}, [], "model_type is missing"),
        ({**LLAMA_2_7B, "vocab_size": "many"}, [], "vocab_size: expected a whole number above 0"),
        (LLAMA_2_7B, ["adapter.targets=[q_prj]"], '"q_prj" matches nothing. Did you mean "q_proj"?'),
        (LLAMA_2_7B, ["adapter.rnk=8"], 'not a field of method "lora". Did you mean "rank"?'),
        (LLAMA_2_7B, ["adapter.train_also=[nrm]"], '"nrm" matches no module with parameters'),
        (LLAMA_32_3B, ["adapter.train_also=[lm_head]"], "shares its weights with the other end"),
        (LLAMA_32_3B, ["adapter.train_also=[embed_tokens]"], "shares its weights with the other end"),
        (LLAMA_32_3B, ["adapter.rank=2000"], "adapter.rank_pattern: {k_proj: 1024, v_proj: 1024}"),
        (LLAMA_2_7B, ["optimizer.lr=1"], "only adapter.* can be set"),
        (LLAMA_2_7B, ["adapter.rank"], "expected KEY=VALUE"),
    ],
)
def test_what_is_wrong_with_a_model_or_its_adapter(
    config: dict[str, Any], overrides: list[str], words: str, cli, tmp_path: Path
) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    code, out, err = cli("count-params", model(tmp_path / "m", config), *arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_a_quantized_layer_is_not_trained_whole(write_recipe, cli, tiny: Path) -> None:
    recipe = write_recipe(
        model={"path": str(tiny / "model"), "quantize": "nf4"}, adapter={"train_also": ["q_proj"]}
    )
    code, _, err = cli("count-params", recipe)
    assert code == 2
    assert "is quantized and cannot be trained whole" in err


def test_options_without_effect_are_errors(write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_from(write_recipe, cli, tmp_path, rank=2)
    code, _, err = cli("count-params", adapter, "--set", "adapter.rank=8")
    assert (code, "has no effect" in err) == (2, True)
    code, _, err = cli("count-params", tmp_path / "first", "--set", "adapter.rank=8")
    assert (code, "has no effect" in err) == (2, True)
    code, _, err = cli("count-params", tiny / "model", "--base", tiny / "model")
    assert (code, "--base has no effect" in err) == (2, True)
    code, _, err = cli("count-params", adapter, "--base", tmp_path / "nowhere")
    assert (code, "is no model directory" in err) == (2, True)


def test_a_damaged_or_strange_adapter(write_recipe, cli, tmp_path: Path) -> None:
    adapter = adapter_from(write_recipe, cli, tmp_path, rank=2)
    other = model(tmp_path / "other", LLAMA_2_7B)
    code, _, err = cli("count-params", adapter, "--base", other)
    assert (code, "in this model" in err) == (2, True)

    def changed(name: str, text: str | None) -> tuple[int, str]:
        copy = Path(shutil.copytree(adapter, tmp_path / "copy", dirs_exist_ok=True))
        (copy / name).unlink() if text is None else (copy / name).write_text(text)
        code, _, err = cli("count-params", copy)
        return code, err

    code, err = changed("adapter_model.safetensors", None)
    assert (code, "no adapter_model.safetensors" in err) == (2, True)
    code, err = changed("adapter_model.safetensors", "short")
    assert (code, "not a safetensors file" in err) == (2, True)
    code, err = changed("adapter_model.safetensors", "\x10" + 7 * "\0" + '{"a.lora_A": 1}  ')
    assert (code, "a.lora_A has no shape" in err) == (2, True)
    code, err = changed("adapter_config.json", "{")
    assert (code, "not JSON" in err) == (2, True)
    code, err = changed("adapter_config.json", '{"peft_type": "POLY"}')
    assert (code, "does not run the kind POLY" in err) == (2, True)
