"""Whole AdaLoRA runs on the tiny model: what they leave, what is best, what resumes, what is refused."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from lorakit.adapters.adalora import AdaLoraAdapter
from lorakit.layers import layers_of
from lorakit.recipe.methods import AdaLora
from lorakit.report import rank_table
from lorakit.targets import Target, select
from tests.conftest import metrics

FILE = "adapter/adapter_model.safetensors"
ADALORA = {"method": "adalora", "init_rank": 6, "target_rank": 2, "warmup": 0.2, "final": 0.3, "interval": 2}
NUM_LAYERS = 14  # 2 blocks of 7 matrices


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tiny: Path) -> Callable[..., Path]:
    """A recipe of 20 steps, of which 4 are warm-up and 6 the end: the ranks are settled after 14."""

    def write(**sections: Any) -> Path:
        held_out = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
        values: dict[str, Any] = {
            "adapter": ADALORA,
            "data": held_out,
            "optimizer": {"lr": 2e-2},
            "training": {"max_steps": 20, "batch_size": 8},
            "eval": {"every": 5},
        }
        return write_recipe(**values | sections)

    return write


def cross_entropy(model: Any, tiny: Path) -> float:
    """Mean over the completions of eval.jsonl, one row at a time, without any code of lorakit."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    total = count = 0.0
    for line in (tiny / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = model(ids).logits[0, prompt - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(scores, ids[0, prompt:], reduction="sum").item()
        count += ids.shape[1] - prompt
    return total / count


def held_out(run: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}


def ranks_in_file(run: Path) -> dict[str, int]:
    """Columns of B that are not zero."""
    tensors = load_file(run / FILE)
    marks = {name: tensor for name, tensor in tensors.items() if ".lora_B." in name}
    return {
        name.removeprefix("base_model.model.").split(".lora_B")[0]: int(tensor.any(0).sum())
        for name, tensor in marks.items()
    }


# ------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_tells_its_ranks_and_ships_them(recipe, cli, tiny: Path, tmp_path: Path) -> None:
    code, _, err = cli("train", recipe())
    assert code == 0, err
    run = tmp_path / "run"
    params = json.loads((run / "params.json").read_text())
    ranks = {module["name"]: module["rank"] for module in params["modules"]}
    assert sum(ranks.values()) == 2 * NUM_LAYERS
    assert len(set(ranks.values())) > 1
    assert {module["init_rank"] for module in params["modules"]} == {6}
    assert params["trainable"] == sum(6 * (m["in"] + m["out"] + 1) for m in params["modules"])
    assert ranks == ranks_in_file(run)

    lines = metrics(run)
    assert lines[-1] == {"step": 20, "ranks": ranks}
    budgets = [line["budget"] for line in lines if "loss" in line]
    assert len(budgets) == 20
    # 28 + floor(56 (1 - (step - 4) / 10)^3) after steps 6, 8, 10, 12 and 14
    assert budgets == [84] * 5 + [56] * 2 + [40] * 2 + [31] * 2 + [28] * 9

    text = (run / "params.md").read_text()
    table = text.split("Ranks, layer by module:")[1].strip().splitlines()
    head, _, first, second, sums = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    assert head[0] == "layer"
    assert (first[0], second[0], sums[0]) == ("0", "1", "sum")
    for column, name in enumerate(head[1:], start=1):
        assert int(first[column]) == ranks[f"model.layers.0.{name}"]
        assert int(second[column]) == ranks[f"model.layers.1.{name}"]
    assert sum(map(int, sums[1:])) == 2 * NUM_LAYERS

    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    assert held_out(run)[0] == pytest.approx(cross_entropy(base, tiny), abs=1e-5)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    assert held_out(run)[20] == pytest.approx(cross_entropy(model, tiny), abs=1e-5)
    assert held_out(run)[20] < held_out(run)[0] - 0.5


def test_the_table_of_ranks_keeps_two_stacks_apart() -> None:
    names = ("vision.layers.0.q", "text.layers.0.q", "text.layers.1.q", "head")
    modules = [{"name": name, "rank": rank, "init_rank": 9} for rank, name in enumerate(names)]
    assert rank_table({"modules": modules})[2:] == [
        "| vision.layers.0 | 0 |  |",
        "| text.layers.0 | 1 |  |",
        "| text.layers.1 | 2 |  |",
        "| - |  | 3 |",
        "| sum | 3 | 3 |",
    ]
    assert [row.split("|")[1].strip() for row in rank_table({"modules": modules[1:]})[2:]] == [
        *("0", "1", "-", "sum")
    ]


def test_the_penalty_is_in_no_loss_that_is_told(recipe, cli, tiny: Path, tmp_path: Path) -> None:
    """With a weight that dwarfs it, the losses of step 0 and 1 are still the base model's."""
    for weight in (0.0, 100.0):
        adapter = ADALORA | {"orthogonal_weight": weight}
        output = tmp_path / f"run{weight}"
        assert cli("train", recipe(adapter=adapter), "--output", output)[0] == 0
    first, second = metrics(tmp_path / "run0.0"), metrics(tmp_path / "run100.0")
    assert first[0]["eval_loss"] == second[0]["eval_loss"]
    assert first[1]["loss"] == second[1]["loss"]
    assert first[1]["grad_norm"] < second[1]["grad_norm"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny / "model"), tmp_path / "run100.0" / "adapter"
    )
    provenance = json.loads((tmp_path / "run100.0" / "adapter" / "lorakit.json").read_text())
    assert provenance["eval_loss"] == pytest.approx(cross_entropy(model.eval(), tiny), abs=1e-5)


def test_micro_batches_and_packing_change_nothing(recipe, cli, tmp_path: Path) -> None:
    for name, more in {"one": 10_000, "many": 48}.items():
        training = {"max_steps": 20, "batch_size": 8, "micro_batch_tokens": more}
        assert cli("train", recipe(training=training), "--output", tmp_path / name)[0] == 0
    one, many = (metrics(tmp_path / name) for name in ("one", "many"))
    assert one[-1] == many[-1]
    for a, b in zip(one[:-1], many[:-1], strict=True):
        assert a.get("loss", a.get("eval_loss")) == pytest.approx(b.get("loss", b.get("eval_loss")), abs=1e-4)


def test_a_module_trained_whole_is_saved_beside_it(recipe, cli, tiny: Path, tmp_path: Path) -> None:
    assert cli("train", recipe(adapter=ADALORA | {"train_also": ["model.norm"]}))[0] == 0
    name = "base_model.model.model.norm.weight"
    tensors = load_file(tmp_path / "run" / FILE)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    assert not torch.equal(tensors[name], base.model.norm.weight)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert held_out(tmp_path / "run")[20] == pytest.approx(cross_entropy(model, tiny), abs=1e-5)
    # and it is taken up again, with what it was
    adapter = {"method": "adalora", "init_rank": 8, "start_from": str(tmp_path / "run" / "adapter")}
    assert cli("train", recipe(adapter=adapter | {"target_rank": 2}), "--output", tmp_path / "next")[0] == 0
    assert held_out(tmp_path / "next")[0] == pytest.approx(held_out(tmp_path / "run")[20], abs=1e-5)


def test_conv1d_layers(recipe, cli, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny / "model", tmp_path / "gpt2"))
    (folder / "config.json").unlink()
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=368, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    code, _, err = cli("train", recipe(model={"path": str(folder)}))
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert held_out(tmp_path / "run")[20] == pytest.approx(cross_entropy(model, tiny), abs=1e-5)
    assert sum(ranks_in_file(tmp_path / "run").values()) == 2 * 8


def in_4_bits(tiny: Path) -> Any:
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", quantization_config=options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # it would multiply in bf16 all the same
            module.support_avx512bf16_for_cpu = False
    return model


def test_a_4_bit_base(recipe, cli, tiny: Path, tmp_path: Path) -> None:
    model = {"path": str(tiny / "model"), "quantize": "nf4", "compute_dtype": "fp32"}
    training = {"max_steps": 20, "batch_size": 8, "precision": "fp32"}
    code, _, err = cli("train", recipe(model=model, training=training))
    assert code == 0, err
    peft = PeftModel.from_pretrained(in_4_bits(tiny), tmp_path / "run" / "adapter").eval()
    assert held_out(tmp_path / "run")[20] == pytest.approx(cross_entropy(peft, tiny), abs=1e-5)
    assert sum(ranks_in_file(tmp_path / "run").values()) == 2 * NUM_LAYERS


def test_the_export_on_a_4_bit_base_is_exact(tiny: Path, tmp_path: Path) -> None:
    model, ids = in_4_bits(tiny).eval(), torch.arange(3, 40)[None]
    targets = [Target(layer, 6, 12.0) for layer in select(layers_of(model)[0], "all-linear")[0]]
    adapter = AdaLoraAdapter(AdaLora(**ADALORA), model, targets, 1, 20)
    assert not any("ranknum" in item.name for item in adapter.trained())
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(ids).logits
        for item in adapter.trained():
            item.parameter.copy_(torch.randn(item.parameter.shape, generator=draw) * 0.2)
        ours = model(ids).logits
    adapter.write(tmp_path, "somewhere")
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(in_4_bits(tiny), tmp_path).eval()(ids).logits
    assert (ours - before).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_an_8_bit_base_and_16_bit_products(recipe, cli, tiny: Path, tmp_path: Path) -> None:
    model = {"path": str(tiny / "model"), "quantize": "int8"}
    training = {"max_steps": 3, "batch_size": 8, "precision": "bf16"}
    code, _, err = cli("train", recipe(model=model, training=training))
    assert code == 0, err
    assert sum(ranks_in_file(tmp_path / "run").values()) == 2 * NUM_LAYERS


def test_a_16_bit_base(recipe, cli, tiny: Path, tmp_path: Path) -> None:
    code, _, err = cli("train", recipe(model={"path": str(tiny / "model"), "dtype": "bf16"}))
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.bfloat16)
    peft = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert held_out(tmp_path / "run")[20] == pytest.approx(cross_entropy(peft, tiny), abs=2e-2)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_settle(steps: int, recipe, cli, tmp_path: Path) -> None:
    code, _, err = cli("train", recipe(), "--set", f"training.max_steps={steps}")
    assert code == 0, err
    assert sum(metrics(tmp_path / "run")[-1]["ranks"].values()) == 2 * NUM_LAYERS


def test_equal_ranks(recipe, cli, tmp_path: Path) -> None:
    adapter = {"method": "adalora", "init_rank": 3, "target_rank": 3}
    code, _, err = cli("train", recipe(adapter=adapter))
    assert code == 0, err
    assert set(ranks_in_file(tmp_path / "run").values()) == {3}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["best_step"] is not None


# ------------------------------------------------------------------------------------------------------------
# The best, and early stopping


def test_an_evaluation_before_the_ranks_are_settled_is_never_the_best(
    recipe, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every evaluation is worse than the one before: the best is the first that counts, after step 14."""
    losses = itertools.count(1.0)
    monkeypatch.setattr("lorakit.train.evaluate", lambda *inputs: {"eval_loss": next(losses)})
    code, _, err = cli("train", recipe(eval={"every": 2, "early_stopping": 2}))
    assert code == 0, err
    assert list(held_out(tmp_path / "run")) == list(range(0, 20, 2))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["outcome"], record["step"]) == ("stopped early", 18)
    assert (record["best_step"], record["best_loss"]) == (14, 8.0)
    provenance = json.loads((tmp_path / "run" / "adapter" / "lorakit.json").read_text())
    assert provenance["step"] == 14
    told = metrics(tmp_path / "run")[-1]["ranks"]
    assert told == ranks_in_file(tmp_path / "run")
    assert sum(told.values()) == 2 * NUM_LAYERS


# ------------------------------------------------------------------------------------------------------------
# Continuing


def test_a_run_is_continued_from_its_adapter_or_from_a_lora(recipe, cli, tmp_path: Path) -> None:
    assert cli("train", recipe(), "--output", tmp_path / "ada")[0] == 0
    lora = {"rank": 4, "alpha": 3}
    assert cli("train", recipe(adapter=lora), "--output", tmp_path / "lora")[0] == 0
    for name in ("ada", "lora"):
        adapter = {
            "method": "adalora",
            "target_rank": 2,
            "alpha": 5,
            "start_from": str(tmp_path / name / "adapter"),
        }
        output = tmp_path / f"after-{name}"
        code, _, err = cli("train", recipe(adapter=adapter), "--output", output)
        assert code == 0, err
        assert held_out(output)[0] == pytest.approx(min(held_out(tmp_path / name).values()), abs=1e-5)
        assert sum(ranks_in_file(output).values()) == 2 * NUM_LAYERS
        assert held_out(output)[20] < held_out(output)[0] + 0.05
        before = (output / FILE).read_bytes()
        interrupted(output)
        code, _, err = cli("train", output / "resolved.yaml", "--resume", "auto")
        assert code == 0, err
        assert (output / FILE).read_bytes() == before


def interrupted(run: Path) -> None:
    """As if the run had been killed after its last checkpoint."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))


def test_a_kill_at_the_very_end_does_not_tell_the_ranks_twice(recipe, cli, tmp_path: Path) -> None:
    path = recipe()
    assert cli("train", path)[0] == 0
    before = metrics(tmp_path / "run")
    interrupted(tmp_path / "run")
    (tmp_path / "run" / "params.json").write_text("{}")
    assert cli("train", path, "--resume", "auto")[0] == 0
    assert metrics(tmp_path / "run") == before
    params = json.loads((tmp_path / "run" / "params.json").read_text())
    assert {module["name"]: module["rank"] for module in params["modules"]} == before[-1]["ranks"]


# ------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 8}, "init_rank"),
        ({"init_rank": 4, "target_rank": 8}, "adapter.target_rank: target_rank 8 is above init_rank 4"),
        ({"init_rank": 4}, "adapter.init_rank: target_rank 8 is above init_rank 4"),
        ({"warmup": 0.6, "final": 0.4}, "adapter.final: warmup and final together leave no steps"),
        ({"warmup": 0.7}, "adapter.warmup: warmup and final together leave no steps"),
        ({"init_rank": 4, "target_rank": 4, "interval": 5}, "adapter.interval: has no effect"),
        ({"beta1": 1.0}, "adapter.beta1"),
        ({"interval": 0}, "adapter.interval"),
        ({"init_rank": True}, "adapter.init_rank"),
        ({"scaling": "rank_stabilized"}, "adapter.scaling"),
        ({"targets": ["embed_tokens"]}, "adapter.targets: model.embed_tokens is an embedding"),
        ({"init_rank": 40}, "adapter.init_rank: 40 is above the smaller side of model.layers.0.self_attn"),
    ],
    ids=str,
)
def test_a_bad_recipe(adapter: dict[str, Any], message: str, recipe, cli, tmp_path: Path) -> None:
    code, _, err = cli("train", recipe(adapter={"method": "adalora"} | adapter))
    assert code == 2, err
    assert message in err
    assert "recipe.yaml:1:" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_lora_plus_says_nothing_on_adalora(recipe, cli) -> None:
    code, _, err = cli("train", recipe(optimizer={"lr": 1e-3, "lr_ratio": 4}))
    assert code == 2
    assert "optimizer.lr_ratio: is LoRA+'s" in err


def test_an_adapter_that_adapts_nothing(recipe, cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = {"peft_type": "LORA", "modules_to_save": ["model.norm"], "r": 2, "lora_alpha": 2}
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps(config))
    norm = {"base_model.model.model.norm.weight": torch.ones(64)}
    save_file(norm, tmp_path / "empty" / "adapter_model.safetensors")
    for method in ({"method": "adalora"}, {"method": "lora"}):
        code, _, err = cli("train", recipe(adapter=method | {"start_from": str(tmp_path / "empty")}))
        assert code == 2, err
        assert "adapter.start_from: it adapts no layer" in err


def test_the_rank_of_start_from_is_above_init_rank(recipe, cli, tmp_path: Path) -> None:
    assert cli("train", recipe(adapter={"rank": 8}), "--output", tmp_path / "lora")[0] == 0
    adapter = ADALORA | {"start_from": str(tmp_path / "lora" / "adapter")}
    code, _, err = cli("train", recipe(adapter=adapter))
    assert code == 2
    assert "has rank 8, above init_rank 6; write a larger adapter.init_rank" in err
    assert not (tmp_path / "run").exists()
    for wrong, message in (
        ({"init_rank": 40}, "adapter.init_rank: 40 is above"),
        ({"targets": ["q_proj"]}, "not the layers"),
    ):
        code, _, err = cli("train", recipe(adapter=adapter | wrong))
        assert code == 2
        assert message in err
