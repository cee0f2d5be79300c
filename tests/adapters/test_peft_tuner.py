"""PEFT's tuners in lorakit's loop: which types go, on which models, and what a recipe is told of the others.

Oracles: PEFT itself loads what is written; OFT and IA3 by closed forms.
"""

import copy
import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType
from torch.nn import functional as F

from lorakit.adapters import Role, attach
from lorakit.adapters.peft_tuner import _judge
from lorakit.errors import LorakitError, RecipeError
from lorakit.layers import layers_of
from lorakit.recipe import load_recipe
from lorakit.recipe.methods import PeftTuner
from lorakit.recipe.peft_types import REFUSED
from lorakit.targets import Target, select
from tests import architectures

IDS = (torch.arange(12) * 5 % 61)[None]

# What each type needs on layers of 16 to 128 features; PEFT's defaults are for larger ones.
CONFIGS: dict[str, dict[str, Any]] = {
    "BEFT": {},
    "BOFT": {},
    "C3A": {"block_size": 16},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 30},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {"r": 4},
    "HRA": {},
    "IA3": {"feedforward_modules": ["down_proj", "mlp.c_proj"]},
    "LILY": {"r": 4},
    "LOHA": {},
    "LOKR": {},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 30},
}
ON_CONV1D = {
    *("DEFT", "FOURIERFT", "FROD", "GRALORA", "HIRA", "IA3", "PVERA", "RANDLORA", "TINYLORA", "UNILORA"),
    *("VBLORA", "WAVEFT"),
}
STARTS_ELSEWHERE = {"FOURIERFT", "C3A", "VBLORA", "UNILORA"}  # PEFT's default start is not the base
ROUNDED = {"FROD", "HRA", "OSF", "DEFT"}  # the base as a product of factors: equal but for rounding

BASES: dict[str, Any] = {}


def base(name: str) -> Any:
    if name not in BASES:
        BASES[name] = architectures.build(architectures.CONFIGS[name]())
    return copy.deepcopy(BASES[name])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def section(kind: str, model: str = "llama", **more: Any) -> PeftTuner:
    config = dict(CONFIGS[kind])
    if kind == "IA3":
        config["feedforward_modules"] = ("down_proj",) if model == "llama" else ("mlp.c_proj",)
    return PeftTuner(method="peft", type=kind, config=config | more)


def attached(
    kind: str, name: str = "llama", train_also: tuple[str, ...] = (), seed: int = 5, **more: Any
) -> tuple[Any, Any]:
    model = base(name)
    layers, problems = select(layers_of(model)[0], "all-linear")
    assert not problems
    targets = [Target(layer, 0, 0.0) for layer in layers]
    return model, attach(section(kind, name, **more), model, targets, seed=seed, train_also=train_also)


def step(model: Any, adapter: Any, times: int = 2) -> None:
    """Adam steps that move every trained parameter."""
    model.train()
    optimizer = torch.optim.Adam([item.parameter for item in adapter.trained()], lr=1e-2)
    for number in range(times):
        torch.manual_seed(number)
        out = model(input_ids=IDS, use_cache=False).logits
        F.cross_entropy(out[0, :-1].float(), IDS[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# ------------------------------------------------------------------------------------------------------------
# Every type


def test_every_type_of_peft_is_in_one_of_the_two_tables() -> None:
    assert {item.value for item in PeftType} == REFUSED.keys() | CONFIGS.keys()
    assert not REFUSED.keys() & CONFIGS.keys()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_type_trains_saves_and_is_loaded_by_peft_or_is_refused(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "gpt2" and kind not in ON_CONV1D:
        with pytest.raises(LorakitError, match=f"adapter: .*{kind}"):
            attached(kind, name)
        return
    plain = base(name)
    before = logits(plain)
    model, adapter = attached(kind, name)
    adapter.try_out(model, nullcontext)
    noted = f"note      {kind} does not start at the base model" in capsys.readouterr().err
    too_little = (kind, name) == ("UNILORA", "gpt2")  # 6e-5 of the largest logit
    assert noted == (kind in STARTS_ELSEWHERE and not too_little)
    start = logits(model)
    if kind not in STARTS_ELSEWHERE:
        assert (start - before).abs().max() <= (1e-5 if kind in ROUNDED else 0.0)
    trained = adapter.trained()
    assert all(item.parameter.dtype == torch.float32 for item in trained)
    assert {item.role for item in trained} <= {Role.OTHER, Role.SCALE}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    old = {item.name: item.parameter.detach().clone() for item in trained}
    step(model, adapter, times=3)
    after = logits(model)
    assert (after - start).abs().max() > 1e-4
    assert all(not torch.equal(item.parameter, old[item.name]) for item in trained)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], tensor) for n, tensor in frozen.items())
    with adapter.disabled():
        assert torch.equal(logits(model), before)

    adapter.write(tmp_path, "base")
    loaded = PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert torch.allclose(logits(loaded), after, atol=1e-6)

    again, other = attached(kind, name, seed=6)  # what a checkpoint holds is all that is needed
    step(again, other, times=1)
    other.load_state({key: tensor.clone() for key, tensor in adapter.state().items()})
    assert torch.equal(logits(again), after)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in ("IA3", "OFT") else pytest.mark.slow) for kind in CONFIGS],
)
def test_a_base_in_bf16_trains_fp32_parameters(kind: str) -> None:
    model = base("llama").bfloat16()
    layers, _ = select(layers_of(model)[0], "all-linear")
    targets = [Target(layer, 0, 0.0) for layer in layers]
    adapter = attach(section(kind), model, targets, seed=5, train_also=["model.norm"])
    adapter.try_out(model, lambda: torch.autocast("cpu", torch.bfloat16))
    assert all(item.parameter.dtype == torch.float32 for item in adapter.trained())
    assert {p.dtype for n, p in model.named_parameters() if ".base_layer." in n} == {torch.bfloat16}
    in_fp32 = attached(kind, train_also=("model.norm",))[1].trained()
    assert [item.name for item in adapter.trained()] == [item.name for item in in_fp32]


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_refused_type_is_told_with_its_reason(kind: str, write_recipe: Any) -> None:
    with pytest.raises(RecipeError) as told:
        load_recipe(write_recipe(adapter={"method": "peft", "type": kind}))
    (problem,) = told.value.problems
    assert problem.field == "adapter.type"
    assert problem.message == f"{kind} is not for method peft: {REFUSED[kind]}"


# ------------------------------------------------------------------------------------------------------------
# Closed forms


def cayley(vector: torch.Tensor, size: int) -> torch.Tensor:
    """The rotation (I + Q) (I - Q)^-1 of a block from the upper triangle of its skew-symmetric Q."""
    q = torch.zeros(size, size, dtype=torch.float64)
    upper = torch.triu_indices(size, size, 1)
    q[upper[0], upper[1]] = vector.double()
    q = q - q.T
    eye = torch.eye(size, dtype=torch.float64)
    return (eye + q) @ torch.linalg.inv(eye - q)


def test_oft_rotates_the_input_in_blocks_and_keeps_the_angles_between_neurons() -> None:
    """W' = W R^T with R block-diagonal and orthogonal: W' W'^T = W W^T, Qiu et al. 2023, section 3."""
    model, adapter = attached("OFT", use_cayley_neumann=False)
    step(model, adapter)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    blocks = [cayley(row, 8) for row in layer.oft_R["default"].weight.detach()]
    assert len(blocks) == 6
    rotation = torch.block_diag(*blocks)
    weight = layer.base_layer.weight.double()
    rotated = layer(torch.eye(48)).double().T.detach()  # (out, in)
    candidates = [weight @ rotation, weight @ rotation.T]
    assert min(float((rotated - one).abs().max()) for one in candidates) < 1e-6
    assert torch.allclose(rotated @ rotated.T, weight @ weight.T, atol=1e-5)
    assert (rotated - weight).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ia3_scales_outputs_and_the_inputs_of_feedforward_modules(name: str) -> None:
    """l * (W x + c) and W (l * x) + c, Liu et al. 2022, section 3.3."""
    model, adapter = attached("IA3", name)
    step(model, adapter)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).double()
    ends = ("self_attn.q_proj", "mlp.down_proj") if name == "llama" else ("attn.c_attn", "mlp.c_proj")
    block = "model.layers.1" if name == "llama" else "transformer.h.1"
    for end in ends:
        layer = model.get_submodule(f"{block}.{end}")
        weight, scale = layer.base_layer.weight.double(), layer.ia3_l["default"].double().flatten()
        weight = weight.T if name == "gpt2" else weight  # (out, in)
        bias = layer.base_layer.bias.double() if layer.base_layer.bias is not None else 0.0
        inputs = x if weight.shape[1] == 32 else x.repeat(1, 8)[:, : weight.shape[1]]
        feedforward = end == ends[1]
        wanted = (inputs * scale) @ weight.T + bias if feedforward else scale * (inputs @ weight.T + bias)
        assert len(scale) == weight.shape[1 if feedforward else 0]
        assert torch.allclose(layer(inputs.float()).double(), wanted, atol=1e-5)
        assert (scale - 1).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name, oft, ia3",
    [  # llama: q, o, gate, up of 32 inputs, k, v likewise, down of 48; out 32, 16, 16, 32, 48, 48 and in 48
        ("llama", 2 * (6 * 4 * 28 + 6 * 28), 2 * (32 + 16 + 16 + 32 + 48 + 48 + 48)),
        ("gpt2", None, 2 * (96 + 32 + 128 + 128)),
    ],
)
def test_counts_are_the_closed_forms(name: str, oft: int | None, ia3: int) -> None:
    """OFT: b (b - 1) / 2 numbers for each of in / b blocks; IA3: one number per output, or per input."""
    for kind, wanted in (("OFT", oft), ("IA3", ia3)):
        if wanted is not None:
            _, adapter = attached(kind, name)
            assert sum(item.parameter.numel() for item in adapter.trained()) == wanted


def test_the_start_is_a_function_of_the_seed() -> None:
    one, other = attached("HIRA")[1].state(), attached("HIRA", seed=6)[1].state()
    torch.rand(3)
    again = attached("HIRA")[1].state()
    assert all(torch.equal(tensor, again[key]) for key, tensor in one.items())
    assert not all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_how_far_from_the_base_a_tuner_starts_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """On the tokens 0 to 6 and 0, in fp32 and under autocast; nothing of a tuner that starts at the base."""
    ids = torch.arange(8)[None] % 7
    before = logits(base("llama"), ids)
    model, adapter = attached("FOURIERFT")
    off = float((logits(model, ids) - before).abs().max())
    assert off > 0.1
    adapter.try_out(model, nullcontext)
    assert capsys.readouterr().err == (
        f"note      FOURIERFT does not start at the base model: its first logits are up to {off:.2g} away"
        " (PEFT's init)\n"
    )
    for kind, lines in (("FOURIERFT", 1), ("OFT", 0)):
        model, adapter = attached(kind)
        adapter.try_out(model, lambda: torch.autocast("cpu", torch.bfloat16))
        assert capsys.readouterr().err.count("note      ") == lines


def test_vectors_do_not_decay_and_matrices_do() -> None:
    """IA3's scales start at one: decay would pull the model towards zero."""
    assert {item.role for item in attached("IA3")[1].trained()} == {Role.SCALE}
    assert {item.role for item in attached("OFT")[1].trained()} == {Role.OTHER}


def test_train_also_is_trained_whole_beside_the_tuner() -> None:
    model, adapter = attached("OFT", train_also=("model.norm",))
    head = [item for item in adapter.trained() if item.role is Role.HEAD]
    assert [item.name for item in head] == ["model.norm.modules_to_save.default.weight"]
    before = logits(base("llama"))
    assert torch.equal(logits(model), before)
    step(model, adapter)
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    assert [item.name for item in adapter.trained() if item.role is Role.HEAD] == [head[0].name]
    assert (head[0].parameter - 1).abs().max() > 0  # architectures.build draws the norm as well


# ------------------------------------------------------------------------------------------------------------
# What is told before a model loads


def problems(write_recipe: Any, model: dict[str, Any] | None = None, **section: Any) -> dict[str, str]:
    more = {"model": model} if model else {}
    with pytest.raises(RecipeError) as told:
        load_recipe(write_recipe(adapter={"method": "peft"} | section, **more))
    return {problem.field: problem.message for problem in told.value.problems}


def test_all_that_is_wrong_with_a_configuration_is_told_at_once(write_recipe: Any) -> None:
    config = {"rr": 8, "r": "8", "eps": True, "coft": 1, "target_modules": ["x"], "bias": "all", "nothing": 0}
    found = problems(write_recipe, type="OFT", config=config)
    assert found.pop("adapter.config.nothing").startswith(
        "not a field of OFT. Fields: block_share, coft, eps,"
    )
    assert found == {
        "adapter.config.rr": 'not a field of OFT. Did you mean "r"?',
        "adapter.config.r": 'expected a whole number, got the text "8" (delete the quotes)',
        "adapter.config.eps": "expected a number, got true",
        "adapter.config.coft": "expected true or false, got 1",
        "adapter.config.target_modules": "not for the recipe: which layers are adapted is adapter.targets",
        "adapter.config.bias": "not for the recipe: biases are the base's, which stays as it is",
    }


def test_a_problem_is_told_at_its_line(tmp_path: Path) -> None:
    text = "model: {path: m}\nadapter:\n  method: peft\n  type: OFT\n  config:\n    r: 4\n    rr: 8\n"
    (tmp_path / "r.yaml").write_text(text + "data: {train: d.jsonl}\noutput: o\n")
    with pytest.raises(RecipeError) as told:
        load_recipe(tmp_path / "r.yaml")
    (problem,) = told.value.problems
    assert problem.where.endswith("r.yaml:7:5")


def test_an_unknown_type_is_told_with_the_nearest(write_recipe: Any) -> None:
    found = problems(write_recipe, type="oft")
    assert found == {"adapter.type": '"oft" is no tuner of PEFT\'s. Did you mean "OFT"?'}
    found = problems(write_recipe, type="NOTHING_LIKE_IT")
    assert "Types: ADALORA" not in found["adapter.type"]
    assert ", OFT," in found["adapter.type"]


def test_what_peft_checks_itself_is_told_as_it_says_it(write_recipe: Any) -> None:
    both = {"r": 4, "oft_block_size": 8}
    assert problems(write_recipe, type="OFT", config=both)["adapter.config"].startswith(
        "PEFT: You can only specify either r (4) or oft_block_size (8)"
    )


def test_of_two_fields_that_say_one_thing_only_the_written_one_counts(write_recipe: Any) -> None:
    """PEFT's OFTConfig(r=4) is an error for the default of its other field."""
    recipe = load_recipe(write_recipe(adapter={"method": "peft", "type": "OFT", "config": {"r": 4}}))
    layers, _ = select(layers_of(base("llama"))[0], ["q_proj"])
    model = base("llama")
    adapter = attach(recipe.adapter, model, [Target(layer, 0, 0.0) for layer in layers], seed=0)
    assert [item.parameter.shape for item in adapter.trained()] == [(4, 28)] * 2


def test_ia3_must_be_told_its_feedforward_modules(write_recipe: Any) -> None:
    assert "feedforward_modules: [down_proj]" in problems(write_recipe, type="IA3")["adapter.config"]
    load_recipe(
        write_recipe(adapter={"method": "peft", "type": "IA3", "config": {"feedforward_modules": []}})
    )


def test_a_quantized_base_takes_only_tuners_that_are_right_on_it(write_recipe: Any, tiny: Path) -> None:
    model = {"path": str(tiny / "model"), "quantize": "nf4"}
    found = problems(write_recipe, model, type="HIRA")
    assert found == {"adapter.type": "HIRA is not known to be right on nf4 weights; IA3 and OFT are"}


# ------------------------------------------------------------------------------------------------------------
# What shows on the model: an error before step 0


def peft(kind: str, **config: Any) -> dict[str, Any]:
    return {"method": "peft", "type": kind, "config": config}


@pytest.mark.parametrize(
    "section, told",
    [
        (peft("OFT", oft_block_size=7), "PEFT would not do as it is told: Invalid `oft_block_size` (7)!"),
        (peft("OFT", oft_block_size=48), "Adjusted `oft_block_size` to"),  # 64 and 128 inputs
        (peft("C3A", block_size=48), "PEFT's C3A does not go here"),
        (peft("IA3", feedforward_modules=["down_prj"]), 'Did you mean "down_proj"?'),
        (peft("HIRA", rank_pattern={"nothing": 3}), '"nothing" matches none of the adapted layers'),
        (peft("OFT") | {"targets": ["model.norm"]}, '"model.norm" matches nothing'),
        (peft("ROAD", group_size=8) | {"targets": ["embed_tokens"]}, "PEFT has no ROAD for it"),
    ],
)
def test_what_does_not_go_on_this_model_is_an_error_before_step_0(
    section: dict[str, Any], told: str, write_recipe: Any, cli: Any
) -> None:
    code, out, err = cli("train", write_recipe(adapter=section))
    assert code == 2
    assert told in err
    assert "Traceback" not in out + err


def test_boft_without_its_extension_is_not_silently_another(write_recipe: Any) -> None:
    """PEFT sets boft_n_butterfly_factor to 1 where it cannot compile: a warning there, an error here."""
    text = "Setting boft_n_butterfly_factor to 1 to speed up the finetuning process."
    noticed = [warnings.WarningMessage(text, UserWarning, "f", 1)]
    _judge(noticed, {"boft_n_butterfly_factor": 1})
    _judge(noticed, {})
    with pytest.raises(LorakitError, match="boft_n_butterfly_factor to 1"):
        _judge(noticed, {"boft_n_butterfly_factor": 2})


def test_a_tuner_that_fails_in_its_first_step_is_told() -> None:
    model, adapter = attached("OFT")
    model.get_submodule("model.layers.0.mlp.down_proj").oft_R["default"].weight.data = torch.zeros(5, 3)
    with pytest.raises(LorakitError, match="PEFT's OFT does not go here"):
        adapter.try_out(model, torch.enable_grad)
    assert not model.training
    assert all(item.parameter.grad is None for item in adapter.trained())


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["OFT", "IA3"])
def test_a_run_is_counted_resumed_and_merged(
    kind: str, quantize: str, write_recipe: Any, cli: Any, tiny: Path, tmp_path: Path
) -> None:
    section = peft(
        kind, **({"oft_block_size": 8} if kind == "OFT" else {"feedforward_modules": ["down_proj"]})
    )
    recipe = write_recipe(
        model={"path": str(tiny / "model")} | ({"quantize": quantize} if quantize != "none" else {}),
        adapter=section | {"train_also": ["model.norm"]},
        training={"max_steps": 4, "batch_size": 4},
        checkpoint={"every": 2},
    )
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert cli("train", recipe, "--output", whole)[0] == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-000004")
    shutil.rmtree(part / "adapter")
    record = json.loads((part / "run.json").read_text()) | {"status": "interrupted", "step": 2}
    (part / "run.json").write_text(json.dumps(record))
    code, _, err = cli("train", recipe, "--output", part, "--resume", "auto")
    assert code == 0, err
    file = "adapter/adapter_model.safetensors"
    assert (part / file).read_bytes() == (whole / file).read_bytes()

    params = json.loads((whole / "params.json").read_text())
    assert json.loads(cli("count-params", recipe, "--json")[1]) == params
    assert json.loads(cli("count-params", whole / "adapter", "--json")[1]) == params
    assert {module.get("tuner") for module in params["modules"]} == {kind, None}
    assert f"| {kind} |" in (whole / "params.md").read_text()

    code, out, err = cli("merge", whole, "--output", tmp_path / "merged")
    assert code == 0, err
    assert "merged    14 layers" in out
