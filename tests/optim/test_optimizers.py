"""Ten steps of every optimizer against its formulas in numpy and fp64, through lorakit's groups and sections.

Gradients are drawn, not computed: what is tried is the update. B learns at its own rate, matrices alone
decay, the learning rate changes from step to step, and one parameter has no gradient in some steps, the first
among them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakit import optim
from lorakit.adapters import Role, Trained
from lorakit.recipe.optimizer import OPTIMIZERS, Mover

STEPS = 10
SHAPES = {
    "a": (Role.A, (3, 5)),
    "b": (Role.B, (4, 3)),
    "sizes": (Role.SCALE, (3, 1)),
    "bias": (Role.FULL, (7,)),
    "experts": (Role.FULL, (2, 3, 4)),
    "now and then": (Role.A, (2, 2)),
}
LR_RATIO, DECAY = 4.0, 0.1
RATES = [0.01 * (1 + step % 3) for step in range(STEPS)]
FIELDS: dict[str, dict[str, Any]] = {  # other than the defaults, so that a field that is not passed on shows
    "adamw": {"betas": (0.7, 0.9), "eps": 1e-3},
    "sgd": {"momentum": 0.8},
    "adafactor": {"beta2_decay": -0.6, "eps2": 0.3},
    "lion": {"betas": (0.7, 0.95)},
    "sophia": {"betas": (0.7, 0.9), "rho": 0.05, "every": 3, "eps": 1e-6},
}
Array = np.ndarray


# ------------------------------------------------------------------------------------------------------------
# The formulas. Each returns the parameter after the step; `state` is the formula's own.


def adamw(x: Array, g: Array, state: dict[str, Any], lr: float, decay: float, s: Any) -> Array:
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = s.betas[0] * state.get("m", 0.0) + (1 - s.betas[0]) * g
    v = state["v"] = s.betas[1] * state.get("v", 0.0) + (1 - s.betas[1]) * g**2
    mean, square = m / (1 - s.betas[0] ** t), v / (1 - s.betas[1] ** t)
    return x * (1 - lr * decay) - lr * mean / (np.sqrt(square) + s.eps)


def sgd(x: Array, g: Array, state: dict[str, Any], lr: float, decay: float, s: Any) -> Array:
    g = g + decay * x
    u = state["u"] = s.momentum * state["u"] + g if "u" in state else g
    return x - lr * (g + s.momentum * u if s.nesterov else u)


def adafactor(x: Array, g: Array, state: dict[str, Any], lr: float, decay: float, s: Any) -> Array:
    """Shazeer and Stern, algorithms 4 and 5, without momentum; sums as means, which cancel."""
    t = state["t"] = state.get("t", 0) + 1
    new = t**s.beta2_decay
    size = max(s.eps2, np.sqrt((x**2).mean()))
    if g.ndim > 1:
        rows = state["rows"] = (1 - new) * state.get("rows", 0.0) + new * (g**2).mean(-1, keepdims=True)
        columns = state["columns"] = (1 - new) * state.get("columns", 0.0) + new * (g**2).mean(
            -2, keepdims=True
        )
        square = rows * columns / rows.mean(-2, keepdims=True)
    else:
        square = state["v"] = (1 - new) * state.get("v", 0.0) + new * g**2
    update = g / np.sqrt(square)
    update = update / max(1.0, np.sqrt((update**2).mean()))
    return x * (1 - lr * decay) - size * min(lr, 1 / np.sqrt(t)) * update


def lion(x: Array, g: Array, state: dict[str, Any], lr: float, decay: float, s: Any) -> Array:
    m = state.get("m", np.zeros_like(x))
    state["m"] = s.betas[1] * m + (1 - s.betas[1]) * g
    return x * (1 - lr * decay) - lr * np.sign(s.betas[0] * m + (1 - s.betas[0]) * g)


def sophia(x: Array, g: Array, state: dict[str, Any], lr: float, decay: float, s: Any) -> Array:
    """Liu et al., algorithm 3; the curvature is taken in by `estimated`."""
    m = state["m"] = s.betas[0] * state.get("m", 0.0) + (1 - s.betas[0]) * g
    ratio = m / np.maximum(s.rho * state.get("h", np.zeros_like(x)), s.eps)
    state["clipped"] = int((np.abs(ratio) >= 1).sum())
    return x * (1 - lr * decay) - lr * np.clip(ratio, -1, 1)


def estimated(g: Array, state: dict[str, Any], num_targets: int, s: Any) -> None:
    state["h"] = s.betas[1] * state.get("h", 0.0) + (1 - s.betas[1]) * num_targets * g**2


BY_HAND: dict[str, Callable[..., Array]] = {
    "adamw": adamw,
    "adamw_8bit": adamw,
    "paged_adamw_8bit": adamw,
    "sgd": sgd,
    "adafactor": adafactor,
    "lion": lion,
    "sophia": sophia,
}
EIGHT_BITS = [name for name in OPTIMIZERS if name.endswith("_8bit")]


def test_every_optimizer_has_its_formula_here() -> None:
    assert BY_HAND.keys() == OPTIMIZERS.keys() == optim.OPTIMIZERS.keys()
    assert FIELDS.keys() == OPTIMIZERS.keys() - set(EIGHT_BITS)


# ------------------------------------------------------------------------------------------------------------
# Ten steps


def section_of(name: str, **more: Any) -> Mover:
    fields = {"weight_decay": DECAY, "lr_ratio": LR_RATIO} | FIELDS.get(name, {}) | more
    return OPTIMIZERS[name].section(name=name, **fields)


def moved(name: str, step: int) -> bool:
    """Whether a parameter has a gradient: one has none in the first step, and now and then."""
    return name != "now and then" or step % 3 != 0


class Run:
    """Parameters and drawn gradients, by lorakit in `dtype` and by hand in fp64."""

    def __init__(self, section: Any, dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> None:
        self.section = section
        draw = np.random.default_rng(0)
        self.by_hand = {name: draw.normal(0, 0.5, shape) for name, (_, shape) in shapes.items()}
        self.by_hand["b"][:] = 0  # as LoRA's starts
        self.trained = [
            Trained(name, nn.Parameter(torch.from_numpy(self.by_hand[name].copy()).to(dtype)), role)
            for name, (role, _) in shapes.items()
        ]
        self.states: dict[str, dict[str, Any]] = {name: {} for name in shapes}
        self.optimizer = optim.build(section, self.trained)
        self.gradients = np.random.default_rng(1)

    def give(self, step: int, size: float) -> dict[str, Array]:
        """Gradients into lorakit's parameters, and what they are."""
        given = {}
        for item in self.trained:
            g = self.gradients.normal(0, size, item.parameter.shape)
            g = torch.from_numpy(g).to(item.parameter.dtype)
            absent = not moved(item.name, step)
            item.parameter.grad = None if absent else g
            if not absent:
                given[item.name] = g.double().numpy()
        return given

    def step(self, step: int) -> None:
        section, rate = self.section, RATES[step]
        optim.set_lr(self.optimizer, rate)
        if section.name == "sophia":
            assert optim.estimates_at(self.optimizer, step) == (step % section.every == 0)
        if optim.estimates_at(self.optimizer, step):
            for name, g in self.give(step, 0.8).items():
                estimated(g, self.states[name], 40, section)
            optim.estimate(self.optimizer, 40)
            assert all(item.parameter.grad is None for item in self.trained)
        given = self.give(step, 0.3)
        for item in self.trained:
            if item.name not in given:
                continue
            name, x = item.name, self.by_hand[item.name]
            lr = rate * (section.lr_ratio if item.role is Role.B else 1.0)
            decay = section.weight_decay if x.ndim > 1 and item.role is not Role.SCALE else 0.0
            formula = BY_HAND[section.name]
            self.by_hand[name] = formula(x, given[name], self.states[name], lr, decay, section)
        self.optimizer.step()

    def off(self) -> float:
        """Largest difference of a parameter from the formula's."""
        return max(
            float(np.abs(item.parameter.detach().double().numpy() - self.by_hand[item.name]).max())
            for item in self.trained
        )


VARIANTS = [(name, {}) for name in FIELDS]
VARIANTS += [("sgd", {"momentum": 0.0}), ("sgd", {"nesterov": True}), ("adafactor", {"eps2": 1.0})]
VARIANTS += [("sophia", {"every": 1}), ("adamw", {"weight_decay": 0.0, "lr_ratio": 1.0})]


@pytest.mark.parametrize(("name", "more"), VARIANTS, ids=str)
def test_ten_steps_are_the_formulas(name: str, more: dict[str, Any]) -> None:
    run = Run(section_of(name, **more))
    for step in range(STEPS):
        run.step(step)
        if name == "sophia":
            clipped = sum(state.get("clipped", 0) for n, state in run.states.items() if moved(n, step))
            numbers = sum(array.size for n, array in run.by_hand.items() if moved(n, step))
            assert optim.measures(run.optimizer)["clipped_share"] == clipped / numbers
            assert 0 < clipped < numbers  # some of both
    assert run.off() <= 1e-12


def test_only_sophia_has_something_to_say() -> None:
    for name in FIELDS.keys() - {"sophia"}:
        run = Run(section_of(name))
        run.step(0)
        assert optim.measures(run.optimizer) == {}


@pytest.mark.parametrize("name", FIELDS)
def test_ten_steps_in_fp32_are_the_formulas_to_rounding(name: str) -> None:
    run = Run(section_of(name), torch.float32)
    for step in range(STEPS):
        run.step(step)
    assert run.off() <= 1e-5
    assert {item.parameter.dtype for item in run.trained} == {torch.float32}


def test_nothing_of_the_parameter_counts_where_steps_are_absolute() -> None:
    """Adafactor with eps2 of 1 on parameters smaller than that: the same step wherever it starts."""
    steps = []
    for start in (0.0, 0.7):
        item = Trained("w", nn.Parameter(torch.full((3, 4), start)), Role.B)
        optimizer = optim.build(section_of("adafactor", eps2=1.0, weight_decay=0.0, lr_ratio=1.0), [item])
        item.parameter.grad = torch.arange(1.0, 13.0).reshape(3, 4)
        optim.set_lr(optimizer, 0.01)
        optimizer.step()
        steps.append(item.parameter.detach() - start)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-5, atol=1e-7)
    assert float(steps[0].pow(2).mean().sqrt()) == pytest.approx(0.01, rel=0.05)


# ------------------------------------------------------------------------------------------------------------
# In 8 bits

WIDE = {"a": (Role.A, (16, 512)), "b": (Role.B, (640, 16)), "small": (Role.A, (63, 65))}


def test_what_is_small_stays_in_32_bits_and_is_the_formula() -> None:
    """Below 4096 numbers there is nothing to tell apart from AdamW, on a CPU as on a GPU."""
    run = Run(section_of("adamw_8bit"), torch.float32)
    for step in range(STEPS):
        run.step(step)
    assert run.off() <= 1e-5
    kinds = {t.dtype for t in optim.state(run.optimizer, run.trained).values() if t.dim()}
    assert kinds == {torch.float32}


@pytest.fixture(scope="module")
def wide() -> Run:
    """Ten steps on parameters that are held in 8 bits, and one that is too small for it."""
    run = Run(section_of("adamw_8bit"), torch.float32, WIDE)
    run.start = {name: array.copy() for name, array in run.by_hand.items()}  # type: ignore[attr-defined]
    for step in range(STEPS):
        run.step(step)
    return run


def test_8_bits_follow_adamw_within_their_rounding(wide: Run) -> None:
    """Each of the two means of a block of 256 is one of 256 values, relative to the largest of the block: a
    few percent of an update, none of it on average."""
    for item in wide.trained:
        found = item.parameter.detach().double().numpy() - wide.start[item.name]  # type: ignore[attr-defined]
        wanted = wide.by_hand[item.name] - wide.start[item.name]  # type: ignore[attr-defined]
        off = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert off < (1e-5 if item.name == "small" else 0.03), f"{item.name}: {off}"
        assert item.name == "small" or off > 1e-4  # it is rounded
        slope = (found * wanted).sum() / (wanted * wanted).sum()
        assert slope == pytest.approx(1, abs=0.01)


def test_the_two_means_are_those_of_adam_rounded(wide: Run) -> None:
    """Read out of the bytes by hand: code times the largest of its block."""
    tensors = optim.state(wide.optimizer, wide.trained)
    for name in ("a", "b"):
        for number, key in ((1, "m"), (2, "v")):
            codes, table, largest = (
                tensors[f"{part}{number}|{name}"] for part in ("state", "qmap", "absmax")
            )
            assert (codes.dtype, table.dtype, largest.dtype) == (torch.uint8, torch.float32, torch.float32)
            held = table[codes.long()].flatten() * largest.repeat_interleave(256)[: codes.numel()]
            wanted = wide.states[name][key].flatten()
            assert np.linalg.norm(held.double().numpy() - wanted) / np.linalg.norm(wanted) < 0.03


# ------------------------------------------------------------------------------------------------------------
# State


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("paged")])
def test_what_is_saved_is_all_there_is(name: str, tmp_path: Any) -> None:
    """Through a file, as a checkpoint has it: three more steps give the same bits."""
    from safetensors.torch import load_file

    from lorakit.adapters import write_tensors

    first = Run(section_of(name), torch.float32, WIDE)
    for step in range(4):
        first.step(step)
    saved = optim.state(first.optimizer, first.trained)
    write_tensors(tmp_path / "optimizer.safetensors", saved)
    second = Run(section_of(name), torch.float32, WIDE)
    for item, other in zip(second.trained, first.trained, strict=True):
        item.parameter.data.copy_(other.parameter.data)
    optim.load_state(second.optimizer, second.trained, load_file(tmp_path / "optimizer.safetensors"))
    second.gradients = np.random.default_rng(2)
    first.gradients = np.random.default_rng(2)
    for step in range(4, 7):
        first.step(step)
        second.step(step)
    for one, two in zip(first.trained, second.trained, strict=True):
        assert torch.equal(one.parameter, two.parameter), one.name
    states = [optim.state(run.optimizer, run.trained) for run in (first, second)]
    assert states[0].keys() == states[1].keys()
    for label, tensor in states[0].items():
        assert tensor.dtype == states[1][label].dtype
        assert torch.equal(tensor, states[1][label]), label
    kinds = [
        {key: type(value) for key, value in run.optimizer.state[run.trained[0].parameter].items()}
        for run in (first, second)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("paged")])
@pytest.mark.parametrize("shapes", [SHAPES, WIDE], ids=["small", "wide"])
def test_the_registry_knows_how_large_the_state_is(name: str, shapes: Any) -> None:
    """To the byte, but for step counts."""
    run = Run(section_of(name), torch.float32, shapes)
    for step in range(3):
        run.step(step)
    found = optim.state(run.optimizer, run.trained)
    held = sum(t.numel() * t.element_size() for label, t in found.items() if not label.startswith("step|"))
    traits = OPTIMIZERS[name]
    assert held == sum(traits.state_bytes(run.section, shape) for _, shape in shapes.values())


def test_what_is_paged_is_asked_of_bitsandbytes_again() -> None:
    """A state that is read from a file lies where paging can reach it: in memory of bitsandbytes' own making,
    which on a CPU it takes from PyTorch with a warning."""
    section = section_of("paged_adamw_8bit")
    runs = []
    with pytest.warns(UserWarning, match="[Pp]aged"):
        for _ in range(2):
            runs.append(Run(section, torch.float32, WIDE))
            runs[-1].step(0)
        first, second = runs
        buffers: list[Tensor] = []
        take = second.optimizer.get_state_buffer  # type: ignore[attr-defined]
        second.optimizer.get_state_buffer = lambda *a, **b: (buffers.append(take(*a, **b)), buffers[-1])[1]  # type: ignore[attr-defined]
        optim.load_state(second.optimizer, second.trained, optim.state(first.optimizer, first.trained))
    held = optim.state(second.optimizer, second.trained)
    states = [tensor for label, tensor in held.items() if label.startswith("state")]
    assert len(states) == len(buffers) == 2 * len(WIDE)
    assert {t.data_ptr() for t in states} == {t.data_ptr() for t in buffers}
    for label, tensor in optim.state(first.optimizer, first.trained).items():
        assert torch.equal(tensor, held[label]), label


def test_sgd_without_momentum_has_no_state() -> None:
    run = Run(section_of("sgd", momentum=0.0))
    run.step(0)
    assert optim.state(run.optimizer, run.trained) == {}
    assert OPTIMIZERS["sgd"].state_bytes(run.section, (3, 4)) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_are_those_of_the_papers(name: str) -> None:
    section: Any = OPTIMIZERS[name].section(name=name)
    betas = {"lion": (0.9, 0.99), "sophia": (0.965, 0.99)}.get(name, (0.9, 0.999))
    assert getattr(section, "betas", betas) == betas
    assert (section.weight_decay, section.lr_ratio, section.max_grad_norm) == (0.0, 1.0, 1.0)
    if name == "sophia":
        assert (section.rho, section.every, section.eps) == (0.04, 10, 1e-12)
