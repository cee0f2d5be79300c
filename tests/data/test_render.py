"""Samples -> tokens and weights. The expected masks are written by hand: what a reader calls trained."""

import copy
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import processors

from lorakit.data.formats import (
    BadRow,
    Chat,
    Labelled,
    Pair,
    Preference,
    Sample,
    Scored,
    SourceTarget,
    Text,
)
from lorakit.data.render import Tokens, as_trained, check_tokenizer, render, render_all
from lorakit.errors import LorakitError


class Seen(NamedTuple):
    """Tokens as lists, which compare."""

    ids: list[int]
    weights: list[int]
    cut: bool
    full_length: int
    ends: bool


def tokens(tokenizer: Any, sample: Sample, train_on: str = "auto", max_length: int = 10_000) -> Seen:
    found = render(sample, tokenizer, train_on, max_length)
    assert (found.ids.dtype, found.weights.dtype) == (np.int32, np.uint8)
    assert len(found.ids) == len(found.weights) <= max_length
    assert set(found.weights.tolist()) <= {0, 1}
    assert found.weights[0] == 0
    return Seen(found.ids.tolist(), found.weights.tolist(), found.cut, found.full_length, found.ends)


def trained(tokenizer: Any, found: Seen) -> list[str]:
    """The text of every run of trained tokens."""
    runs: list[list[int]] = []
    for index, weight in enumerate(found.weights):
        if weight and not found.weights[index - 1]:
            runs.append([])
        if weight:
            runs[-1].append(found.ids[index])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def untrained(tokenizer: Any, found: Seen) -> str:
    ids = [i for i, weight in zip(found.ids, found.weights, strict=True) if not weight]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def with_specials(tokenizer: Any, single: str) -> Any:
    """The tokenizer with other tokens put around a text, "$A" being the text."""
    other = copy.deepcopy(tokenizer)
    specials = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=specials
    )
    return other


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple({"role": role, "content": content} for role, content in turns))


ONE = chat(("user", "Hi"), ("assistant", "Yo"))
SYSTEM = chat(("system", "Be brief"), ("user", "Hi"), ("assistant", "Yo"))
MULTI = chat(("user", "Hi"), ("assistant", "Yo"), ("user", "Again"), ("assistant", "Bye\n"))
TOOL = chat(("user", "Hi"), ("assistant", "call"), ("tool", "result"), ("assistant", "done"))
OPEN = chat(("user", "Hi"), ("assistant", "Yo"), ("user", "More"))


# ------------------------------------------------------------------------------------------------------------
# Prompt and completion, text


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("When does Ada open the bakery?", " Ada opens the bakery at noon."),
        ("Prompt:\n", "completion"),
        ("a", "b"),
        ("12", "34"),
        ("\U0001f600", "é\U0001f600"),
        ("ends in a space ", "1 and goes on\n"),
    ],
)
def test_exactly_the_completion_and_the_end_token_are_trained(
    tokenizer: Any, prompt: str, completion: str
) -> None:
    found = tokens(tokenizer, Pair(prompt, completion))
    assert found.ids == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    assert trained(tokenizer, found) == [completion + "</s>"]
    assert untrained(tokenizer, found) == "<s>" + prompt
    assert (found.cut, found.full_length) == (False, len(found.ids))


def test_a_token_that_joins_prompt_and_completion_is_trained(tokenizer: Any) -> None:
    # " Ada" is one token. The prompt alone ends in other tokens, which the model would never see here.
    found = tokens(tokenizer, Pair("When does Ad", "a open"))
    assert found.ids == [*tokenizer("When does Ada open")["input_ids"], tokenizer.eos_token_id]
    assert trained(tokenizer, found) == [" Ada open</s>"]
    assert untrained(tokenizer, found) == "<s>When does"
    alone = tokenizer("When does Ad")["input_ids"]
    assert found.ids[: len(alone)] != alone


def test_a_text_that_brings_its_begin_token_gets_no_second_one(tokenizer: Any) -> None:
    found = tokens(tokenizer, Pair("<s>When does", " Ada"))
    assert found.ids == tokens(tokenizer, Pair("When does", " Ada")).ids
    assert found.ids.count(tokenizer.bos_token_id) == 1
    assert trained(tokenizer, found) == [" Ada</s>"]


def test_a_completion_that_brings_its_end_token_gets_no_second_one(tokenizer: Any) -> None:
    found = tokens(tokenizer, Pair("When", " does</s>"))
    assert found.ids == tokens(tokenizer, Pair("When", " does")).ids
    assert trained(tokenizer, found) == [" does</s>"]


def test_a_tokenizer_that_adds_the_end_token_itself_does_not_double_it(tokenizer: Any) -> None:
    found = tokens(with_specials(tokenizer, "<s> $A </s>"), Pair("When", " does"))
    assert found == tokens(tokenizer, Pair("When", " does"))


def test_the_first_token_is_never_trained_because_nothing_predicts_it(tokenizer: Any) -> None:
    bare = with_specials(tokenizer, "$A")
    found = tokens(bare, Text("12"))
    assert found.ids == [*bare("12")["input_ids"], bare.eos_token_id]
    assert found.weights == [0, 1, 1]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("auto", [" does</s>"]), ("completion", [" does</s>"]), ("all", ["When does</s>"])],
)
def test_train_on_decides_whether_the_prompt_is_trained(
    tokenizer: Any, train_on: str, expected: list[str]
) -> None:
    found = tokens(tokenizer, Pair("When", " does"), train_on)
    assert trained(tokenizer, found) == expected
    assert found.ids == tokens(tokenizer, Pair("When", " does")).ids


@pytest.mark.parametrize("train_on", ["auto", "all"])
def test_all_of_a_text_is_trained(tokenizer: Any, train_on: str) -> None:
    found = tokens(tokenizer, Text("Ada opens"), train_on)
    assert found.ids == [*tokenizer("Ada opens")["input_ids"], tokenizer.eos_token_id]
    assert trained(tokenizer, found) == ["Ada opens</s>"]


@pytest.mark.parametrize(
    "sample", [Text("a\ud800b"), Pair("a", "\udfff"), chat(("user", "\ud800"), ("assistant", "a"))]
)
def test_text_that_is_no_unicode_is_a_bad_row(tokenizer: Any, sample: Sample) -> None:
    with pytest.raises(BadRow):
        render(sample, tokenizer, "auto", 100)


# ------------------------------------------------------------------------------------------------------------
# Truncation


@pytest.mark.parametrize("length", range(2, 8))
def test_a_longer_sample_loses_its_end_and_its_end_token(tokenizer: Any, length: int) -> None:
    pair = Pair("12", "3456")  # digits are one token each: <s> 1 2 3 4 5 6 </s>
    full = tokens(tokenizer, pair)
    assert len(full.ids) == 8
    found = tokens(tokenizer, pair, max_length=length)
    assert found.ids == full.ids[:length]
    assert found.weights == full.weights[:length] == [0, 0, 0, 1, 1, 1, 1][:length]
    assert tokenizer.eos_token_id not in found.ids
    assert (found.cut, found.full_length) == (True, 8)


@pytest.mark.parametrize("length", [8, 9])
def test_a_sample_that_just_fits_is_whole(tokenizer: Any, length: int) -> None:
    found = tokens(tokenizer, Pair("12", "3456"), max_length=length)
    assert (found.cut, found.full_length, found.ids[-1]) == (False, 8, tokenizer.eos_token_id)


def test_a_chat_is_cut_like_any_other_sample(tokenizer: Any) -> None:
    talk = chat(("user", "12"), ("assistant", "345"))
    full = tokens(tokenizer, talk)  # <s> <|user|> 1 2 </s> \n <|assistant|> 3 4 5 </s> \n
    assert len(full.ids) == 12
    found = tokens(tokenizer, talk, max_length=9)
    assert found.ids == full.ids[:9]
    assert trained(tokenizer, found) == ["34"]
    assert (found.cut, found.full_length) == (True, 12)


@pytest.mark.parametrize(("length", "ends"), [(7, False), (8, True)])
def test_a_pair_ends_when_its_end_token_is_left(tokenizer: Any, length: int, ends: bool) -> None:
    assert tokens(tokenizer, Pair("12", "3456"), max_length=length).ends is ends
    assert tokens(tokenizer, Text("123456"), max_length=length).ends is ends


def test_a_text_of_megabytes_is_cut_as_if_it_were_tokenized_at_once(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("Ada opens the bakery at noon. 12 \U0001f600\n" * 300, "no_white_space_at_all" * 300)
    for text in words:
        samples = [
            Text(text),
            Pair(text, "end"),
            Pair("Ada", text),
            chat(("user", "Hi"), ("assistant", text)),
        ]
        for sample in samples:
            monkeypatch.setattr("lorakit.data.render._PIECE", 1 << 30)
            whole = tokens(tokenizer, sample, max_length=20)
            monkeypatch.setattr("lorakit.data.render._PIECE", 1000)
            pieces = tokens(tokenizer, sample, max_length=20)
            assert (pieces.ids, pieces.weights, pieces.ends) == (whole.ids, whole.weights, whole.ends)
            assert (pieces.cut, whole.cut) == (True, True)
            assert abs(pieces.full_length - whole.full_length) <= 0.01 * whole.full_length
    assert pieces.full_length > 1000


def test_a_text_of_many_characters_and_few_tokens_is_whole(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.data.render._PIECE", 100)
    text = "<|tool|>" * 100  # 800 characters, one token for eight
    found = tokens(tokenizer, Text(text), max_length=102)
    assert (len(found.ids), found.cut, found.ends) == (102, False, True)
    found = tokens(tokenizer, Text("<|tool|>" * 1000), max_length=5)
    assert (len(found.ids), found.full_length) == (5, 1002)


# ------------------------------------------------------------------------------------------------------------
# Begin, end and pad


@pytest.mark.parametrize("sample", [Text("<s><s>Hi"), Pair("<s><s>Hi", "Yo")])
def test_a_text_that_brings_two_begin_tokens_is_refused(tokenizer: Any, sample: Sample) -> None:
    with pytest.raises(BadRow, match="begin-of-sequence token <s> twice: one is in the text of the row"):
        render(sample, tokenizer, "auto", 100)


def test_a_tokenizer_that_adds_two_begin_tokens_is_told(tokenizer: Any) -> None:
    with pytest.raises(BadRow, match="<s> twice: the tokenizer adds one"):
        render(Text("Hi"), with_specials(tokenizer, "<s> <s> $A"), "auto", 100)


def test_a_text_may_be_one_begin_token_where_begin_and_end_are_one(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.bos_token = other.eos_token
    other = with_specials(other, "$A")
    found = tokens(other, Text("Hi"))
    assert found.ids == [*other("Hi")["input_ids"], other.eos_token_id]
    assert (found.weights[-1], found.ends) == (1, True)


@pytest.mark.parametrize("pad", ["</s>", "<|tool|>", None])
def test_padding_and_truncation_of_the_tokenizer_have_no_effect(tokenizer: Any, pad: str | None) -> None:
    other = copy.deepcopy(tokenizer)
    other.pad_token = pad
    other.backend_tokenizer.enable_padding(length=64, pad_id=1, pad_token="</s>")
    other.backend_tokenizer.enable_truncation(4)
    samples = [Pair("When does", " Ada"), MULTI, Text("Ada opens the bakery at noon."), ONE]
    for sample, found in zip(samples, render_all(samples, other, "auto", 1000), strict=True):
        plain = render(sample, tokenizer, "auto", 1000)
        assert isinstance(found, Tokens)
        assert found.ids.tolist() == plain.ids.tolist()
        assert found.weights.tolist() == plain.weights.tolist()
        assert found.ends is True


# ------------------------------------------------------------------------------------------------------------
# Batches


def test_a_batch_of_all_kinds_is_what_its_samples_are_alone(tokenizer: Any) -> None:
    samples: list[Sample] = [
        Pair("When does", " Ada"),
        chat(("user", "\ud800"), ("assistant", "a")),
        MULTI,
        Text("\udfff"),
        Text("<s>Ada"),
        Text("<s><s>Ada"),
        Pair("12", "3456789" * 3),
        ONE,
        Text("\U0001f600é"),
        OPEN,
    ]
    for length in (3, 9, 1000):
        for sample, found in zip(samples, render_all(samples, tokenizer, "auto", length), strict=True):
            try:
                alone = tokens(tokenizer, sample, max_length=length)
            except BadRow as error:
                assert str(found) == str(error)
            else:
                assert isinstance(found, Tokens)
                assert (found.ids.tolist(), found.weights.tolist()) == alone[:2]
                assert (found.cut, found.full_length, found.ends) == alone[2:]


def test_a_batch_of_nothing_is_nothing(tokenizer: Any) -> None:
    assert render_all([], tokenizer, "auto", 10) == []


def test_all_texts_of_a_kind_go_through_the_tokenizer_together(tokenizer: Any) -> None:
    calls = []

    class Counting:
        """The tokenizer's backend, with its calls counted."""

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(tokenizer.backend_tokenizer, name)

    other = copy.copy(tokenizer)
    other._tokenizer = Counting()
    render_all([MULTI, ONE] * 20, other, "auto", 1000)
    assert calls.count("encode_batch") == 1
    assert "encode" not in calls


# ------------------------------------------------------------------------------------------------------------
# What causal-lm trains on

ONE_TURN = [
    ("alpaca", Pair("i\nc\n", "o"), "i\nc", "o"),
    ("labelled-text", Labelled("A text", "good"), "A text", "good"),
    ("labelled-text", Labelled("A text\n", 3), "A text", "3"),
    ("labelled-text", Labelled("A text", True), "A text", "true"),
    ("labelled-text", Labelled("A text", 0.5), "A text", "0.5"),
    ("sentence-pair", Scored("One", "Two", 5.0, "5.00"), "One\nTwo", "5.00"),
    ("text-to-text", SourceTarget("Hallo", "Hello"), "Hallo", "Hello"),
]


@pytest.mark.parametrize(("name", "sample", "asked", "answer"), ONE_TURN)
def test_a_sample_of_two_texts_is_a_chat_where_there_is_a_template_and_else_a_pair(
    tokenizer: Any, name: str, sample: Sample, asked: str, answer: str
) -> None:
    assert as_trained(sample, name, tokenizer) == chat(("user", asked), ("assistant", answer))
    pair = as_trained(sample, name, with_template(tokenizer, ""))
    assert isinstance(pair, Pair)
    assert (pair.prompt.rstrip("\n"), pair.prompt[-1], pair.completion) == (asked, "\n", answer)
    assert trained(tokenizer, tokens(tokenizer, pair)) == [answer + "</s>"]


@pytest.mark.parametrize("sample", [Pair("p", "c"), ONE, Text("t")])
def test_other_samples_are_trained_as_they_are(tokenizer: Any, sample: Sample) -> None:
    assert as_trained(sample, "prompt-completion", tokenizer) is sample


def test_preferences_are_refused_with_the_cure(tokenizer: Any) -> None:
    with pytest.raises(LorakitError) as caught:
        as_trained(Preference("p", "a", "b"), "preference", tokenizer)
    assert "task causal-lm does not train" in caught.value.message
    cure = "data.format: prompt-completion, data.columns: {prompt: prompt, completion: chosen}"
    assert cure in caught.value.hint
    with pytest.raises(LorakitError) as caught:
        as_trained(Preference("", ONE.messages, OPEN.messages), "preference", tokenizer)
    assert "data.format: messages, data.columns: {messages: chosen}" in caught.value.hint


# ------------------------------------------------------------------------------------------------------------
# Chats: the tiny tokenizer's template is <s>, then for each turn <|role|> content </s> and a line end

MASKS = [
    ("one turn", ONE, "auto", ["Yo</s>"]),
    ("one turn", ONE, "assistant", ["Yo</s>"]),
    ("one turn", ONE, "last-turn", ["Yo</s>"]),
    ("one turn", ONE, "all", ["<|user|>Hi</s>\n<|assistant|>Yo</s>\n"]),
    ("system", SYSTEM, "auto", ["Yo</s>"]),
    ("system", SYSTEM, "last-turn", ["Yo</s>"]),
    ("multi-turn", MULTI, "auto", ["Yo</s>", "Bye\n</s>"]),
    ("multi-turn", MULTI, "assistant", ["Yo</s>", "Bye\n</s>"]),
    ("multi-turn", MULTI, "last-turn", ["Bye\n</s>"]),
    (
        "multi-turn",
        MULTI,
        "all",
        ["<|user|>Hi</s>\n<|assistant|>Yo</s>\n<|user|>Again</s>\n<|assistant|>Bye\n</s>\n"],
    ),
    ("tool", TOOL, "auto", ["call</s>", "done</s>"]),
    ("tool", TOOL, "last-turn", ["done</s>"]),
    ("last word of the user", OPEN, "auto", ["Yo</s>"]),
    ("last word of the user", OPEN, "last-turn", ["Yo</s>"]),
    (
        "two answers in a row",
        chat(("user", "Hi"), ("assistant", "A"), ("assistant", "B")),
        "auto",
        ["A</s>", "B</s>"],
    ),
    ("empty answer", chat(("user", "Hi"), ("assistant", "")), "auto", ["</s>"]),
    ("emoji", chat(("user", "Hi"), ("assistant", "\U0001f600é")), "auto", ["\U0001f600é</s>"]),
    ("spaces", chat(("user", "Hi"), ("assistant", " Yo  \n")), "auto", [" Yo  \n</s>"]),
]


@pytest.mark.parametrize(
    ("talk", "train_on", "expected"), [case[1:] for case in MASKS], ids=[f"{c[0]}, {c[2]}" for c in MASKS]
)
def test_what_is_trained_of_a_chat(tokenizer: Any, talk: Chat, train_on: str, expected: list[str]) -> None:
    found = tokens(tokenizer, talk, train_on)
    assert trained(tokenizer, found) == expected
    rendered = tokenizer.apply_chat_template(list(talk.messages), tokenize=False)
    assert rendered.startswith("<s><|")
    assert found.ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert found.ids.count(tokenizer.bos_token_id) == 1
    assert (found.cut, found.full_length) == (False, len(found.ids))


def test_what_is_not_trained_of_a_chat_is_all_that_the_model_is_given(tokenizer: Any) -> None:
    found = tokens(tokenizer, MULTI)
    assert (
        untrained(tokenizer, found) == "<s><|user|>Hi</s>\n<|assistant|>\n<|user|>Again</s>\n<|assistant|>\n"
    )


def test_a_turn_of_weight_0_is_not_trained(tokenizer: Any) -> None:
    first, second = ({**turn, "weight": 0} for turn in MULTI.messages[1::2])
    asked = MULTI.messages[::2]
    for talk, train_on, expected in (
        (Chat((asked[0], first, asked[1], MULTI.messages[3])), "auto", ["Bye\n</s>"]),
        (Chat((*MULTI.messages[:3], second)), "auto", ["Yo</s>"]),
        (Chat((*MULTI.messages[:3], second)), "last-turn", ["Yo</s>"]),
        (Chat((asked[0], first, asked[1], second)), "auto", []),
    ):
        found = tokens(tokenizer, talk, train_on)
        assert trained(tokenizer, found) == expected
        assert (found.ids, found.ends) == (tokens(tokenizer, MULTI).ids, bool(expected))


@pytest.mark.parametrize("train_on", ["auto", "last-turn"])
def test_a_chat_may_start_with_the_assistant_or_is_a_bad_row(tokenizer: Any, train_on: str) -> None:
    try:
        found = tokens(tokenizer, chat(("assistant", "Yo")), train_on)
    except BadRow as error:
        assert "turn 1" in str(error)
    else:
        assert trained(tokenizer, found) == ["Yo</s>"]


# ------------------------------------------------------------------------------------------------------------
# Other templates

# Answers before the last one keep only their first letter, as some templates drop thinking.
FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content[:1] }}{% else %}{{ m.content }}{% endif %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_turn_and_a_cure(tokenizer: Any) -> None:
    forgetful = with_template(tokenizer, FORGETS)
    with pytest.raises(BadRow) as caught:
        render(MULTI, forgetful, "auto", 100)
    assert str(caught.value) == (
        "turn 2: the chat template renders the text up to here in another way when more turns follow:"
        " 'stant|>Yo</s>' becomes 'stant|>Y</s><|user|>Again</s'. What is trained would not be generated;"
        " task.train_on: each-turn, last-turn or all may do"
    )


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("last-turn", ["Bye\n</s>"]),
        ("all", ["Hi</s><|assistant|>Y</s><|user|>Again</s><|assistant|>Bye\n</s>"]),
    ],
)
def test_a_template_that_rewrites_earlier_turns_serves_the_last_one_and_all(
    tokenizer: Any, train_on: str, expected: list[str]
) -> None:
    forgetful = with_template(tokenizer, FORGETS)
    assert trained(forgetful, tokens(forgetful, MULTI, train_on)) == expected
    assert trained(forgetful, tokens(forgetful, ONE, "auto")) == ["Yo</s>"]


@pytest.mark.parametrize(
    ("talk", "train_on", "expected"),
    [
        (ONE, "auto", ["Yo\n</s>"]),
        (MULTI, "auto", ["Yo\n", "Bye\n\n</s>"]),
        (MULTI, "last-turn", ["Bye\n\n</s>"]),
    ],
)
def test_a_template_without_an_end_token_gets_the_end_of_text_which_is_trained(
    tokenizer: Any, talk: Chat, train_on: str, expected: list[str]
) -> None:
    endless = with_template(tokenizer, ENDLESS)
    found = tokens(endless, talk, train_on)
    rendered = endless.apply_chat_template(list(talk.messages), tokenize=False)
    assert found.ids == [*endless(rendered, add_special_tokens=False)["input_ids"], endless.eos_token_id]
    assert trained(endless, found) == expected


def test_the_end_token_after_a_user_turn_is_not_trained(tokenizer: Any) -> None:
    endless = with_template(tokenizer, ENDLESS)
    assert trained(endless, tokens(endless, OPEN)) == ["Yo\n"]


def test_an_end_of_turn_token_without_a_role_in_the_configuration_ends_the_turn(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|tool|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    other = with_template(tokenizer, template)
    assert other.added_tokens_decoder[other.convert_tokens_to_ids("<|tool|>")].special
    assert trained(other, tokens(other, MULTI)) == ["Yo<|tool|>", "Bye\n<|tool|>"]


def test_white_space_that_the_template_cuts_off_an_answer_is_not_trained(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    other = with_template(tokenizer, template)
    assert trained(other, tokens(other, chat(("user", " Hi "), ("assistant", "  Yo \n")))) == ["Yo</s>"]


def test_a_template_that_raises_is_a_bad_row_with_its_own_words(tokenizer: Any) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}x</s>"
    other = with_template(tokenizer, template)
    with pytest.raises(BadRow, match="the chat template refuses this conversation: no system turns"):
        render(SYSTEM, other, "all", 100)
    assert tokens(other, ONE, "all").ids == other("x</s>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ nosuch.field }}",
        "{{ messages[9].content }}",
        "{% for %}",
        "{{ messages[0].content + 3 }}",
        "{{ messages | nosuchfilter }}",
        "{{ 'x' | join(1, 2, 3, 4) }}",
    ],
)
def test_a_template_with_a_mistake_is_a_bad_row(tokenizer: Any, template: str) -> None:
    with pytest.raises(BadRow, match=r"the chat template refuses this conversation: ."):
        render(ONE, with_template(tokenizer, template), "auto", 100)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ '{:d}'.format('x') }}",
        "{{ messages[0].content.index('zz') }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ],
    ids=["division", "huge range", "format", "index", "recursion"],
)
def test_a_template_that_fails_in_another_way_is_a_bad_row(tokenizer: Any, template: str) -> None:
    with pytest.raises(BadRow):
        render(ONE, with_template(tokenizer, template), "auto", 100)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    ],
)
def test_a_template_that_reaches_for_python_is_refused(
    tokenizer: Any, template: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((BadRow, LorakitError)):
        render(ONE, with_template(tokenizer, template), "auto", 100)
    assert not (tmp_path / "pwned").exists()


def test_a_class_in_a_template_renders_as_nothing_and_what_is_lost_is_told(tokenizer: Any) -> None:
    other = with_template(tokenizer, "{{ ''.__class__ }}")
    with pytest.raises(BadRow, match="turn 2: the chat template leaves out a part of the turn's content"):
        render(ONE, other, "auto", 100)
    found = tokens(other, ONE, "all")
    assert (found.ids, found.weights, found.ends) == ([tokenizer.eos_token_id], [0], False)


# ------------------------------------------------------------------------------------------------------------
# Tokenizers that cannot serve


def test_the_tiny_tokenizer_can_serve(tokenizer: Any) -> None:
    check_tokenizer(tokenizer, len(tokenizer))


def test_a_tokenizer_without_an_end_token_is_refused_with_the_cure(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(LorakitError) as caught:
        check_tokenizer(other)
    assert "no end-of-sequence token" in caught.value.message
    assert "eos_token" in caught.value.hint


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(LorakitError, match=r"slow tokenizer.*tokenizer\.json"):
        check_tokenizer(SimpleNamespace(eos_token_id=1, is_fast=False))


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(tokenizer: Any) -> None:
    with pytest.raises(LorakitError, match=f"{len(tokenizer)} tokens.*{len(tokenizer) - 1}"):
        check_tokenizer(tokenizer, len(tokenizer) - 1)
