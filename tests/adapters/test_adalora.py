"""AdaLoRA on its own: schedule, choice, penalty, layers, export, and a LoRA taken up again.

The oracles are PEFT's own allocator, penalty and LoRA layers, and closed forms; a whole training by hand is
in tests/oracles.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file

from lorakit.adapters import Role, attach
from lorakit.adapters.adalora import AdaLoraAdapter, budget_at, largest, phases
from lorakit.adapters.lora_files import read_adapter
from lorakit.errors import LorakitError
from lorakit.layers import layers_of
from lorakit.recipe.methods import AdaLora, Lora
from lorakit.targets import Target, select
from tests import architectures

IDS = torch.arange(3, 15)[None]
ALPHA = 10.0


def section(**fields: Any) -> AdaLora:
    values = {"init_rank": 5, "target_rank": 2, "alpha": ALPHA, "interval": 2} | fields
    return AdaLora(method="adalora", **values)


def built(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return architectures.build(architectures.CONFIGS[name]()).to(dtype)


def attached(
    model: Any, adalora: AdaLora, steps: int = 20, names: Any = "all-linear", **more: Any
) -> AdaLoraAdapter:
    chosen, problems = select(layers_of(model)[0], names)
    assert not problems
    alpha = 2.0 * adalora.init_rank if adalora.alpha == "auto" else adalora.alpha
    targets = [Target(layer, adalora.init_rank, alpha) for layer in chosen]
    return AdaLoraAdapter(adalora, model, targets, 5, steps, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.float()


def randomise(adapter: AdaLoraAdapter, spread: float = 0.3) -> None:
    draw = torch.Generator().manual_seed(7)
    for item in adapter.trained():
        item.parameter.data.copy_(torch.randn(item.parameter.shape, generator=draw) * spread)


def fill_gradients(adapter: AdaLoraAdapter, draw: torch.Generator) -> None:
    for item in adapter.trained():
        item.parameter.grad = torch.randn(item.parameter.shape, generator=draw)


def settle(adapter: AdaLoraAdapter, steps: int = 20) -> None:
    """Random gradients and updates: what is left are different ranks."""
    draw = torch.Generator().manual_seed(11)
    randomise(adapter)
    for step in range(steps):
        fill_gradients(adapter, draw)
        adapter.before_step(step)
        for item in adapter.trained():
            item.parameter.data += 0.1 * torch.randn(item.parameter.shape, generator=draw)
        adapter.after_step(step)


# ------------------------------------------------------------------------------------------------------------
# The schedule and the choice


def test_the_budgets_are_those_of_the_released_code() -> None:
    """Six layers, rank 6 to 2, 20 steps, 2 of warm-up and 5 at the end."""
    assert phases(20, 0.1, 0.25) == (2, 15)
    assert phases(100, 0.575, 0.0) == (58, 100)  # the even one; as floats the product is below 57.5
    assert phases(100, 0.0, 0.575) == (0, 42)
    expected = [36, 36, 36, 30, 26, 22, 19, 17, 15, 14, 13, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12]
    assert [budget_at(step, 2, 15, 36, 12) for step in range(21)] == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 100, 1001])
@pytest.mark.parametrize("shares", [(0.1, 0.3), (0.0, 0.0), (0.5, 0.49)])
def test_the_phases_follow_each_other(steps: int, shares: tuple[float, float]) -> None:
    start, settled = phases(steps, *shares)
    assert 0 <= start <= settled <= steps
    if start < settled:
        budgets = [budget_at(step, start, settled, 60, 20) for step in range(steps + 1)]
        assert all(a >= b for a, b in itertools.pairwise(budgets))
        assert budgets[start] == 60
        assert budgets[settled:] == [20] * (steps + 1 - settled)


def test_of_equal_scores_exactly_the_budget_stays() -> None:
    masks = largest([torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 0.0])], 2)
    assert [mask.tolist() for mask in masks] == [[False, True, True], [False, False]]
    everything = largest([torch.zeros(3), torch.zeros(2)], 5)
    assert all(mask.all() for mask in everything)
    assert not any(mask.any() for mask in largest([torch.ones(3)], 0))


def test_the_choice_is_that_of_peft() -> None:
    """PEFT's allocator on the same weights and gradients, step by step, until the ranks are settled.

    PEFT leaves the gradient of the settled step out; here it is given to it."""
    ours = attached(built(), section())
    theirs = attached(built(), section())
    config = theirs.peft.peft_config["default"]
    config.tinit, config.tfinal, config.deltaT, config.total_step = 2, 6, 2, 20
    config.beta1, config.beta2 = ours.section.beta1, ours.section.beta2
    allocator = RankAllocator(theirs.peft.base_model.model, config, "default")
    assert (ours.start, ours.settled_at) == (2, 14)
    draw = torch.Generator().manual_seed(3)
    for step in range(14):
        for mine, other in zip(ours.trained(), theirs.trained(), strict=True):
            mine.parameter.data.copy_(torch.randn(mine.parameter.shape, generator=draw))
            mine.parameter.grad = torch.randn(mine.parameter.shape, generator=draw)
            other.parameter.data.copy_(mine.parameter.data)
            other.parameter.grad = mine.parameter.grad.clone()
        ours.before_step(step)
        ours.after_step(step)
        done = step + 1
        if done == 14:
            allocator.update_ipt(theirs.peft.base_model.model)
        budget, _ = allocator.update_and_allocate(theirs.peft.base_model.model, done, force_mask=done == 14)
        assert budget == ours.budget(done)
        for name, mine in ours.lambda_.items():
            assert torch.equal(mine, theirs.lambda_[name]), f"step {done}: {name}"
    assert sum(ours.ranks().values()) == 2 * len(ours.layers)
    assert len(set(ours.ranks().values())) > 1


def test_the_penalty_is_that_of_peft_and_no_part_of_the_models_loss() -> None:
    model = built()
    adapter = attached(model, section(orthogonal_weight=0.3))
    randomise(adapter)
    adapter.peft.peft_config["default"].orth_reg_weight = 0.3
    plain = model(IDS, labels=IDS).loss
    penalty = adapter.penalty()
    assert penalty is not None
    torch.testing.assert_close(adapter.peft(IDS, labels=IDS).loss - plain, penalty, rtol=1e-5, atol=1e-5)
    assert attached(built(), section(orthogonal_weight=0)).penalty() is None


# ------------------------------------------------------------------------------------------------------------
# The layers


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_step_0_is_the_base_and_the_count_is_the_closed_form(name: str) -> None:
    model = built(name)
    before = logits(model)
    adapter = attached(model, section())
    assert torch.equal(logits(model), before)
    sides = sum(t.layer.in_features + t.layer.out_features + 1 for t in adapter.targets)
    assert sum(item.parameter.numel() for item in adapter.trained()) == 5 * sides
    assert {item.role for item in adapter.trained()} == {Role.A, Role.B, Role.SCALE}
    assert all(item.parameter.dtype == torch.float32 for item in adapter.trained())
    for matrix in (*adapter.p.values(), *adapter.q.values()):
        assert matrix.detach().std() == pytest.approx(0.02, rel=0.4)
    randomise(adapter)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(logits(model), before)


def test_the_scale_stays_that_of_the_initial_rank() -> None:
    """W x + alpha / (init_rank + 1e-5) P diag(lambda) Q x by hand in fp64, before and after pruning."""
    model = built()
    adapter = attached(model, section(), names=["up_proj"])
    layer = adapter.layers["model.layers.0.mlp.up_proj"]

    def check() -> None:
        x = torch.randn(5, 32)
        name = "model.layers.0.mlp.up_proj"
        p, diagonal, q = (part[name].double() for part in (adapter.p, adapter.lambda_, adapter.q))
        update = p @ torch.diag(diagonal[:, 0]) @ q * ALPHA / (5 + 1e-5)
        expected = x.double() @ (layer.get_base_layer().weight.double() + update).T
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)

    randomise(adapter)
    check()
    settle(adapter)
    assert sum(adapter.ranks().values()) == 4
    check()


def test_a_16_bit_base_does_not_round_the_rank() -> None:
    """PEFT keeps the rank in the dtype of the base, and bf16 has no 257."""
    model = built(dtype=torch.bfloat16)
    adapter = attached(model, section(init_rank=257), names=["up_proj"])
    assert adapter._scale("model.layers.0.mlp.up_proj") == pytest.approx(ALPHA / 257, rel=1e-6)
    assert not any(item.parameter.dtype != torch.float32 for item in adapter.trained())


def test_what_is_taken_away_stays_away() -> None:
    """After the settled step an optimizer with momentum moves every lambda, and the mask takes it back."""
    adapter = attached(built(), section())
    settle(adapter, steps=adapter.settled_at)
    ranks = adapter.ranks()
    assert sum(ranks.values()) == 2 * len(ranks)
    for step in range(adapter.settled_at, 20):
        randomise(adapter)
        adapter.after_step(step)
        assert adapter.ranks() == ranks
        for name, mask in adapter.kept.items():
            assert torch.equal(adapter.lambda_[name][:, 0] != 0, mask)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_settle(steps: int) -> None:
    adapter = attached(built(), section(interval=10), steps=steps)
    settle(adapter, steps)
    assert adapter.settled(steps)
    assert sum(adapter.ranks().values()) == 2 * len(adapter.layers)


def test_equal_ranks_leave_nothing_to_decide() -> None:
    adapter = attached(built(), section(init_rank=3, target_rank=3))
    settle(adapter)
    assert adapter.settled(0)
    assert set(adapter.ranks().values()) == {3}
    assert all(p.all() for p in adapter.lambda_.values())
    assert not adapter.importance  # nothing is remembered that nobody asks for


def test_a_layer_without_a_gradient_is_the_first_to_go() -> None:
    adapter = attached(built(), section())
    draw = torch.Generator().manual_seed(3)
    unused = next(iter(adapter.layers))
    for step in range(20):
        fill_gradients(adapter, draw)
        for part in (adapter.p, adapter.lambda_, adapter.q):
            part[unused].grad = None
        adapter.before_step(step)
        adapter.after_step(step)
    assert adapter.ranks()[unused] == 0
    assert sum(adapter.ranks().values()) == 2 * len(adapter.layers)


def test_state_round_trip_in_the_middle_of_the_schedule() -> None:
    one = attached(built(), section())
    settle(one, steps=9)
    other = attached(built(), section())
    other.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    for adapter in (one, other):
        draw = torch.Generator().manual_seed(2)
        for step in range(9, 20):
            fill_gradients(adapter, draw)
            adapter.before_step(step)
            adapter.after_step(step)
    for name, tensor in one.state().items():
        assert torch.equal(tensor, other.state()[name]), name
    with pytest.raises(LorakitError, match="is missing"):
        other.load_state({k: v for k, v in one.state().items() if not k.startswith("kept|")})


def test_too_few_steps_are_told_before_anything_is_loaded(write_recipe, cli) -> None:
    adapter = {"method": "adalora", "warmup": 0.5, "final": 0.45}
    code, out, _ = cli("validate", write_recipe(adapter=adapter, training={"max_steps": 4}))
    assert code == 2
    assert "training.max_steps: 4 steps are too few" in out
    code, _, _ = cli("validate", write_recipe(adapter=adapter, training={"max_steps": 40}))
    assert code == 0


def test_what_an_export_fills_up_with_zeros_is_trained_again(write_recipe, cli, tmp_path: Path) -> None:
    """Where a row of A and a column of B are zero, all gradients are, for ever."""
    adapter = {"method": "adalora", "init_rank": 6, "target_rank": 2, "interval": 2, "targets": ["mlp"]}
    first = write_recipe(adapter=adapter, training={"max_steps": 10, "batch_size": 4})
    assert cli("train", first, "--output", tmp_path / "ada")[0] == 0
    start = tmp_path / "ada" / "adapter"

    def num_dead(folder: Path) -> int:
        tensors = load_file(folder / "adapter_model.safetensors")
        pairs = [
            (a, tensors[name.replace("lora_A", "lora_B")]) for name, a in tensors.items() if "lora_A" in name
        ]
        return sum(int(((a == 0).all(1) & (b == 0).all(0)).sum()) for a, b in pairs)

    assert num_dead(start) > 0
    second = write_recipe(adapter={"start_from": str(start)}, training={"max_steps": 2, "batch_size": 4})
    code, _, err = cli("train", second, "--output", tmp_path / "on")
    assert code == 0
    assert f"{num_dead(start)} directions of start_from are zero and start anew" in err
    assert num_dead(tmp_path / "on" / "adapter") == 0


def test_phases_without_steps_are_refused() -> None:
    with pytest.raises(LorakitError, match="too few"):
        attached(built(), section(warmup=0.5, final=0.49), steps=3)


# ------------------------------------------------------------------------------------------------------------
# What is written, and taken up again


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_peft_reads_the_export_as_plain_lora(name: str, tmp_path: Path) -> None:
    model = built(name)
    adapter = attached(model, section())
    settle(adapter)
    assert len(set(adapter.ranks().values())) > 1
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(built(name), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rank = max(adapter.ranks().values())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert {t.shape[0] for k, t in tensors.items() if ".lora_A." in k} == {rank}
    assert {t.shape[1] for k, t in tensors.items() if ".lora_B." in k} == {rank}
    living = {k.split(".lora_B")[0]: int(t.any(0).sum()) for k, t in tensors.items() if ".lora_B." in k}
    assert living == {f"base_model.model.{name}": rank for name, rank in adapter.ranks().items()}
    assert not any("lora_E" in name or "ranknum" in name for name in tensors)


def test_the_export_on_a_16_bit_base(tmp_path: Path) -> None:
    """The files are exact in fp32; the logits differ by where bf16 rounds."""
    model = built(dtype=torch.bfloat16)
    adapter = attached(model, section())
    settle(adapter)
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(built(dtype=torch.bfloat16), tmp_path).eval()
    difference = (logits(theirs) - logits(model)).abs().max()
    assert difference <= 0.02 * logits(model).abs().max()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    name = next(iter(adapter.layers))
    product = (
        tensors[f"base_model.model.{name}.lora_B.weight"]
        @ (tensors[f"base_model.model.{name}.lora_A.weight"])
    )
    p, diagonal, q = (part[name].detach() for part in (adapter.p, adapter.lambda_, adapter.q))
    torch.testing.assert_close(product, ALPHA / (5 + 1e-5) * p @ (diagonal * q), rtol=1e-5, atol=1e-6)


def saved_lora(folder: Path, rank: int = 3, **options: Any) -> tuple[Any, torch.Tensor]:
    """(a LoRA that PEFT wrote to `folder`, its logits)."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=rank,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **options,
    )
    peft = get_peft_model(built(), config).eval()
    if options.get("modules_to_save"):
        with torch.no_grad():
            peft.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.5)
    peft.save_pretrained(folder)
    return peft, logits(peft)


def continued(folder: Path, adalora: AdaLora) -> tuple[Any, AdaLoraAdapter]:
    model = built()
    there = read_adapter(folder, layers_of(model)[0])
    targets = [Target(t.layer, adalora.init_rank, ALPHA) for t in there.targets]
    adapter = AdaLoraAdapter(adalora, model, targets, 5, 20, there.train_also)
    adapter.continue_from(there.factors, there.whole)
    return model, adapter


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 7},
        {"lora_alpha": 7, "use_rslora": True},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"up_proj": 5}},
        {"modules_to_save": ["model.norm"]},
    ],
    ids=str,
)
def test_a_lora_is_continued_where_it_stands(options: dict[str, Any], tmp_path: Path) -> None:
    _, wanted = saved_lora(tmp_path, **options)
    model, adapter = continued(tmp_path, section())
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    for name, p in adapter.p.items():  # orthonormal where it came from the decomposition, new beside it
        rank = int((adapter.lambda_[name] != 0).sum())
        assert rank == (1 if "rank_pattern" in options and "q_proj" in name else 3)
        torch.testing.assert_close((p.T @ p)[:rank, :rank], torch.eye(rank), rtol=0, atol=1e-5)
        q = adapter.q[name]
        torch.testing.assert_close((q @ q.T)[:rank, :rank], torch.eye(rank), rtol=0, atol=1e-5)
        assert p[:, rank:].detach().std() == pytest.approx(0.02, rel=0.4)


def test_a_lora_of_a_higher_rank_is_refused(tmp_path: Path) -> None:
    saved_lora(tmp_path, rank=6)
    with pytest.raises(LorakitError, match=r"has rank 6, above init_rank 5"):
        continued(tmp_path, section())


def test_an_export_is_continued_where_it_stands(tmp_path: Path) -> None:
    """Zero-padded to one rank, of which the padding is no rank."""
    model = built()
    adapter = attached(model, section(), names=["q_proj", "up_proj"])
    settle(adapter)
    adapter.write(tmp_path, "somewhere")
    other, again = continued(tmp_path, section())
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)
    assert {name: int((part != 0).sum()) for name, part in again.lambda_.items()} == adapter.ranks()


def test_plain_lora_takes_up_an_export(tmp_path: Path) -> None:
    model = built()
    adapter = attached(model, section(), names=["q_proj", "up_proj"])
    settle(adapter)
    adapter.write(tmp_path, "somewhere")
    other = built()
    there = read_adapter(tmp_path, layers_of(other)[0])
    attach(Lora(), other, there.targets, 0).load_state(there.tensors)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)
