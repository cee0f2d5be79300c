"""The guard: right fast paths agree with their plain twins on many models, wrong ones are found and switched
off.

All fast paths together are compared with the model's and PEFT's own code on tiny random models, loss and the
gradient of every trained parameter. What is wrong is made wrong here, one place at a time.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface

from lorakit import fast
from lorakit.adapters import Adapter, attach
from lorakit.data.batches import first_tokens
from lorakit.fast import PATHS, FastPaths, Limits, Observed, distance
from lorakit.kernels import attention, cross_entropy, lora, norm, products
from lorakit.layers import layers_of
from lorakit.micro_batch import MicroBatch
from lorakit.recipe.methods import AdaLora, Full, Lora
from lorakit.targets import assign, select
from lorakit.tasks import Objective, causal_lm
from tests import architectures
from tests.conftest import SHARED
from tests.samples import made

ENDS = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = architectures.CONFIGS["llama"]().to_dict()
SHAPE = {
    name: LLAMA[name]
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
}
WITHOUT = ["fast.shapes", "fast.loss", "fast.lora"]
WITH_NORMS = [*WITHOUT, "fast.norm"]
# Name -> (configuration, what it has fast paths for when rows are padded). Scales and caps far from 1, so
# that a path that forgets one is far off.
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (architectures.CONFIGS["llama"], WITH_NORMS),
    "qwen3": (architectures.CONFIGS["qwen3"], WITH_NORMS),
    "gemma2": (
        lambda: hf.Gemma2Config(
            **SHAPE,
            **ENDS,
            head_dim=8,
            sliding_window=40,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
        WITH_NORMS,
    ),
    "phi3": (lambda: hf.Phi3Config(**SHAPE, **ENDS, pad_token_id=None), WITH_NORMS),
    "phi": (architectures.CONFIGS["phi"], WITHOUT),  # its head has a bias
    "gpt2": (architectures.CONFIGS["gpt2"], WITHOUT),
    "mixtral": (architectures.CONFIGS["mixtral"], WITH_NORMS),
    "gpt_neox": (architectures.CONFIGS["gpt_neox"], WITHOUT),
    "opt": (architectures.CONFIGS["opt"], WITHOUT),
    "cohere": (
        lambda: hf.CohereConfig(**SHAPE, **ENDS, pad_token_id=None, logit_scale=0.25),
        WITHOUT,
    ),
    "granite": (
        lambda: hf.GraniteConfig(
            **SHAPE,
            **ENDS,
            pad_token_id=None,
            logits_scaling=4.0,
            embedding_multiplier=2.0,
            residual_multiplier=0.7,
            attention_multiplier=0.3,
        ),
        WITH_NORMS,
    ),
}


def with_a_transform_before_its_head() -> Any:
    """RoBERTa as a decoder: a dense layer, GELU and a norm stand between hidden states and output weights."""
    return hf.RobertaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        is_decoder=True,
    )


def without_a_decoder_that_transformers_finds() -> Any:
    """ModernBERT as a decoder: get_decoder() is its output layer."""
    return hf.ModernBertDecoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
        **ENDS,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Subject:
    """A model with its adapter, a micro-batch and its switches."""

    paths: FastPaths
    adapter: Adapter
    micro: MicroBatch
    precision: str

    @property
    def model(self) -> Any:
        return self.paths.model

    def choose(self) -> dict[str, bool]:
        decisions = fast.choose(self.paths, self.adapter, self.micro, self.precision)
        return {name: decision.value for name, decision in decisions.items()}

    def observed(self, on: Sequence[str]) -> Observed:
        """With the adapter away from zero."""
        with fast._moved(self.adapter):
            self.paths.switch(on)
            return fast._observe(self.paths, self.adapter, self.micro)


def subject(
    model: Any,
    precision: str = "fp32",
    packed: bool = True,
    section: Any = None,
    targets: str | list[str] = "all-linear",
    train_also: Sequence[str] = (),
    checkpointing: bool = False,
    base: str = "",
    lengths: Sequence[int] = (40, 3, 70, 25, 9, 150),
) -> Subject:
    """`model`: a name of MODELS, or a model. bf16: under autocast, the `base` in bf16 too where it is not
    fp32."""
    model = architectures.build(MODELS[model][0]()) if isinstance(model, str) else model
    section = section or Lora(rank=4)
    quantized = getattr(model, "is_quantized", False)
    if precision == "bf16" and base != "fp32" and section.method != "full" and not quantized:
        model.to(torch.bfloat16)
    model.requires_grad_(False)
    if packed:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = attached(model, section, targets, train_also)
    draw = np.random.default_rng(0)
    ids = draw.integers(3, model.config.get_text_config().vocab_size, sum(lengths)).astype(np.int32)
    data = made(ids, np.ones(len(ids), np.uint8), np.cumsum([0, *lengths]))
    micro = first_tokens(data, fast.NUM_TOKENS, packed)

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()

    return Subject(
        FastPaths(Objective(model, causal_lm.CausalLmTask()), adapter, micro, autocast),
        adapter,
        micro,
        precision,
    )


def attached(model: Any, section: Any, targets: str | list[str], train_also: Sequence[str]) -> Adapter:
    if section.method == "full":
        return attach(section, model, [], 0, stored_config=model.config)
    chosen, problems = select(layers_of(model)[0], targets)
    assert chosen and not problems
    rank = section.init_rank if section.method == "adalora" else section.rank
    planned = {"total_steps": 20} if section.method == "adalora" else {}
    assigned, _ = assign(chosen, rank, 2.0 * rank, {}, {})
    return attach(section, model, assigned, 0, train_also=list(train_also), **planned)


FP32 = [path for path in PATHS if path != "fast.attention"]  # where the fused attention is the fast one

# Closer than the guard asks for. fp32 rounds to 6e-8 and bf16 to 2e-3 of a number; two layers, forwards and
# backwards, round some dozens of times, and a small gradient is a difference of larger numbers.
ROUNDING = {"fp32": Limits(1e-6, 1e-5, 3e-5), "bf16": Limits(1e-3, 0.04, 0.15)}


def agree(found: Observed, expected: Observed, precision: str) -> None:
    """To rounding."""
    loss, gradients, gradient, worst = distance(found, expected)
    within = ROUNDING[precision]
    assert loss <= within.loss
    assert gradients <= within.gradients
    assert gradient <= within.gradient, worst


# ------------------------------------------------------------------------------------------------------------
# Right paths


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_path_agrees_alone_and_together(
    name: str, precision: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "LIMITS", ROUNDING)
    here = subject(name, precision, packed)
    available = MODELS[name][1] + (["fast.attention"] if packed and precision == "bf16" else [])
    assert here.paths.available() == available
    expected = here.observed(())
    assert len(expected.gradients) == len(here.adapter.trained())
    assert all(gradient.any() for gradient in expected.gradients.values())
    for path in available:
        agree(here.observed([path]), expected, precision)
    assert here.choose() == dict.fromkeys(available, True)
    with fast._moved(here.adapter):  # the switches are left on
        agree(fast._observe(here.paths, here.adapter, here.micro), expected, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_whose_hidden_states_do_not_go_straight_to_the_head(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = subject(architectures.build(with_a_transform_before_its_head()), precision)
    assert here.choose() == {path: path != "fast.loss" for path in here.paths.available()}
    assert "the loss without logits (fast path) is switched off" in capsys.readouterr().err
    agree(here.observed(here.paths.available()[2:]), here.observed(()), precision)


def test_a_model_that_a_path_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    here = subject(architectures.build(without_a_decoder_that_transformers_finds()))
    assert here.choose() == {path: path != "fast.loss" for path in here.paths.available()}
    assert "the loss without logits (fast path) is switched off: it does not run" in capsys.readouterr().err


def test_a_hybrid_model_with_a_multiplier_at_its_head() -> None:
    """Falcon-H1: attention and a state space side by side; padded, as it cannot be packed."""
    config = hf.FalconH1Config(
        **SHAPE,
        **ENDS,
        pad_token_id=None,
        head_dim=8,
        lm_head_multiplier=0.5,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
    )
    here = subject(architectures.build(config), packed=False, targets=["q_proj", "v_proj", "down_proj"])
    assert here.choose() == dict.fromkeys(here.paths.available(), True)
    assert "fast.loss" in here.paths.available()
    agree(here.observed(here.paths.available()), here.observed(()), "fp32")


ADAPTERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dropout": ({"section": Lora(rank=4, dropout=0.1)}, []),
    "dropout, checkpointing": ({"section": Lora(rank=4, dropout=0.1), "checkpointing": True}, []),
    "checkpointing": ({"checkpointing": True}, []),
    "rank-stabilized": ({"section": Lora(rank=4, scaling="rank_stabilized")}, []),
    "adalora": ({"section": AdaLora(method="adalora", init_rank=4, target_rank=2)}, []),
    "embeddings": ({"targets": ["embed_tokens", "q_proj", "down_proj"]}, []),
    "head": ({"targets": ["lm_head", "q_proj"]}, ["fast.loss"]),
    "head whole": ({"targets": ["q_proj", "v_proj"], "train_also": ["lm_head"]}, []),
    "norm whole": ({"train_also": ["model.norm"]}, []),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_adapter(name: str, precision: str) -> None:
    """An adapted head is nothing for the loss without logits; all else agrees, and what is trained whole has
    its gradient."""
    options, off = ADAPTERS[name]
    here = subject("llama", precision, **options)
    expected = here.observed(())
    verdicts = here.choose()
    assert verdicts == {path: path not in off for path in here.paths.available()}
    agree(here.observed([path for path in verdicts if verdicts[path]]), expected, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2: head and embedding are one matrix
def test_full_fine_tuning_has_what_needs_no_adapter(name: str, precision: str) -> None:
    here = subject(name, precision, section=Full(method="full"))
    assert here.paths.available()[:2] == ["fast.shapes", "fast.loss"]
    assert here.choose() == dict.fromkeys(here.paths.available(), True)
    agree(here.observed(here.paths.available()), here.observed(()), precision)


def nf4(folder: Path) -> Any:
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # that form has no backward
            module.support_avx512bf16_for_cpu = False
    return model


def test_a_4_bit_base(tiny: Path) -> None:
    here = subject(nf4(tiny / "model"), "bf16")
    assert here.choose() == dict.fromkeys(PATHS, True)
    assert len(here.paths.groups) == 2 * 4  # q, k, v; o; gate, up; down
    agree(here.observed(list(PATHS)), here.observed(()), "bf16")


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="needs the real model beside the checkout")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pretrained_model(precision: str) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(SHARED / "models" / "stories260K" / "hf")
    here = subject(model, precision)
    assert here.choose() == dict.fromkeys(PATHS if precision == "bf16" else FP32, True)
    agree(here.observed(here.paths.available()), here.observed(()), precision)


# ------------------------------------------------------------------------------------------------------------
# Wrong paths


class Backwards(torch.autograd.Function):
    """x; its gradient goes through `change`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.change(grad), None


def halved(x: Tensor) -> Tensor:
    return Backwards.apply(x, lambda grad: 0.5 * grad)


FACTORS, OUTPUTS, NORM = lora.factors, lora.outputs, norm.rms_norm
SUMMED, ATTEND, WIDENED = cross_entropy.summed, attention.attend, MicroBatch.widened
GATHER = products._gather


def factors_of_half_the_scale(layer: Any) -> Any:
    a, b, scale = FACTORS(layer)
    return a, b, scale / 2


def factors_with_half_the_gradient_of_a(layer: Any) -> Any:
    a, b, scale = FACTORS(layer)
    return halved(a), b, scale


def factors_with_half_of_one_gradient(layer: Any) -> Any:
    """That of the B of one matrix."""
    a, b, scale = FACTORS(layer)
    return a, halved(b) if len(b) == len(a.T) else b, scale  # of 14 the square ones


def outputs_swapped(layers: Any, x: Tensor, *more: Any) -> Any:
    first, *others = OUTPUTS(layers, x, *more)
    return (first, *others[::-1])


def outputs_whose_gradient_passes_by_the_update(layers: Any, x: Tensor, *more: Any) -> Any:
    found = []
    for layer in layers:
        a, b, scale = FACTORS(layer)
        update = scale * (x.detach() @ a.T.to(x.dtype)) @ b.T.to(x.dtype)
        found.append(layer.base_layer(x) + update.to(x.dtype))
    return tuple(found)


def norm_without_the_gradient_of_its_divisor(x: Tensor, weight: Tensor, eps: float, around_one: bool) -> Any:
    divisor = (x.float().square().mean(-1, keepdim=True) + eps).sqrt().detach()
    return (x / divisor * (weight.float() + around_one)).to(x.dtype)


WRONG: dict[str, tuple[str, str, Any, str, Any]] = {  # (path, model, where, name, what stands there)
    "a scale halved": ("fast.lora", "llama", lora, "factors", factors_of_half_the_scale),
    "outputs swapped": ("fast.lora", "llama", lora, "outputs", outputs_swapped),
    "A's gradients": ("fast.lora", "llama", lora, "factors", factors_with_half_the_gradient_of_a),
    "some gradients": ("fast.lora", "llama", lora, "factors", factors_with_half_of_one_gradient),
    "the input's gradient": (
        "fast.lora",
        "llama",
        lora,
        "outputs",
        outputs_whose_gradient_passes_by_the_update,
    ),
    "norm": ("fast.norm", "llama", norm, "rms_norm", norm_without_the_gradient_of_its_divisor),
    "norm around one": ("fast.norm", "gemma2", norm, "rms_norm", norm_without_the_gradient_of_its_divisor),
    "softcap": ("fast.loss", "gemma2", causal_lm, "logit_transform", lambda config: (1.0, None)),
    "factor": ("fast.loss", "cohere", causal_lm, "logit_transform", lambda config: (1.0, None)),
    "divisor": ("fast.loss", "granite", causal_lm, "logit_transform", lambda config: (1.0, None)),
    "bias": (
        "fast.loss",
        "phi",
        cross_entropy,
        "summed",
        lambda h, w, targets, bias, *more: SUMMED(h, w, targets, None, *more),
    ),
    "a target forgotten": (
        "fast.loss",
        "llama",
        cross_entropy,
        "summed",
        lambda h, w, targets, *more: SUMMED(h[:-1], w, targets[:-1], *more),
    ),
    "hidden gradient": (
        "fast.loss",
        "llama",
        cross_entropy,
        "summed",
        lambda h, *more: SUMMED(halved(h), *more),
    ),
    "not a number": (
        "fast.loss",
        "llama",
        cross_entropy,
        "summed",
        lambda *given: SUMMED(*given) * float("nan"),
    ),
    "a gradient that is no number": (
        "fast.loss",
        "llama",
        cross_entropy,
        "summed",
        lambda h, *more: SUMMED(Backwards.apply(h, lambda grad: grad * float("nan")), *more),
    ),
    "positions": (
        "fast.shapes",
        "gpt2",  # whose positions are absolute
        MicroBatch,
        "widened",
        lambda micro, width: replace(
            WIDENED(micro, width), position_ids=torch.zeros(1, width, dtype=torch.long)
        ),
    ),
    "predictors": (
        "fast.shapes",
        "llama",
        MicroBatch,
        "widened",
        lambda micro, width: replace(
            WIDENED(micro, width), predictors=(micro.predictors + 1).clamp(max=width - 1)
        ),
    ),
    "attention's scale": (
        "fast.attention",
        "llama",
        attention,
        "attend",
        lambda q, k, v, lengths, scale: ATTEND(q, k, v, lengths, 1.5 * scale),
    ),
    "documents that see each other": (
        "fast.attention",
        "llama",
        attention,
        "attend",
        lambda q, k, v, lengths, scale: ATTEND(q, k, v, (sum(lengths),), scale),
    ),
    "gradients beyond the first block": (
        "fast.attention",
        "llama",
        products,
        "_gather",
        lambda total, part, first, stop: GATHER(total, -part if first else part, first, stop),
    ),
    "the keys' gradient": (
        "fast.attention",
        "llama",
        attention,
        "attend",
        lambda q, k, v, lengths, scale: ATTEND(q, halved(k), v, lengths, scale),
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_path_is_switched_off_aloud_and_alone(
    what: str, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, name, place, attribute, wrong = WRONG[what]
    here = subject(name, precision)
    if path not in here.paths.available():
        assert path == "fast.attention" and precision == "fp32"
        return
    expected = here.observed(())
    monkeypatch.setattr(place, attribute, wrong)
    verdicts = here.choose()
    assert verdicts == {other: other != path for other in here.paths.available()}
    (line,) = capsys.readouterr().err.splitlines()
    told = f"warning: {PATHS[path][0]} (fast path) is switched off: loss "
    assert line.startswith(told)
    assert re.search(r"gradients \S+ from those of .+: more than rounding explains", line)
    # what is left trains right though the wrong code is still there
    with fast._moved(here.adapter):
        agree(fast._observe(here.paths, here.adapter, here.micro), expected, precision)


def test_long_first_rows_hide_no_leak_between_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several documents are compared, whatever the rows are."""
    here = subject("llama", "bf16", lengths=(400, 300, 500))
    lengths = here.micro.document_lengths
    assert lengths is not None and len(lengths) == 3 and len(set(lengths)) == 3
    assert here.choose()["fast.attention"]
    monkeypatch.setattr(
        attention, "attend", lambda q, k, v, lengths, scale: ATTEND(q, k, v, (sum(lengths),), scale)
    )
    assert not here.choose()["fast.attention"]


@pytest.mark.parametrize("training", [True, False])
def test_an_objective_leaves_its_model_in_the_mode_it_is_in(training: bool) -> None:
    model = architectures.build(MODELS["llama"][0]()).train(training)
    objective = Objective(model, causal_lm.CausalLmTask())
    assert objective.training is model.training is training


def failing(*given: Any) -> Any:
    raise RuntimeError("no kernel image for this device\nand a long story")


def test_a_path_that_raises_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = subject("llama")
    monkeypatch.setattr(norm, "rms_norm", failing)
    assert here.choose() == {path: path != "fast.norm" for path in FP32}
    assert capsys.readouterr().err == (
        "warning: norms in one step (fast path) is switched off: "
        "it does not run here: no kernel image for this device\n"
    )


def test_a_path_that_fails_half_way_back_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some gradients are there by then; they may not be added to those of the next path."""
    here = subject("llama")
    first = here.paths.groups[0].layers[0]
    steps = []

    def factors(layer: Any) -> Any:
        a, b, scale = FACTORS(layer)

        def fail(grad: Tensor) -> Tensor:
            steps.append([item.name for item in here.adapter.trained() if item.parameter.grad is not None])
            return failing()

        return (Backwards.apply(a, fail) if layer is first else a), b, scale

    monkeypatch.setattr(lora, "factors", factors)
    assert here.choose() == {path: path != "fast.lora" for path in FP32}
    assert len(steps) == 2 and all(len(seen) > 10 for seen in steps)  # with the others, and alone
    assert all(item.parameter.grad is None for item in here.adapter.trained())


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_what_runs_out_of_memory_is_no_verdict(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run would not fit anyway; it says so. The adapter is back where it was."""
    here = subject("llama")
    before = {item.name: item.parameter.clone() for item in here.adapter.trained()}

    def full(*given: Any) -> Any:
        raise error

    monkeypatch.setattr(cross_entropy, "summed", full)
    with pytest.raises(error):
        here.choose()
    assert all(torch.equal(item.parameter, before[item.name]) for item in here.adapter.trained())


def test_paths_that_are_right_alone_and_wrong_together_are_all_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = subject("llama")

    def factors(layer: Any) -> Any:
        return factors_of_half_the_scale(layer) if here.paths.objective.fused else FACTORS(layer)

    monkeypatch.setattr(lora, "factors", factors)
    verdicts = fast.choose(here.paths, here.adapter, here.micro, "fp32")
    assert {path: verdict.value for path, verdict in verdicts.items()} == dict.fromkeys(FP32, False)
    assert all(verdict.why.startswith("together: loss ") for verdict in verdicts.values())
    assert capsys.readouterr().err.count("is switched off: together: ") == len(FP32)
    assert_plain(here)


@pytest.mark.parametrize("section", [None, AdaLora(method="adalora", init_rank=4, target_rank=2)])
def test_a_start_at_zero_hides_no_gradient(section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where B (or AdaLoRA's singular values) is zero, the gradient of A is zero, right or wrong."""
    here = subject("llama", section=section)
    start = [item for item in here.adapter.trained() if not item.parameter.any()]
    assert len(start) == 14
    monkeypatch.setattr(lora, "factors", factors_with_half_the_gradient_of_a)
    assert here.choose()["fast.lora"] is False
    assert not any(item.parameter.any() for item in start)
    if section is None:  # this test can tell
        monkeypatch.setattr(fast, "_moved", lambda adapter: nullcontext())
        assert here.choose()["fast.lora"] is True


# ------------------------------------------------------------------------------------------------------------
# What the guard leaves behind


@pytest.mark.parametrize("section", [Lora(rank=4, dropout=0.1), Full(method="full")])
def test_the_guard_leaves_everything_as_it_was(section: Any) -> None:
    here = subject("llama", section=section)
    before = {name: tensor.clone() for name, tensor in here.model.state_dict().items()}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert all(here.choose().values())
    assert torch.equal(torch.get_rng_state(), state)
    after = here.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in here.model.parameters())
    assert all(module.training for module in here.paths.objective.modules())  # as the loop trains


def assert_plain(here: Subject) -> None:
    """Every module has its own forward, and nothing is fast."""
    assert not [name for name, module in here.model.named_modules() if "forward" in vars(module)]
    assert here.paths.objective.fused is False and here.paths.objective.repeats_shapes is False
    assert here.paths.autocast is here.paths.plain_autocast
    assert AttentionInterface()[attention.NAME].keywords == {"products": False}  # type: ignore[union-attr]


def test_the_switches_do_exactly_what_they_are_told() -> None:
    here = subject("llama", "bf16")
    assert_plain(here)  # as made
    here.paths.switch(list(PATHS))
    fast_forward = {name for name, module in here.model.named_modules() if "forward" in vars(module)}
    assert len(fast_forward) == 14 + 5  # adapted layers; two norms in each block and the last
    assert here.paths.objective.fused is True and here.paths.objective.repeats_shapes is True
    assert here.paths.autocast is nullcontext
    assert AttentionInterface()[attention.NAME].keywords == {"products": True}  # type: ignore[union-attr]
    assert here.model.config._attn_implementation == attention.NAME
    here.paths.switch(["fast.norm"])
    left = {name for name, module in here.model.named_modules() if "forward" in vars(module)}
    assert len(left) == 5 and all("norm" in name for name in left)
    here.paths.switch(())
    assert_plain(here)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_guard_sees_rows_of_a_length_that_is_changed(packed: bool) -> None:
    """A multiple of every grain would be compared with itself."""
    widths = []

    def note(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        widths.append(named["input_ids"].shape[1])

    here = subject("llama", packed=packed)
    here.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    here.observed(())
    here.observed(["fast.shapes"])
    assert widths[0] < widths[1]


def test_distance_by_hand() -> None:
    """Of the losses 1 / 4; of all gradients |(3, 4)| / |(30, 40, ...)|; of b, whose size is below a hundredth
    of a's, a share of that hundredth."""
    expected = Observed(4.0, {"a": torch.tensor([30.0, 40.0]), "b": torch.tensor([[0.3]])})
    found = Observed(5.0, {"a": torch.tensor([33.0, 44.0]), "b": torch.tensor([[0.4]])})
    loss, gradients, gradient, worst = distance(found, expected)
    assert loss == pytest.approx(0.25)
    assert gradients == pytest.approx((25 + 0.01) ** 0.5 / (2500 + 0.09) ** 0.5)
    assert gradient == pytest.approx(0.1 / 0.5)
    assert worst == "b"
    assert distance(expected, expected) == (0.0, 0.0, 0.0, "a")
    missing = distance(Observed(4.0, {"a": expected.gradients["a"]}), expected)
    assert missing == (0.0, float("inf"), float("inf"), "b")
    none = Observed(4.0, {})
    assert distance(none, none) == (0.0, 0.0, 0.0, "")


# ------------------------------------------------------------------------------------------------------------
# Autocast


BARE: dict[str, tuple[dict[str, Any], bool]] = {
    "bf16": ({}, True),
    "adalora": ({"section": AdaLora(method="adalora", init_rank=4, target_rank=2)}, True),
    "some layers": ({"targets": ["q_proj"]}, True),
    "fp32 base": ({"base": "fp32"}, False),
    "trained norm": ({"train_also": ["model.norm"]}, False),
    "trained head": ({"train_also": ["lm_head"]}, False),
    "embeddings": ({"targets": ["embed_tokens", "q_proj"]}, False),
    "full": ({"section": Full(method="full")}, False),
}


@pytest.mark.parametrize("name", BARE)
def test_autocast_is_left_out_where_nothing_needs_it(name: str) -> None:
    options, bare = BARE[name]
    here = subject("llama", "bf16", **options)
    assert here.paths.is_bare is bare
    here.paths.switch(["fast.lora"])
    assert (here.paths.autocast is nullcontext) == bare
    here.paths.switch(["fast.loss", "fast.norm"])
    assert here.paths.autocast is here.paths.plain_autocast


def test_a_4_bit_base_needs_no_autocast_unless_it_is_fp32_elsewhere(tiny: Path) -> None:
    here = subject(nf4(tiny / "model"), "bf16")
    assert here.paths.is_bare
    norms: list[nn.Module] = [m for m in here.model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    norms[0].float()
    assert not fast._is_bare(here.model, here.adapter, here.paths.groups)


def test_what_is_trained_outside_of_groups_needs_autocast_in_any_dtype() -> None:
    here = subject("llama", "bf16", section=Full(method="full"))
    here.model.to(torch.bfloat16)
    assert not fast._is_bare(here.model, here.adapter, here.paths.groups)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "opt"])
def test_without_autocast_the_numbers_are_those_with_it(name: str) -> None:
    """The same products in the same dtype: what differs is what autocast would have kept in fp32 between
    them."""
    here = subject(name, "bf16")
    assert here.paths.is_bare
    on = here.paths.available()
    bare = here.observed(on)
    here.paths.is_bare = False
    cast = here.observed(on)
    agree(bare, cast, "bf16")
