"""Rows of the embedding trained beside LoRA: gradients by autograd on the whole table, PEFT's file, runs.

The oracle is a plain model without PEFT and without lorakit's loss, whose whole embedding has a gradient: of
that, the trained rows must be what the adapter has, and with tied ends the head's part is in it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional

from lorakit import tasks
from lorakit.adapters import Role, attach
from lorakit.adapters.lora_files import read_adapter
from lorakit.errors import LorakitError
from lorakit.layers import layers_of
from lorakit.micro_batch import MicroBatch
from lorakit.recipe.methods import Lora
from lorakit.recipe.task import Task
from lorakit.targets import Target, select, select_rows
from lorakit.tasks import Objective
from lorakit.tokenizer import token_ids
from tests import architectures
from tests.conftest import as_a_kill_left_it, metrics

IDS = torch.tensor([[7, 3, 9, 5, 3, 11, 4, 5, 8]])
ROWS = [5, 3]  # not in order: the order of the recipe is the order in the file
ENDS = [(name, tied) for name in ("llama", "gpt2", "gemma2") for tied in (False, True)]


def built(name: str, tied: bool) -> Any:
    config = architectures.CONFIGS[name]()
    config.tie_word_embeddings = tied
    return architectures.build(config)


def attached(model: Any, tokens: list[int] = ROWS) -> Any:
    targets = [Target(layer, 2, 4.0) for layer in select(layers_of(model)[0], "attention")[0]]
    return attach(Lora(rank=2), model, targets, seed=5, tokens=tokens)


def rows_of(adapter: Any) -> torch.nn.Parameter:
    (item,) = (item for item in adapter.trained() if item.role is Role.HEAD)
    return item.parameter


def randomise(adapter: Any) -> None:
    draw = torch.Generator().manual_seed(7)
    for item in adapter.trained():
        item.parameter.data += torch.randn(item.parameter.shape, generator=draw) * 0.2


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(("name", "tied"), ENDS)
def test_step_0_is_the_base_and_only_these_rows_move(name: str, tied: bool) -> None:
    model = built(name, tied)
    before, table = logits(model), model.get_input_embeddings().weight.detach().clone()
    adapter = attached(model)
    assert torch.equal(logits(model), before)
    assert rows_of(adapter).shape == (2, 32) and torch.equal(rows_of(adapter), table[ROWS])
    model(IDS).logits.logsumexp(-1).sum().backward()
    moved = {path for path, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {item.name for item in adapter.trained()}
    randomise(adapter)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(model.get_input_embeddings().token_adapter.base_layer.weight, table)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "tied"), ENDS)
def test_loss_and_gradient_are_those_of_a_plain_model(name: str, tied: bool, fused: bool) -> None:
    """In fp64. With tied ends the rows are read by the embedding and by the head, and so is the gradient;
    the loss without logits must see them too, and must not where the adapter is disabled."""
    model = built(name, tied).double()
    adapter = attached(model)
    rows = rows_of(adapter)
    rows.data = rows.data.double() + 0.3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    count = IDS.shape[1]
    micro = MicroBatch(
        IDS, torch.arange(count)[None], None, torch.ones_like(IDS), torch.arange(count - 1), IDS[0, 1:], (0,)
    )
    objective = Objective(model, tasks.build(Task()))
    objective.fused = fused
    loss = objective(micro)
    loss.backward()

    plain = built(name, tied).double()
    table = plain.get_input_embeddings().weight
    table.data[ROWS] = rows.data
    if not tied:
        assert plain.get_output_embeddings().weight is not table
    expected = functional.cross_entropy(plain(IDS).logits[0, :-1], IDS[0, 1:], reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert rows.grad is not None and rows.grad.abs().min(1).values.max() > 0
    assert torch.allclose(rows.grad, table.grad[ROWS], rtol=1e-10, atol=1e-12)

    base = built(name, tied).double()
    with adapter.disabled(), torch.no_grad():
        before = objective(micro).item()
    wanted = functional.cross_entropy(base(IDS).logits[0, :-1], IDS[0, 1:], reduction="sum").item()
    assert before == pytest.approx(wanted, rel=1e-12)
    assert abs(before - loss.item()) > 1e-3


@pytest.mark.parametrize(("name", "tied"), ENDS)
def test_peft_and_lorakit_read_the_file(name: str, tied: bool, tmp_path: Path) -> None:
    model = built(name, tied)
    adapter = attached(model)
    randomise(adapter)
    wanted = logits(model)
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(built(name, tied), tmp_path).eval()
    assert torch.equal(logits(theirs), wanted)

    fresh = built(name, tied)
    layers = layers_of(fresh)[0]
    contents = read_adapter(tmp_path, layers)
    assert contents.tokens == tuple(ROWS) and contents.copies == {} and contents.whole == {}
    again = attach(Lora(), fresh, contents.targets, seed=0, tokens=contents.tokens)
    again.load_state(contents.tensors)
    assert torch.equal(logits(fresh), wanted)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ((table, ids),) = config["trainable_token_indices"].items()
    assert ids == ROWS
    weight = torch.zeros(64, 32)
    changed = contents.changes[f"{table}.weight"](weight)
    assert torch.equal(changed[ROWS], rows_of(adapter)) and changed.count_nonzero() == 64
    for odd, words in (
        ({table: [5, 64]}, "do not fit"),
        ({table: [5]}, "do not fit"),
        ({"lm_head": ROWS}, "not of lm_head"),
    ):
        text = json.dumps(config | {"trainable_token_indices": odd})
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(LorakitError, match=words):
            read_adapter(tmp_path, layers)


def test_what_peft_itself_writes_is_read(tmp_path: Path) -> None:
    model = built("llama", True)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    peft.save_pretrained(tmp_path)
    fresh = built("llama", True)
    contents = read_adapter(tmp_path, layers_of(fresh)[0])
    attach(Lora(), fresh, contents.targets, seed=0, tokens=contents.tokens).load_state(contents.tensors)
    assert torch.equal(logits(fresh), logits(model))


def test_a_tied_head_with_a_bias_is_refused() -> None:
    """PEFT's layer multiplies by the rows and forgets the bias: the base would be another one."""
    model = built("llama", True)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(64))
    with pytest.raises(LorakitError, match="has a bias"):
        attached(model)


# ------------------------------------------------------------------------------------------------------------
# Which tokens


def test_a_token_is_a_text_or_a_number(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    whole = next(text for text in vocabulary if text.startswith("Ġ") and len(text) > 3)
    texts = ["<|user|>", 2, whole.replace("Ġ", " "), "A"]
    ids, problems = token_ids(tokenizer, texts)
    assert (ids, problems) == ([3, 2, vocabulary[whole], vocabulary["A"]], [])
    for wrong, words in (
        ("<|usr|>", 'is not one token of this tokenizer. Did you mean "<|user|>"? A token that it lacks'),
        ("two words of it", "needs a larger vocabulary"),
        (3, "3 and '<|user|>' are the same token"),
    ):
        _, (problem,) = token_ids(tokenizer, ["<|user|>", wrong])
        assert words in problem
    assert token_ids(tokenizer, []) == ([], [])


def test_rows_that_cannot_be_trained_alone() -> None:
    layers = layers_of(built("llama", True))[0]
    table, problems = select_rows(layers, [3, "x"], True, ["model.layers.0.self_attn.q_proj"])
    assert table is not None and (table.name, problems) == ("model.embed_tokens", [])
    assert "64 is no row of model.embed_tokens" in select_rows(layers, [64], True, [])[1][0]
    for moved in ("model.embed_tokens", "model", "lm_head"):
        assert "already" in select_rows(layers, [3], True, [moved])[1][0]
    assert select_rows(layers, [3], False, ["lm_head"])[1] == []
    assert select_rows(layers, [], True, ["model.embed_tokens"])[1] == []


# ------------------------------------------------------------------------------------------------------------
# Whole runs

TOKENS = ["<|user|>", "<|assistant|>", 20]


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tiny: Path) -> Callable[..., Path]:
    held_out = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}

    def write(adapter: dict[str, Any] | None = None, **sections: Any) -> Path:
        values: dict[str, Any] = {
            "adapter": {"rank": 4, "train_tokens": TOKENS} | (adapter or {}),
            "data": held_out,
            "optimizer": {"lr": 1e-2, "weight_decay": 0.5},
            "training": {"max_steps": 6, "batch_size": 4},
            "eval": {"every": 3},
            "checkpoint": {"every": 3},
        }
        return write_recipe(**values | sections)

    return write


@pytest.fixture(scope="module")
def tied_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny / "model", tmp_path_factory.mktemp("tied") / "model"))
    config = hf.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_run(recipe, cli, tiny: Path, tied_model: Path, tied: bool, tmp_path: Path) -> None:
    """Counted, fast, read by PEFT and eval, merged with tied ends still tied, continued to the same bits."""
    folder = tied_model if tied else tiny / "model"
    path = recipe(model={"path": str(folder)})
    code, _, err = cli("train", path)
    assert code == 0, err
    assert "switched off" not in err
    run = tmp_path / "run"
    params = json.loads((run / "params.json").read_text())
    rows = {m["name"]: m["trainable"] for m in params["modules"] if m["rank"] == 0}
    assert rows == {"model.embed_tokens": 3 * 64}
    for place in (path, run / "adapter"):
        code, out, err = cli("count-params", place, "--json")
        assert code == 0, err
        assert json.loads(out)["modules"] == params["modules"]
    found = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]
    code, out, err = cli("eval", run)
    assert code == 0, err
    assert found[-1] < found[0]

    code, _, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 0, err
    base = hf.AutoModelForCausalLM.from_pretrained(folder)
    table = base.model.embed_tokens.weight.detach().clone()
    theirs = logits(PeftModel.from_pretrained(base, run / "adapter").eval())
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(merged), theirs, atol=1e-4)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    moved = (merged.model.embed_tokens.weight != table).any(1).nonzero().flatten().tolist()
    assert moved == [3, 4, 20]

    again = tmp_path / "again"
    as_a_kill_left_it(run, again, step=3, later=6)
    code, _, err = cli("train", path, "--output", again, "--resume", "auto")
    assert code == 0, err
    file = "adapter/adapter_model.safetensors"
    one, other = load_file(run / file), load_file(again / file)
    assert all(torch.equal(one[name], other[name]) for name in one)

    start = {"method": "lora", "start_from": str(run / "adapter")}
    values = json.loads(path.read_text()) | {"adapter": start}
    path.write_text(json.dumps(values))
    code, _, err = cli("train", path, "--output", tmp_path / "next")
    assert code == 0, err
    first = next(line["eval_loss"] for line in metrics(tmp_path / "next") if "eval_loss" in line)
    assert first == pytest.approx(found[-1], abs=1e-5)
    code, out, err = cli("count-params", path, "--json")
    assert json.loads(out)["modules"] == params["modules"], err


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"train_tokens": ["<|usr|>"]}, 'Did you mean "<|user|>"?'),
        ({"train_tokens": [100_000]}, "100000 is no row of model.embed_tokens"),
        ({"targets": ["q_proj", "embed_tokens"]}, "model.embed_tokens is adapted or trained whole already"),
        ({"train_also": ["model.embed_tokens"]}, "model.embed_tokens is adapted or trained whole already"),
    ],
)
def test_what_is_no_token_is_refused(recipe, cli, adapter: dict[str, Any], words: str) -> None:
    code, _, err = cli("train", recipe(adapter))
    assert code == 2
    assert "adapter.train_tokens" in err and words in err


def test_tokens_and_an_adapter_to_start_from(recipe, cli, tmp_path: Path) -> None:
    assert cli("train", recipe())[0] == 0
    start = {"start_from": str(tmp_path / "run" / "adapter")}
    for adapter, words in (
        (start, "the tokens come from there"),
        (start | {"method": "adalora", "rank": 4}, "adapter.train_tokens: not a field of"),
    ):
        code, out, _ = cli("validate", recipe(adapter))
        assert code == 2 and words in out, out
    path = recipe()
    adapter = {"method": "adalora", "init_rank": 8, "target_rank": 4} | start
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter": adapter}))
    code, out, _ = cli("validate", path)
    assert code == 2 and "trained tokens of the vocabulary, which adalora cannot" in out


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_bf16_base_and_a_4_bit_one(recipe, cli, tiny: Path, quantize: str, tmp_path: Path) -> None:
    model = {"path": str(tiny / "model")}
    model |= {"dtype": "bf16"} if quantize == "none" else {"quantize": quantize}
    code, _, err = cli("train", recipe(model=model))
    assert code == 0, err
    assert "switched off" not in err
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (rows,) = (tensor for name, tensor in tensors.items() if "token_adapter" in name)
    assert rows.dtype == torch.float32
    code, _, err = cli("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 0, err
