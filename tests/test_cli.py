"""The command line: help, versions, validate, schema; fast where nothing heavy is needed."""

import contextlib
import errno
import importlib
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

VERBS = (
    *("train", "validate", "preview", "advise", "count-params", "merge", "inspect"),
    *("eval", "generate", "chat", "recipes", "schema"),
)


@pytest.mark.parametrize("verb", [[], *([name] for name in VERBS)])
def test_help(verb: list[str], cli) -> None:
    code, out, _ = cli(*verb, "--help")
    assert code == 0
    assert "Usage: lorakit" in out


@pytest.mark.parametrize("group", [[], ["recipes"]])
def test_no_summary_of_a_verb_is_cut_at_80_columns(group: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", *group, "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    listed = done.stdout.split("Commands:\n")[1].splitlines()
    assert len(listed) == (3 if group else len(VERBS))
    assert not [line for line in listed if line.endswith("...") or len(line) > 80]


def test_version_and_wrong_calls(cli) -> None:
    assert cli("--version")[1] == "lorakit 0.1.0\n"
    assert cli("trian")[0] == 2
    assert cli("train")[0] == 2
    assert cli("train", "x.yaml", "--rsume")[0] == 2
    code, _, err = cli("train", "nothing.yaml")
    assert code == 2
    assert "nothing.yaml: cannot read this recipe" in err


def test_validate_takes_many_files_and_reports_all(cli, write_recipe, tmp_path: Path) -> None:
    good = write_recipe()
    (tmp_path / "bad.yaml").write_text(
        "model: {path: x/y}\ndata: {train: a/b}\noutput: o\noptimizer: {lr: fast}\n"
    )
    (tmp_path / "worse.yaml").write_text("modle: 1\n")
    code, out, _ = cli("validate", good, tmp_path / "bad.yaml", tmp_path / "worse.yaml")
    assert code == 2
    assert f"{good}: valid" in out
    assert 'bad.yaml:4:13  optimizer.lr: expected a number > 0, got "fast"' in out
    assert 'worse.yaml:1:1  modle: not a section. Did you mean "model"?' in out
    assert cli("validate", good)[0] == 0


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"targets": ["q_prj"]}, 'adapter.targets: "q_prj" matches nothing. Did you mean "q_proj"?'),
        ({"targets": "mpl"}, 'adapter.targets: "mpl" matches nothing.'),
        ({"rank": 4096}, "adapter.rank: 4096 is above the smaller side of model.layers.0.self_attn.q_proj"),
        ({"rank_pattern": {"q_prj": 2}}, 'adapter.rank_pattern: "q_prj" matches none of the adapted layers'),
        ({"alpha_pattern": {"q_prj": 2}}, 'adapter.alpha_pattern: "q_prj" matches none of the adapted'),
        ({"method": "adalora", "init_rank": 4096}, "adapter.init_rank: 4096 is above the smaller side"),
    ],
)
def test_validate_holds_targets_and_ranks_against_the_model(
    adapter: dict[str, object], message: str, cli, write_recipe
) -> None:
    """Where config.json is here; with the missing files, all at once, and train says the same."""
    recipe = write_recipe(adapter=adapter, data={"train": "nothing.jsonl"})
    code, out, _ = cli("validate", recipe)
    assert code == 2
    places = [line for line in out.splitlines() if line.startswith(f"{recipe}:1:")]
    assert any(message in line for line in places), out
    assert any("data.train: no such file" in line for line in places), out
    assert message in cli("train", recipe)[2]


TWICE = "is adapted (adapter.targets) and cannot be trained whole too; leave it out of one of the two"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"train_also": ["0.self_attn.v_proj"]}, f"model.layers.0.self_attn.v_proj {TWICE}"),
        ({"train_also": ["0.mlp"]}, f"model.layers.0.mlp.gate_proj in model.layers.0.mlp {TWICE}"),
        (
            {"method": "peft", "type": "OFT", "train_also": ["model"]},
            f"adapter.train_also: model.layers.0.self_attn.q_proj in model {TWICE}",
        ),
        ({"targets": ["lm_head"], "train_also": ["lm_head"]}, f"adapter.train_also: lm_head {TWICE}"),
        (
            {"targets": ["q_proj"], "train_tokens": [1], "train_also": ["embed_tokens"]},
            "adapter.train_tokens: model.embed_tokens is adapted or trained whole already",
        ),
    ],
)
def test_no_layer_is_both_adapted_and_trained_whole(
    adapter: dict[str, object], message: str, cli, write_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded, in its counts, and in train of a model that the table does not know."""
    recipe = write_recipe(adapter=adapter)
    assert cli("validate", recipe)[0] == 2
    assert message in cli("validate", recipe)[1]
    monkeypatch.setattr("lorakit.validate.problems_of", lambda recipe: [])
    for verb in ("count-params", "train"):
        code, _, err = cli(verb, recipe)
        assert code == 2
        assert message in err


def test_validate_leaves_a_model_that_it_cannot_know(cli, write_recipe, tiny: Path, tmp_path: Path) -> None:
    """Another type (nothing is built to find out), a hub model, targets that come from elsewhere."""
    wrong = {"targets": ["q_prj"]}
    other = Path(shutil.copytree(tiny / "model", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "falcon"}))
    for path in (str(other), "owner/name"):
        assert cli("validate", write_recipe(model={"path": path}, adapter=wrong))[0] == 0
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert cli("validate", write_recipe(adapter=wrong | {"start_from": "adapter"}))[0] == 0
    assert cli("validate", write_recipe(adapter={"method": "full"}))[0] == 0


def test_validate_reads_a_damaged_configuration(cli, write_recipe, tiny: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny / "model", tmp_path / "other"))
    (other / "config.json").write_text("{")
    recipe = write_recipe(model={"path": str(other)})
    code, out, _ = cli("validate", recipe)
    assert code == 2
    assert out.startswith(f"{recipe}:1:")
    assert f"model.path: {other / 'config.json'}: not JSON" in out


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    for arguments in (["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]):
        done = subprocess.run([sys.executable, "-m", "lorakit", *arguments], capture_output=True, text=True)
        assert "Traceback" in done.stderr
        assert done.returncode == 2
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "train", "no.yaml"], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


FAILURES = {
    "gpu": (
        lambda: torch_error("CUDA out of memory. Tried 2 GiB.\nMore."),
        "out of memory: CUDA out of memory.",
    ),
    "cpu": (
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: no 9 bytes"),
        "out of memory: [enforce",
    ),
    "python": (MemoryError, "out of memory: MemoryError\n"),
    "disk": (
        lambda: OSError(errno.ENOSPC, "No space left", "/full"),
        "stopped: [Errno 28] No space left: '/full'",
    ),
    "file": (lambda: safetensor_error("incomplete metadata"), "stopped: incomplete metadata\n"),
}
CURES = {
    "merge": "a machine with more memory",
    "eval": "Without --exact-match",
    "generate": "A smaller --batch-size",
    "chat": "a shorter conversation",
    "preview": "more memory",
}


def torch_error(text: str) -> Exception:
    import torch

    return torch.OutOfMemoryError(text)


def safetensor_error(text: str) -> Exception:
    from safetensors import SafetensorError

    return SafetensorError(text)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("verb", CURES)
def test_memory_and_disk_fail_with_a_message_in_every_verb(
    verb: str, failure: str, cli, write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = FAILURES[failure]
    call = break_down(verb, make(), write_recipe, tmp_path, monkeypatch)
    code, out, err = cli(*call)
    assert (code, out) == (1, "")
    assert err.startswith(f"lorakit: {message}")
    hints = err.splitlines()[1:]
    assert hints and all(hint.startswith("  ") for hint in hints)
    if failure in ("gpu", "cpu", "python"):
        assert CURES[verb] in err
    assert ("CUDA_VISIBLE_DEVICES=" in err) == (failure == "gpu")
    code, _, err = cli(*call, "--debug")
    assert code == 1
    assert "Traceback" in err and message in err


@pytest.mark.parametrize("verb", CURES)
def test_a_bug_of_ours_keeps_its_traceback(
    verb: str, cli, write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (KeyError("x"), RuntimeError("shapes differ"), ValueError("x")):
        with pytest.raises(type(error)) as raised:
            cli(*break_down(verb, error, write_recipe, tmp_path, monkeypatch))
        assert raised.value is error


def break_down(
    verb: str, error: Exception, write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str | Path]:
    """A call of `verb`, whose function raises `error`."""

    def fail(*_: object, **__: object) -> None:
        raise error

    function = "score" if verb == "eval" else verb
    monkeypatch.setattr(importlib.import_module(f"lorakit.{function}"), function, fail)
    more = {"merge": ["--output", tmp_path / "merged"], "generate": ["-p", "x"]}.get(verb, [])
    return [verb, write_recipe() if verb == "preview" else tmp_path, *more]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_under_the_output_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", "schema"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("lorakit: stopped: [Errno 28] No space left on device")


INTERRUPTED = """
import functools, os, signal, sys
from transformers import LlamaForCausalLM

calls, real = [], LlamaForCausalLM.forward

@functools.wraps(real)
def forward(*arguments, **named):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments, **named)

LlamaForCausalLM.forward = forward
from lorakit.cli import main
sys.argv = ["lorakit", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("call", [["generate", "-p", "When does Ada"], ["eval"], ["eval", "--exact-match"]])
def test_ctrl_c_amid_the_work_ends_in_one_line_and_a_clean_terminal(call: list[str], pairs_run: Path) -> None:
    verb, *options = call
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, verb, str(pairs_run), *options],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert shown.endswith(b"lorakit: interrupted\r\n")
    assert b"Traceback" not in shown
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") > 0  # the cursor goes and comes


def test_nothing_is_wrapped_or_coloured_in_a_pipe(write_recipe) -> None:
    long = "x" * 300
    recipe = write_recipe(model={"path": f"./{long}"})
    done = subprocess.run([sys.executable, "-m", "lorakit", "train", recipe], capture_output=True, text=True)
    assert f"{long}" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout


def test_the_light_verbs_import_nothing_heavy(write_recipe) -> None:
    """What makes them fast, held without a clock: no heavy package is imported."""
    code = (
        "import sys; sys.argv = ['lorakit', *sys.argv[1:]]\n"
        "from lorakit import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    for arguments in (["--help"], ["validate", str(write_recipe())], ["schema"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", arguments


def test_the_schema_that_recipes_point_to_is_the_current_one(cli) -> None:
    committed = ROOT / "recipes" / "recipe.schema.json"
    assert json.loads(committed.read_text()) == json.loads(cli("schema")[1]), "run: make schema"


@pytest.mark.slow
def test_the_light_verbs_take_under_half_a_second(write_recipe) -> None:
    for arguments in (["--help"], ["validate", str(write_recipe())]):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "lorakit", *arguments], capture_output=True, check=True)
            times.append(time.perf_counter() - began)
        assert sorted(times)[2] < 0.5


def test_the_python_api_loads_on_use() -> None:
    import lorakit

    assert lorakit.load_recipe.__module__ == "lorakit.recipe"
    assert lorakit.make_plan.__module__ == "lorakit.plan"
    # Twice, because the modules lorakit.train and lorakit.merge have the names of their functions.
    names = "lorakit.train.__name__, lorakit.merge.__name__"
    code = f"import lorakit; print({names}); print({names})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train merge", "train merge"]
    with pytest.raises(AttributeError):
        lorakit.nothing  # noqa: B018
