"""EVA: the directions of a layer's inputs against numpy and PEFT, the ranks against counting; whole runs."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import EvaConfig, initialize_lora_eva_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.adapters import attach, eva
from lorakit.adapters.pairs import factors
from lorakit.errors import LorakitError
from lorakit.kernels import lora
from lorakit.layers import layers_of
from lorakit.micro_batch import MicroBatch
from lorakit.recipe.inits import highest_rank
from lorakit.recipe.methods import Lora
from lorakit.targets import Target, select
from tests import architectures
from tests.conftest import Killed, killed_at, metrics

FILE = "adapter/adapter_model.safetensors"


# ------------------------------------------------------------------------------------------------------------
# The directions


def cloud(rows: int, inside: int, decay: float = 0.5) -> Tensor:
    """(rows, inside) fp64 around a mean that is larger than all it varies; every direction `decay` of the one
    before."""
    draw = np.random.default_rng(1)
    basis = np.linalg.qr(draw.normal(size=(inside, inside)))[0]
    spread = decay ** np.arange(inside)
    return torch.from_numpy(draw.normal(size=(rows, inside)) * spread @ basis.T + 30.0 * basis[:, 2])


def by_numpy(x: Tensor, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(shares, directions) of the centred rows."""
    centred = x.numpy() - x.numpy().mean(0)
    _, s, vh = np.linalg.svd(centred, full_matrices=False)
    return s[:number] ** 2 / (s**2).sum(), vh[:number]


def alike(a: Tensor, b: np.ndarray) -> np.ndarray:
    """|cosine| of each direction with its twin."""
    return np.abs((a.numpy() * b).sum(1))


def test_c12_a_planted_subspace_is_found_whatever_the_mean() -> None:
    """Inputs that vary along three directions alone: phi(A, V) = |A V|^2 / 3 = 1."""
    draw = np.random.default_rng(3)
    planted = np.linalg.qr(draw.normal(size=(20, 3)))[0]
    mean = 50 * draw.normal(size=20)
    x = torch.from_numpy(draw.normal(size=(100, 3)) * (5.0, 2.0, 0.5) @ planted.T + mean)
    shares, a = eva.strongest(eva.seen(None, x, 20), 20, 6)
    assert abs((a[:3].numpy() @ planted) ** 2).sum() / 3 == pytest.approx(1, abs=1e-12)
    assert float(shares[:3].sum()) == pytest.approx(1, abs=1e-12)
    assert shares[3:].tolist() == [0, 0, 0]
    assert torch.allclose(a @ a.T, torch.eye(6, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("inside", [3, 12, 40])
def test_directions_and_shares_are_those_of_the_centred_rows(inside: int) -> None:
    x = cloud(60, inside)
    shares, a = eva.strongest(eva.scatter_of(x), inside, 3)
    wanted, directions = by_numpy(x, 3)
    assert shares.numpy() == pytest.approx(wanted, rel=1e-9)
    assert alike(a, directions) == pytest.approx(1, abs=1e-9)
    largest = a.gather(1, a.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())
    assert bool((shares[:-1] >= shares[1:]).all())


@pytest.mark.parametrize("pieces", [[60], [1, 59], [7, 1, 1, 20, 31]])
def test_in_pieces_it_is_the_whole(pieces: list[int]) -> None:
    """Means that differ from piece to piece; nothing is cut off, for all that can be is kept."""
    x = cloud(60, 12) + torch.linspace(0, 9, 60, dtype=torch.float64)[:, None] ** 2
    found = None
    for piece in x.split(pieces):
        found = eva.seen(found, piece, 12)
        assert found is not None
        assert len(found.rows) <= 24
    assert found is not None
    shares, a = eva.strongest(found, 12, 12)
    wanted, directions = by_numpy(x, 12)
    there = wanted > 1e-10
    assert found.count == 60
    assert shares.numpy()[there] == pytest.approx(wanted[there], rel=1e-6)
    assert alike(a, directions)[there] == pytest.approx(1, abs=1e-6)
    assert found.mean.numpy() == pytest.approx(x.numpy().mean(0))


@pytest.mark.parametrize("exact", [512, 8])
def test_what_is_cut_off_hardly_moves_the_strongest(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 rows are kept of 60 directions, by eigenvalues and by the randomised method; the whole they are a
    share of is kept exactly."""
    monkeypatch.setattr(eva, "EXACT", exact)
    x = cloud(900, 60)
    found = None
    for piece in x.split([50, 400, 150, 300]):
        found = eva.seen(found, piece, 30)
        assert found is not None
        assert len(found.rows) <= 60
    shares, a = eva.strongest(found, 60, 6)
    wanted, directions = by_numpy(x, 6)
    assert found is not None
    assert float(found.total) == pytest.approx(float(((x - x.mean(0)) ** 2).sum()), rel=1e-9)
    assert shares.numpy() == pytest.approx(wanted, rel=1e-6)
    assert alike(a, directions) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("rows", "keep"), [(40, 10), (12, 10), (40, 25)])
@pytest.mark.parametrize("exact", [512, 8])
def test_what_is_kept_is_the_best_of_its_rank(
    rows: int, keep: int, exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R^T R of the kept rows is the truncated SVD's (Eckart and Young)."""
    monkeypatch.setattr(eva, "EXACT", exact)
    x = cloud(rows, 25)
    cut = eva.cut(eva.scatter_of(x), keep)
    _, s, vh = np.linalg.svd(x.numpy() - x.numpy().mean(0), full_matrices=False)
    best = (vh[:keep].T * s[:keep] ** 2) @ vh[:keep]
    assert (cut.rows.T @ cut.rows).numpy() == pytest.approx(best, abs=1e-9 if exact == 512 else 5e-5)
    assert len(cut.rows) <= keep


def test_shares_are_of_the_whole_with_what_was_cut_off() -> None:
    """Directions of nearly one size, of which a third is kept."""
    x = cloud(400, 30, decay=0.97)
    found = eva.cut(eva.scatter_of(x), 10)
    wanted, _ = by_numpy(x, 10)
    assert wanted.sum() < 0.6
    assert eva.strongest(found, 30, 10)[0].numpy() == pytest.approx(wanted, rel=1e-9)


def test_a_layer_that_saw_too_little_gets_directions_that_explain_nothing() -> None:
    """One row has no variance, and a layer that is never called (an expert) not even a mean."""
    for scatter in (None, eva.scatter_of(cloud(1, 9)), eva.scatter_of(cloud(3, 9))):
        shares, a = eva.strongest(scatter, 9, 4)
        assert torch.allclose(a @ a.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
        assert int((shares > 0).sum()) == (2 if scatter is not None and scatter.count == 3 else 0)
    assert eva.seen(None, cloud(0, 9), 4) is None


# ------------------------------------------------------------------------------------------------------------
# The ranks


def test_c12_the_largest_shares_of_all_layers_get_the_ranks() -> None:
    shares = [[0.5, 0.2, 0.1, 0.1], [0.9, 0.05, 0.01, 0.0], [0.3, 0.3, 0.2, 0.1]]
    assert eva.redistributed(shares, 6) == [2, 1, 3]
    assert eva.redistributed(shares, 1) == [0, 1, 0]
    assert eva.redistributed(shares, 12) == [4, 4, 4]
    assert eva.redistributed([[0.4, 0.3], [0.4, 0.3], [0.4, 0.3]], 4) == [2, 1, 1]  # of equals the earlier
    assert eva.redistributed([[0.0, 0.0], [0.0, 0.0]], 2) == [1, 1]


def test_c12_no_other_ranks_explain_more() -> None:
    """All ways to share seven ranks among three layers of at most four."""
    draw = np.random.default_rng(2)
    for _ in range(20):
        shares = [sorted((draw.random(4) ** 3).tolist(), reverse=True) for _ in range(3)]
        found = eva.redistributed(shares, 7)
        assert sum(found) == 7
        ways = [ranks for ranks in product(range(5), repeat=3) if sum(ranks) == 7]
        explained = {ranks: sum(sum(own[:r]) for own, r in zip(shares, ranks, strict=True)) for ranks in ways}
        assert explained[tuple(found)] == max(explained.values())


@pytest.mark.parametrize(
    ("rank", "spread", "sides", "highest"),
    [
        (8, 2.0, (64, 64), 16),
        (8, 1.0, (64, 64), 8),
        (25, 1.16, (64, 64), 29),
        (3, 1.5, (64, 64), 4),
        (8, 2.0, (10, 64), 10),
        (8, 2.0, (64, 9), 9),
    ],
)
def test_the_highest_rank(rank: int, spread: float, sides: tuple[int, int], highest: int) -> None:
    """1.16 * 25 is 28.999... as a product of floats."""
    assert highest_rank(rank, spread, *sides) == highest


# ------------------------------------------------------------------------------------------------------------
# The adapter

IDS = torch.from_numpy(np.random.default_rng(5).integers(3, 60, (6, 16)))


class Given:
    """A probe of given rows, in one process."""

    def __init__(self, model: Any, micros: list[tuple[Tensor, Tensor | None]]) -> None:
        self.model, self.micros = model, micros

    def draw(self, share: float) -> int:
        return len(self.micros)

    def micro_batches(self) -> Iterator[MicroBatch]:
        nothing = torch.zeros(0, dtype=torch.long)
        for ids, mask in self.micros:
            yield MicroBatch(ids, torch.zeros_like(ids), None, mask, nothing, nothing, ())

    def forward(self, micro: MicroBatch) -> None:
        self.model(input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False)

    def from_all_ranks(self, tensor: Tensor) -> Tensor:
        return tensor[None]


def attached(name: str = "llama", rank: int = 4, **fields: Any) -> tuple[Any, Any]:
    model = architectures.build(architectures.CONFIGS[name]())
    chosen, _ = select(layers_of(model)[0], "all-linear")
    section = Lora(rank=rank, init="eva", **fields)
    return model, attach(section, model, [Target(layer, rank, 2.0 * rank) for layer in chosen], seed=5)


def decided(name: str = "llama", rank: int = 4, **fields: Any) -> tuple[Any, Any]:
    model, adapter = attached(name, rank, **fields)
    adapter.prepare(Given(model, [(IDS, None)]))
    return model, adapter


@pytest.fixture
def with_empty_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0, 1, 2, ... whatever the data say."""
    monkeypatch.setattr(eva, "redistributed", lambda shares, budget: [i % 4 for i in range(len(shares))])


def randomise(adapter: Any) -> None:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for item in adapter.trained():
            item.parameter.copy_(torch.randn(item.parameter.shape, generator=draw) * 0.1)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_is_what_the_real_tokens_of_a_layer_vary_along(name: str, padded: bool) -> None:
    """Against numpy, on the inputs that a plain hook on the bare model sees, in two micro-batches."""
    mask = torch.ones_like(IDS)
    if padded:
        mask[1::2, 5:] = 0
    micros = [(ids, part if padded else None) for ids, part in zip(IDS.split(2), mask.split(2), strict=True)]
    model, adapter = attached(name)
    seen: dict[str, list[Tensor]] = {target.layer.name: [] for target in adapter.targets}
    bare = architectures.build(architectures.CONFIGS[name]())
    for layer in seen:
        bare.get_submodule(layer).register_forward_pre_hook(
            lambda m, x, layer=layer: seen[layer].append(x[0].detach())
        )
    probe = Given(bare, micros)
    for micro in probe.micro_batches():
        probe.forward(micro)
    adapter.prepare(Given(model, micros))
    chosen = mask.bool() if padded else torch.ones_like(mask).bool()
    explained = {}
    for layer, rank in adapter.ranks().items():
        inputs = torch.cat(seen[layer])[chosen]
        shares, directions = by_numpy(inputs.double(), 8)
        a, b = factors(adapter.layers[layer])
        assert a.shape[0] == b.shape[1] == rank
        assert not b.any()
        assert alike(a.detach().double(), directions[:rank]) == pytest.approx(1, abs=1e-4), layer
        explained[layer] = shares
    assert [adapter.notes()[layer]["explained"] for layer in explained] == pytest.approx(
        [shares[: adapter.ranks()[layer]].sum() for layer, shares in explained.items()], rel=1e-4
    )
    ranks = list(adapter.ranks().values())
    assert sum(ranks) == 4 * len(explained)
    pairs = list(zip(ranks, explained.values(), strict=True))
    kept, left = [shares[r - 1] for r, shares in pairs if r], [shares[r] for r, shares in pairs if r < 8]
    assert min(kept) >= max(left) * (1 - 1e-5)
    assert len(set(ranks)) > 1
    assert max(ranks) <= 8


def by_peft(adapter: Any, rank: int, **fields: Any) -> Any:
    """PEFT's model of the layers of `adapter`, after its EVA on the same rows in one batch."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[target.layer.name for target in adapter.targets],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, use_label_mask=False),
        **fields,
    )
    theirs = get_peft_model(architectures.build(architectures.CONFIGS["llama"]()), config)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    return theirs


@pytest.mark.filterwarnings("ignore:lora with eva")
@pytest.mark.parametrize("rank", [2, 4])
def test_the_subspaces_and_ranks_are_pefts(rank: int) -> None:
    """With all rows in one batch, which PEFT sees again until nothing moves. Which of the layers that read
    one tensor gets the last rank is left to a tie: PEFT's argsort, ours the earlier layer."""
    _, adapter = decided("llama", rank)
    theirs = by_peft(adapter, rank)
    found = {}
    for name in adapter.ranks():
        module: Any = theirs.get_base_model().get_submodule(name)
        found[name] = module.lora_A["default"].weight.detach() if hasattr(module, "lora_A") else None
    kinds = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    for index, kind in product(range(2), kinds):
        names = [name for name in found if f".{index}." in name and name.endswith(kind)]
        ranks = sorted(0 if found[name] is None else len(found[name]) for name in names)
        assert sorted(adapter.ranks()[name] for name in names) == ranks
        for name in names:
            ours = factors(adapter.layers[name])[0].detach()
            shared = min(len(ours), 0 if found[name] is None else len(found[name]))
            if shared:
                assert alike(ours[:shared], found[name][:shared].numpy()) == pytest.approx(1, abs=1e-3)
    assert sum(adapter.ranks().values()) == sum(0 if a is None else len(a) for a in found.values())


@pytest.mark.filterwarnings("ignore:lora with eva")
def test_peft_moves_the_scale_of_a_rank_stabilized_layer() -> None:
    """Its alpha is that of alpha / rank, whatever the scale is divided by; alpha / rank itself it keeps."""
    _, adapter = decided()
    for stabilized in (False, True):
        base = by_peft(adapter, 4, use_rslora=stabilized).get_base_model()
        adapted = [base.get_submodule(name) for name in adapter.ranks()]
        scales = {m.r["default"]: m.scaling["default"] for m in adapted if hasattr(m, "scaling")}
        assert len(scales) > 1
        before = 8 / 4**0.5 if stabilized else 2.0
        assert scales == pytest.approx({r: before * (r / 4) ** (0.5 * stabilized) for r in scales})


def test_layers_that_read_one_tensor_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of the seven of a block: q, k and v are one, gate and up are one."""
    calls: list[int] = []
    real = eva.strongest
    monkeypatch.setattr(eva, "strongest", lambda *given: calls.append(1) or real(*given))
    decided()
    assert len(calls) == 2 * 4


class Forked(nn.Module):
    """`first` reads x and y, `second` y alone, `never` nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> None:
        for layer, given in ((self.first, x), (self.first, y), (self.second, y)):
            layer(given)


def test_layers_that_share_one_input_of_several_are_kept_apart() -> None:
    x, y = cloud(40, 12).float(), cloud(40, 12, decay=0.8).float().flip(1)
    model = get_peft_model(Forked(), LoraConfig(target_modules=["first", "second", "never"])).base_model.model
    layers = [model.first, model.second, model.never]

    class Probe(Given):
        def forward(self, micro: MicroBatch) -> None:
            model(x, y)

    found = eva.look(layers, [4, 3, 2], Probe(model, [(IDS, None)]))
    for (shares, directions), given, number in zip(found, (torch.cat([x, y]), y), (4, 3), strict=False):
        wanted, theirs = by_numpy(given.double(), number)
        assert shares.numpy() == pytest.approx(wanted, rel=1e-4)
        assert alike(directions, theirs) == pytest.approx(1, abs=1e-4)
    assert found[2][0].tolist() == [0, 0]
    assert found[2][1].shape == (2, 12)


def test_what_several_processes_saw_is_put_together() -> None:
    """Three of them, of which one saw nothing, and no two as many rows."""
    parts = [cloud(70, 12)[:50], cloud(70, 12)[50:] * 2, cloud(0, 12)]
    own = [eva.seen(None, part, 12) for part in parts]
    told: list[Tensor] = []

    class Probe:
        def from_all_ranks(self, tensor: Tensor) -> Tensor:
            told.append(tensor.clone())
            return torch.stack(told)

    probe: Any = Probe()
    for scatter in own:
        found = eva._of_all_ranks(scatter, 12, 12, torch.device("cpu"), probe)
    assert found is not None
    shares, directions = eva.strongest(found, 12, 3)
    wanted, theirs = by_numpy(torch.cat(parts), 3)
    assert found.count == 70
    assert shares.numpy() == pytest.approx(wanted, rel=1e-9)
    assert alike(directions, theirs) == pytest.approx(1, abs=1e-9)


def test_step_0_is_the_base_and_scales_stay() -> None:
    model, adapter = decided(scaling="rank_stabilized")
    assert torch.equal(logits(model), logits(architectures.build(architectures.CONFIGS["llama"]())))
    _, before = attached(scaling="rank_stabilized")
    assert len(set(adapter.ranks().values())) > 1
    for name, layer in adapter.layers.items():
        assert layer.scaling == before.layers[name].scaling == {"default": 8 / 4**0.5}
        assert (
            layer.lora_alpha["default"] == layer.r["default"] * layer.scaling["default"]
        )  # PEFT's set_scale
        a = factors(layer)[0].detach()
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-6)


def test_patterns_give_what_they_have_and_bound_a_layer() -> None:
    model = architectures.build(architectures.CONFIGS["llama"]())
    chosen, _ = select(layers_of(model)[0], "all-linear")
    targets = [Target(layer, 1 if "down_proj" in layer.name else 8, 4.0) for layer in chosen]
    adapter = attach(Lora(rank=8, init="eva", rank_spread=1.5), model, targets, seed=5)
    adapter.prepare(Given(model, [(IDS, None)]))
    assert sum(adapter.ranks().values()) == 2 * 1 + 12 * 8
    assert all(rank <= (1 if "down_proj" in name else 12) for name, rank in adapter.ranks().items())
    assert max(adapter.ranks().values()) > 8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fast_paths_that_were_switched_on_before_are_still_right(name: str, with_empty_layers: None) -> None:
    """With ranks 0 to 3, against PEFT's own forward: outputs, and the gradient of every parameter."""
    model, adapter = attached(name)
    groups = lora.groups_of(model, lambda: logits(model))
    for group in groups:
        group.switch_on()
    adapter.prepare(Given(model, [(IDS, None)]))
    randomise(adapter)

    def observed() -> tuple[Tensor, dict[str, Tensor]]:
        for item in adapter.trained():
            item.parameter.grad = None
        found = model(IDS, use_cache=False).logits
        found.square().mean().backward()
        return found.detach(), {item.name: item.parameter.grad.clone() for item in adapter.trained()}

    fast = observed()
    for group in groups:
        group.switch_off()
    plain = observed()
    assert torch.allclose(fast[0], plain[0], atol=1e-5)
    assert fast[1].keys() == plain[1].keys()
    sizes = {key: float(grad.norm()) for key, grad in plain[1].items()}
    assert all(float((fast[1][key] - plain[1][key]).norm()) <= 1e-4 * size for key, size in sizes.items())
    assert len(sizes) == 2 * sum(rank > 0 for rank in adapter.ranks().values())
    assert 0 in adapter.ranks().values()


@pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")
def test_ranks_survive_state_disabling_and_peft(with_empty_layers: None, tmp_path: Path) -> None:
    """Ranks 0 to 3, on a fresh adapter and in PEFT."""
    model, adapter = decided()
    randomise(adapter)
    wanted = logits(model)
    state = {key: tensor.clone() for key, tensor in adapter.state().items()}
    other_model, other = attached()
    other.load_state(state)
    assert torch.equal(logits(other_model), wanted)
    assert (other.ranks(), other.notes()) == (adapter.ranks(), adapter.notes())
    assert [item.name for item in other.trained()] == [item.name for item in adapter.trained()]
    assert sum(item.parameter.numel() for item in other.trained()) == sum(
        rank * (t.layer.in_features + t.layer.out_features)
        for t, rank in zip(adapter.targets, adapter.ranks().values(), strict=True)
    )
    with pytest.raises(LorakitError, match="is missing"):
        attached()[1].load_state({k: v for k, v in state.items() if k != "explained"})

    with adapter.disabled():
        assert torch.equal(logits(model), logits(architectures.build(architectures.CONFIGS["llama"]())))
    assert torch.equal(logits(model), wanted)
    assert [item.name for item in other.trained()] == [item.name for item in adapter.trained()]
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(architectures.build(architectures.CONFIGS["llama"]()), tmp_path).eval()
    assert torch.allclose(logits(theirs), wanted, atol=2e-5)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(tensor) for key, tensor in file.items() if "lora_A" in key} == {3}


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def recipe(write_recipe: Any, tiny: Path) -> Any:
    def write(**sections: Any) -> Path:
        data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
        values: dict[str, Any] = {
            "data": data,
            "adapter": {"rank": 4, "init": "eva", "probe": 40},
            "training": {"max_steps": 6, "batch_size": 8},
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"every": 3},
            "eval": {"every": 3},
        }
        return write_recipe(**values | sections)

    return write


def losses(run: Path) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in metrics(run)]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    recipe: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the rows are looked at; when what was decided alone is saved, after which nobody looks again; and
    later on."""
    straight, run, path = tmp_path / "straight", tmp_path / "killed", recipe()
    again = ("train", path, "--output", run, "--resume", "auto")
    assert cli("train", path, "--output", straight)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(eva, "redistributed", kill)
        cli(*again)
    assert not list(run.glob("checkpoints/*"))
    with killed_at(1):
        cli(*again)
    assert [folder.name for folder in run.glob("checkpoints/*")] == ["step-000000"]
    monkeypatch.setattr(eva, "redistributed", kill)
    with killed_at(5):
        cli(*again)
    assert (run / "checkpoints" / "step-000003").is_dir()
    code, _, err = cli(*again)
    assert code == 0, err
    assert "probe  " not in err
    for name in ("params.json", "ranks.svg", FILE):
        assert (straight / name).read_bytes() == (run / name).read_bytes(), name
    assert losses(straight) == losses(run)


def kill(*_: Any) -> None:
    raise Killed


def test_a_run_tells_what_was_decided(recipe: Any, cli: Any, tmp_path: Path) -> None:
    code, _, err = cli("train", recipe())
    assert code == 0, err
    params = json.loads((tmp_path / "run" / "params.json").read_text())
    modules = params["modules"]
    ranks = [m["rank"] for m in modules]
    assert sum(ranks) == 4 * len(modules) == 56
    assert {m["init_rank"] for m in modules} == {4}
    assert len(set(ranks)) > 1
    assert all(m["trainable"] == m["rank"] * (m["in"] + m["out"]) for m in modules)
    assert all(0 < m["explained"] <= 1 for m in modules)
    assert f"of 56 ranks a layer gets {min(ranks)} to {max(ranks)}" in err
    text = (tmp_path / "run" / "params.md").read_text()
    assert "ranks.svg" in text
    assert "| initial rank |" in text
    assert cli("merge", tmp_path / "run", "--output", tmp_path / "merged")[0] == 0


def test_a_run_whose_first_layer_gets_nothing(
    with_empty_layers: None, recipe: Any, cli: Any, tmp_path: Path
) -> None:
    """It is told in its place, continued, and read again."""
    run, path = tmp_path / "run", recipe()
    with killed_at(5):
        cli("train", path)
    code, _, err = cli("train", path, "--resume", "auto")
    assert code == 0, err
    modules = json.loads((run / "params.json").read_text())["modules"]
    assert [m["rank"] for m in modules] == [i % 4 for i in range(14)]
    assert [m["trainable"] for m in modules] == [m["rank"] * (m["in"] + m["out"]) for m in modules]
    assert modules[0]["name"] == "model.layers.0.self_attn.q_proj"
    assert "| model.layers.0.self_attn.q_proj | 64 | 64 | 0 | 4 | 0 |" in (run / "params.md").read_text()
    code, out, err = cli("eval", run, "--json")
    assert code == 0, err
    best = json.loads((run / "run.json").read_text())["best_loss"]
    assert json.loads(out)["adapter"]["loss"] == pytest.approx(best, rel=1e-5)
    code, _, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 0, err
    code, _, err = cli("inspect", run)
    assert code == 0, err


@pytest.mark.slow
def test_the_layout_of_rows_and_the_fast_paths_change_no_decision(
    recipe: Any, cli: Any, tmp_path: Path
) -> None:
    """Neither padding nor what fast paths fill rows up with counts."""
    training = {"max_steps": 1, "batch_size": 8}
    layouts = {
        "packed": training,
        "plain": training | {"fast": "off"},
        "padded": training | {"micro_batch_tokens": 50},
    }
    found = {}
    for name, section in layouts.items():
        path = recipe(adapter={"rank": 4, "init": "eva", "probe": 37}, training=section)
        more = ["--set", "data.packing=false"] if name == "padded" else []
        assert cli("train", path, "--output", tmp_path / name, *more)[0] == 0
        params = json.loads((tmp_path / name / "params.json").read_text())
        found[name] = [(module["rank"], module["explained"]) for module in params["modules"]]
    for name in ("plain", "padded"):
        assert [rank for rank, _ in found[name]] == [rank for rank, _ in found["packed"]]
        assert [share for _, share in found[name]] == pytest.approx(
            [share for _, share in found["packed"]], rel=1e-4
        )


def test_what_cannot_be_looked_at_is_refused(recipe: Any, cli: Any, tiny: Path) -> None:
    """By validate and by train alike."""
    stream = {"train": str(tiny / "train.jsonl"), "streaming": True, "max_length": 128}
    embedding = {"init": "eva", "targets": ["embed_tokens"]}
    for sections, told in (
        ({"data": stream, "eval": {}}, "needs rows to look at before step 0; a stream has none"),
        ({"adapter": embedding}, "its inputs are tokens, which have no directions"),
    ):
        path = recipe(**sections)
        for verb in ("validate", "train"):
            code, out, err = cli(verb, path)
            assert code == 2
            assert told in out + err
    code, _, err = cli("train", recipe(adapter={"init": "eva", "probe": 5000}))
    assert code == 2
    assert "5000 samples, but an epoch has" in err and "a share of them" in err
    assert "loaded in" not in err  # the model


def test_the_count_says_what_the_data_decide(recipe: Any, cli: Any) -> None:
    code, out, err = cli("count-params", recipe())
    assert code == 0, err
    assert "EVA moves ranks from layer to layer, as the data decide" in out
    sides = 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 128) + (128 + 64))
    assert f"at most {4 * 8 * sides / 1e3:,.1f} kB" in out  # one rank for all, of twice the four at most


@pytest.mark.slow
@pytest.mark.parametrize("samples", [40, 1])
def test_two_processes_decide_as_one_does(samples: int, recipe: Any, cli: Any, tmp_path: Path) -> None:
    """With one sample one of them has nothing to look at."""
    from tests.test_ranks import torchrun

    path = recipe(adapter={"rank": 4, "init": "eva", "probe": samples})
    assert cli("train", path, "--output", tmp_path / "one")[0] == 0
    done = torchrun(path, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "params.json").read_text()) for name in ("one", "two"))
    assert [m["rank"] for m in one["modules"]] == [m["rank"] for m in two["modules"]]
    assert [m["explained"] for m in one["modules"]] == pytest.approx(
        [m["explained"] for m in two["modules"]], rel=1e-5
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
