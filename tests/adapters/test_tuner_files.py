"""Adapters of any tuner, as PEFT itself wrote them: what lorakit opens, merges and counts.

The oracle is PEFT's model in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import OFTConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from lorakit import saved
from lorakit.count import count_params
from lorakit.errors import LorakitError
from lorakit.merge import merge
from tests import architectures
from tests.adapters.test_peft_tuner import CONFIGS, ON_CONV1D, logits

MORE = {"VERA": {"r": 8}, "ADALORA": {"total_step": 10}, "LN_TUNING": {}}
UNMERGED = {  # -> what the user is told
    "BEFT": "Base layer has no bias",
    "LILY": "not supported for Lily",
    "LN_TUNING": "is no matrix",
}
FAST = ("ADALORA", "BEFT", "IA3", "LN_TUNING", "OFT", "VERA")
KINDS = [
    pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in sorted(CONFIGS | MORE)
]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
TARGETS = {"llama": LINEAR, "gpt2": CONV1D}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("llama", "gpt2"):
        found[name] = tmp_path_factory.mktemp(name)
        architectures.build(architectures.CONFIGS[name]()).save_pretrained(found[name])
    return found


def by_peft(kind: str, base: Path, folder: Path, name: str = "llama", **more: Any) -> Any:
    """An adapter that PEFT made, moved away from its start and saved; returns its model."""
    config = (CONFIGS | MORE)[kind] | more
    if kind == "IA3":
        config |= {"feedforward_modules": [TARGETS[name][-1]]}
    if kind != "LN_TUNING":
        config["target_modules"] = TARGETS[name]
    if (
        name == "gpt2"
        and "fan_in_fan_out" in PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].__dataclass_fields__
    ):
        config["fan_in_fan_out"] = True
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(
        model, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type="CAUSAL_LM", **config)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_wrote_is_opened_merged_and_counted(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, folder = bases["llama"], tmp_path / "adapter"
    model = by_peft(kind, base, folder)
    wanted = logits(model)
    opened = saved.open_saved(saved.find(folder), str(base), torch.device("cpu"), exact=True)
    assert torch.allclose(logits(opened.base.model), wanted, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in opened.base.model.parameters())
    assert opened.adapter is not None
    plain = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with opened.adapter.disabled():
        assert torch.equal(logits(opened.base.model), logits(plain))

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if kind in ("FROD", "SHIRA"):  # they start from the weights
        with pytest.raises(LorakitError, match="before the weights are there"):
            count_params(folder, base=base)
    else:
        params = count_params(folder, base=base)
        assert params["trainable"] == trained
        assert sum(module["trainable"] for module in params["modules"]) == trained

    if kind in UNMERGED:
        with pytest.raises(LorakitError, match=UNMERGED[kind]):
            merge(folder, tmp_path / "merged", base=str(base))
        assert not (tmp_path / "merged").exists()
        return
    merged = merge(folder, tmp_path / "merged", base=str(base))
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits(alone) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert merged.parity.largest_effect > 1e-3
    assert merged.num_layers == 14


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in sorted(ON_CONV1D)]
)
def test_conv1d_layers_are_merged_with_their_biases(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """IA3 scales biases too."""
    model = by_peft(kind, bases["gpt2"], tmp_path / "adapter", "gpt2")
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(bases["gpt2"]))
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits(alone) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()


def test_modules_trained_whole_and_adapted_embeddings_are_read_back(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = by_peft("OFT", bases["llama"], tmp_path / "a", modules_to_save=["model.norm"])
    merge(tmp_path / "a", tmp_path / "merged", base=str(bases["llama"]))
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits(alone) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()
    params = count_params(tmp_path / "a", base=bases["llama"])
    assert {m["name"]: m["trainable"] for m in params["modules"]}["model.norm"] == 32
    assert [m.get("tuner") for m in params["modules"]].count("OFT") == 14


@pytest.mark.parametrize("name, end", [("llama", "embed_tokens"), ("gpt2", "wte")])
def test_an_embedding_is_merged_and_its_copy_must_be_the_base_s(
    name: str, end: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT writes an embedding called embed_tokens whole too. Merged, the two ends of a tied model (GPT-2)
    come apart."""
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    model = get_peft_model(model, OFTConfig(oft_block_size=8, target_modules=[end], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path / "a")
    merge(tmp_path / "a", tmp_path / "merged", base=str(bases[name]))
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits(alone) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()

    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    copied = [key for key in keys if key.endswith(f"{end}.base_layer.weight")]
    assert bool(copied) == (name == "llama")
    if copied:
        other = architectures.build(architectures.CONFIGS[name]())
        other.model.embed_tokens.weight.data += 1
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(LorakitError, match=r"holds another model\.embed_tokens\.weight than this base"):
            merge(tmp_path / "a", tmp_path / "m2", base=str(tmp_path / "other"))


# ------------------------------------------------------------------------------------------------------------
# What is wrong with a file


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    by_peft("IA3", bases["llama"], tmp_path / "adapter")
    return tmp_path / "adapter"


def opened(folder: Path, base: Path) -> Any:
    return saved.open_saved(saved.find(folder), str(base), torch.device("cpu"))


def rewritten(folder: Path, **fields: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def test_a_pickle_is_not_read(adapter: Path, bases: dict[str, Path]) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    for verb in (lambda: opened(adapter, bases["llama"]), lambda: count_params(adapter, base=bases["llama"])):
        with pytest.raises(LorakitError, match="is a pickle"):
            verb()


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"peft_type": "PREFIX_TUNING"}, "does not run the kind PREFIX_TUNING: it trains positions"),
        ({"peft_type": "NOTHING"}, "no configuration of NOTHING"),
        ({"peft_type": 3}, "peft_type: expected text"),
        ({"target_modules": ["nowhere"], "feedforward_modules": []}, "does not go here: .*nowhere"),
        ({"feedforward_modules": []}, "does not fit this model: size mismatch"),
        ({"target_modules": ["q_proj", "down_proj"]}, "the model has no place for"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told(
    fields: dict[str, Any], told: str, adapter: Path, bases: dict[str, Path]
) -> None:
    with pytest.raises(LorakitError, match=told):
        opened(rewritten(adapter, **fields), bases["llama"])


def test_tensors_that_are_missing_or_of_another_base_are_told(
    adapter: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file)
    with pytest.raises(LorakitError, match="the file lacks"):
        opened(adapter, bases["llama"])
    with pytest.raises(LorakitError, match="the file lacks"):
        count_params(adapter, base=bases["llama"])
    save_file(tensors, file)
    with pytest.raises(LorakitError, match=r"does not go here|does not fit"):
        opened(adapter, bases["gpt2"])


def test_what_a_file_of_others_names_is_not_followed(adapter: Path, bases: dict[str, Path]) -> None:
    """Neither as a path nor on the hub."""
    rewritten(adapter, base_model_name_or_path="/etc", revision="x", auto_mapping={"base_model_class": "os"})
    found = opened(adapter, bases["llama"])
    config = found.adapter.peft.peft_config["default"]
    assert config.base_model_name_or_path != "/etc"
    assert (config.revision, config.auto_mapping) == (None, None)


def test_start_from_takes_only_a_lora(adapter: Path, write_recipe: Any, cli: Any) -> None:
    recipe = write_recipe(adapter={"method": "lora", "start_from": str(adapter)})
    code, _, err = cli("train", recipe)
    assert (code, "an adapter of the kind IA3, where only LoRA can be taken" in err) == (2, True)
