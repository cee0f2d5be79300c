"""DoRA against the paper's equations, PEFT and its own files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config

from lorakit import base_model
from lorakit.adapters import Role, attach
from lorakit.errors import LorakitError
from lorakit.kernels import lora
from lorakit.layers import layers_of, matrix_of
from lorakit.optim import groups
from lorakit.recipe.methods import Dora
from lorakit.recipe.model import Model
from lorakit.recipe.traits import TRAITS
from lorakit.targets import assign, select
from tests import architectures
from tests.test_merge import save

IDS = torch.arange(3, 15)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def attached(model: Any, targets: Any = "all-linear", **fields: Any) -> Any:
    chosen, problems = select(layers_of(model)[0], targets)
    found, more = assign(chosen, fields.get("rank", 4), fields.get("alpha", "auto"), {}, {})
    assert not problems and not more
    return attach(Dora(method="dora", **({"rank": 4} | fields)), model, found, seed=5)


def build(name: str) -> Any:
    return architectures.build(architectures.CONFIGS[name]())


def randomise(adapter: Any, seed: int = 7) -> None:
    """A and B anywhere, m within a third of what it was."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in adapter.trained():
            moved = torch.randn(item.parameter.shape, generator=draw)
            if item.role is Role.SCALE:
                item.parameter.mul_(1 + 0.3 * moved.clamp(-1, 1))
            else:
                item.parameter.copy_(0.1 * moved)


TARGETS = {"llama": "all-linear", "gpt2": ["wte", "c_attn", "c_fc"], "gemma": ["embed_tokens", "q_proj"]}


# ------------------------------------------------------------------------------------------------------------
# The equations, in fp64


def by_hand(layer: Any, kind: str, scale: float, x: Tensor, dropped: Tensor) -> Tensor:
    """W x + bias + (m / n - 1) W d(x) + m / n * scale B A d(x), with n constant; x: (T, in)."""
    base, is_embedding = layer.get_base_layer(), kind == "embedding"
    part = {"A": layer.lora_embedding_A, "B": layer.lora_embedding_B} if is_embedding else {}
    a = part["A"]["default"] if is_embedding else layer.lora_A["default"].weight
    b = part["B"]["default"] if is_embedding else layer.lora_B["default"].weight
    m = layer.lora_magnitude_vector["default"].weight
    w = base.weight.detach() if kind == "linear" else base.weight.detach().T  # (out, in)
    n = (w + scale * b @ a).detach().square().sum(dim=1).sqrt()
    y = x @ w.T + (m / n - 1) * (dropped @ w.T) + m / n * scale * (dropped @ a.T @ b.T)
    return y if getattr(base, "bias", None) is None else y + base.bias.detach()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("name", "target"), [("llama", "down_proj"), ("gpt2", "c_attn"), ("llama", "embed_tokens")]
)
@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_a_layer_is_the_equation_and_so_are_its_gradients(
    name: str, target: str, dropout: float, scaling: str
) -> None:
    model = build(name)
    adapter = attached(model, [target], dropout=dropout, scaling=scaling, alpha=3.0)
    randomise(adapter)
    model.double().train()
    layer = model.get_submodule(adapter.targets[0].layer.name)
    kind, scale = adapter.targets[0].layer.kind, 3.0 / (4 if scaling == "standard" else 2)
    generator = torch.Generator().manual_seed(1)
    if kind == "embedding":  # PEFT's has no dropout
        given: Any = torch.tensor([3, 9, 3, 63])
        x = dropped = torch.nn.functional.one_hot(given, 64).double()
    else:
        given = x = torch.randn(6, adapter.targets[0].layer.in_features, generator=generator).double()
        torch.manual_seed(2)
        dropped = torch.nn.functional.dropout(x, dropout)  # the mask that the layer draws
    assert kind == "embedding" or dropout == 0 or not torch.equal(x, dropped)
    moving = [item.parameter for item in adapter.trained() if f"{target}." in item.name][:3]
    wanted = by_hand(layer, kind, scale, x, dropped)
    upstream = torch.randn(wanted.shape, generator=generator).double()
    wanted_grads = torch.autograd.grad(wanted, moving, upstream)
    torch.manual_seed(2)
    found = layer(given)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    for got, want in zip(torch.autograd.grad(found, moving, upstream), wanted_grads, strict=True):
        assert want.any()
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn", "c_fc"])])
def test_o18_longer_rows_of_the_base_change_nothing_at_a_fixed_length(name: str, targets: Any) -> None:
    """While B A is zero, m W / |W| does not see how long W's rows are."""
    model = build(name)
    adapter = attached(model, targets)
    model.double()
    layers = [(model.get_submodule(t.layer.name), t.layer) for t in adapter.targets]
    with torch.no_grad():
        for layer, _ in layers:
            layer.lora_magnitude_vector["default"].weight.mul_(1.3)
        before = logits(model)
        for layer, shape in layers:
            factor = torch.linspace(0.5, 2.0, shape.out_features, dtype=torch.float64)
            layer.get_base_layer().weight.mul_(factor[:, None] if shape.kind == "linear" else factor)
    assert torch.allclose(logits(model), before, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Step 0


def fast(model: Any, on: bool) -> None:
    if on:
        for group in lora.groups_of(model, lambda: logits(model)):
            group.switch_on()


@pytest.mark.parametrize("paths", ["plain", "fast"])
@pytest.mark.parametrize("name", TARGETS)
def test_step_0_is_the_base(name: str, paths: str) -> None:
    """To 1e-5 in fp32. In bf16 exactly, since lengths and m are fp32, whose ratio of one no bf16 output sees;
    but that the fast path adds a bias after it has rounded."""
    for dtype in (torch.float32, torch.bfloat16):
        model = build(name).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            before = logits(model)
            adapter = attached(model, TARGETS[name])
            assert {item.parameter.dtype for item in adapter.trained()} == {torch.float32}
            fast(model, paths == "fast")
            after = logits(model)
        rounded = 0.04 * before.std().item() if paths == "fast" and name == "gpt2" else 0.0
        assert torch.allclose(after, before, rtol=0, atol=1e-5 if dtype == torch.float32 else rounded)


def test_peft_starts_a_bf16_base_at_rounded_lengths() -> None:
    """The defect that lorakit's start works around: PEFT's step 0 is some percent of a logit off."""
    model = build("llama").to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model).float()
        config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])
        theirs = logits(get_peft_model(model, config)).float()
    assert 5e-3 < float((theirs - before).abs().max() / before.std()) < 0.1


def test_peft_measures_the_columns_of_a_bf16_embedding_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def off() -> float:
        model = build("llama").to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            before = logits(model).float()
            attached(model, ["embed_tokens"])
            return float((logits(model).float() - before).abs().max() / before.std())

    assert off() == 0
    monkeypatch.setattr("lorakit.adapters.lora._lengths_of_columns", DoraEmbeddingLayer(True).get_weight_norm)
    assert 5e-3 < off() < 0.1


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_step_0_and_gradients_on_a_quantized_base(quantize: str, tiny: Path) -> None:
    """m is the lengths of the rows that the 4 bits mean."""
    section = Model(path=str(tiny / "model"), quantize=quantize, compute_dtype="fp32")
    base = base_model.load(tiny / "model", section, "AutoModelForCausalLM", "fp32", torch.device("cpu"))
    before = logits(base.model)
    adapter = attached(base.model)
    assert torch.allclose(logits(base.model), before, rtol=0, atol=1e-5)
    layer = base.model.get_submodule(adapter.targets[0].layer.name)
    lengths = matrix_of(layer.get_base_layer()).float().norm(dim=1)
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, lengths, rtol=1e-5)
    randomise(adapter)
    base.model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(item.parameter.grad.any() for item in adapter.trained())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_conv1d_layers_in_4_bits_merge_in_the_layout_of_their_file(
    method: str, cli, write_recipe, tiny: Path, tmp_path: Path
) -> None:
    """bitsandbytes turns a Conv1D (in, out) into a Linear4bit (out, in)."""
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 128}
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    config = GPT2Config(**shape, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    base = save(config, tmp_path / "base")
    tokenizer.save_pretrained(base)
    recipe = write_recipe(
        model={"path": str(base), "quantize": "nf4", "compute_dtype": "fp32"},
        adapter={"method": method, "rank": 4},
        optimizer={"lr": 1e-2},
        training={"max_steps": 2, "batch_size": 2, "precision": "fp32"},
    )
    code, _, err = cli("train", recipe)
    assert code == 0, err
    code, _, err = cli("merge", tmp_path / "run", "--output", tmp_path / "merged", "--dtype", "fp32")
    assert code == 0, err
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = AutoModelForCausalLM.from_pretrained(base, quantization_config=options)
    for module in quantized.modules():  # else an evaluation reorders the weight, and DoRA measures that
        module.support_avx512bf16_for_cpu = False
    attached_there = PeftModel.from_pretrained(quantized, tmp_path / "run/adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(attached_there), atol=1e-3)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-1)


def test_an_8_bit_base_is_refused_as_long_as_peft_loses_its_scales(
    write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(model={"path": str(tiny / "model"), "quantize": "int8"}, adapter={"method": "dora"})
    code, out, err = cli("validate", recipe)
    assert code == 2
    assert "adapter.method: PEFT loses the scales of 8-bit rows" in out + err
    section = Model(path=str(tiny / "model"), quantize="int8")
    base = base_model.load(tiny / "model", section, "AutoModelForCausalLM", "fp32", torch.device("cpu"))
    logits(base.model)  # works
    dequantize_module_weight(base.model.model.layers[0].mlp.up_proj)
    with pytest.raises(AttributeError):
        logits(base.model)


def test_a_row_of_zeros_is_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = 0
    with pytest.raises(LorakitError, match=r"row 7 of model.layers.1.mlp.up_proj is zero; DoRA divides"):
        attached(model)


def test_lengths_are_scales_that_do_not_decay() -> None:
    adapter = attached(build("llama"))
    vectors = {item.name for item in adapter.trained() if item.parameter.dim() == 1}
    assert vectors == {item.name for item in adapter.trained() if item.role is Role.SCALE} != set()
    for group in groups(adapter.trained(), weight_decay=0.1, lr_ratio=4.0):
        for parameter in group["params"]:
            decays = parameter.dim() == 2
            assert group["weight_decay"] == (0.1 if decays else 0.0)
            assert decays or group["lr_ratio"] == 1.0


# ------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", TARGETS)
def test_file_merge_and_count(name: str, cli, tmp_path: Path) -> None:
    """PEFT loads the file; lorakit's merge is what PEFT computes; the file's numbers are the closed form."""
    base = save(architectures.CONFIGS[name](), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = attached(model, TARGETS[name])
    randomise(adapter)
    (tmp_path / "adapter").mkdir()
    adapter.write(tmp_path / "adapter", "somewhere")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    assert torch.equal(logits(theirs), logits(model))

    code, out, err = cli("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged")
    assert code == 0, err
    assert f"{len(adapter.targets)} layers" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    for target in adapter.targets:  # O18
        layer, weight = target.layer, merged.get_submodule(target.layer.name).weight.detach().double()
        lengths = (weight if layer.kind == "linear" else weight.T).norm(dim=1)
        m = model.get_submodule(layer.name).lora_magnitude_vector["default"].weight.double()
        assert torch.allclose(lengths, m, rtol=1e-6)

    code, out, _ = cli("count-params", tmp_path / "adapter", "--base", base, "--json")
    assert code == 0
    closed = TRAITS["dora"].num_trained
    assert [entry["trainable"] for entry in json.loads(out)["modules"]] == [
        closed(t.layer.in_features, t.layer.out_features, t.rank) for t in adapter.targets
    ]
    assert sum(item.parameter.numel() for item in adapter.trained()) == json.loads(out)["trainable"]


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.001])
def test_a_merge_that_is_not_the_adapter_is_refused(factor: float, cli, tmp_path: Path, monkeypatch) -> None:
    from lorakit.adapters.lora_files import Factors

    base = save(architectures.CONFIGS["llama"](), tmp_path / "base")
    adapter = attached(AutoModelForCausalLM.from_pretrained(base), ["down_proj"])
    randomise(adapter)
    (tmp_path / "adapter").mkdir()
    adapter.write(tmp_path / "adapter", "somewhere")
    right = Factors.applied
    monkeypatch.setattr(Factors, "applied", lambda self, weight: factor * right(self, weight))
    code, _, err = cli("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged")
    assert code != 0
    assert "is off by more than rounding" in err
    assert not (tmp_path / "merged").exists()


def test_a_run_is_continued_evaluated_and_told_from_lora(
    write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    section = {"method": "dora", "rank": 4, "targets": "attention", "scaling": "rank_stabilized"}
    recipe = write_recipe(data=data, adapter=section, optimizer={"lr": 1e-2})
    assert cli("train", recipe, "--set", "checkpoint.best=false")[0] == 0
    start = tmp_path / "run" / "adapter"
    again = write_recipe(data=data, adapter={"method": "dora", "start_from": str(start)})
    code, _, err = cli("train", again, "--output", tmp_path / "second")
    assert code == 0, err

    def losses(run: str) -> list[float]:
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [line["eval_loss"] for line in lines if "eval_loss" in line]

    assert losses("second")[0] == pytest.approx(losses("run")[-1], abs=1e-6)
    code, out, err = cli("eval", tmp_path / "run", "--json")
    assert code == 0, err
    assert json.loads(out)["adapter"]["loss"] == pytest.approx(losses("run")[-1], abs=1e-6)

    for method in ("lora", "adalora"):
        wrong = write_recipe(data=data, adapter={"method": method, "start_from": str(start)})
        for verb in ("validate", "train", "count-params"):
            code, out, err = cli(verb, wrong)
            assert (code, f"whose lengths of rows {method} does not have" in out + err) == (2, True), err
    lora = write_recipe(data=data, adapter={"rank": 4}, output=str(tmp_path / "lora"))
    assert cli("train", lora)[0] == 0
    wrong = write_recipe(data=data, adapter={"method": "dora", "start_from": str(tmp_path / "lora/adapter")})
    for verb in ("validate", "train", "count-params"):
        code, out, err = cli(verb, wrong)
        assert (code, "has no lengths of rows" in out + err) == (2, True), err
