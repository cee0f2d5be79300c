"""The training loop against lora_by_hand: losses, gradient norms and the adapter, over all steps of a run.

Everything that lorakit adds to a forward pass takes part: attach, the batch plan with a partial last batch,
masks, the division by trained tokens, clipping, the optimizer's groups, the schedule. The rank and alpha of
the two layers differ.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakit import loop, optim
from lorakit.adapters import Adapter, attach
from lorakit.data.batches import Batches, order
from lorakit.data.tokens import TokenData
from lorakit.recipe.methods import Lora
from lorakit.recipe.optimizer import AdamW
from lorakit.shapes import Layer
from lorakit.targets import Target
from lorakit.tasks import Objective
from lorakit.tasks.causal_lm import CausalLmTask
from tests.oracles import lora_by_hand
from tests.samples import made

VOCABULARY, EMBEDDING, HIDDEN = 13, 6, 8
RANK1, RANK2 = 3, 2
BATCH_SIZE, EPOCHS, SEED = 3, 7, 5
TOTAL_STEPS = 3 * EPOCHS
SETTINGS = lora_by_hand.Settings(
    alpha1=6.0,
    alpha2=5.0,
    lr=2e-2,
    lr_ratio=1.0,
    warmup_steps=4,
    weight_decay=0.1,
    max_grad_norm=1.7,
    beta1=0.8,
    beta2=0.95,
)
# Seven samples: two whole batches of three and one of a single sample in every epoch.
LENGTHS = (2, 9, 5, 3, 12, 4, 7)
TRAINED = ("01", "001101111", "01111", "001", "000000110001", "0101", "0111110")
LAYOUTS = {
    "one packed row": {"micro_batch_tokens": 1000, "packing": True},
    "packed rows of 12": {"micro_batch_tokens": 12, "packing": True},
    "padded rows": {"micro_batch_tokens": 20, "packing": False},
}


class Toy(nn.Module):
    """The toy of lora_by_hand with the face of a transformers model."""

    def __init__(self, frozen: lora_by_hand.Arrays) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, EMBEDDING)
        self.places = nn.Embedding(max(LENGTHS), EMBEDDING)
        self.linear1 = nn.Linear(EMBEDDING, HIDDEN, bias=False)
        self.linear2 = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        for name, module in self.frozen().items():
            module.weight.data = torch.from_numpy(frozen[name]).float()
        self.requires_grad_(False)

    def frozen(self) -> dict[str, Any]:
        """The modules that hold the frozen arrays of lora_by_hand."""
        return {"E": self.embed, "P": self.places, "W1": self.linear1, "W2": self.linear2}

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_lengths: tuple[int, ...] | None = None,
        logits_to_keep: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        if position_ids is None:  # as transformers counts, which is wrong for a row of several documents
            position_ids = torch.arange(input_ids.shape[1])[None] % max(LENGTHS)
        hidden = torch.tanh(self.linear1(self.embed(input_ids) + self.places(position_ids)))
        if logits_to_keep is not None:
            hidden = hidden[:, logits_to_keep]
        return SimpleNamespace(logits=self.linear2(hidden))

    def prepare_inputs_for_generation(self, *inputs: Any, **options: Any) -> None:
        """PEFT asks for it when it wraps a causal language model; nothing here generates."""
        raise NotImplementedError


class Lines:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.checkpoints: list[int] = []

    def stepped(self, state: loop.TrainState) -> None:
        pass

    def metrics(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def best(self, state: loop.TrainState) -> None:
        raise AssertionError("there is no evaluation in these runs")

    def checkpoint(self, state: loop.TrainState) -> None:
        self.checkpoints.append(state.step)

    def column(self, name: str) -> np.ndarray:
        return np.array([line[name] for line in self.lines])


def arrays() -> tuple[lora_by_hand.Arrays, lora_by_hand.Arrays]:
    """(frozen, start), all exact in fp32, so that the fp32 run starts from the same numbers. B is not zero,
    so that A has gradients in the first step already."""
    draw = np.random.default_rng(1)
    shapes = {
        "E": (VOCABULARY, EMBEDDING),
        "P": (max(LENGTHS), EMBEDDING),
        "W1": (HIDDEN, EMBEDDING),
        "W2": (VOCABULARY, HIDDEN),
        "A1": (RANK1, EMBEDDING),
        "B1": (HIDDEN, RANK1),
        "A2": (RANK2, HIDDEN),
        "B2": (VOCABULARY, RANK2),
    }
    spread = {"E": 1.0, "P": 0.5, "W1": 0.5, "W2": 0.5, "A1": 0.4, "B1": 0.3, "A2": 0.4, "B2": 0.3}
    made = {name: draw.normal(0, spread[name], shape) for name, shape in shapes.items()}
    exact = {name: array.astype(np.float32).astype(np.float64) for name, array in made.items()}
    return {n: exact[n] for n in ("E", "P", "W1", "W2")}, {n: exact[n] for n in ("A1", "B1", "A2", "B2")}


def token_data() -> TokenData:
    draw = np.random.default_rng(2)
    ids = draw.integers(0, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    weights = np.array([int(mark) for mark in "".join(TRAINED)], dtype=np.uint8)
    return made(ids, weights, np.cumsum([0, *LENGTHS]))


def documents_of_steps(data: TokenData) -> list[list[lora_by_hand.Document]]:
    """The permutation of each epoch cut in threes, the last step with the one that is left."""
    steps = []
    for epoch in range(EPOCHS):
        a, b, c, d, e, f, g = (data.sample(sample) for sample in order(data.parts, SEED, epoch))
        steps += [[a, b, c], [d, e, f], [g]]
    return steps


def adapted_toy(dtype: torch.dtype) -> tuple[Toy, Adapter, dict[str, nn.Parameter]]:
    """(the toy with its adapter, the adapter, A1, B1, A2 and B2 as lorakit trains them)."""
    frozen, start = arrays()
    toy = Toy(frozen)
    targets = [
        Target(Layer("linear1", "linear", EMBEDDING, HIDDEN), RANK1, SETTINGS.alpha1),
        Target(Layer("linear2", "linear", HIDDEN, VOCABULARY), RANK2, SETTINGS.alpha2),
    ]
    adapter = attach(Lora(rank=RANK1, alpha=SETTINGS.alpha1), toy, targets, seed=0)
    for parameter in toy.parameters():
        parameter.data = parameter.data.to(dtype)
    ours = {item.role.value + item.name.split(".")[0][-1]: item.parameter for item in adapter.trained()}
    assert ours.keys() == start.keys()
    for name, parameter in ours.items():
        assert parameter.shape == start[name].shape
        parameter.data.copy_(torch.from_numpy(start[name]))
    return toy, adapter, ours


def drive(
    toy: Toy, adapter: Any, settings: lora_by_hand.Settings, layout: dict[str, Any], lines: Lines
) -> loop.Outcome:
    """lorakit's loop over the toy: what an oracle's own loop is compared with."""
    section = AdamW(
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        lr_ratio=settings.lr_ratio,
    )
    return loop.run(
        objective=Objective(toy, CausalLmTask()),
        adapter=adapter,
        optimizer=optim.build(section, adapter.trained()),
        batch_at=Batches(token_data(), BATCH_SIZE, SEED, **layout).at,
        lr_at=lambda step: optim.lr_at(step, "cosine", settings.lr, settings.warmup_steps, TOTAL_STEPS),
        evaluate=None,
        observer=lines,
        state=loop.TrainState(),
        cadence=loop.Cadence(
            log=1, evaluate=1, checkpoint=1000, evaluate_at_start=False, early_stopping=None
        ),
        total_steps=TOTAL_STEPS,
        seed=0,
        max_grad_norm=settings.max_grad_norm,
        device=torch.device("cpu"),
    )


def train_with_lorakit(
    settings: lora_by_hand.Settings, dtype: torch.dtype, layout: dict[str, Any]
) -> tuple[Lines, Toy, dict[str, nn.Parameter]]:
    """The run of lora_by_hand.train through lorakit's loop."""
    toy, adapter, ours = adapted_toy(dtype)
    lines = Lines()
    outcome = drive(toy, adapter, settings, layout, lines)
    assert outcome == "finished"
    assert lines.checkpoints == [TOTAL_STEPS]
    return lines, toy, ours


def by_hand(settings: lora_by_hand.Settings) -> tuple[np.ndarray, np.ndarray, lora_by_hand.Arrays]:
    losses, norms, final = lora_by_hand.train(*arrays(), documents_of_steps(token_data()), settings)
    return np.array(losses), np.array(norms), final


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("lr_ratio", [1.0, 4.0])
def test_a_run_in_fp64_equals_the_formulas(lr_ratio: float, layout: dict[str, Any]) -> None:
    settings = replace(SETTINGS, lr_ratio=lr_ratio)
    losses, norms, final = by_hand(settings)
    lines, toy, ours = train_with_lorakit(settings, torch.float64, layout)

    np.testing.assert_allclose(lines.column("loss"), losses, rtol=0, atol=1e-9)
    np.testing.assert_allclose(lines.column("grad_norm"), norms, rtol=0, atol=1e-9)
    for name, expected in final.items():
        error = np.linalg.norm(ours[name].detach().numpy() - expected) / np.linalg.norm(expected)
        assert error < 1e-9, f"{name} is off by {error:.1e}"
    for name, module in toy.frozen().items():
        assert np.array_equal(module.weight.detach().numpy(), arrays()[0][name]), f"{name} moved"


@pytest.mark.parametrize("lr_ratio", [1.0, 4.0])
def test_a_run_in_fp32_equals_the_formulas_to_rounding(lr_ratio: float) -> None:
    settings = replace(SETTINGS, lr_ratio=lr_ratio)
    losses, _, _ = by_hand(settings)
    lines, _, ours = train_with_lorakit(settings, torch.float32, LAYOUTS["packed rows of 12"])

    assert {parameter.dtype for parameter in ours.values()} == {torch.float32}
    np.testing.assert_allclose(lines.column("loss"), losses, rtol=1e-5)


def test_the_lines_of_a_run_say_where_it_is() -> None:
    """Steps from 1, the learning rate of A, and all tokens of the steps so far, the partial ones included."""
    lines, _, _ = train_with_lorakit(SETTINGS, torch.float64, LAYOUTS["one packed row"])
    steps = documents_of_steps(token_data())

    assert lines.column("step").tolist() == list(range(1, TOTAL_STEPS + 1))
    expected = [lora_by_hand.learning_rate(step, TOTAL_STEPS, SETTINGS) for step in range(TOTAL_STEPS)]
    np.testing.assert_allclose(lines.column("lr"), expected, rtol=1e-12)
    tokens = np.cumsum([sum(len(ids) for ids, _ in documents) for documents in steps])
    trained = np.cumsum([sum(int(weights.sum()) for _, weights in documents) for documents in steps])
    assert lines.column("tokens").tolist() == tokens.tolist()
    assert lines.column("trained_tokens").tolist() == trained.tolist()


@pytest.mark.parametrize("lr_ratio", [1.0, 4.0])
def test_the_run_is_one_that_can_tell(lr_ratio: float) -> None:
    """Of the run that is compared: some steps are clipped and some are not, the last step of an epoch is
    smaller, the documents' masks are uneven, and the loss falls."""
    losses, norms, _ = by_hand(replace(SETTINGS, lr_ratio=lr_ratio))
    clipped = norms > SETTINGS.max_grad_norm
    assert clipped.sum() >= 3 and (~clipped).sum() >= 3, norms
    assert [len(documents) for documents in documents_of_steps(token_data())] == [3, 3, 1] * EPOCHS
    assert len(set(token_data().num_targets.tolist())) > 3
    assert losses[-6:].mean() < losses[:6].mean() - 0.1


def test_the_gradient_by_hand_equals_finite_differences() -> None:
    """The oracle itself, by a third way."""
    frozen, start = arrays()
    documents = documents_of_steps(token_data())[0]
    _, gradient = lora_by_hand.loss_and_gradient(frozen, start, documents, SETTINGS)
    for name, array in start.items():
        for place in np.ndindex(array.shape):
            moved = {n: a.copy() for n, a in start.items()}
            sides = []
            for change in (1e-5, -1e-5):
                moved[name][place] = array[place] + change
                sides.append(lora_by_hand.loss_and_gradient(frozen, moved, documents, SETTINGS)[0])
            assert gradient[name][place] == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-8)
