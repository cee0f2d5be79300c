"""The oracles of the methods: exact properties that hold whatever the model, each as a named test.

HELD says where each one is held: here, or where its method is tested. The numbers are those of the list that
they were gathered in; C are counts, O properties. G is dL/dW of the whole weight, s = alpha / rank, eta the
learning rate, i and o the sides of a layer. Adapters are lorakit's on its own loop; the other side is plain
torch, numpy or the standard library.
"""

import ast
import math
import re
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorakit import loop, optim
from lorakit.adapters import Adapter, Role, attach
from lorakit.data.batches import Batches
from lorakit.layers import layers_of, matrix_of
from lorakit.merge import merge
from lorakit.recipe.methods import Lora
from lorakit.recipe.optimizer import AdamW
from lorakit.shapes import Layer
from lorakit.targets import Target, select
from lorakit.tasks import Objective
from lorakit.tasks.causal_lm import CausalLmTask
from tests import architectures
from tests.adapters import matrix
from tests.conftest import ROOT
from tests.oracles.test_loop_by_hand import (
    BATCH_SIZE,
    EMBEDDING,
    HIDDEN,
    LAYOUTS,
    SEED,
    SETTINGS,
    TOTAL_STEPS,
    VOCABULARY,
    Lines,
    Toy,
    arrays,
    drive,
    token_data,
)

_HERE, _MATRIX, _COUNT = "oracles/test_methods.py", "adapters/test_matrix.py", "test_count.py"
_ADALORA, _DELTA = "adapters/test_adalora.py", "adapters/test_delta_lora.py"
_INITS, _SOPHIA = "adapters/test_inits.py", "optim/test_sophia.py"
HELD: dict[str, tuple[str, str]] = {  # oracle -> (file below tests/, beginning of the names of its tests)
    "C1-C5, C7": (_COUNT, "test_published_numbers"),
    "C6": (_COUNT, "test_the_methods_of_pefts_benchmark"),
    "C8": (_COUNT, "test_the_table_of_thinking_machines"),
    "C9": (_COUNT, "test_adalora_adds_one_number_per_rank"),
    "C10": ("adapters/test_vera.py", "test_published_counts"),
    "C11": (_ADALORA, "test_the_budgets_are_those_of_the_released_code"),
    "C12": ("adapters/test_eva.py", "test_c12"),
    "C13": (_MATRIX, "test_the_count_is_the_closed_form"),
    "C15": (_HERE, "test_c15"),
    "O1 step 0 is the base": (_MATRIX, "test_step_0_is_the_base"),
    "O2 the base keeps its bits": (_MATRIX, "test_only_the_declared_parameters_move"),
    "O3 merged is attached, in fp32": (_MATRIX, "test_merged_is_attached"),
    "O3 in bf16": (_HERE, "test_o03"),
    "O4 saved is trained": (_MATRIX, "test_what_was_saved_is_what_was_trained"),
    "O4 merged and unmerged": (_HERE, "test_o04"),
    "O5": (_HERE, "test_o05"),
    "O6": (_HERE, "test_o06"),
    "O7": (_HERE, "test_o07"),
    "O8": (_MATRIX, "test_the_count_is_the_closed_form"),
    "O9": (_HERE, "test_o09"),
    "O10 switching": (_HERE, "test_o10"),
    "O10 disabled is the base": (_MATRIX, "test_disabled_is_the_base"),
    "O12 VeRA": ("adapters/test_vera.py", "test_peft_computes_the_same_from_the_export"),
    "O12 AdaLoRA": (_ADALORA, "test_peft_reads_the_export_as_plain_lora"),
    "O13": (_HERE, "test_o13"),
    "O14": (_HERE, "test_o14"),
    "O15": ("adapters/test_lora_fa.py", "test_o15"),
    "O16": (_DELTA, "test_o16"),
    "O17": (_DELTA, "test_o17"),
    "O18": ("adapters/test_dora.py", "test_o18"),
    "O19 masked for good": (_ADALORA, "test_what_is_taken_away_stays_away"),
    "O19 the scale": (_ADALORA, "test_the_scale_stays_that_of_the_initial_rank"),
    "O20": (_SOPHIA, "test_o20"),
    "O22": (_SOPHIA, "test_o22"),
    "O23": (_INITS, "test_o23"),
    "O24": (_INITS, "test_o24"),
    "O25": (_HERE, "test_o25"),
    "O26": ("test_anatomy.py", "test_o26"),
    "O27 in every cell": (_MATRIX, "test_interrupted_is_uninterrupted"),
    "O27 whole runs": ("test_train.py", "test_a_resumed_run_ends_with_the_same_bits"),
    "O28": ("adapters/test_adalora_runs.py", "test_the_penalty_is_in_no_loss_that_is_told"),
    "O29": (
        "oracles/test_layout_changes_nothing.py",
        "test_gradients_and_losses_do_not_depend_on_the_layout",
    ),
    "O30": (_HERE, "test_o30"),
    "O33": (_HERE, "test_o33"),
}
LATER = {  # what today's code has nothing of
    "O11": "sums of adapters",
    "O21": "Sophia-H, which needs second derivatives of every layer",
    "O31": "distillation",
    "O32": "Reptile",
}


def test_no_oracle_is_forgotten() -> None:
    named: set[str] = set()
    for entry in (*HELD, *LATER):
        for kind, first, last in re.findall(r"\b([CO])(\d+)(?:-[CO](\d+))?", entry):
            named |= {f"{kind}{number}" for number in range(int(first), int(last or first) + 1)}
    assert named == {f"O{n}" for n in range(1, 34)} | {f"C{n}" for n in range(1, 14)} | {"C15"}


@pytest.mark.parametrize("oracle", HELD)
def test_every_oracle_is_where_the_table_says(oracle: str) -> None:
    file, beginning = HELD[oracle]
    tree = ast.parse((ROOT / "tests" / file).read_text())
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert any(name.startswith(beginning) for name in names)


# ------------------------------------------------------------------------------------------------------------
# One layer of the toy in fp64


def adapted(rank: int, alpha: float, a: Tensor | None = None, b: Tensor | None = None) -> tuple[Toy, Adapter]:
    """The toy of test_loop_by_hand in fp64 with a LoRA on its first layer; A (R, I) and B (O, R) as given."""
    toy = Toy(arrays()[0])
    target = Target(Layer("linear1", "linear", EMBEDDING, HIDDEN), rank, alpha)
    adapter = attach(Lora(rank=rank, alpha=alpha), toy, [target], seed=0)
    toy.double()
    with torch.no_grad():
        for item, given in zip(adapter.trained(), (a, b), strict=True):
            item.parameter.copy_(item.parameter if given is None else given)
    return toy, adapter


def first_batch() -> Any:
    (micro,) = Batches(token_data(), BATCH_SIZE, SEED, **LAYOUTS["one packed row"]).at(0).micros
    return micro


def loss_of(toy: nn.Module) -> Tensor:
    loss: Tensor = Objective(toy, CausalLmTask())(first_batch())
    return loss


def whole_gradient(weight: Tensor | None = None) -> Tensor:
    """G (O, I) of the toy without an adapter, at its own first weight or at `weight`."""
    toy = Toy(arrays()[0]).double()
    if weight is not None:
        toy.linear1.weight.data = weight.clone()
    toy.linear1.weight.requires_grad_(True)
    loss_of(toy).backward()
    assert toy.linear1.weight.grad is not None
    return toy.linear1.weight.grad


def sgd_step(toy: Toy, adapter: Adapter, lr: float) -> Tensor:
    """s B A after one step of plain gradient descent on A and B together."""
    loss_of(toy).backward()
    a, b = (item.parameter for item in adapter.trained())
    target = adapter.targets[0]
    with torch.no_grad():
        a -= lr * a.grad
        b -= lr * b.grad
    return target.alpha / target.rank * (b @ a).detach()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_o05_without_a_and_b_nothing_moves() -> None:
    """dL/dB = s G A^T and dL/dA = s B^T G: with A = B = 0 both are zero, and the loss stays what it is."""
    toy, adapter = adapted(3, 6.0, torch.zeros(3, EMBEDDING), torch.zeros(HIDDEN, 3))
    before = loss_of(toy).item()
    assert torch.equal(sgd_step(toy, adapter, 1.0), torch.zeros(HIDDEN, EMBEDDING, dtype=torch.float64))
    assert [float(item.parameter.grad.abs().max()) for item in adapter.trained()] == [0.0, 0.0]
    assert loss_of(toy).item() == before


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 6.0), (4, 32.0)])
def test_o06_the_first_sgd_step_is_the_gradient_through_a(rank: int, alpha: float) -> None:
    """At B = 0: dL/dA = 0, and a step of gradient descent moves W by exactly -eta s^2 G A^T A."""
    a = torch.from_numpy(np.random.default_rng(3).normal(size=(rank, EMBEDDING)))
    toy, adapter = adapted(rank, alpha, a, torch.zeros(HIDDEN, rank))
    moved = sgd_step(toy, adapter, lr=0.01)
    assert relative(moved, -0.01 * (alpha / rank) ** 2 * whole_gradient() @ a.T @ a) < 1e-13


def test_o06_gradients_away_from_the_start() -> None:
    """dL/dB = s G A^T and dL/dA = s B^T G, with G at W + s B A."""
    draw = np.random.default_rng(4)
    a, b = (torch.from_numpy(draw.normal(0, 0.4, size=shape)) for shape in ((3, EMBEDDING), (HIDDEN, 3)))
    toy, adapter = adapted(3, 6.0, a, b)
    g = whole_gradient(torch.from_numpy(arrays()[0]["W1"]) + 2.0 * b @ a)
    loss_of(toy).backward()
    of_a, of_b = (item.parameter.grad for item in adapter.trained())
    assert relative(of_a, 2.0 * b.T @ g) < 1e-13
    assert relative(of_b, 2.0 * g @ a.T) < 1e-13


def test_o07_a_square_orthogonal_a_is_full_fine_tuning() -> None:
    """With rank = i and A^T A = I the first step is -eta s^2 G: the direction of full fine-tuning."""
    a = torch.linalg.qr(torch.from_numpy(np.random.default_rng(5).normal(size=(EMBEDDING, EMBEDDING)))).Q
    toy, adapter = adapted(EMBEDDING, 2.0 * EMBEDDING, a, torch.zeros(HIDDEN, EMBEDDING))
    moved, g = sgd_step(toy, adapter, lr=0.01), whole_gradient()
    assert relative(moved, -0.01 * 4.0 * g) < 1e-13
    cosine = float((moved * -g).sum() / (moved.norm() * g.norm()))
    assert cosine == pytest.approx(1.0, abs=1e-14)


# ------------------------------------------------------------------------------------------------------------
# Runs that must be one and the same


def run_of(section: Lora, rank: int, alpha: float) -> tuple[np.ndarray, dict[str, Tensor]]:
    """(losses, A and B at the end) of a run of the toy in fp32, both layers adapted."""
    toy = Toy(arrays()[0])
    targets = [
        Target(Layer("linear1", "linear", EMBEDDING, HIDDEN), rank, alpha),
        Target(Layer("linear2", "linear", HIDDEN, VOCABULARY), rank, alpha),
    ]
    adapter, lines = attach(section, toy, targets, seed=3), Lines()
    drive(toy, adapter, SETTINGS, LAYOUTS["padded rows"], lines)
    return lines.column("loss"), {item.name: item.parameter.detach() for item in adapter.trained()}


@pytest.mark.parametrize("rank", [1, 4])
def test_o09_rank_stabilized_lora_is_lora_with_another_alpha(rank: int) -> None:
    """alpha / sqrt(rank) = (alpha sqrt(rank)) / rank: the same bits in every step (sqrt(4) is exact)."""
    alpha = 6.0
    stabilized = Lora(rank=rank, alpha=alpha, scaling="rank_stabilized")
    losses, final = run_of(stabilized, rank, alpha)
    others, same = run_of(Lora(rank=rank, alpha=alpha * math.sqrt(rank)), rank, alpha * math.sqrt(rank))
    assert np.array_equal(losses, others)
    assert all(torch.equal(tensor, same[name]) for name, tensor in final.items())
    if rank > 1:
        plain, _ = run_of(Lora(rank=rank, alpha=alpha), rank, alpha)
        assert not np.array_equal(losses, plain)


def test_o13_b_learns_lambda_times_as_fast_as_a_in_every_step() -> None:
    """LoRA+: lr_B / lr_A = lambda exactly, through warm-up and cosine."""
    _, adapter = adapted(3, 6.0)
    optimizer = optim.build(AdamW(lr=3e-3, lr_ratio="lora+"), adapter.trained())
    roles = {id(item.parameter): item.role for item in adapter.trained()}
    for step in range(TOTAL_STEPS):
        optim.set_lr(optimizer, optim.lr_at(step, "cosine", 3e-3, 4, TOTAL_STEPS))
        found = {roles[id(group["params"][0])]: group["lr"] for group in optimizer.param_groups}
        assert found[Role.B] == 4 * found[Role.A] > 0


def adam_run(alpha: float, times_a: float, times_b: float, lr_a: float, lr_b: float) -> np.ndarray:
    """Losses in fp64 with Adam of eps = 0, no decay, no clipping; A and B start `times` as large."""
    draw = np.random.default_rng(6)
    a, b = (torch.from_numpy(draw.normal(0, 0.4, size=shape)) for shape in ((3, EMBEDDING), (HIDDEN, 3)))
    toy, adapter = adapted(3, alpha, times_a * a, times_b * b)
    groups = optim.groups(adapter.trained(), 0.0, lr_b / lr_a)
    lines = Lines()
    loop.run(
        objective=Objective(toy, CausalLmTask()),
        adapter=adapter,
        optimizer=torch.optim.AdamW(groups, lr=lr_a, eps=0.0, weight_decay=0.0),
        batch_at=Batches(token_data(), BATCH_SIZE, SEED, **LAYOUTS["one packed row"]).at,
        lr_at=lambda step: optim.lr_at(step, "cosine", lr_a, 4, TOTAL_STEPS),
        evaluate=None,
        observer=lines,
        state=loop.TrainState(),
        cadence=loop.Cadence(
            log=1, evaluate=1, checkpoint=1000, evaluate_at_start=False, early_stopping=None
        ),
        total_steps=TOTAL_STEPS,
        seed=0,
        max_grad_norm=None,
        device=torch.device("cpu"),
    )
    return lines.column("loss")


def test_o14_adam_does_not_see_how_the_scale_is_spread() -> None:
    """With eps = 0 a run is the same under alpha -> alpha / (p q), A -> p A, lr_A -> p lr_A, B -> q B, lr_B
    -> q lr_B: LoRA+ is one coordinate of a family. Powers of two round nothing: the same losses to the bit.
    """
    plain = adam_run(16.0, 1, 1, 1e-2, 1e-2)
    assert np.array_equal(plain, adam_run(4.0, 1, 4, 1e-2, 4e-2))  # LoRA(16, lr) is LoRA+(4, lr, ratio 4)
    assert np.array_equal(plain, adam_run(8.0, 2, 1, 2e-2, 1e-2))
    assert np.array_equal(plain, adam_run(2.0, 2, 4, 2e-2, 4e-2))
    assert not np.array_equal(plain, adam_run(4.0, 1, 1, 1e-2, 1e-2))
    assert plain[-1] < 0.9 * plain[0]


def test_o10_switching_adapters_forth_and_back_leaves_no_trace() -> None:
    """a, b, a again: the logits of a to the bit."""
    model, adapter = on_llama(4, 8.0)
    states = []
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        states.append({n: torch.randn(t.shape, generator=draw) * 0.1 for n, t in adapter.state().items()})
    found = []
    for state in (states[0], states[1], states[0]):
        adapter.load_state(state)
        found.append(logits(model))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


# ------------------------------------------------------------------------------------------------------------
# A small Llama

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, architectures.VOCABULARY, (8, 16)))


def on_llama(rank: int, alpha: float, scaling: str = "standard", seed: int = 0) -> tuple[Any, Adapter]:
    model = architectures.build(architectures.CONFIGS["llama"]()).requires_grad_(False)
    targets = [Target(layer, rank, alpha) for layer in select(layers_of(model)[0], "all-linear")[0]]
    return model, attach(Lora(rank=rank, scaling=scaling), model, targets, seed=seed)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def test_o04_merged_and_unmerged_is_the_base_to_rounding() -> None:
    """PEFT folds the adapter in and out of the model that lorakit attached it to: W to 1e-6 in fp32."""
    model, adapter = on_llama(4, 8.0)
    with torch.no_grad():
        for item in adapter.trained():
            item.parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(7))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached = logits(model)
    adapter.peft.merge_adapter()  # type: ignore[attr-defined]
    assert (logits(model) - attached).abs().max() <= 1e-5 * attached.abs().max()
    moved = max(float((t - before[n]).abs().max()) for n, t in model.state_dict().items())
    assert moved > 0.01
    adapter.peft.unmerge_adapter()  # type: ignore[attr-defined]
    assert max(float((t - before[n]).abs().max()) for n, t in model.state_dict().items()) <= 1e-6


def learned(rank: int, scaling: str) -> float:
    """How far the loss has come down after eight steps of Adam, alpha = 32 whatever the rank."""
    model, adapter = on_llama(rank, 32.0, scaling)
    optimizer = torch.optim.AdamW([item.parameter for item in adapter.trained()], lr=1e-4, weight_decay=0.0)
    losses = []
    for _ in range(9):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0] - losses[-1]


def test_o25_the_start_of_a_run_does_not_depend_on_the_rank() -> None:
    """With alpha fixed, s = alpha / rank, Adam moves each of rank directions alike and W by their mean: ranks
    4, 16 and 32 begin with the same losses. With alpha / sqrt(rank) they do not: 16 goes twice as far as 4.
    """
    of_4, of_16, of_32 = (learned(rank, "standard") for rank in (4, 16, 32))
    assert of_16 == pytest.approx(of_4, rel=0.1)
    assert of_32 == pytest.approx(of_4, rel=0.1)
    ratio = learned(16, "rank_stabilized") / learned(4, "rank_stabilized")
    assert ratio == pytest.approx(2.0, rel=0.2)


def test_o33_a_starts_kaiming_uniform() -> None:
    """kaiming_uniform(a = sqrt(5)): |A| <= 1 / sqrt(i) and var(A) = 1 / (3 i). Over n draws of a uniform the
    relative deviation of the variance is sqrt(0.8 / n)."""
    toy = Toy(arrays()[0])
    toy.linear1 = nn.Linear(512, HIDDEN, bias=False)
    adapter = attach(Lora(rank=64), toy, [Target(Layer("linear1", "linear", 512, HIDDEN), 64, 1.0)], seed=1)
    a = adapter.trained()[0].parameter.detach().double()
    assert a.shape == (64, 512)
    assert a.abs().max() <= 1 / math.sqrt(512)
    assert a.abs().max() > 0.999 / math.sqrt(512)
    assert float(a.pow(2).mean()) == pytest.approx(1 / (3 * 512), rel=3 * math.sqrt(0.8 / a.numel()))
    assert not adapter.trained()[1].parameter.any()


# ------------------------------------------------------------------------------------------------------------
# Held in few bits


def nf4_codes() -> np.ndarray:
    """The sixteen levels from the definition: quantiles of a normal distribution, eight above zero and seven
    below it, from the outermost at 1 - (1/32 + 1/30) / 2, divided by the largest. QLoRA, appendix E."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    above = quantile(np.linspace(outermost, 0.5, 9)[:-1])
    below = -quantile(np.linspace(outermost, 0.5, 8)[:-1])
    codes = np.sort(np.concatenate([above, below, [0.0]]))
    found: np.ndarray = codes / codes.max()
    return found


def nf4_layer(weight: Tensor) -> Any:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compress_statistics=False
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    return layer.to("cpu")


def test_c15_the_codes_of_nf4() -> None:
    """What bitsandbytes makes of a matrix of ones and zeros and what lies between, against the definition."""
    codes = torch.from_numpy(nf4_codes())
    layer = nf4_layer(codes.float().repeat(4).repeat(8, 1))
    found = matrix_of(layer).double().unique()
    assert len(found) == 16
    assert float((found - codes).abs().max()) < 2e-7
    assert found[1].item() == pytest.approx(-0.6961928009986877, abs=1e-7)  # as printed in the paper
    assert found[8].item() == pytest.approx(0.07958029955625534, abs=1e-7)


@pytest.mark.parametrize("scale", [1.0, 0.037, 12.5])
def test_o30_codes_times_a_constant_survive_four_bits_exactly(scale: float) -> None:
    """A block of 64 that holds nothing but codes times its largest entry is itself again, to the bit."""
    layer = nf4_layer(torch.from_numpy(nf4_codes()).float().repeat(4).repeat(8, 1))
    exact = matrix_of(layer)  # the codes as bitsandbytes has them, in fp32
    draw = torch.Generator().manual_seed(0)
    weight = torch.stack([row[torch.randperm(64, generator=draw)] for row in exact]) * scale
    assert torch.equal(matrix_of(nf4_layer(weight)), weight)


def test_o03_a_merge_rounded_to_bf16_is_within_2_percent_and_one_into_4_bits_is_not(tmp_path: Path) -> None:
    """The price of rounding the sum of base and adapter, in logits, relative to the largest of them. This is
    why an adapter of a 4-bit base is not folded back into 4 bits."""
    folder = tmp_path / "bases"
    folder.mkdir()
    matrix.make_bases(folder)
    run = matrix.Attached(matrix.Cell("lora", "linear", "fp32"), matrix.Bench(folder)).train()
    run.save(tmp_path / "adapter")
    wanted = run.final_logits

    def off(load: Any) -> float:
        model = load(tmp_path / "merged").eval()
        with torch.no_grad():
            found = model(input_ids=matrix.IDS, use_cache=False).logits
        return float((found - wanted).abs().max() / wanted.abs().max())

    merge(tmp_path / "adapter", tmp_path / "merged", dtype="bf16")
    plain = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    assert 0 < off(plain) <= 0.02

    def in_4_bits(place: Path) -> Any:
        model = plain(place)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.data = matrix_of(nf4_layer(module.weight.data))
        return model

    assert off(in_4_bits) > 0.1
