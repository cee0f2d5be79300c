"""`lorakit preview` shows what trains, and nothing in the data acts on a terminal or a browser."""

import html
import io
import json
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.errors import LorakitError
from lorakit.output_file import check_place, write
from lorakit.preview import Piece, Preview, Shown, choose, pieces_of
from lorakit.preview_html import page
from lorakit.terminal import signs, visible
from tests.conftest import ROOT, load_script

# ------------------------------------------------------------------------------------------------------------
# Pieces


def byte_level() -> Any:
    """Tokens are bytes or a few common letters, so that 😀 is four of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Any:
    """As Llama-2's: a blank is ▁, the first one is stripped, what has no token is written in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,!"]
    merges = [("▁", letter) for letter in "abc"]
    vocabulary += [first + second for first, second in merges]
    table = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(table, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_pieces() -> Any:
    """As BERT's: the decoder puts blanks between words and takes them away before a full stop."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = ["[UNK]", "a", "##b", "b", "do", "n", "'", "t", ".", ",", "!"]
    model = models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


TEXTS = (
    "a b, c.",
    "",
    " ",
    "a",
    "e\u0301 na\u00efve \u00fc",
    "a😀b👩\u200d🚀 a",
    "\ufffd a\ufffd\ufffdb",
    "你好, a!\n\ta",
)


@pytest.mark.parametrize("text", [*TEXTS, "ab don't. a , b !"], ids=ascii)
@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_pieces])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_pieces_together_are_the_text_and_hold_every_token_once(make: Any, text: str, cut: int) -> None:
    """Also where the end of the text is cut off amid a character."""
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ids = ids[: len(ids) - cut]
    weights = [i % 2 for i in range(len(ids))]
    pieces = pieces_of(tokenizer.decode, ids, weights, set())
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert [i for piece in pieces for i in piece.ids] == ids
    assert [w for piece in pieces for w in piece.weights] == weights


def test_a_character_of_several_tokens_is_one_piece_and_the_others_are_single() -> None:
    """UTF-8 has 4 bytes for 😀 and 2 for ü, and here a token is a byte."""
    tokenizer = byte_level()
    ids = tokenizer.encode("a😀ü.").ids
    assert len(ids) == 1 + 4 + 2 + 1
    pieces = pieces_of(tokenizer.decode, ids, [0, 0, 1, 1, 1, 0, 0, 1], set())
    assert [piece.text for piece in pieces] == ["a", "😀", "ü", "."]
    assert [len(piece.ids) for piece in pieces] == [1, 4, 2, 1]
    assert [piece.kind for piece in pieces] == ["masked", "trained", "masked", "trained"]
    cut = pieces_of(tokenizer.decode, ids[:3], [0, 1, 1], set())
    assert [piece.text for piece in cut] == ["a", "\ufffd"]


def test_a_special_token_is_a_piece_of_its_own_even_after_half_a_character() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    half = tokenizer.encode("😀").ids[:2]
    begin, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))

    def decode(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    pieces = pieces_of(decode, [begin, *half, end, begin], [0, 0, 1, 1, 0], {begin, end})
    assert [piece.text for piece in pieces] == ["<s>", "\ufffd", "</s>", "<s>"]
    assert [piece.special for piece in pieces] == [True, False, True, True]


def test_a_decoder_that_changes_what_it_said_still_adds_up() -> None:
    """The tenth token turns everything round: whatever it touched becomes one piece."""

    def decode(ids: Any) -> str:
        text = "".join(chr(97 + i) for i in ids)
        return text[::-1] if 9 in ids else text

    ids = list(range(12))
    pieces = pieces_of(decode, ids, [0] * 12, set())
    assert "".join(piece.text for piece in pieces) == decode(ids) == "lkjihgfedcba"
    assert [i for piece in pieces for i in piece.ids] == ids
    assert [piece.text for piece in pieces_of(decode, ids[:9], [0] * 9, set())] == list("abcdefghi")


# ------------------------------------------------------------------------------------------------------------
# Which samples


@pytest.mark.parametrize(
    ("lengths", "number", "expected"),
    [
        ([5, 9, 2], 1, {0: "first"}),
        ([5], 3, {0: "first"}),
        ([5, 9, 2, 7], 2, {1: "longest", 2: "shortest"}),
        ([5, 9, 2, 9, 2], 2, {1: "longest", 2: "shortest"}),
        ([5, 5, 5], 2, {0: "longest", 1: "shortest"}),
        ([5, 9, 2], 3, {0: "", 1: "longest", 2: "shortest"}),
        ([5, 9, 2], 99, {0: "", 1: "longest", 2: "shortest"}),
    ],
)
def test_which_samples_are_shown(lengths: list[int], number: int, expected: dict[int, str]) -> None:
    assert choose(np.array(lengths), number, seed=0) == expected
    assert list(choose(np.array(lengths), number, seed=0)) == sorted(expected)


@pytest.mark.parametrize("number", [3, 4, 17, 99])
def test_random_samples_are_the_seeds_and_no_other_ones(number: int) -> None:
    lengths = np.array([*range(10, 60), *range(59, 9, -1)])  # 100 samples
    chosen = choose(lengths, number, seed=7)
    assert chosen == choose(lengths, number, seed=7)
    assert len(chosen) == number
    assert list(chosen) == sorted(chosen)
    assert list(chosen.values()).count("random") == number - 2
    assert chosen[49] == "longest"
    assert chosen[0] == "shortest"
    if number < 99:
        assert chosen != choose(lengths, number, seed=8)


# ------------------------------------------------------------------------------------------------------------
# Characters

HOSTILE = (
    "</script><img src=x onerror=alert(1)>\x1b]52;c;QQ==\x07\x1b[2J\u202egnp.exe"
    "\x9b31m\r\n\t&amp;\"'\x00\u2028"
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, naïve 你好 😀", "plain text, naïve 你好 😀"),
        ("a\nb\tc", "a↵\nb→c"),
        ("\r\n", "\\r↵\n"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x00\x07\x7f\x9b\x85", "\\x00\\x07\\x7f\\x9b\\x85"),
        ("\u202e\u2066\u200b\ufeff\u200d", "\\u202e\\u2066\\u200b\\ufeff\\u200d"),
        ("\u2028\u2029\u00a0\u3000", "\\u2028\\u2029\\xa0\\u3000"),
        ("\U000e0041\ue000\ud800", "\\U000e0041\\ue000\\ud800"),
    ],
    ids=ascii,
)
def test_what_cannot_be_seen_is_shown_by_a_sign(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert "".join(part for part, _ in signs(text)) == shown


def test_no_character_of_unicode_gets_through_that_a_terminal_acts_on() -> None:
    shown = visible("".join(map(chr, range(0x110000))))
    kinds = {unicodedata.category(character) for character in set(shown) - {"\n", " "}}
    assert not [kind for kind in kinds if kind[0] in "CZ"]


# ------------------------------------------------------------------------------------------------------------
# The verb


def rows_of(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_preview_shows_the_tokens_and_the_account(cli, write_recipe, tiny: Path, tokenizer) -> None:
    recipe = write_recipe(
        data={"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "limit": 10}
    )
    code, out, err = cli("preview", recipe, "-n", "99", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"rows", "eval_rows", "samples"}
    assert found["rows"] == {"read": 10, "kept": 10, "truncated": 0, "dropped": 0, "masked_out": 0, "bad": 0}
    assert found["eval_rows"]["read"] == 10
    assert all(set(sample) == {"source", "ids", "weights", "text"} for sample in found["samples"])
    assert [s["source"].rsplit("/", 1)[-1] for s in found["samples"]] == [
        f"train.jsonl:{n}" for n in range(1, 11)
    ]
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    for row, sample in zip(rows, found["samples"], strict=False):
        assert sample["text"] == f"<s>{row['prompt']}{row['completion']}</s>"
        trained = [i for i, w in zip(sample["ids"], sample["weights"], strict=True) if w]
        assert tokenizer.decode(trained) == row["completion"] + "</s>"
        assert set(sample["weights"]) == {0, 1}
    text = cli("preview", recipe, "-n", "1")[1]
    assert f"⊢<s>{rows[0]['prompt']}[[{rows[0]['completion']}</s>]]⊣" in text
    assert re.search(r"^read +10 +10$", text, re.MULTILINE)
    number, trained = (len(found["samples"][0]["ids"]), sum(found["samples"][0]["weights"]))
    facts = f"{number} tokens, {trained} trained ({100 * trained / number:.1f} %)"
    assert f"train.jsonl:1 (first): {facts}\n" in text
    assert text.count("\n--- ") == 1


def test_of_many_rows_the_longest_the_shortest_and_a_random_one_are_shown(
    cli, write_recipe, tmp_path: Path
) -> None:
    """In the order of the rows, as text and as JSON the same ones."""
    rows = [{"prompt": "q", "completion": " a" * n} for n in (5, 9, 40, 7, 3, 8, 2, 11, 12)]
    recipe = write_recipe(data={"train": rows_of(tmp_path / "rows.jsonl", rows)})
    samples = json.loads(cli("preview", recipe, "--json")[1])["samples"]
    lines = [int(sample["source"].rsplit(":", 1)[1]) for sample in samples]
    assert len(set(lines)) == 3
    assert lines == sorted(lines)
    assert set(lines) > {3, 7}
    text = cli("preview", recipe)[1]
    shown = re.findall(r"^--- .*?:(\d+) \((\w+)\)", text, re.MULTILINE)
    assert shown == [(str(n), {3: "longest", 7: "shortest"}.get(n, "random")) for n in lines]


def test_preview_counts_every_kind_of_row(cli, write_recipe, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": " b"},
        {"prompt": "long " * 50, "completion": " b"},
        {"prompt": "a", "completion": " long" * 50},
        {"prompt": "a"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n")
    data = {"train": "rows.jsonl", "max_length": 20, "on_long": "truncate", "on_bad_row": "skip"}
    code, out, err = cli("preview", write_recipe(data=data), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["rows"] == {"read": 5, "kept": 1, "truncated": 1, "dropped": 0, "masked_out": 1, "bad": 2}
    assert [sample["source"].rsplit(":")[-1] for sample in found["samples"]] == ["1", "3"]
    text = cli("preview", write_recipe(data=data))[1]
    cut = text.split("rows.jsonl:3 (longest): ")[1]
    assert re.match(r"20 tokens, \d+ trained \(\d\d.\d %\); cut at data.max_length; no end token", cut)
    assert cut.rstrip().endswith("]]⋯")
    found = json.loads(cli("preview", write_recipe(data=data | {"on_long": "drop"}), "--json")[1])
    assert found["rows"] == {"read": 5, "kept": 1, "truncated": 0, "dropped": 2, "masked_out": 0, "bad": 2}


def test_the_seed_of_the_recipe_draws_the_random_samples(cli, write_recipe) -> None:
    def sources(seed: int) -> list[str]:
        recipe = write_recipe(training={"max_steps": 1, "seed": seed})
        return [s["source"] for s in json.loads(cli("preview", recipe, "-n", "6", "--json")[1])["samples"]]

    assert sources(1) == sources(1)
    assert sources(1) != sources(2)


def test_preview_needs_no_weights(cli, write_recipe, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in (tiny / "model").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    code, out, err = cli("preview", write_recipe(model={"path": "model"}), "-n", "1")
    assert code == 0, err
    assert "trained" in out


def test_preview_imports_no_torch_and_says_nothing_of_it(write_recipe) -> None:
    """What makes it start in a second; transformers imports torch for a tokenizer where it finds it."""
    code = (
        "import sys; sys.argv = ['lorakit', *sys.argv[1:]]\n"
        "from lorakit import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'peft', 'accelerate', 'bitsandbytes', 'datasets'}\n"
        "print(sorted(name for name in heavy if sys.modules.get(name)))"
    )
    call = [sys.executable, "-c", code, "preview", str(write_recipe()), "-n", "1"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "⊢<s>" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(("written", "flag"), [(True, False), (False, True)])
def test_a_models_own_code_needs_recipe_and_call(written: bool, flag: bool, cli, write_recipe) -> None:
    revision = {"revision": "0" * 40, "trust_remote_code": True} if written else {}
    recipe = write_recipe(model={"path": "owner/name"} | revision)
    code, out, err = cli("preview", recipe, *(["--trust-remote-code"] if flag else []))
    assert (code, out) == (2, "")
    assert "running a model's own code needs both" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals(variables: dict[str, str], coloured: bool, monkeypatch) -> None:
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    hostile_preview().show()
    on_terminal = sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    hostile_preview().show()
    in_pipe = sys.stdout.getvalue()
    assert in_pipe == hostile_preview().as_text() + "\n"
    assert (on_terminal != in_pipe) == coloured
    if coloured:
        assert "\x1b[1;32mtrained\x1b[0m" in on_terminal
        assert "\x1b[2mmasked\x1b[0m" in on_terminal
        assert "[[" not in on_terminal


def test_an_output_that_knows_few_letters_gets_escapes(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    hostile_preview().show()
    sys.stdout.flush()
    assert b"\n\\u22a2<s></script>" in sys.stdout.buffer.getvalue()


def test_of_a_stream_the_first_rows_are_shown_and_said_to_be(cli, write_recipe, tiny: Path, tmp_path) -> None:
    recipe = write_recipe(data={"train": str(tiny / "train.jsonl"), "streaming": True, "max_length": 128})
    code, out, err = cli("preview", recipe)
    assert code == 0, err
    number = re.search(r"^stream  counted and shown are its first ([\d,]+) rows$", out, re.MULTILINE)
    assert re.search(rf"^read +{number.group(1)}$", out, re.MULTILINE)
    assert cli("preview", recipe, "--html", tmp_path / "page.html")[0] == 0
    assert f"<p>{number.group()}</p>" in (tmp_path / "page.html").read_text("utf-8")
    assert "stream" not in cli("preview", write_recipe())[1]


# ------------------------------------------------------------------------------------------------------------
# Hostile data


def hostile_preview() -> Preview:
    """Two samples made by hand; all that the data decide is hostile: text, names of files and columns."""
    from lorakit.data import Loaded
    from lorakit.data.account import Account
    from lorakit.data.tokens import Entry, TokenData, as_batch

    ids, weights = np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], np.uint8)
    name = f"{HOSTILE}.jsonl"
    tokens = TokenData.of([as_batch([Entry(ids, weights, row=3, hash=1, id_hash=1)] * 2)], [name])
    account = Account(read=3, kept=2, bad=1, first={"bad": f'{name}:1: no field "{HOSTILE}"'})
    account.measure(tokens)
    texts = ("<s>", HOSTILE, HOSTILE, "</s>")
    pieces = [Piece(text, (i,), (int(weights[i]),), text in ("<s>", "</s>")) for i, text in enumerate(texts)]
    sample = Shown(
        f"{name}:3", "longest", ids.tolist(), weights.tolist(), "".join(texts), pieces, False, True
    )
    return Preview(
        f"{HOSTILE}.yaml", Loaded(tokens, account, "text", f"the columns {HOSTILE}"), None, [sample, sample]
    )


def test_no_row_can_move_the_cursor_or_turn_the_text_round(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    hostile_preview().show()
    for text in (hostile_preview().as_text(), re.sub(r"\x1b\[[\d;]*m", "", sys.stdout.getvalue())):
        assert {c for c in text if unicodedata.category(c)[0] in "CZ"} == {" ", "\n"}
        assert "onerror=alert(1)>\\x1b]52;c;QQ==\\x07\\x1b[2J\\u202egnp.exe\\x9b31m\\r↵\n→&amp;" in text
    assert hostile_preview().as_text().count("[[") == 1 + 2  # the legend, and one run in each sample


def test_no_row_speaks_to_the_terminal_out_of_an_error(cli, write_recipe, tmp_path: Path) -> None:
    row = {"messages": [{"role": HOSTILE, "content": "x"}]}
    recipe = write_recipe(data={"train": rows_of(tmp_path / "rows.jsonl", [row])})
    code, out, err = cli("preview", recipe)
    assert (code, out) == (2, "")
    assert "unknown role" in err
    assert "\\x1b]52;c;QQ==\\x07" in err
    assert {c for c in err if unicodedata.category(c)[0] in "CZ"} == {" ", "\n"}


class Page(HTMLParser):
    """Tags with their attributes, and the spans of every <pre>: (class, title, text)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.samples: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.open += [tag] if tag not in ("meta", "br") else []
        if tag == "pre":
            self.samples.append([])
        elif tag == "span" and "pre" in self.open:
            self.samples[-1].append([found["class"] or "", found["title"] or "", ""])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if "pre" in self.open and "span" in self.open:
            self.samples[-1][-1][2] += text


def test_no_row_can_put_anything_on_the_page() -> None:
    text = page(hostile_preview())
    found = Page(text)
    assert not found.open
    assert {tag for tag, _ in found.tags} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "small", "p", "br"),
        *("table", "tr", "th", "td", "div", "pre", "i", "span"),
    }
    assert {name for _, attributes in found.tags for name in attributes} <= {
        *("lang", "charset", "http-equiv", "content", "name", "class", "style", "title", "dir"),
    }
    assert {c for c in text if unicodedata.category(c)[0] in "CZ"} == {" ", "\n"}
    assert [[class_, title] for class_, title, _ in found.samples[0]] == [
        *(["masked special", "id 0"], ["masked", "id 1"], ["trained", "id 2"], ["trained special", "id 3"]),
    ]
    assert found.samples[0][2][2] == visible(HOSTILE)
    assert html.escape(visible(f"{HOSTILE}.jsonl:1: no field")) in text


def test_the_page_needs_nothing_else() -> None:
    text = page(hostile_preview())
    policy = next(
        a["content"] for _, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    own = re.sub(
        r"<title>.*?</title>|<h[13]>.*?</h[13]>|<pre.*?</pre>|<p>.*?</p>", "", text, flags=re.DOTALL
    )  # without the data's
    assert not re.search(r"https?:|//|url\(|@import|src=|href=|<script|<link", own)
    assert "prefers-color-scheme: dark" in own


def test_a_character_that_is_trained_in_part_says_which() -> None:
    half = hostile_preview()
    pieces = [Piece("😀", (5, 6, 7), (0, 1, 1), False), Piece("é", (8, 9), (1, 1), False)]
    mixed = replace(half, samples=[replace(half.samples[0], pieces=pieces)])
    assert Page(page(mixed)).samples == [
        [["trained", "id 5 6 7, trained 0 1 1", "😀"], ["trained", "id 8 9", "é"]]
    ]


def test_the_page_shows_the_tokens_of_the_json(cli, write_recipe, tmp_path: Path) -> None:
    """Every id once and in order, with its colour; the text of the spans is that of the sample."""
    answers = [f" {HOSTILE} {i}" for i in range(4)] + [" 😀 naïve\n"]
    rows = [{"prompt": f"{HOSTILE}{i}:", "completion": answer} for i, answer in enumerate(answers)]
    data = {"train": rows_of(tmp_path / "rows.jsonl", rows), "max_length": 1024}
    recipe = write_recipe(data=data)
    file = tmp_path / "page.html"
    file.write_text("an older one")
    code, out, err = cli("preview", recipe, "-n", "9", "--html", file)
    assert (code, out, err) == (0, "", f"page      {file}\n")
    samples = json.loads(cli("preview", recipe, "-n", "9", "--json")[1])["samples"]
    assert len(samples) == 5
    for spans, sample in zip(Page(file.read_text("utf-8")).samples, samples, strict=True):
        ids, weights, specials = [], [], []
        for class_, title, text in spans:
            numbers, _, mixed = title.removeprefix("id ").partition(", trained ")
            own = [int(number) for number in numbers.split()]
            ids += own
            weights += [int(w) for w in mixed.split()] or [int("trained" in class_)] * len(own)
            specials += [text] if "special" in class_ else []
        assert ids == sample["ids"]
        assert weights == sample["weights"]
        assert specials == ["<s>", "</s>"]
        assert "".join(text for *_, text in spans) == visible(sample["text"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "recipe.yaml", "rows.jsonl"]
    code, out, _ = cli("preview", recipe, "--json", "--html", file)
    assert json.loads(out)["rows"]["read"] == 5


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".", "is a directory"),
        ("nowhere/page.html", "no such directory: {}/nowhere"),
        ("recipe.yaml/page.html", "no such directory"),
        ("/dev/null", "is no regular file"),
    ],
)
def test_a_page_that_cannot_be_written_is_told(place: str, message: str, cli, write_recipe, tmp_path) -> None:
    recipe = write_recipe()
    file = tmp_path / place
    code, out, err = cli("preview", recipe, "--html", file)
    assert (code, out) == (2, "")
    assert f"--html {file}: {message.format(tmp_path)}" in err


def test_a_page_is_written_wholly_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    file, link = tmp_path / "page.html", tmp_path / "link.html"
    file.write_text("old")
    link.symlink_to(file)
    check_place("--html", link)

    def refuse(self: Path, *_: Any) -> None:
        assert self != file
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(LorakitError, match=r"link.html: cannot write: Permission denied") as told:
            write("--html", link, "new")
    assert told.value.exit_code == 2
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write("--html", link, "new")
    assert file.read_text() == "new"
    assert link.is_symlink()


# ------------------------------------------------------------------------------------------------------------
# The picture in the README


def test_the_picture_is_what_the_preview_shows() -> None:
    committed = (ROOT / "docs" / "preview.svg").read_text("utf-8")
    assert committed == load_script("make_preview_picture").draw(), "run: scripts/make_preview_picture.py"
    assert len(committed) < 40_000
    assert re.findall(r"\w+://[^\"\s]+", committed) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"url\((?!#)|@font-face|<image|<script", committed)
