"""Which fast paths a run takes: each is compared with its plain twin on this very model, once per run.

The loss, the adapted layers, the norms and the attention of packed rows each have a fast path (kernels/),
and the model's and PEFT's own code as its twin. On the first tokens of the data, loss and gradients of the
adapter are computed plainly and with all fast paths together; where the two disagree, with each alone, and
with those that agreed. What is off by more than rounding is switched off, aloud, and the run goes on: a model
that nobody has seen trains right, only slower. The verdicts are decisions of the run, read back when it is
continued. What no few tokens show is left to the tests: dropout, and a loss of more than one piece.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import Adapter
from lorakit.errors import out_of_memory
from lorakit.kernels import attention, lora, norm, products
from lorakit.micro_batch import MicroBatch
from lorakit.plan import Decision, Decisions
from lorakit.tasks import Objective
from lorakit.terminal import say

Autocast = Callable[[], AbstractContextManager[Any]]

# Path -> (what it computes, what its plain twin is), for messages.
PATHS = {
    "fast.shapes": ("rows of lengths that repeat", "rows as they are"),
    "fast.loss": ("the loss without logits", "the model's own head"),
    "fast.lora": ("adapted layers in groups", "PEFT's layers"),
    "fast.norm": ("norms in one step", "the model's own norms"),
    "fast.attention": ("attention by matrix products", "PyTorch's fused attention"),
}
NUM_TOKENS = 250  # that are compared; a length that fast.shapes changes


@dataclass(frozen=True)
class Limits:
    """What rounding explains, as shares: of the loss, of all gradients together, of the gradient of one
    matrix."""

    loss: float
    gradients: float
    gradient: float


# Measured on some 20 models and adapters of 2 to 24 layers: right paths are at most (2e-7, 2e-6, 6e-6) off in
# fp32 and (6e-4, 0.05, 0.11) in bf16; one target of 255 forgotten is 4e-3 of the loss, a gradient halved 0.5
# of itself.
LIMITS = {"fp32": Limits(1e-5, 1e-4, 1e-3), "bf16": Limits(3e-3, 0.1, 0.2)}
_AWAY = 0.1  # spread of what starts at zero: smaller, and a gradient that goes past the update is not seen


class FastPaths:
    """The switches of one model."""

    def __init__(self, objective: Objective, adapter: Adapter, micro: MicroBatch, autocast: Autocast) -> None:
        """`micro`: run once, without gradients, to see which adapted layers share an input."""
        self.objective, self.plain_autocast = objective, autocast
        self.model: Any = objective.model
        self.is_packed = micro.document_lengths is not None

        with autocast():
            self.in_bf16 = torch.is_autocast_enabled(micro.input_ids.device.type)

        def run() -> None:
            with torch.no_grad(), autocast():
                objective(micro)

        self.groups = lora.groups_of(objective.model, run)
        self.norms = norm.norms_of(objective.model)
        self.is_bare = _is_bare(objective.model, adapter, self.groups)
        self.autocast = autocast

    def available(self) -> list[str]:
        """The paths that this model has something for."""
        on_cpu = next(self.objective.parameters()).device.type == "cpu"
        there = {
            "fast.shapes": on_cpu,
            "fast.loss": True,
            "fast.lora": self.groups,
            "fast.norm": self.norms,
            "fast.attention": on_cpu and self.is_packed and self.in_bf16,  # in fp32 the fused one is faster
        }
        return [name for name in PATHS if there[name]]

    def switch(self, on: Collection[str]) -> None:
        """Exactly the paths `on` are taken from here on; `autocast` is what the model must run in."""
        self.objective.fused = "fast.loss" in on
        self.objective.repeats_shapes = "fast.shapes" in on
        for group in self.groups:
            group.switch_on() if "fast.lora" in on else group.switch_off()
        for module, forward in self.norms:
            vars(module).pop("forward", None)
            if "fast.norm" in on:
                vars(module)["forward"] = forward
        if self.is_packed:
            attention.register(products="fast.attention" in on)
            self.model.set_attn_implementation(attention.NAME)
        # Autocast looks at every operation; where nothing is left that it would cast, it only costs.
        self.autocast = nullcontext if self.is_bare and "fast.lora" in on else self.plain_autocast


def _is_bare(model: nn.Module, adapter: Adapter, groups: Sequence[lora.Group]) -> bool:
    """Whether bf16 products need no autocast: all that is frozen is bf16 or packed, and all that is trained
    belongs to `groups`, which cast by themselves."""
    grouped = {id(p) for group in groups for layer in group.layers for p in layer.parameters()}
    trained = {id(item.parameter) for item in adapter.trained()}
    kinds = {p.dtype for p in model.parameters() if id(p) not in grouped and p.is_floating_point()}
    return trained <= grouped and kinds == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------
# The guard


@dataclass(frozen=True)
class Observed:
    loss: float
    gradients: dict[str, Tensor]  # by parameter, fp32


def choose(paths: FastPaths, adapter: Adapter, micro: MicroBatch, precision: str) -> Decisions:
    """The verdict on every available path; the paths are left switched accordingly.

    All together are what will run, and are compared first; one by one only to find what is wrong. The
    parameters and the generators of random numbers are left as they were.
    """
    limits, agreed = LIMITS[precision], paths.available()
    with _moved(adapter), _generators_kept(micro.input_ids.device), products.blocks_of(NUM_TOKENS // 5):
        paths.switch(())
        expected = _observe(paths, adapter, micro)
        together = _compare(paths, agreed, adapter, micro, expected, limits)
        verdicts = dict.fromkeys(agreed, together)
        if not together.value:
            verdicts = {
                name: _compare(paths, [name], adapter, micro, expected, limits) for name in paths.available()
            }
            agreed = [name for name, verdict in verdicts.items() if verdict.value]
            together = _compare(paths, agreed, adapter, micro, expected, limits)
    if agreed and not together.value:
        verdicts |= {name: Decision(False, f"together: {together.why}") for name in agreed}
        agreed = []
    for name, verdict in verdicts.items():
        if not verdict.value:
            say(f"warning: {PATHS[name][0]} (fast path) is switched off: {verdict.why}")
    paths.switch(agreed)
    paths.objective.train()
    return verdicts


def _compare(
    paths: FastPaths,
    on: Sequence[str],
    adapter: Adapter,
    micro: MicroBatch,
    expected: Observed,
    limits: Limits,
) -> Decision:
    paths.switch(on)
    twins = " and ".join(PATHS[name][1] for name in on)
    try:
        found = _observe(paths, adapter, micro)
    except Exception as error:  # whatever a model does not have that the path counts on
        if out_of_memory(error):
            raise
        return Decision(False, f"it does not run here: {(str(error).splitlines() or [''])[0][:120]}")
    loss, gradients, gradient, worst = distance(found, expected)
    told = f"loss {loss:.1e}, gradients {gradients:.1e} from those of {twins}"
    if not (loss <= limits.loss and gradients <= limits.gradients and gradient <= limits.gradient):
        return Decision(False, f"{told} (at most {gradient:.1e}, {worst}): more than rounding explains")
    return Decision(True, f"{told}, on {micro.input_ids.numel()} tokens")


def distance(found: Observed, expected: Observed) -> tuple[float, float, float, str]:
    """(of the losses, of all gradients, of the gradient that differs most, its name), as shares of those
    expected.

    A gradient that is small beside the others is measured against a hundredth of the largest.
    """
    loss = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-12)
    if found.gradients.keys() != expected.gradients.keys():
        odd = sorted(found.gradients.keys() ^ expected.gradients.keys())[0]
        return loss, float("inf"), float("inf"), odd
    sizes = {name: float(g.norm()) for name, g in expected.gradients.items()}
    largest = max(sizes.values(), default=0.0)
    differences = {name: float((found.gradients[name] - g).norm()) for name, g in expected.gradients.items()}
    size = sum(s * s for s in sizes.values()) ** 0.5
    total = sum(d * d for d in differences.values()) ** 0.5 / max(size, 1e-30)
    shares = {name: d / max(sizes[name], 0.01 * largest, 1e-30) for name, d in differences.items()}
    worst = max(shares, key=lambda name: shares[name], default="")
    return loss, total, shares.get(worst, 0.0), worst


def _observe(paths: FastPaths, adapter: Adapter, micro: MicroBatch) -> Observed:
    """Loss and gradients of `micro` in training mode without the dropout of adapters, whose masks are others
    in rows of another length."""
    paths.objective.train()
    for module in paths.objective.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    torch.manual_seed(0)
    try:
        with paths.autocast():
            loss = paths.objective(micro)
        loss.backward()
        grads = {item.name: item.parameter.grad for item in adapter.trained()}
    finally:  # also what a path left that failed half way
        for item in adapter.trained():
            item.parameter.grad = None
    return Observed(loss.item(), {name: g.float() for name, g in grads.items() if g is not None})


@contextmanager
def _moved(adapter: Adapter) -> Iterator[None]:
    """The adapter away from its start, where a factor of zero hides the gradient of the other."""
    draw = torch.Generator().manual_seed(0)
    zero = [item.parameter for item in adapter.trained() if not item.parameter.any()]
    with torch.no_grad():
        for parameter in zero:
            parameter.copy_(_AWAY * torch.randn(parameter.shape, generator=draw))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
