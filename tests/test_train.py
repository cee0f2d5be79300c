"""Whole runs on the tiny model: what they leave, what resumes, what is refused."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit import checkpoint
from tests.conftest import Killed, killed_at, metrics

ADAPTER = "adapter/adapter_model.safetensors"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_but_time(first: Path, second: Path) -> None:
    timing = ("seconds", "tokens_per_s")
    lines = [
        [{k: v for k, v in line.items() if k not in timing} for line in metrics(run)]
        for run in (first, second)
    ]
    assert lines[0] == lines[1]


# ------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_what_the_design_says(write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    before = sha(tiny / "model" / "model.safetensors")
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    recipe = write_recipe(
        data=data,
        training={"max_steps": 8, "batch_size": 8},
        optimizer={"lr": 5e-3},
        eval={"every": 4},
        checkpoint={"every": 4},
    )
    code, out, err = cli("train", recipe)
    assert code == 0, err
    run = tmp_path / "run"
    assert "held-out loss" in out
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml",
        "resolved.yaml",
        "run.json",
        "metrics.jsonl",
        "data.md",
        "params.json",
        "params.md",
        "adapter",
        "checkpoints",
        ".lock",
    }
    assert {p.name for p in (run / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
        "README.md",
    }
    assert [p.name for p in checkpoint.folders(run / "checkpoints")] == ["step-000004", "step-000008"]
    assert sha(tiny / "model" / "model.safetensors") == before

    lines = metrics(run)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    assert set(training[0]) == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "tokens_per_s",
        "seconds",
    }
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(held_out) == [0, 4, 8]
    assert held_out[8] < held_out[4] < held_out[0]
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["step"] == record["steps"] == 8
    assert record["best_step"] == 8
    assert record["rows"]["read"] == 240
    assert record["peak_bytes"] > 50_000_000
    assert record["versions"]["torch"] == torch.__version__
    assert record["decisions"]["training.precision"]["value"] == "fp32"

    params = json.loads((run / "params.json").read_text())
    tensors = load_file(run / ADAPTER)
    assert params["trainable"] == sum(t.numel() for t in tensors.values())
    assert params["trainable"] == sum(m["rank"] * (m["in"] + m["out"]) for m in params["modules"])
    assert params["adapter_bytes"]["float32"] == 4 * params["trainable"]
    assert set(params) == {"total", "trainable", "trainable_percent", "adapter_bytes", "modules"}
    provenance = json.loads((run / "adapter" / "lorakit.json").read_text())
    assert provenance["step"] == 8
    assert provenance["eval_loss"] == held_out[8]

    code, out, _ = cli("validate", run / "resolved.yaml")
    assert code == 0, out


def test_peft_loads_the_adapter_and_finds_the_same_loss(
    write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    """The held-out loss by plain PEFT and transformers, one row at a time, without any code of lorakit."""
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    adapter = {
        "rank": 4,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"v_proj": 2},
        "scaling": "rank_stabilized",
    }
    recipe = write_recipe(
        data=data, adapter=adapter, training={"max_steps": 6, "batch_size": 8}, optimizer={"lr": 1e-2}
    )
    assert cli("train", recipe)[0] == 0

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    total = count = 0.0
    for line in (tiny / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, whole = (
            tokenizer(row["prompt"])["input_ids"],
            tokenizer(row["prompt"] + row["completion"])["input_ids"],
        )
        assert whole[: len(prompt)] == prompt
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += ids.shape[1] - len(prompt)
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(total / count, abs=1e-6)


def test_full_fine_tuning_writes_a_model(write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    recipe = write_recipe(adapter={"method": "full"}, data=data, training={"max_steps": 6, "batch_size": 8})
    code, _, err = cli("train", recipe, "--set", "checkpoint.every=3")
    assert code == 0, err
    assert not (tmp_path / "run" / "adapter").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.config.to_dict()["vocab_size"] == 368
    params = json.loads((tmp_path / "run" / "params.json").read_text())
    assert params["trainable"] == params["total"] == sum(p.numel() for p in model.parameters())
    held_out = [line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert held_out[-1] < held_out[0]


def test_a_part_of_the_model_moves_and_the_rest_keeps_its_bits(
    write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    part = {"method": "full", "train_only": ["norm", r"model\.layers\.1\.mlp\..*", "lm_head"]}
    code, _, err = cli("train", write_recipe(adapter=part))
    assert code == 0, err
    before = dict(AutoModelForCausalLM.from_pretrained(tiny / "model").named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").named_parameters())
    moved = {name for name in before if not before[name].equal(after[name])}
    mlp = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert moved == {"model.norm.weight", "lm_head.weight"} | mlp
    params = json.loads((tmp_path / "run" / "params.json").read_text())
    assert params["trainable"] == sum(before[name].numel() for name in moved)
    assert params["total"] == sum(parameter.numel() for parameter in before.values())
    saved = load_file(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "adapter_model.safetensors")
    assert saved.keys() == moved


def test_lora_plus_is_told_and_continued_as_decided(write_recipe, cli, tmp_path: Path) -> None:
    """What `lora+` became stands in resolved.yaml, which continues the run."""
    code, _, err = cli("train", write_recipe(optimizer={"lr": 1e-3, "lr_ratio": "lora+"}))
    assert code == 0
    assert "optimizer.lr_ratio: 4.0 (LoRA+ where B starts at zero" in err
    resolved = tmp_path / "run" / "resolved.yaml"
    from lorakit.recipe import load_recipe

    assert load_recipe(resolved).optimizer.lr_ratio == 4.0
    code, _, err = cli("train", resolved, "--resume", "auto")
    assert code == 0, err


def test_what_is_trained_only_must_be_there(write_recipe, cli) -> None:
    part = {"method": "full", "train_only": ["nrom", "model.norm"]}
    for verb in ("validate", "train", "count-params"):
        code, out, err = cli(verb, write_recipe(adapter=part))
        assert code == 2
        assert "adapter.train_only" in out + err
        assert '"nrom" matches no module and no parameter. Did you mean "norm"?' in out + err


def test_train_also_trains_whole_modules_and_peft_reads_them(
    write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = {"rank": 2, "targets": ["q_proj"], "train_also": ["model.norm", "lm_head"]}
    assert cli("train", write_recipe(adapter=adapter))[0] == 0
    tensors = load_file(tmp_path / "run" / ADAPTER)
    assert {name for name in tensors if "lora" not in name} == {
        "base_model.model.model.norm.weight",
        "base_model.model.lm_head.weight",
    }
    params = json.loads((tmp_path / "run" / "params.json").read_text())
    assert params["trainable"] == sum(t.numel() for t in tensors.values())
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    head = base.lm_head.weight.clone()
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    assert not torch.equal(loaded.base_model.model.lm_head.weight, head)


def test_embedding_layers_are_adapted(write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = {"rank": 2, "targets": ["embed_tokens", "o_proj"]}
    assert cli("train", write_recipe(adapter=adapter))[0] == 0
    tensors = load_file(tmp_path / "run" / ADAPTER)
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (2, 368)
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].abs().sum() > 0
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny / "model"), tmp_path / "run" / "adapter"
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantized_bases_train(kind: str, write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    model = {"path": str(tiny / "model"), "quantize": kind}
    recipe = write_recipe(model=model, training={"max_steps": 12, "batch_size": 8}, optimizer={"lr": 1e-2})
    code, _, err = cli("train", recipe)
    assert code == 0, err
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5


def test_bf16_precision_keeps_fp32_adapters(write_recipe, cli, tmp_path: Path) -> None:
    assert cli("train", write_recipe(), "--set", "training.precision=bf16")[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "run" / ADAPTER).values()} == {torch.float32}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["decisions"]["training.precision"]["value"] == "bf16"


def test_gradient_checkpointing_changes_nothing(write_recipe, cli, tmp_path: Path) -> None:
    recipe = write_recipe(adapter={"rank": 4, "dropout": 0.1})
    for name, value in (("a", "false"), ("b", "true")):
        code, _, err = cli(
            "train", recipe, "--set", f"training.gradient_checkpointing={value}", "--output", tmp_path / name
        )
        assert code == 0, err
    assert sha(tmp_path / "a" / ADAPTER) == sha(tmp_path / "b" / ADAPTER)


def test_a_model_that_cannot_be_packed_is_padded_and_says_so(
    write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    from tests import architectures

    config = architectures.UNPACKED["falcon"]()
    config.vocab_size = 368
    architectures.build(config).save_pretrained(tmp_path / "falcon")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / "model" / name, tmp_path / "falcon")
    code, _, err = cli("train", write_recipe(model={"path": str(tmp_path / "falcon")}))
    assert code == 0, err
    assert "data.packing: False (rows are padded instead of packed" in err
    assert len(metrics(tmp_path / "run")) == 4


def test_start_from_continues_with_a_fresh_optimizer(write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    first = write_recipe(
        data=data, adapter={"rank": 4, "alpha": 4, "targets": "attention"}, optimizer={"lr": 1e-2}
    )
    assert cli("train", first, "--set", "checkpoint.best=false")[0] == 0
    start = tmp_path / "run" / "adapter"
    second = write_recipe(data=data, adapter={"start_from": str(start)})
    code, _, err = cli("train", second, "--output", tmp_path / "second")
    assert code == 0, err
    before = [line for line in metrics(tmp_path / "run") if "eval_loss" in line][-1]["eval_loss"]
    assert metrics(tmp_path / "second")[0]["eval_loss"] == pytest.approx(before, abs=1e-6)
    modules = json.loads((tmp_path / "second" / "params.json").read_text())["modules"]
    assert {m["rank"] for m in modules} == {4}
    assert len(modules) == 8
    for wrong, text in (
        (
            {"rank": 8},
            "adapter.rank: 8, but start_from has 4 at model.layers.0.self_attn.q_proj; delete rank",
        ),
        ({"alpha": 9}, "adapter.alpha: 9.0, but start_from has 4.0"),
        ({"targets": "mlp"}, "adapter.targets: not the layers of start_from"),
        ({"scaling": "rank_stabilized"}, "adapter.scaling"),
    ):
        recipe = write_recipe(data=data, adapter={"start_from": str(start), **wrong})
        code, _, err = cli("train", recipe, "--output", tmp_path / "third")
        assert (code, text in err) == (2, True), err
    assert (
        cli(
            "train",
            write_recipe(data=data, adapter={"start_from": str(start), "rank": 4, "targets": "attention"}),
            "--output",
            tmp_path / "third",
        )[0]
        == 0
    )


def test_an_adapter_made_by_peft_is_continued(write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        alpha_pattern={"down_proj": 16},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = base(ids).logits
    recipe = write_recipe(adapter={"start_from": str(tmp_path / "theirs")}, optimizer={"lr": 1e-30})
    code, _, err = cli("train", recipe)
    assert code == 0, err
    from peft import PeftModel

    ours = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny / "model"), tmp_path / "run" / "adapter"
    )
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, expected, atol=1e-5)


def test_early_stopping_and_the_best_adapter(write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    """A learning rate that destroys the model: the best adapter is an early one, and the run stops."""
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    recipe = write_recipe(
        data=data,
        training={"max_steps": 30, "batch_size": 4},
        optimizer={"lr": 1.0, "max_grad_norm": None},
        schedule={"name": "constant", "warmup": 0},
        eval={"every": 1, "early_stopping": 3},
        checkpoint={"every": 100},
    )
    code, _, err = cli("train", recipe)
    assert code == 0, err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["outcome"] == "stopped early"
    held_out = {
        line["step"]: line["eval_loss"]
        for line in metrics(tmp_path / "run")
        if line["step"] and "eval_loss" in line
    }
    best = min(held_out, key=held_out.get)
    assert record["step"] == best + 3
    assert json.loads((tmp_path / "run" / "adapter" / "lorakit.json").read_text())["step"] == best
    assert (
        json.loads((tmp_path / "run" / "adapter" / "lorakit.json").read_text())["eval_loss"] == held_out[best]
    )


def test_tensorboard_gets_the_metrics(write_recipe, cli, tmp_path: Path) -> None:
    assert cli("train", write_recipe(log={"every": 1, "trackers": ["tensorboard"]}))[0] == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "run" / "trackers").rglob("events*")).parent))
    events.Reload()
    seen = [event.value for event in events.Scalars("loss")]
    assert seen == pytest.approx([line["loss"] for line in metrics(tmp_path / "run")], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Resume


def resume_recipe(write_recipe, tiny: Path, **more):
    data = {
        "train": str(tiny / "train.jsonl"),
        "eval": str(tiny / "eval.jsonl"),
        "max_length": 128,
        "limit": 30,
    }
    sections = {
        "data": data,
        "adapter": {"rank": 4, "dropout": 0.1},
        "training": {"epochs": 3, "batch_size": 8, "micro_batch_tokens": 60},
        "eval": {"every": 3},
        "checkpoint": {"every": 2},
    } | more
    return write_recipe(**sections)


RESUMED = {
    "lora": {},
    "full": {"adapter": {"method": "full"}},
    "part": {"adapter": {"method": "full", "train_only": ["norm", "mlp"]}},
    "adalora": {  # of 12 steps 5 are warm-up, and the ranks are settled after 8
        "adapter": {
            "method": "adalora",
            "init_rank": 6,
            "target_rank": 2,
            "dropout": 0.1,
            "warmup": 0.4,
            "interval": 2,
        }
    },
}
KILLS = [(method, step) for method in RESUMED for step in ((5, 8, 11) if method == "adalora" else (1, 5, 8))]


@pytest.mark.parametrize(("method", "kill_at"), KILLS)
def test_a_resumed_run_ends_with_the_same_bits(
    method: str, kill_at: int, write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    recipe = resume_recipe(write_recipe, tiny, **RESUMED[method])
    product = "model/model.safetensors" if method in ("full", "part") else ADAPTER
    assert cli("train", recipe, "--output", tmp_path / "straight")[0] == 0

    with killed_at(kill_at):
        cli("train", recipe, "--output", tmp_path / "killed")
    code, _, err = cli("train", recipe, "--output", tmp_path / "killed", "--resume", "auto")
    assert code == 0, err
    assert sha(tmp_path / "killed" / product) == sha(tmp_path / "straight" / product)
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        last = sorted((tmp_path / "straight" / "checkpoints").iterdir())[-1].name
        assert sha(tmp_path / "killed" / "checkpoints" / last / file) == sha(
            tmp_path / "straight" / "checkpoints" / last / file
        )
    same_but_time(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_exits_130(
    number, write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    recipe = resume_recipe(
        write_recipe,
        tiny,
        training={"max_steps": 400, "batch_size": 8},
        checkpoint={"every": 1000},
        eval={"every": 100},
    )
    command = [sys.executable, "-m", "lorakit", "train", str(recipe), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and (not lines.exists() or lines.read_text().count("\n") < 5):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--resume auto" in err
    assert f"{number.name}: finishing this step, then a checkpoint" in err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "interrupted"
    saved = checkpoint.folders(tmp_path / "run" / "checkpoints")
    assert [p.name for p in saved] == [f"step-{record['step']:06d}"]
    assert record["step"] < 400
    if number == signal.SIGTERM:
        resolved = tmp_path / "run" / "resolved.yaml"
        assert cli("train", resolved, "--resume", "auto")[0] == 0
        assert cli("train", recipe, "--output", tmp_path / "straight")[0] == 0
        assert sha(tmp_path / "run" / ADAPTER) == sha(tmp_path / "straight" / ADAPTER)


def test_a_signal_before_the_first_step_leaves_nothing(write_recipe, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lorakit",
        "train",
        str(write_recipe()),
        "--output",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline and not (tmp_path / "run" / ".lock").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "run.json").exists() or "checkpoint was written" in err


def test_resume_of_a_finished_run_says_so(write_recipe, cli, tmp_path: Path) -> None:
    recipe = write_recipe()
    assert cli("train", recipe)[0] == 0
    before = sha(tmp_path / "run" / "run.json")
    code, _, err = cli("train", recipe, "--resume", "auto")
    assert code == 0
    assert "finished (4 steps): nothing to do" in err
    assert sha(tmp_path / "run" / "run.json") == before


def test_resume_of_another_recipe_or_data_is_refused_with_the_difference(
    write_recipe, cli, tiny, tmp_path: Path
) -> None:
    recipe = resume_recipe(write_recipe, tiny)
    assert cli("train", recipe)[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    code, _, err = cli(
        "train", recipe, "--resume", "auto", "--set", "optimizer.lr=0.5", "--set", "training.seed=3"
    )
    assert code == 2
    assert "optimizer.lr: 0.001 then, 0.5 now" in err
    assert "training.seed: 0 then, 3 now" in err
    rows = (tiny / "train.jsonl").read_text().replace("bakery", "brewery")
    (tmp_path / "other.jsonl").write_text(rows)
    code, _, err = cli("train", recipe, "--resume", "auto", "--set", f"data.train={tmp_path / 'other.jsonl'}")
    assert code == 2
    assert "train: not the same rows or tokens" in err
    code, _, err = cli(
        "train", recipe, "--resume", "auto", "--set", "log.every=5", "--set", "checkpoint.keep=1"
    )
    assert code == 0, err


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    write_recipe, cli, tiny, tmp_path: Path
) -> None:
    recipe = resume_recipe(write_recipe, tiny)
    assert cli("train", recipe)[0] == 0
    wanted = sha(tmp_path / "run" / ADAPTER)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    newest = checkpoint.folders(tmp_path / "run" / "checkpoints")[-1]
    raw = bytearray((newest / "optimizer.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (newest / "optimizer.safetensors").write_bytes(raw)
    code, _, err = cli("train", recipe, "--resume", "auto")
    assert code == 0, err
    assert f"{newest.name} is not used: optimizer.safetensors is damaged" in err
    assert sha(tmp_path / "run" / ADAPTER) == wanted


def test_a_run_killed_right_after_its_last_evaluation_does_not_train_on(
    write_recipe, cli, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of an early stop says that patience is used up: resuming ends the run."""
    recipe = resume_recipe(
        write_recipe,
        tiny,
        training={"max_steps": 30, "batch_size": 4},
        optimizer={"lr": 1.0, "max_grad_norm": None},
        schedule={"name": "constant", "warmup": 0},
        eval={"every": 1, "early_stopping": 1},
    )
    assert cli("train", recipe, "--output", tmp_path / "straight")[0] == 0
    from lorakit.writer import Writer

    def killed(self, outcome, state):
        raise Killed

    monkeypatch.setattr(Writer, "close", killed)
    with pytest.raises(Killed):
        cli("train", recipe)
    monkeypatch.undo()
    code, _, err = cli("train", recipe, "--resume", "auto")
    assert code == 0, err
    same_but_time(tmp_path / "straight", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "stopped early"


def test_when_every_checkpoint_is_damaged_the_run_starts_over_and_keeps_its_new_ones(
    write_recipe, cli, tiny, tmp_path: Path
) -> None:
    recipe = resume_recipe(write_recipe, tiny)
    assert cli("train", recipe)[0] == 0
    wanted = sha(tmp_path / "run" / ADAPTER)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    for folder in checkpoint.folders(tmp_path / "run" / "checkpoints"):
        (folder / "state.json").write_text("{}")
    code, _, err = cli("train", recipe, "--resume", "auto")
    assert code == 0, err
    assert "has no checkpoint yet: starting over" in err
    assert sha(tmp_path / "run" / ADAPTER) == wanted
    assert not any(map(checkpoint.damage, checkpoint.folders(tmp_path / "run" / "checkpoints")))


@pytest.mark.parametrize(
    "sections",
    [{"model": {"attention": "eager"}}, {"adapter": {"start": True}}, {"data": {"packing": False}}],
)
def test_resolved_yaml_continues_every_kind_of_run(sections, write_recipe, cli, tiny, tmp_path: Path) -> None:
    """The command that lorakit prints is accepted: padded runs, and runs that started from an adapter."""
    more = {}
    if "adapter" in sections:
        assert (
            cli("train", write_recipe(adapter={"rank": 4, "targets": "mlp"}), "--output", tmp_path / "first")[
                0
            ]
            == 0
        )
        more = {"adapter": {"start_from": str(tmp_path / "first" / "adapter")}}
    if "model" in sections:
        more = {"model": {"path": str(tiny / "model"), "attention": "eager"}}
    if "data" in sections:
        more = {"data": {"train": str(tiny / "train.jsonl"), "max_length": 128, "packing": False}}
    assert cli("train", write_recipe(**more))[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    code, _, err = cli("train", tmp_path / "run" / "resolved.yaml", "--resume", "auto")
    assert code == 0, err


def test_a_kill_before_run_json_leaves_a_place_that_can_be_used(write_recipe, cli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".probe.new", ".run.json.new"):
        (tmp_path / "run" / name).write_text("x")
    assert cli("train", write_recipe())[0] == 0
    assert not (tmp_path / "run" / ".probe.new").exists()


def test_a_held_out_loss_that_is_no_number_ends_the_run(
    write_recipe, cli, tiny, tmp_path: Path, monkeypatch
) -> None:
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    module = importlib.import_module("lorakit.train")  # the package's own `train` is the function
    monkeypatch.setattr(module, "evaluate", lambda *arguments: {"eval_loss": float("nan")})
    code, _, err = cli(
        "train", write_recipe(data=data), "--set", "eval.at_start=false", "--set", "eval.every=2"
    )
    assert code == 1
    assert "step 2: the held-out loss is nan" in err
    assert not (tmp_path / "run" / "adapter").exists()


def test_accelerates_environment_changes_no_number(write_recipe, cli, tmp_path: Path, monkeypatch) -> None:
    recipe = write_recipe()
    assert cli("train", recipe, "--output", tmp_path / "a")[0] == 0
    code = "from lorakit.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(recipe), "--output", str(tmp_path / "b")]
    done = subprocess.run(
        command, env=os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sha(tmp_path / "a" / ADAPTER) == sha(tmp_path / "b" / ADAPTER)


def test_a_4_bit_base_that_is_held_in_fp32_elsewhere_trains_its_norms(
    write_recipe, cli, tiny, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny / "model", tmp_path / "bf16"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    recipe = write_recipe(
        model={"path": str(folder), "quantize": "nf4"},
        adapter={"rank": 2, "train_also": ["model.norm"]},
        training={"max_steps": 3, "batch_size": 4, "precision": "fp32"},
    )
    code, _, err = cli("train", recipe)
    assert code == 0, err


def test_a_moved_run_is_continued_where_it_is_now_and_by_either_recipe(
    write_recipe, cli, tiny, tmp_path: Path
) -> None:
    recipe = resume_recipe(write_recipe, tiny)
    assert cli("train", recipe)[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    (tmp_path / "run").rename(tmp_path / "moved")
    resolved = tmp_path / "moved" / "resolved.yaml"
    code, _, err = cli("train", resolved, "--resume", "auto")
    assert code == 2
    assert f"--output {tmp_path / 'moved'}" in err
    assert not (tmp_path / "run").exists()
    for which in (resolved, recipe):  # what was resolved then and the recipe it came from mean the same
        path = tmp_path / "moved" / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "interrupted"}))
        code, _, err = cli("train", which, "--resume", "auto", "--output", tmp_path / "moved")
        assert code == 0, err


def test_resume_from_a_named_checkpoint(write_recipe, cli, tiny, tmp_path: Path) -> None:
    recipe = resume_recipe(write_recipe, tiny, checkpoint={"every": 2, "keep": 10})
    assert cli("train", recipe)[0] == 0
    wanted, lines = sha(tmp_path / "run" / ADAPTER), len(metrics(tmp_path / "run"))
    code, _, err = cli("train", recipe, "--resume", "step-000004")
    assert code == 0, err
    assert "step-000004" in err
    assert sha(tmp_path / "run" / ADAPTER) == wanted
    assert len(metrics(tmp_path / "run")) == lines
    code, _, err = cli("train", recipe, "--resume", "step-000099")
    assert code == 2
    assert cli("train", recipe, "--resume", tmp_path)[0] == 2


# ------------------------------------------------------------------------------------------------------------
# Bad input: exit code 2, place, cause and cure; nothing is left behind


def refused(cli, *arguments: object) -> str:
    code, _, err = cli("train", *arguments)
    assert code == 2, err
    assert "Traceback" not in err
    return err


def test_an_empty_data_set(write_recipe, cli, tiny, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    err = refused(cli, write_recipe(data={"train": "empty.jsonl"}))
    assert "empty.jsonl: no row to train on" in err
    assert not (tmp_path / "run").exists()


def test_a_row_without_the_field(write_recipe, cli, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 2 + [{"prompt": "a", "completoin": "b"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    err = refused(cli, write_recipe(data={"train": "rows.jsonl"}))
    assert 'rows.jsonl:3: no field "completion". Did you mean "completoin"?' in err
    assert "on_bad_row: skip" in err


def test_a_completion_that_is_empty_after_truncation(write_recipe, cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a long prompt " * 40, "completion": " b"}))
    err = refused(cli, write_recipe(data={"train": "rows.jsonl", "max_length": 16, "on_long": "truncate"}))
    assert "rows.jsonl:1: nothing left to train on" in err
    assert "data.max_length is 16" in err


def test_a_sample_that_is_too_long(write_recipe, cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a long prompt " * 40, "completion": " b"}))
    err = refused(cli, write_recipe(data={"train": "rows.jsonl", "max_length": 16}))
    assert "rows.jsonl:1:" in err
    assert "data.on_long: truncate or drop" in err


def test_a_target_that_matches_nothing(write_recipe, cli, tmp_path: Path) -> None:
    err = refused(cli, write_recipe(adapter={"targets": ["q_porj"]}))
    assert 'adapter.targets: "q_porj" matches nothing. Did you mean "q_proj"?' in err
    assert "recipe.yaml:1:" in err
    assert not (tmp_path / "run").exists()


def test_a_rank_larger_than_the_layer_prints_its_cure(write_recipe, cli) -> None:
    err = refused(cli, write_recipe(adapter={"rank": 40}))
    assert "rank_pattern: {k_proj: 32, v_proj: 32}" in err
    assert (
        cli("train", write_recipe(adapter={"rank": 40, "rank_pattern": {"k_proj": 32, "v_proj": 32}}))[0] == 0
    )


def test_chats_without_a_template(write_recipe, cli, tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    model, data = {"path": str(folder)}, {"train": "chats.jsonl"}
    err = refused(cli, write_recipe(model=model, data=data))
    assert "no chat template" in err
    assert "data.chat_template" in err
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, "chat.jinja"):
        recipe = write_recipe(model=model, data=data | {"chat_template": given})
        code, _, err = cli("train", recipe, "--output", tmp_path / f"run{len(given)}")
        assert code == 0, err


def test_an_output_that_holds_another_run_or_something_else(write_recipe, cli, tmp_path: Path) -> None:
    recipe = write_recipe()
    assert cli("train", recipe)[0] == 0
    before = sha(tmp_path / "run" / ADAPTER)
    err = refused(cli, recipe)
    assert "already holds a run" in err
    assert "--resume auto" in err
    assert "--output" in err
    assert sha(tmp_path / "run" / ADAPTER) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    assert "cat.png" in refused(cli, recipe, "--output", tmp_path / "photos")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(cli, recipe, "--output", tmp_path / "file")


def test_two_writers(write_recipe, cli, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing" in refused(cli, write_recipe())
        assert (tmp_path / "run" / ".lock").exists()  # the place of the other is left as it was
    assert cli("train", write_recipe())[0] == 0


def test_a_missing_model_or_data_file_has_its_line(write_recipe, cli, tiny) -> None:
    err = refused(cli, write_recipe(model={"path": "./nowhere"}, data={"train": "nothing.jsonl"}))
    assert "model.path: no model directory" in err
    assert "data.train: no such file" in err
    assert err.count("recipe.yaml:1:") == 2


def test_fp16_weights_are_refused_with_the_cure(write_recipe, cli, tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny / "model", tmp_path / "half"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    assert "write bf16 or fp32" in refused(cli, write_recipe(model={"path": str(folder)}))
    assert cli("train", write_recipe(model={"path": str(folder), "dtype": "fp32"}))[0] == 0


def test_a_tokenizer_with_more_tokens_than_the_model(write_recipe, cli, tiny, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    assert "369 tokens, the model embeddings for 368" in refused(
        cli, write_recipe(model={"path": str(folder)})
    )


def test_trust_remote_code_needs_both_sides(write_recipe, cli, tiny) -> None:
    assert "needs both" in refused(cli, write_recipe(), "--trust-remote-code")
    model = {"path": "owner/name", "revision": "a" * 40, "trust_remote_code": True}
    assert "needs both" in refused(cli, write_recipe(model=model))


def test_a_loss_that_is_no_number(
    write_recipe, cli, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, the step and the rows are named, the adapter and the checkpoints of before are untouched."""
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    from lorakit.tasks.causal_lm import CausalLmTask

    real, steps = CausalLmTask.loss_sum, []

    def poisoned(self, model, micro):
        loss = real(self, model, micro)
        if not loss.requires_grad:  # an evaluation
            return loss
        steps.append(micro.samples)
        return loss * float("nan") if len(steps) == 4 else loss  # the trial, and three steps

    monkeypatch.setattr(CausalLmTask, "loss_sum", poisoned)
    training = {"max_steps": 4, "batch_size": 4, "fast": "off"}  # one loss to poison
    recipe = write_recipe(data=data, eval={"every": 2}, checkpoint={"every": 2}, training=training)
    code, _, err = cli("train", recipe)
    assert code == 1
    assert "step 3: loss nan" in err
    for sample in steps[3]:
        assert f"train.jsonl:{sample + 1}" in err
    assert "Traceback" not in err
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert json.loads((run / "adapter" / "lorakit.json").read_text())["step"] == 2
    assert all(t.isfinite().all() for t in load_file(run / ADAPTER).values())
    assert [p.name for p in checkpoint.folders(run / "checkpoints")] == ["step-000002"]
    monkeypatch.undo()
    assert cli("train", recipe, "--resume", "auto")[0] == 0


def small_disk(folder: Path, size: str) -> bool:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
    )
    return mounted.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_or_read_only_disk_is_found_before_step_0(write_recipe, cli, tmp_path: Path) -> None:
    if not small_disk(tmp_path / "disk", "512k"):
        pytest.skip("cannot mount here")
    try:
        err = refused(cli, write_recipe(), "--output", tmp_path / "disk" / "run")
        assert "MB free" in err
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        err = refused(cli, write_recipe(), "--output", tmp_path / "disk" / "other")
        assert "cannot write to" in err
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_disk_that_fills_up_while_running(
    write_recipe, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, one message, and the checkpoint of before is whole."""
    import errno

    import lorakit.adapters

    real, saved = lorakit.adapters.save_file, []

    def full(*arguments, **options):
        saved.append(arguments)
        if len(saved) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(lorakit.adapters, "save_file", full)
    code, _, err = cli("train", write_recipe(checkpoint={"every": 2}))
    assert code == 1
    assert "No space left on device" in err
    assert "--resume auto" in err
    assert "Traceback" not in err
    folders = checkpoint.folders(tmp_path / "run" / "checkpoints")
    assert [checkpoint.damage(folder) for folder in folders] == [""]
    monkeypatch.undo()
    assert cli("train", write_recipe(checkpoint={"every": 2}), "--resume", "auto")[0] == 0


def test_from_python_paths_may_be_text(write_recipe, tmp_path: Path) -> None:
    from lorakit.merge import merge
    from lorakit.train import train

    assert train(str(write_recipe())) == tmp_path / "run"
    assert merge(str(tmp_path / "run"), str(tmp_path / "merged")).folder == tmp_path / "merged"
