"""PEFT's tuners in lorakit's loop: which types go, on which models, and what a recipe is told of the others.

Oracles: PEFT itself loads what is written; OFT and IA3 by closed forms.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType
from torch.nn import functional as F

from lorakit.adapters import Role, attach
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
    kind: str, name: str = "llama", train_also: tuple[str, ...] = (), **more: Any
) -> tuple[Any, Any]:
    model = base(name)
    layers, problems = select(layers_of(model)[0], "all-linear")
    assert not problems
    targets = [Target(layer, 0, 0.0) for layer in layers]
    return model, attach(section(kind, name, **more), model, targets, seed=5, train_also=train_also)


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
    kind: str, name: str, tmp_path: Path
) -> None:
    if name == "gpt2" and kind not in ON_CONV1D:
        with pytest.raises(LorakitError, match=f"adapter: .*{kind}"):
            attached(kind, name)
        return
    plain = base(name)
    before = logits(plain)
    model, adapter = attached(kind, name)
    adapter.try_out(model, torch.enable_grad)
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

    again, other = attached(kind, name)  # what a checkpoint holds is all that is needed
    step(again, other, times=1)
    other.load_state({key: tensor.clone() for key, tensor in adapter.state().items()})
    assert torch.equal(logits(again), after)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_base_in_bf16_trains_fp32_parameters(kind: str) -> None:
    model = base("llama").bfloat16()
    layers, _ = select(layers_of(model)[0], "all-linear")
    adapter = attach(section(kind), model, [Target(layer, 0, 0.0) for layer in layers], seed=5)
    adapter.try_out(model, lambda: torch.autocast("cpu", torch.bfloat16))
    assert all(item.parameter.dtype == torch.float32 for item in adapter.trained())
    assert {p.dtype for n, p in model.named_parameters() if ".base_layer." in n} == {torch.bfloat16}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_refused_type_is_told_with_its_reason(kind: str, write_recipe: Any) -> None:
    with pytest.raises(RecipeError) as told:
        load_recipe(write_recipe(adapter={"method": "peft", "type": kind}))
    (problem,) = told.value.problems
    assert problem.field == "adapter.type"
    assert problem.message == f"{kind}: {REFUSED[kind]}"
