"""Delta-LoRA against the loop of the paper, which really moves W, and against LoRA with a larger alpha."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import Role, attach
from lorakit.errors import LorakitError
from lorakit.layers import layers_of
from lorakit.recipe.methods import DeltaLora, Lora, first_step
from lorakit.shapes import Layer
from lorakit.targets import Target, assign, select
from tests import architectures
from tests.conftest import killed_at, metrics

VOCABULARY, HIDDEN, OUT, RANK, ALPHA, RATIO = 11, 7, 9, 2, 5.0, 1.5
SCALE = ALPHA / RANK
LAYERS = {
    "embed": Layer("embed", "embedding", VOCABULARY, HIDDEN),
    "mix": Layer("mix", "conv1d", HIDDEN, OUT),
    "head": Layer("head", "linear", OUT, VOCABULARY),
}
IDS = torch.arange(3, 15)[None]
FILE = "adapter/adapter_model.safetensors"


class Toy(nn.Module):
    """ids -> logits: head(tanh(mix(embed(ids)))), a layer of each kind, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.mix = Conv1D(OUT, HIDDEN)
        self.head = nn.Linear(OUT, VOCABULARY, bias=False)
        nn.init.normal_(self.mix.weight, 0, 0.5)
        self.double().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))

    def prepare_inputs_for_generation(self, *inputs: Any, **options: Any) -> None:
        """PEFT asks for it."""
        raise NotImplementedError


def toy(section: Any, at_zero: bool, **more: Any) -> tuple[Toy, Any, dict[str, Tensor]]:
    """(the toy, its adapter in fp64, A and B of it): the same for all methods. `at_zero`:
    B A is zero, as where training begins."""
    model = Toy()
    targets = [Target(layer, RANK, section.alpha) for layer in LAYERS.values()]
    adapter = attach(section, model, targets, seed=1, **more)
    model.double()
    draw = torch.Generator().manual_seed(8)
    start = {i.name: 0.4 * torch.randn(i.parameter.shape, generator=draw).double() for i in adapter.trained()}
    if at_zero:
        start = {name: tensor * (role_of(name) != "B") for name, tensor in start.items()}
    for item in adapter.trained():
        item.parameter.data = start[item.name].clone()
    return model, adapter, start


def role_of(name: str) -> str:
    return "B" if "_B" in name else "A"


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(6)
    return [
        (
            torch.randint(VOCABULARY, (8,), generator=draw),
            torch.randint(VOCABULARY, (8,), generator=draw),
        )
        for _ in range(number)
    ]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets)


def train(
    model: Toy, adapter: Any, optimizer: torch.optim.Optimizer, num_steps: int, clip: float = 0.0
) -> list[float]:
    """The losses of a run with the adapter's hooks."""
    losses = []
    for step, (ids, targets) in enumerate(batches(num_steps)):
        loss = loss_of(model(ids), targets)
        loss.backward()
        adapter.before_step(step)
        if clip:
            nn.utils.clip_grad_norm_([item.parameter for item in adapter.trained()], clip)
        optimizer.step()
        adapter.after_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def paper(start: dict[str, Tensor], k: int, num_steps: int, lr: float) -> tuple[list[float], list[Tensor]]:
    """(losses, effective weights (out, in) of the layers) of algorithm 1 as it stands: W itself moves."""
    base = Toy()
    w = [base.embed.weight.T.clone(), base.mix.weight.T.clone(), base.head.weight.clone()]  # (out, in)
    values = [tensor.clone().requires_grad_() for tensor in start.values()]
    pairs = list(zip(values[::2], values[1::2], strict=True))
    optimizer = torch.optim.Adam(values, lr=lr)
    losses = []

    def effective() -> list[Tensor]:
        return [weight + SCALE * b @ a for weight, (a, b) in zip(w, pairs, strict=True)]

    for step, (ids, targets) in enumerate(batches(num_steps)):
        embed, mix, head = effective()
        loss = loss_of(torch.tanh(embed.T[ids] @ mix.T + base.mix.bias) @ head.T, targets)
        optimizer.zero_grad()
        loss.backward()
        products = [(b @ a).detach() for a, b in pairs]
        optimizer.step()
        if step >= k:
            with torch.no_grad():
                for weight, (a, b), old in zip(w, pairs, products, strict=True):
                    weight += RATIO * SCALE * (b @ a - old)
        losses.append(loss.item())
    return losses, [weight.detach() for weight in effective()]


def effective_of(model: Toy) -> list[Tensor]:
    """(out, in) of every layer as the model computes, by what it makes of unit vectors."""
    with torch.no_grad():
        return [
            model.embed(torch.arange(VOCABULARY)).T,
            (model.mix(torch.eye(HIDDEN).double()) - model.mix.base_layer.bias).T,
            model.head(torch.eye(OUT).double()).T,
        ]


# ------------------------------------------------------------------------------------------------------------
# The paper


@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_o16_it_is_the_loop_that_moves_w(k: int, tmp_path: Path) -> None:
    """Same losses and weights as if W had moved (the sum telescopes), and the file holds them, rank <= 2r."""
    section = DeltaLora(method="delta-lora", rank=RANK, alpha=ALPHA, delta_ratio=RATIO, start=k)
    model, adapter, start = toy(section, at_zero=k == 0, total_steps=10)
    losses = train(model, adapter, torch.optim.Adam([i.parameter for i in adapter.trained()], lr=0.05), 10)
    expected, weights = paper(start, k, 10, 0.05)
    assert losses == pytest.approx(expected, abs=1e-12, rel=0)
    for ours, theirs in zip(effective_of(model), weights, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    base = [layer.base_layer.weight for layer in (model.embed, model.mix, model.head)]
    fresh = Toy()
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(base, [fresh.embed.weight, fresh.mix.weight, fresh.head.weight], strict=True)
    )

    adapter.write(tmp_path, "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    rank = RANK if k == 0 else 2 * RANK  # B_K A_K is zero where W follows from the start
    assert config["r"] == config["lora_alpha"] == rank
    untouched = [fresh.embed.weight.T, fresh.mix.weight.T, fresh.head.weight]
    for name, weight, bare in zip(LAYERS, weights, untouched, strict=True):
        marks = ("embedding_A", "embedding_B") if name == "embed" else ("A.weight", "B.weight")
        a, b = (tensors[f"base_model.model.{name}.lora_{mark}"] for mark in marks)
        assert len(a) == rank
        assert (b @ a - (weight - bare)).abs().max() < 1e-12


def test_nothing_follows_before_step_k() -> None:
    """Up to and with the step that takes the snapshot it is LoRA, bit for bit; then it is not."""
    section = DeltaLora(method="delta-lora", rank=RANK, alpha=ALPHA, delta_ratio=RATIO, start=5)
    model, adapter, _ = toy(section, at_zero=False, total_steps=10)
    twin, lora, _ = toy(Lora(rank=RANK, alpha=ALPHA), at_zero=False)
    runs = [
        train(m, a, torch.optim.Adam([i.parameter for i in a.trained()], lr=0.05), 10)
        for m, a in ((model, adapter), (twin, lora))
    ]
    assert runs[0][:6] == pytest.approx(runs[1][:6], abs=1e-14)  # W first moves after step 5
    assert abs(runs[0][6] - runs[1][6]) > 1e-4


def from_lora(eps: float, clips: tuple[float, float] = (0.0, 0.0)) -> float:
    """How far Delta-LoRA with K = 0 is from LoRA with (1 + lambda) alpha after 20 steps of AdamW from B A = 0
    on: the largest difference of losses and effective weights. `clips`: of the gradients of the two."""
    delta = DeltaLora(method="delta-lora", rank=RANK, alpha=ALPHA, delta_ratio=RATIO)
    larger = Lora(rank=RANK, alpha=(1 + RATIO) * ALPHA)
    found = []
    for section, more, clip in ((delta, {"total_steps": 20}, clips[0]), (larger, {}, clips[1])):
        model = Toy()
        targets = [Target(layer, RANK, section.alpha) for layer in LAYERS.values()]
        adapter = attach(section, model, targets, seed=1, **more)
        model.double()
        parameters = [item.parameter for item in adapter.trained()]
        optimizer = torch.optim.AdamW(parameters, lr=0.02, eps=eps, weight_decay=0.1)
        losses = torch.tensor(train(model, adapter, optimizer, 20, clip), dtype=torch.float64)
        found.append(torch.cat([losses, *(weight.flatten() for weight in effective_of(model))]))
    return float((found[0] - found[1]).abs().max())


def test_o17_from_the_first_step_on_it_is_lora_with_a_larger_alpha() -> None:
    """Exactly where Adam has no eps, almost with its usual one. Clipping at the same norm makes a difference,
    because the gradients are 1 + lambda times smaller; at a norm as much smaller it makes none."""
    assert from_lora(eps=1e-300) < 1e-13
    assert 1e-13 < from_lora(eps=1e-8) < 1e-5
    assert from_lora(eps=1e-300, clips=(0.8, 0.8)) > 1e-2
    assert from_lora(eps=1e-300, clips=(0.8, (1 + RATIO) * 0.8)) < 1e-5  # torch divides by norm + 1e-6


# ------------------------------------------------------------------------------------------------------------
# Models and files


def attached(name: str, section: DeltaLora, targets: Any = "all-linear") -> tuple[Any, Any]:
    model = architectures.build(architectures.CONFIGS[name]())
    chosen, _ = select(layers_of(model)[0], targets)
    found, problems = assign(chosen, section.rank, section.alpha, section.rank_pattern, section.alpha_pattern)
    assert not problems
    return model, attach(section, model, found, seed=5, total_steps=8)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def walk(adapter: Any) -> None:
    """Eight steps of a random walk of A and B."""
    draw = torch.Generator().manual_seed(7)
    for step in range(8):
        with torch.no_grad():
            for item in adapter.trained():
                item.parameter.add_(0.05 * torch.randn(item.parameter.shape, generator=draw))
        adapter.after_step(step)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", "all-linear"), ("gpt2", ["wte", "c_attn", "c_fc"]), ("mixtral", "attention")],
)
def test_peft_computes_the_same_with_our_files(name: str, targets: Any, tmp_path: Path) -> None:
    section = DeltaLora(
        method="delta-lora",
        rank=4,
        start=0.5,
        scaling="rank_stabilized",
        rank_pattern={r".*\.1\..*": 2},
        alpha_pattern={r".*\.0\..*": 3.0},
    )
    model, adapter = attached(name, section, targets)
    before = logits(model)
    walk(adapter)
    after = logits(model)
    assert (after - before).abs().max() > 0.1
    assert {item.role for item in adapter.trained()} == {Role.A, Role.B}
    assert set(adapter.ranks().values()) == {4, 2}
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    moving = {id(item.parameter) for item in adapter.trained()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == moving
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(architectures.build(architectures.CONFIGS[name]()), tmp_path).eval()
    assert torch.allclose(logits(theirs), after, atol=2e-5)


def test_step_0_is_the_base_and_the_state_brings_all_of_it_back() -> None:
    section = DeltaLora(method="delta-lora", rank=4, start=3)
    model, adapter = attached("gpt2", section, ["wte", "c_attn"])
    base = logits(architectures.build(architectures.CONFIGS["gpt2"]()))
    assert torch.equal(logits(model), base)
    fresh = {name: tensor.clone() for name, tensor in adapter.state().items()}
    walk(adapter)
    wanted = logits(model)
    state = {name: tensor.clone() for name, tensor in adapter.state().items()}
    other_model, other = attached("gpt2", section, ["wte", "c_attn"])
    other.load_state(state)
    assert torch.equal(logits(other_model), wanted)
    other.load_state(fresh)  # from before W followed
    assert torch.equal(logits(other_model), base)
    with pytest.raises(LorakitError, match="is missing"):
        other.load_state({name: tensor for name, tensor in state.items() if name != "following"})


def test_the_step_at_which_w_begins_to_follow() -> None:
    assert [first_step(10, start) for start in (0, 0.0, 1, 3, 0.25, 0.3, 9)] == [0, 0, 1, 3, 2, 3, 9]
    assert first_step(100, 0.575) == 58  # the even one of 57 and 58; as floats the product is below 57.5


@pytest.mark.parametrize("steps", [{"max_steps": 3}, {"epochs": 1, "batch_size": 1000}])
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"method": "delta-lora", "start": 0.9},
            "adapter.start: {0} steps before W follows do not fit into the {0} steps of this run",
        ),
        (
            {"method": "adalora", "warmup": 0.3, "final": 0.6},
            "training.max_steps: {0} steps are too few for AdaLoRA's three phases",
        ),
    ],
)
def test_a_schedule_without_steps_is_told_before_the_model_is_loaded(
    adapter: dict[str, Any], message: str, steps: dict[str, int], write_recipe: Any, cli: Any
) -> None:
    """In the recipe itself where that says how many, else when the rows are counted."""
    recipe = write_recipe(adapter=adapter, training=steps)
    code, _, err = cli("train", recipe)
    assert code == 2
    assert f"{recipe}:1:" in err
    assert message.format(steps.get("max_steps", 1)) in err
    assert "loaded in" not in err
    assert cli("validate", recipe)[0] == (2 if "max_steps" in steps else 0)


@pytest.mark.parametrize("kill_at", [3, 6, 10])
def test_a_resumed_run_ends_with_the_same_bits(
    kill_at: int, write_recipe: Any, cli: Any, tiny: Path, tmp_path: Path
) -> None:
    """W follows from step 5 on; killed before it, before the checkpoint that remembers it, and after."""
    recipe = write_recipe(
        data={"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128},
        adapter={"method": "delta-lora", "rank": 4, "start": 5},
        training={"max_steps": 12, "batch_size": 8},
        checkpoint={"every": 2},
        eval={"every": 4},
    )
    code, _, err = cli("train", recipe, "--output", tmp_path / "straight")
    assert code == 0, err

    with killed_at(kill_at):
        cli("train", recipe, "--output", tmp_path / "killed")
    code, _, err = cli("train", recipe, "--output", tmp_path / "killed", "--resume", "auto")
    assert code == 0, err
    assert "from" in err
    one, two = (load_file(tmp_path / name / FILE) for name in ("straight", "killed"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [
        [line.get("loss", line.get("eval_loss")) for line in metrics(tmp_path / name)]
        for name in ("straight", "killed")
    ]
    assert losses[0] == losses[1]
