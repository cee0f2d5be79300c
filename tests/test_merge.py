"""A merged model is base and adapter: every tensor against fp64, every model against PEFT, and bad calls."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import architectures

IDS = torch.tensor([[5, 9, 13, 21, 34, 8, 3, 40]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def peft_adapter(base: Path, folder: Path, **config: Any) -> None:
    """An adapter as PEFT writes it, with a B that is not zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    peft = get_peft_model(model, LoraConfig(**values))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1 if "lora_" in name else 0.2)
    peft.save_pretrained(folder)


def save(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    architectures.build(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny model, with a chat template from the recipe."""
    from lorakit.recipe import load_recipe
    from lorakit.train import train

    folder = tmp_path_factory.mktemp("merge")
    recipe = {
        "model": {"path": str(tiny / "model")},
        "adapter": {"rank": 4, "rank_pattern": {"down_proj": 8}, "scaling": "rank_stabilized"},
        "data": {"train": str(tiny / "train.jsonl"), "max_length": 128},
        "optimizer": {"lr": 0.02},
        "training": {"max_steps": 8, "batch_size": 8},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return train(load_recipe(folder / "recipe.yaml"))


# ------------------------------------------------------------------------------------------------------------
# Numbers


def test_every_tensor_is_the_fp64_sum_rounded_once(run: Path, tiny: Path, cli, tmp_path: Path) -> None:
    code, out, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 0, err
    base = load_file(tiny / "model" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    changed = set()
    for name, tensor in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if key not in adapter:
            assert torch.equal(merged[name], tensor)
            continue
        a, b = adapter[key].double(), adapter[key.replace("lora_A", "lora_B")].double()
        rank = a.shape[0]
        wanted = tensor.double() + 16 / rank**0.5 * (b @ a)
        assert torch.allclose(merged[name].double(), wanted, rtol=3e-7, atol=3e-7)
        changed.add(rank)
    assert changed == {4, 8}
    assert "14 layers" in out
    assert str(tmp_path / "merged") in out
    assert sorted(tmp_path.iterdir()) == [tmp_path / "merged"]


def test_the_merged_model_answers_as_peft_does_and_brings_its_tokenizer(
    run: Path, tiny: Path, cli, tmp_path: Path
) -> None:
    assert cli("merge", run / "adapter", "--output", tmp_path / "merged")[0] == 0
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    wanted = logits(PeftModel.from_pretrained(base, run / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), wanted, atol=1e-5)
    said = json.loads((tmp_path / "merged" / "lorakit.json").read_text())
    assert said["parity"]["largest_difference"] < 1e-5 < said["parity"]["largest_effect"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny / "model").chat_template
    mode = (tmp_path / "merged" / "model.safetensors").stat().st_mode & 0o777
    assert mode == (tmp_path / "merged" / "config.json").stat().st_mode & 0o777


def test_a_merged_model_is_called_one_where_an_adapter_is_wanted(run: Path, cli, tmp_path: Path) -> None:
    assert cli("merge", run, "--output", tmp_path / "merged")[0] == 0
    for verb in (
        ["generate", tmp_path / "merged", "-p", "hi"],
        ["merge", tmp_path / "merged", "--output", "x"],
    ):
        code, _, err = cli(*verb)
        assert code == 2
        assert "is a merged model" in err and "transformers loads it" in err


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "mixtral"])
def test_peft_adapters_merge_on_every_kind_of_layer(name: str, cli, tmp_path: Path) -> None:
    base = save(architectures.CONFIGS[name](), tmp_path / "base")
    more = {"target_modules": ["q_proj", "v_proj", "o_proj"]} if name == "mixtral" else {}
    peft_adapter(base, tmp_path / "adapter", **more)
    code, _, err = cli("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload())
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, atol=2e-5
    )


def test_patterns_embeddings_and_modules_trained_whole(cli, tmp_path: Path) -> None:
    base = save(architectures.CONFIGS["llama"](), tmp_path / "base")
    peft_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 3},
        modules_to_save=["lm_head", "norm"],
    )
    assert cli("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(model, tmp_path / "adapter"))
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, atol=2e-5
    )


def test_tied_ends_come_apart_when_one_of_them_is_adapted(cli, tmp_path: Path) -> None:
    config = architectures.CONFIGS["llama"]()
    config.tie_word_embeddings = True
    base = save(config, tmp_path / "base")
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    peft_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "v_proj"])
    assert cli("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(model, tmp_path / "adapter"))
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, atol=2e-5
    )
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is False


def test_each_tensor_keeps_its_dtype_and_dtype_overrides(tiny: Path, run: Path, cli, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny / "model", base)
    tensors = load_file(base / "model.safetensors")
    mixed = {
        name: tensor if "norm" in name or "q_proj" in name else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli("merge", run, "--base", base, "--output", tmp_path / "merged")
    assert code == 0, err
    assert "other files than the base" in err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in mixed.items()}
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{kind}.weight"].double() for kind in "AB")
    exact = mixed[f"{name}.weight"].double() + 16 / 4**0.5 * (b @ a)
    assert ((merged[f"{name}.weight"].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()
    assert cli("merge", run, "--base", base, "--dtype", "fp16", "--output", tmp_path / "half")[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_shards_stay_shards(tiny: Path, run: Path, cli, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    assert cli("merge", run, "--base", tmp_path / "base", "--output", tmp_path / "merged")[0] == 0
    before, after = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["weight_map"]
        for name in ("base", "merged")
    )
    assert before == after
    assert len(set(after.values())) > 1
    wanted = logits(PeftModel.from_pretrained(model, run / "adapter"))
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, atol=1e-5
    )


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_quantized_base_is_dequantized_first(
    quantize: str, write_recipe, tiny: Path, cli, tmp_path: Path
) -> None:
    import bitsandbytes as bnb

    model = {"path": str(tiny / "model"), "quantize": quantize}
    recipe = write_recipe(model=model, optimizer={"lr": 0.02}, training={"max_steps": 6, "batch_size": 8})
    assert cli("train", recipe)[0] == 0
    code, out, err = cli("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 0, err
    assert "bf16" in out
    name = "model.layers.1.mlp.down_proj"
    stored = load_file(tiny / "model" / "model.safetensors")
    weight = stored[f"{name}.weight"]
    if quantize == "int8":
        codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        weight = codes.float() * scale[:, None] / 127
    else:
        packed, state = bnb.functional.quantize_4bit(
            weight, quant_type=quantize, compress_statistics=True, blocksize=64
        )
        weight = bnb.functional.dequantize_4bit(packed, state)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
    wanted = (weight + 2 * b @ a).bfloat16()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(merged[f"{name}.weight"].float(), wanted.float(), rtol=2**-7, atol=1e-6)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    off = (merged[f"{name}.weight"].float() - stored[f"{name}.weight"] - 2 * b @ a).norm()
    rounding = (wanted.float() - weight - 2 * b @ a).norm()
    assert off > 2 * rounding  # what quantization did is still there
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.01])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_that_is_not_the_adapter_is_refused_and_leaves_nothing(
    factor: float, dtype: str, run: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even of an adapter that moves little: what the logits of a 16-bit model would not tell, tensors do."""
    from lorakit.adapters.lora_files import Factors

    weak = scaled(run, tmp_path / "weak", 0.05)
    real = Factors.update
    monkeypatch.setattr(Factors, "update", lambda self: factor * real(self))
    place = weak if factor < 1 else run
    code, _, err = cli("merge", place, "--dtype", dtype, "--output", tmp_path / "merged")
    assert code == 1
    assert f"is off by more than rounding to {'float32' if dtype == 'fp32' else 'bfloat16'} explains" in err
    assert [path.name for path in tmp_path.iterdir()] == ["weak"]


def test_a_tensor_that_nothing_should_change_is_compared_too(
    run: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorakit.merge

    real = lorakit.merge.write_tensors

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
        real(path, tensors)

    monkeypatch.setattr(lorakit.merge, "write_tensors", write)
    code, _, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 1
    assert "model.norm.weight is off" in err


def scaled(run: Path, folder: Path, factor: float) -> Path:
    """A copy of a run whose adapter moves less."""
    shutil.copytree(run, folder)
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t * factor if "lora_B" in n else t for n, t in tensors.items()}, path, {"format": "pt"})
    return folder


def test_an_adapter_that_rounding_swallows_is_said(run: Path, cli, tmp_path: Path) -> None:
    small = scaled(run, tmp_path / "small", 1e-3)
    code, _, err = cli("merge", small, "--dtype", "bf16", "--output", tmp_path / "merged")
    assert code == 0
    assert "warning: rounding to bf16 moves logits by" in err
    code, _, err = cli("merge", small, "--dtype", "fp32", "--output", tmp_path / "exact")
    assert code == 0
    assert "warning" not in err


def test_int8_in_fp32_is_the_matrix_it_means(write_recipe, tiny: Path, cli, tmp_path: Path) -> None:
    model = {"path": str(tiny / "model"), "quantize": "int8"}
    assert cli("train", write_recipe(model=model, optimizer={"lr": 0.02}))[0] == 0
    code, out, err = cli("merge", tmp_path / "run", "--dtype", "fp32", "--output", tmp_path / "merged")
    assert code == 0, err
    assert (
        json.loads((tmp_path / "merged" / "lorakit.json").read_text())["parity"]["largest_difference"] < 1e-4
    )
    assert "fp32" in out


def test_a_model_whose_files_name_it_otherwise(cli, tmp_path: Path) -> None:
    """A multimodal Gemma-3: names begin otherwise in the files, and the vision tower's end alike."""
    import transformers

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    peft_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=r".*language_model.*\.(q|v)_proj")
    call = ("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--output", tmp_path / "merged")
    code, _, err = cli(*call)
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(model, tmp_path / "adapter"))
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, atol=2e-5
    )


# ------------------------------------------------------------------------------------------------------------
# Bad calls, and being stopped


def copy_of(run: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(run, folder)
    path = folder / "adapter" / "lorakit.json"
    said = json.loads(path.read_text())
    said["base"] |= changes
    path.write_text(json.dumps(said))
    return folder


def test_bad_calls_say_cause_and_cure(run: Path, tiny: Path, cli, write_recipe, tmp_path: Path) -> None:
    def refused(*arguments: Any) -> str:
        code, _, err = cli("merge", *arguments)
        assert code == 2, err
        assert "Traceback" not in err
        return err

    out = ("--output", tmp_path / "merged")
    (tmp_path / "there").mkdir()
    assert "exists" in refused(run, "--output", tmp_path / "there")
    assert "no such directory" in refused(tmp_path / "nothing", *out)
    assert "neither a run nor an adapter" in refused(tiny, *out)
    assert "expected fp32" in refused(run, *out, "--dtype", "int4")
    moved = copy_of(run, tmp_path / "moved", path=str(tmp_path / "gone"))
    assert "not where it was" in (text := refused(moved, *out))
    assert "--base" in text
    changed = copy_of(run, tmp_path / "changed", fingerprint="0" * 64)
    assert "not those that" in (text := refused(changed, *out))
    assert "--base" in text
    other = save(architectures.CONFIGS["gpt2"](), tmp_path / "gpt2")
    assert "which this model does not have" in refused(run, "--base", other, *out)
    narrow = save(architectures.CONFIGS["llama"](), tmp_path / "narrow")
    assert "in this model" in refused(run, "--base", narrow, *out)
    peft_adapter(tiny / "model", tmp_path / "peft")
    assert "--base" in refused(tmp_path / "peft", *out)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text()) | {"use_qalora": True}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    text = refused(tmp_path / "peft", "--base", tiny / "model", *out)
    assert "neither LoRA nor DoRA (use_qalora: True)" in text
    peft_adapter(tiny / "model", tmp_path / "pissa", init_lora_weights="pissa")
    text = refused(tmp_path / "pissa", "--base", tiny / "model", *out)
    assert "init_lora_weights: pissa, which changes the base's weights" in text
    assert "path_initial_model_for_weight_conversion" in text
    assert "cannot be written" in refused(run, "--output", tmp_path / ("long" * 100))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"base": "x"},
        {"base": {"path": "x", "quantize": "int3", "dtype": "fp32", "fingerprint": None}},
        {"precision": "fp8"},
        {"chat_template": 3},
    ],
    ids=str,
)
def test_a_damaged_lorakit_json_is_said(damage: dict[str, Any], run: Path, cli, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter" / "lorakit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    code, _, err = cli("merge", tmp_path / "copy", "--output", tmp_path / "merged")
    assert code == 2, err
    assert "lorakit.json: not as lorakit wrote it" in err


def test_a_path_in_somebody_elses_lorakit_json_is_text(run: Path, cli, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the secret")
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter" / "lorakit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": str(tmp_path / "secret")}))
    cli("merge", tmp_path / "copy", "--output", tmp_path / "merged")
    assert not [
        p for p in (tmp_path / "merged").rglob("*") if p.is_file() and b"the secret" in p.read_bytes()
    ]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error")], ids=str
)
def test_a_full_disk_leaves_nothing(
    error: Exception, run: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorakit.merge

    def fail(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(lorakit.merge, "write_tensors", fail)
    code, _, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 1
    assert "cannot be written" in err
    assert not list(tmp_path.iterdir())


def test_full_fine_tuning_and_an_unfinished_run_have_nothing_to_merge(
    write_recipe, cli, tmp_path: Path
) -> None:
    recipe = write_recipe(adapter={"method": "full"}, training={"max_steps": 2, "batch_size": 4})
    assert cli("train", recipe)[0] == 0
    code, _, err = cli("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 2
    assert "nothing to merge" in err
    shutil.rmtree(tmp_path / "run" / "model")
    code, _, err = cli("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 2
    assert "has no adapter yet" in err


def test_a_checkpoint_of_a_run_merges_too(run: Path, tiny: Path, cli, tmp_path: Path) -> None:
    place = sorted((run / "checkpoints").iterdir())[-1]
    assert cli("merge", place, "--output", tmp_path / "merged")[0] == 0
    assert cli("merge", run, "--output", tmp_path / "again")[0] == 0
    names = [tmp_path / name / "model.safetensors" for name in ("merged", "again")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(number: int, run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorakit", "merge", str(run), "--output", str(tmp_path / "merged")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.time() + 60
    while time.time() < deadline and not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    left = [path.name for path in tmp_path.iterdir()]
    assert left in ([], ["merged"]), err  # nothing, or all of it
    assert process.returncode == 130 or left == ["merged"], err
    assert "Traceback" not in err
