"""LoftQ on models that are loaded in few bits: what is given back, from the base's own files, on Linear and
Conv1D, beside PEFT's."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit import base_model
from lorakit.adapters import attach
from lorakit.adapters.pairs import factors
from lorakit.base_model import Base
from lorakit.errors import LorakitError
from lorakit.recipe.methods import Lora
from lorakit.recipe.model import Model
from lorakit.targets import assign, select
from tests import architectures
from tests.adapters import matrix
from tests.oracles.test_methods import nf4_codes

BLOCK = 64  # numbers that share a constant, in the order of the rows
IDS = matrix.IDS


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    matrix.make_bases(folder)
    return folder


def loaded(folder: Path, kind: str, dtype: str = "fp32", double: bool = False) -> Base:
    fields: dict[str, Any] = {} if kind == "none" else {"quantize": kind}
    if kind in ("nf4", "fp4"):
        fields |= {"double_quant": double, "compute_dtype": "fp32"}
    section = Model(path=str(folder), **fields)
    return base_model.load(folder, section, "AutoModelForCausalLM", dtype, torch.device("cpu"))


class Files:
    """The part of a probe that reads the base's files."""

    def __init__(self, folder: Path) -> None:
        self.stored = partial(base_model.stored, folder)


def started(base: Base, **fields: Any) -> Any:
    """LoftQ on all linear layers, prepared."""
    section = Lora(**({"init": "loftq", "rank": 4} | fields))  # type: ignore[arg-type]
    alpha = 2.0 * section.rank if section.alpha == "auto" else section.alpha
    layers = select(base.layers, section.targets)[0]
    targets, problems = assign(layers, section.rank, alpha, section.rank_pattern, section.alpha_pattern)
    assert not problems
    adapter = attach(section, base.model, targets, seed=0)
    adapter.prepare(Files(base.folder))  # type: ignore[arg-type]
    return adapter


def in_nf4(weight: np.ndarray) -> np.ndarray:
    """What NF4 makes of (out, in) without bitsandbytes: blocks of 64 numbers over their largest, each the
    nearest of the sixteen codes."""
    codes = nf4_codes()
    blocks = weight.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[..., None] / largest[..., None] - codes).argmin(axis=-1)
    found: np.ndarray = (codes[nearest] * largest).reshape(weight.shape)
    return found


def product(layer: Any) -> np.ndarray:
    """s B A in fp64."""
    a, b = (factor.detach().double().numpy() for factor in factors(layer))
    found: np.ndarray = layer.scaling["default"] * b @ a
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


@pytest.mark.parametrize("name", ["llama-fp32", "gpt2-fp32"])
@pytest.mark.parametrize("fields", [{}, {"alpha": 1.0}, {"scaling": "rank_stabilized", "rank": 3}])
def test_o23_on_every_layer_of_a_model(name: str, fields: dict[str, Any], bases: Path) -> None:
    """|W - Q - s B A|_F is the best that any matrix of the rank can do, whatever the scale: W from the file,
    Q by hand. A pattern's layer has a rank and a scale of its own."""
    pattern = {"rank_pattern": {r".*(layers|h)\.1\..*": 2}, "alpha_pattern": {r".*(layers|h)\.0\.mlp.*": 5.0}}
    base = loaded(bases / name, "nf4")
    adapter = started(base, **fields, **pattern)
    files = load_file(bases / name / "model.safetensors")
    for target in adapter.targets:
        weight = files[target.layer.weight].double().numpy()
        weight = weight.T if target.layer.kind == "conv1d" or name.startswith("gpt2") else weight
        lost = weight - in_nf4(np.ascontiguousarray(weight))
        values = np.linalg.svd(lost, compute_uv=False)
        found = product(adapter.layers[target.layer.name])
        assert np.linalg.matrix_rank(found, tol=1e-5) == target.rank
        assert np.linalg.norm(lost - found) == pytest.approx(
            np.sqrt((values[target.rank :] ** 2).sum()), rel=1e-4
        )
        assert np.linalg.norm(lost - found) < np.linalg.norm(lost)


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False), ("int8", False)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_step_0_is_nearer_to_the_unquantized_base(kind: str, double: bool, dtype: str, bases: Path) -> None:
    """In logits, and nearer with a larger rank; without the adapter it is the quantized base."""
    folder = bases / f"llama-{dtype}"
    wanted = logits(loaded(folder, "none", dtype).model)
    off = [float((logits(loaded(folder, kind, dtype, double).model) - wanted).norm())]
    for rank in (8, 64):
        base = loaded(folder, kind, dtype, double)
        adapter = started(base, rank=rank)
        off.append(float((logits(base.model) - wanted).norm()))
        with adapter.disabled():
            assert float((logits(base.model) - wanted).norm()) == off[0]
    assert off[2] < off[1] < off[0]
    if dtype == "fp32" and kind != "int8":  # at full rank all is given back; 8 bits round the products, too
        assert off[2] < 1e-3 * off[0]


def test_the_line_says_what_was_lost_and_what_is_left(
    bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = loaded(bases / "llama-fp32", "nf4")
    adapter = started(base, rank=8)
    files = load_file(bases / "llama-fp32" / "model.safetensors")
    squares = np.zeros(3)
    for target in adapter.targets:
        weight = files[target.layer.weight].double().numpy()
        lost = weight - in_nf4(weight)
        left = lost - product(adapter.layers[target.layer.name])
        squares += [(matrix**2).sum() for matrix in (weight, lost, left)]
    before, now = np.sqrt(squares[1:] / squares[0])
    told = capsys.readouterr().err
    assert f"quantization took {before:.2%} of the adapted weights, of which A and B leave {now:.2%}" in told


def test_peft_agrees_at_alpha_equal_to_the_rank_alone(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """replace_lora_weights_loftq reads the same file and gives back the same, but divides by no scale: at
    alpha = 2 rank it adds the loss twice. If this fails, PEFT divides now: inits.py should not say otherwise.

    It moves weights to "cuda" whatever there is: without a GPU that is a CPU here.
    """
    if not torch.cuda.is_available():
        to = Tensor.to

        def anywhere(tensor: Tensor, *given: Any, device: Any = None, **named: Any) -> Tensor:
            there: dict[str, Any] = {} if device in (None, "cuda") else {"device": device}
            return to(tensor, *given, **there, **named)

        monkeypatch.setattr(Tensor, "to", anywhere)
    folder = bases / "llama-fp32"
    ours = loaded(folder, "nf4")
    adapter = started(ours, alpha=4.0)
    for alpha in (4, 8):
        theirs = loaded(folder, "nf4").model
        peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "up_proj"]))
        replace_lora_weights_loftq(peft, str(folder / "model.safetensors"))
        for name, layer in adapter.layers.items():
            if name.endswith(("q_proj", "up_proj")):
                found = product(theirs.get_submodule(name))
                wanted = product(layer) * (alpha / 4)
                assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


# ------------------------------------------------------------------------------------------------------------
# The base's files


def copied(bases: Path, to: Path, rename: Any) -> Path:
    """The Llama with other names in its file; `rename` gives None for what is left out."""
    to.mkdir()
    (to / "config.json").write_text((bases / "llama-fp32" / "config.json").read_text())
    tensors = load_file(bases / "llama-fp32" / "model.safetensors")
    save_file({rename(name): t for name, t in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def test_names_that_begin_otherwise_in_the_files(bases: Path, tmp_path: Path) -> None:
    """As a base model without its head writes them."""
    folder = copied(bases, tmp_path / "short", lambda name: name.removeprefix("model."))
    wanted, found = started(loaded(bases / "llama-fp32", "nf4")), started(loaded(folder, "nf4"))
    assert all(torch.equal(t, found.state()[name]) for name, t in wanted.state().items())


def test_several_files(bases: Path, tmp_path: Path) -> None:
    base = loaded(bases / "llama-fp32", "none")
    base.model.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    wanted, found = started(loaded(bases / "llama-fp32", "nf4")), started(loaded(tmp_path / "parts", "nf4"))
    assert all(torch.equal(t, found.state()[name]) for name, t in wanted.state().items())


def test_a_layer_that_the_files_do_not_have_is_named(bases: Path, tmp_path: Path) -> None:
    base = loaded(bases / "llama-fp32", "nf4")
    other = copied(bases, tmp_path / "other", lambda name: name.replace("up_proj", "w3"))
    with pytest.raises(LorakitError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is not in the files"):
        base_model.stored(other, "model.layers.0.mlp.up_proj.weight")
    both = copied(bases, tmp_path / "both", lambda name: name.replace("model.layers.", "a.layers."))
    tensors = load_file(both / "model.safetensors")
    tensors |= {name.replace("a.", "b."): t.clone() for name, t in tensors.items() if name.startswith("a.")}
    save_file(tensors, both / "model.safetensors", {"format": "pt"})
    with pytest.raises(LorakitError, match=r"could be a\.layers\.0.* or b\.layers\.0"):
        base_model.stored(both, "model.layers.0.mlp.up_proj.weight")
    swapped = {"q_proj": "k_proj", "k_proj": "q_proj"}

    def swap(name: str) -> str:
        part = name.split(".")[-2]
        return name.replace(part, swapped.get(part, part))

    wrong = copied(bases, tmp_path / "wrong", swap)
    with pytest.raises(LorakitError, match=r"q_proj\.weight in the base's files, .* is not what this layer"):
        started(Base(**(vars(base) | {"folder": wrong})))


def test_odd_widths_are_read_as_they_lie(tmp_path: Path) -> None:
    """bitsandbytes misreads layers 32 and 48 wide on some CPUs; what the bits mean is what counts, on every
    machine the same."""
    model = architectures.build(architectures.CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "narrow")
    base = loaded(tmp_path / "narrow", "nf4")
    adapter = started(base)
    down = adapter.layers["model.layers.0.mlp.down_proj"]
    weight = model.model.layers[0].mlp.down_proj.weight.detach().double().numpy()  # (32, 48)
    lost = weight - in_nf4(weight)
    values = np.linalg.svd(lost, compute_uv=False)
    assert np.linalg.norm(lost - product(down)) == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=1e-4)


def test_a_run_ends_before_step_0_where_a_weight_is_not_found(
    write_recipe: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would where transformers puts a layer together when it loads."""
    real = base_model.nearest
    monkeypatch.setattr(
        base_model, "nearest", lambda name, index: [] if "v_proj" in name else real(name, index)
    )
    model = json.loads(write_recipe().read_text())["model"] | {"quantize": "nf4", "compute_dtype": "fp32"}
    code, out, err = cli("train", write_recipe(model=model, adapter={"rank": 4, "init": "loftq"}))
    assert code == 2
    assert "model.layers.0.self_attn.v_proj.weight is not in the files of" in err
    assert "adapter.targets" in err
    assert "Traceback" not in out + err
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# ------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_is_qlora_from_a_better_start(write_recipe: Any, cli: Any, tmp_path: Path) -> None:
    """Its files are those of a LoRA of the same rank; it calls step 0 by its name."""
    model = json.loads(write_recipe().read_text())["model"] | {"quantize": "nf4", "compute_dtype": "fp32"}
    data = json.loads(write_recipe().read_text())["data"]
    data |= {"eval": data["train"].replace("train.jsonl", "eval.jsonl")}
    recipe = write_recipe(model=model, data=data, adapter={"rank": 4, "init": "loftq"})
    code, out, err = cli("train", recipe)
    assert code == 0, err
    assert "loftq     quantization took" in err
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 8, True)
    assert "as loftq starts" in out + err
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| method | lora, init: loftq |" in card
    assert "before training, as loftq starts |" in card
    first = load_file(tmp_path / "run" / "checkpoints" / "step-000000" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in first.values())
    code, out, err = cli("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 0, err
