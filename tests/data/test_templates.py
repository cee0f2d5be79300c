"""Conversations in the chat templates of models: what is trained stands here in guillemets, written by hand.

The expectation is a list of pieces of text, each trained or not; pieces begin and end where tokens do, so
that tokenizing them one by one gives the tokens and weights that the rendering must have. No offsets
are used.
"""

import json
import re
from typing import Any

import pytest

from lorakit.data.formats import BadRow, Chat
from lorakit.data.prompts import chat_ids
from lorakit.data.render import Tokens, render, render_all
from tests.data.templates import FAMILIES, tokenizer_of

TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
TIME_JSON = '{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}'


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str = "time", **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "abcdefghi", "type": "function", "function": function}


ONE = (turn("user", "Hi"), turn("assistant", "Yo"))
MORE = (turn("user", "More"), turn("assistant", "Bye"))
RULES = turn("system", "Be brief")
THOUGHT = (turn("user", "Hi"), turn("assistant", "Yo", reasoning_content="hm"))
IN_TEXT = (turn("user", "Hi"), turn("assistant", "<think>\nhm\n</think>\n\nYo"))
ASKED = (
    turn("user", "When?"),
    turn("assistant", "", tool_calls=[call(place="pier")]),
    turn("tool", '"noon"', tool_call_id="abcdefghi"),
    turn("assistant", "At noon"),
)

CHATS: dict[str, Chat] = {
    "one": Chat(ONE),
    "system": Chat((RULES, *ONE)),
    "multi": Chat((*ONE, *MORE)),
    "system multi": Chat((RULES, *ONE, *MORE)),
    "open": Chat((*ONE, turn("user", "More"))),
    "first": Chat((turn("assistant", "Yo"), *MORE)),
    "spaces": Chat((turn("user", " Hi "), turn("assistant", " Yo\n"))),
    "unicode": Chat((turn("user", "é"), turn("assistant", "\U0001f600"))),
    "thought": Chat(THOUGHT),
    "thought in text": Chat(IN_TEXT),
    "thoughts": Chat((*IN_TEXT, turn("user", "More"), turn("assistant", "<think>\noh\n</think>\n\nBye"))),
    "call": Chat(ASKED[:2], (TIME,)),
    "tools": Chat(ASKED, (TIME,)),
    "thoughtful tools": Chat(
        (
            ASKED[0],
            {**ASKED[1], "reasoning_content": "hm"},
            ASKED[2],
            {**ASKED[3], "reasoning_content": "ah"},
        ),
        (TIME,),
    ),
    "called": Chat(ASKED),
    "begins with a call": Chat(ASKED[1:]),
    "two calls": Chat((ASKED[0], turn("assistant", "", tool_calls=[call(a=1), call(b="é")])), (TIME,)),
}

L3 = "<s><|start_header_id|>system<|end_header_id|>\n\nCutting date\n\n"
USER, BOT = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))

# (template, conversation, train_on): the text, with what is trained in guillemets.
MASKS: dict[tuple[str, str, str], str] = {
    # ChatML
    ("chatml", "one", "auto"): "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n",
    ("chatml", "multi", "auto"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«Bye<|im_end|>»\n"
    ),
    ("chatml", "multi", "last-turn"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«Bye<|im_end|>»\n"
    ),
    ("chatml", "system", "auto"): (
        "<|im_start|>system\nBe brief<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n"
    ),
    ("chatml", "open", "auto"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n<|im_start|>user\nMore<|im_end|>\n"
    ),
    ("chatml", "first", "auto"): (
        "<|im_start|>assistant\n«Yo<|im_end|>»\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«Bye<|im_end|>»\n"
    ),
    ("chatml", "spaces", "auto"): (
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n« Yo\n<|im_end|>»\n"
    ),
    ("chatml", "unicode", "auto"): (
        "<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n«\U0001f600<|im_end|>»\n"
    ),
    ("chatml", "thoughts", "auto"): (  # this template takes thoughts for text, and so does what is trained
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nYo<|im_end|>»\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«<think>\noh\n</think>\n\nBye<|im_end|>»\n"
    ),
    ("marked", "system multi", "auto"): (
        "<|im_start|>system\nBe brief<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«Bye<|im_end|>»\n"
    ),
    ("marked", "open", "last-turn"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n<|im_start|>user\nMore<|im_end|>\n"
    ),
    # Llama 3
    ("llama3", "one", "auto"): f"{L3}<|eot_id|>{USER}Hi<|eot_id|>{BOT}«Yo<|eot_id|>»",
    ("llama3", "system multi", "auto"): (
        f"{L3}Be brief<|eot_id|>{USER}Hi<|eot_id|>{BOT}«Yo<|eot_id|>»{USER}More<|eot_id|>{BOT}«Bye<|eot_id|>»"
    ),
    ("llama3", "spaces", "auto"): f"{L3}<|eot_id|>{USER}Hi<|eot_id|>{BOT}«Yo<|eot_id|>»",
    ("llama3", "multi", "all"): (
        f"<s>«{L3[3:]}<|eot_id|>{USER}Hi<|eot_id|>{BOT}Yo<|eot_id|>{USER}More<|eot_id|>{BOT}Bye<|eot_id|>»"
    ),
    ("llama3", "tools", "auto"): (
        f"{L3}<|eot_id|>{USER}Functions:\n{TIME_JSON}\nWhen?<|eot_id|>"
        f'{BOT}«{{"name": "time", "parameters": {{"place": "pier"}}}}<|eot_id|>»'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"\\"noon\\""<|eot_id|>'
        f"{BOT}«At noon<|eot_id|>»"
    ),
    ("llama3", "begins with a call", "auto"): (
        f'{L3}<|eot_id|>{BOT}«{{"name": "time", "parameters": {{"place": "pier"}}}}<|eot_id|>»'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"\\"noon\\""<|eot_id|>'
        f"{BOT}«At noon<|eot_id|>»"
    ),
    # Qwen 3
    ("qwen3", "one", "auto"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nYo<|im_end|>»\n"
    ),
    ("qwen3", "thought", "auto"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nYo<|im_end|>»\n"
    ),
    ("qwen3", "thought in text", "auto"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nYo<|im_end|>»\n"
    ),
    ("qwen3", "thoughts", "last-turn"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«<think>\noh\n</think>\n\nBye<|im_end|>»\n"
    ),
    ("qwen3", "system multi", "last-turn"): (
        "<|im_start|>system\nBe brief<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nBye<|im_end|>»\n"
    ),
    ("qwen3", "thoughtful tools", "auto"): (
        f"<|im_start|>system\n<tools>\n{TIME_JSON}\n</tools><|im_end|>\n"
        "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\n"
        '<tool_call>\n{"name": "time", "arguments": {"place": "pier"}}\n</tool_call><|im_end|>»\n'
        '<|im_start|>user\n<tool_response>\n"noon"\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n«<think>\nah\n</think>\n\nAt noon<|im_end|>»\n"
    ),
    ("qwen3", "two calls", "auto"): (
        f"<|im_start|>system\n<tools>\n{TIME_JSON}\n</tools><|im_end|>\n"
        "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\n"
        '<tool_call>\n{"name": "time", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {"b": "é"}}\n</tool_call><|im_end|>»\n'
    ),
    # Mistral
    ("mistral", "one", "auto"): "<s>[INST] Hi[/INST]« Yo</s>»",
    ("mistral", "multi", "auto"): "<s>[INST] Hi[/INST]« Yo</s>»[INST] More[/INST]« Bye</s>»",
    ("mistral", "system", "auto"): "<s>[INST] Be brief\n\nHi[/INST]« Yo</s>»",
    ("mistral", "system multi", "last-turn"): (
        "<s>[INST] Hi[/INST] Yo</s>[INST] Be brief\n\nMore[/INST]« Bye</s>»"
    ),
    ("mistral", "tools", "auto"): (
        f"<s>[AVAILABLE_TOOLS] [{TIME_JSON}][/AVAILABLE_TOOLS][INST] When?[/INST]"
        '«[TOOL_CALLS] [{"name": "time", "arguments": {"place": "pier"}, "id": "abcdefghi"}]</s>»'
        '[TOOL_RESULTS] {"content": "noon", "call_id": "abcdefghi"}[/TOOL_RESULTS]« At noon</s>»'
    ),
    ("mistral-old", "multi", "auto"): "<s>[INST] Hi [/INST]« Yo</s>»[INST] More [/INST]« Bye</s>»",
    # Gemma
    ("gemma", "multi", "auto"): (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n"
        "<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n«Bye<end_of_turn>»\n"
    ),
    ("gemma", "open", "auto"): (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n"
        "<start_of_turn>user\nMore<end_of_turn>\n"
    ),
    # Phi
    ("phi", "multi", "auto"): (
        "<|user|>\nHi<|end|>\n<|assistant|>\n«Yo<|end|>»\n<|user|>\nMore<|end|>\n<|assistant|>\n«Bye<|end|>\n</s>»"
    ),
    ("phi", "system", "last-turn"): (
        "<|system|>\nBe brief<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n«Yo<|end|>\n</s>»"
    ),
    # DeepSeek
    ("deepseek", "system multi", "auto"): (
        "<s>Be brief<|User|>Hi<|Assistant|>«Yo</s>»<|User|>More<|Assistant|>«Bye</s>»"
    ),
    ("deepseek", "thought in text", "auto"): (
        "<s><|User|>Hi<|Assistant|>«<think>\nhm\n</think>\n\nYo</s>»"
    ),
    ("deepseek", "called", "auto"): (
        '<s><|User|>When?<|Assistant|>«<|call|>time\n{"place": "pier"}<|/call|></s>»'
        '<|output|>"noon"<|/output|>«At noon</s>»'
    ),
    ("deepseek", "thoughts", "last-turn"): (
        "<s><|User|>Hi<|Assistant|>\n\nYo</s><|User|>More<|Assistant|>«<think>\noh\n</think>\n\nBye</s>»"
    ),
}  # fmt: skip
NAMES = [", ".join(case) for case in MASKS]


def pieces(marked: str) -> list[tuple[str, bool]]:
    """(text, whether it is trained) of each piece."""
    found = [(part.strip("«»"), part.startswith("«")) for part in re.findall(r"«[^»]*»|[^«»]+", marked)]
    assert "".join(text for text, _ in found) == re.sub("[«»]", "", marked)
    return found


@pytest.mark.parametrize("case", MASKS, ids=NAMES)
def test_the_tokens_and_what_is_trained_of_them(tokenizer: Any, case: tuple[str, str, str]) -> None:
    family, name, train_on = case
    model = tokenizer_of(family, tokenizer)
    ids: list[int] = []
    weights: list[int] = []
    for text, trained in pieces(MASKS[case]):
        tokens = model(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        weights += [int(trained)] * len(tokens)
    found = render(CHATS[name], model, train_on, 10_000)
    assert model.decode(found.ids) == model.decode(ids)
    assert found.ids.tolist() == ids
    assert found.weights.tolist() == weights
    assert found.ends


@pytest.mark.parametrize("case", [case for case in MASKS if case[2] != "all"])
def test_a_model_is_asked_what_it_was_trained_on(tokenizer: Any, case: tuple[str, str, str]) -> None:
    """The prompt for the last answer is all that stands before it where it is trained."""
    family, name, _ = case
    model = tokenizer_of(family, tokenizer)
    messages = CHATS[name].messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if last > 0:
        before = re.sub("[«»]", "", MASKS[case][: MASKS[case].rindex("«")])
        expected = model(before, add_special_tokens=False)["input_ids"]
        assert chat_ids(messages[:last], model, CHATS[name].tools) == expected


def test_every_family_and_every_kind_of_conversation_is_in_the_table() -> None:
    assert {family for family, _, _ in MASKS} == set(FAMILIES)
    assert len(MASKS) >= 20


def with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message as OpenAI's API has it: arguments as text."""
    if "tool_calls" not in message:
        return message
    functions = [dict(c["function"]) for c in message["tool_calls"]]
    for function in functions:
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    calls = [{**c, "function": f} for c, f in zip(message["tool_calls"], functions, strict=True)]
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHATS)
def test_the_tokens_are_those_of_the_tokenizers_own_rendering(tokenizer: Any, family: str, name: str) -> None:
    """For every pair of template and conversation that renders, whether it can be trained turn by turn or
    not."""
    model, chat = tokenizer_of(family, tokenizer), CHATS[name]
    messages: list[dict[str, Any]] = [*chat.messages]
    if family == "deepseek":
        messages = [with_json_arguments(message) for message in messages]
    try:
        text = model.apply_chat_template(messages, tools=list(chat.tools) or None, tokenize=False)
    except Exception as error:
        with pytest.raises(BadRow, match=re.escape(str(error))):
            render(chat, model, "all", 10_000)
        return
    try:
        found = render(chat, model, "all", 10_000)
    except BadRow as error:
        assert "leaves out" in str(error)
        return
    end = "" if text.rstrip().endswith((">", "</s>", "[/INST]", "[/TOOL_RESULTS]")) else "</s>"
    assert found.ids.tolist() == model(text + end, add_special_tokens=False)["input_ids"]
    assert found.weights.tolist() == [0] + [1] * (len(found.ids) - 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_on", ["auto", "last-turn", "all"])
def test_a_batch_is_what_its_samples_are_alone(tokenizer: Any, family: str, train_on: str) -> None:
    model = tokenizer_of(family, tokenizer)
    together = render_all(list(CHATS.values()), model, train_on, 40)
    assert any(isinstance(found, Tokens) for found in together)
    for chat, found in zip(CHATS.values(), together, strict=True):
        try:
            alone = render(chat, model, train_on, 40)
        except BadRow as error:
            assert isinstance(found, BadRow) and str(found) == str(error)
            continue
        assert isinstance(found, Tokens)
        assert found.ids.tolist() == alone.ids.tolist()
        assert found.weights.tolist() == alone.weights.tolist()
        assert (found.cut, found.full_length, found.ends) == (alone.cut, alone.full_length, alone.ends)


# ------------------------------------------------------------------------------------------------------------
# What is refused

ANOTHER = "the chat template renders the text up to here in another way"
NOT_GENERATED = "What is trained would not be generated; task.train_on: each-turn, last-turn or all may do"
LEFT_OUT = "Write a data.chat_template that renders it, or take it out of the row."

REFUSED = {
    ("gemma", "system", "auto"): "the chat template refuses this conversation: System role not supported",
    ("mistral-old", "system", "all"): (
        "the chat template refuses this conversation:"
        " Conversation roles must alternate user/assistant/user/assistant/..."
    ),
    ("llama3", "two calls", "auto"): "the chat template refuses this conversation: one tool call at a time",
    ("mistral", "system multi", "auto"): (
        f"turn 3: {ANOTHER} when more turns follow:"
        " '>[INST] Be brief\\n\\nHi[/INST] ' becomes '>[INST] Hi[/INST] Yo</s>[INS'."
        f" {NOT_GENERATED}"
    ),
    ("qwen3", "multi", "auto"): (
        f"turn 2: {ANOTHER} when more turns follow:"
        " 'sistant\\n<think>\\n\\n</think>\\n\\nY' becomes 'sistant\\nYo<|im_end|>\\n<|im_st'."
        f" {NOT_GENERATED}"
    ),
    ("qwen3", "thoughts", "auto"): (
        f"turn 2: {ANOTHER} when more turns follow:"
        " 'sistant\\n<think>\\nhm\\n</think>\\n' becomes 'sistant\\nYo<|im_end|>\\n<|im_st'."
        f" {NOT_GENERATED}"
    ),
    ("deepseek", "thoughts", "auto"): (
        f"turn 2: {ANOTHER} when more turns follow:"
        " 'istant|><think>\\nhm\\n</think>\\n' becomes 'istant|>\\n\\nYo</s><|User|>More'."
        f" {NOT_GENERATED}"
    ),
    ("chatml", "thought", "auto"): (
        f"turn 2: the chat template leaves out a part of the turn's reasoning_content. {LEFT_OUT}"
    ),
    ("llama3", "thought", "last-turn"): (
        f"turn 2: the chat template leaves out a part of the turn's reasoning_content. {LEFT_OUT}"
    ),
    ("chatml", "call", "auto"): f'the chat template leaves out the tool "time" of field "tools". {LEFT_OUT}',
    ("gemma", "tools", "all"): f'the chat template leaves out the tool "time" of field "tools". {LEFT_OUT}',
    (
        "deepseek",
        "tools",
        "auto",
    ): f'the chat template leaves out the tool "time" of field "tools". {LEFT_OUT}',
    ("phi", "called", "auto"): f'turn 2: the chat template leaves out the call of "time". {LEFT_OUT}',
    ("chatml", "called", "all"): f'turn 2: the chat template leaves out the call of "time". {LEFT_OUT}',
}


@pytest.mark.parametrize("case", REFUSED, ids=[", ".join(case) for case in REFUSED])
def test_what_a_template_cannot_render_is_refused_with_the_turn_and_the_place(
    tokenizer: Any, case: tuple[str, str, str]
) -> None:
    family, name, train_on = case
    with pytest.raises(BadRow) as caught:
        render(CHATS[name], tokenizer_of(family, tokenizer), train_on, 10_000)
    assert str(caught.value) == REFUSED[case]


def with_template(tokenizer: Any, template: str) -> Any:
    model = tokenizer_of("chatml", tokenizer)
    model.chat_template = template
    return model


def refusal(chat: Chat, model: Any, train_on: str = "auto") -> str:
    with pytest.raises(BadRow) as caught:
        render(chat, model, train_on, 10_000)
    return str(caught.value)


def test_a_prompt_that_begins_the_answer_in_another_way_than_the_answer_begins_is_refused(
    tokenizer: Any,
) -> None:
    model = tokenizer_of("chatml", tokenizer)
    model.chat_template = model.chat_template.replace(
        "assistant\n' }}{%- endif", "assistant\n<think>\n' }}{%- endif"
    )
    for train_on in ("auto", "last-turn"):
        assert refusal(CHATS["one"], model, train_on) == (
            f"turn 2: {ANOTHER} than in a prompt:"
            " 'sistant\\n<think>\\n' becomes 'sistant\\nYo<|im_end|>\\n'."
            " What is trained would not be generated;"
            " a data.chat_template that does not, or task.train_on: all, may do"
        )
    found = render(Chat((ONE[0], turn("assistant", "<think>\nhm</think>Yo"))), model, "auto", 1000)
    assert model.decode(found.ids[found.weights == 1]) == "hm</think>Yo<|im_end|>"
    render(CHATS["one"], model, "all", 10_000)


@pytest.mark.parametrize("train_on", ["auto", "last-turn", "all"])
def test_a_system_turn_that_the_template_leaves_out_is_refused(tokenizer: Any, train_on: str) -> None:
    model = with_template(
        tokenizer,
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
    )
    assert refusal(CHATS["system"], model, train_on) == (
        f"turn 1: the chat template leaves out the system turn. {LEFT_OUT}"
    )
    assert (
        model.decode(render(CHATS["one"], model, train_on, 99).ids)
        == "<|im_start|>Hi<|im_end|><|im_start|>Yo<|im_end|>"
    )


def test_a_system_turn_may_come_with_other_white_space(tokenizer: Any) -> None:
    model = tokenizer_of("llama3", tokenizer)
    render(Chat((turn("system", " Be \n brief\n"), *ONE)), model, "auto", 1000)
    model.chat_template = model.chat_template.replace(
        "messages[0].content | trim", "messages[0].content.split() | join(' ')"
    )
    render(Chat((turn("system", " Be \n brief\n"), *ONE)), model, "auto", 1000)


def test_words_beside_a_tool_call_that_the_template_leaves_out_are_refused(tokenizer: Any) -> None:
    talk = Chat((ASKED[0], {**ASKED[1], "content": "Let me look"}, *ASKED[2:]), (TIME,))
    model = tokenizer_of("llama3", tokenizer)
    assert (
        refusal(talk, model)
        == f"turn 2: the chat template leaves out a part of the turn's content. {LEFT_OUT}"
    )
    assert render(talk, tokenizer_of("qwen3", tokenizer), "last-turn", 1000).ends


def test_the_second_of_two_calls_cannot_get_lost(tokenizer: Any) -> None:
    model = tokenizer_of("qwen3", tokenizer)
    model.chat_template = model.chat_template.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    assert (
        refusal(CHATS["two calls"], model)
        == f'turn 2: the chat template leaves out the call of "time". {LEFT_OUT}'
    )


def test_the_second_of_two_tools_cannot_get_lost(tokenizer: Any) -> None:
    model = tokenizer_of("qwen3", tokenizer)
    model.chat_template = model.chat_template.replace("for tool in tools", "for tool in tools[:1]")
    other = {"type": "function", "function": {"name": "tim", "parameters": {}}}
    talk = Chat(CHATS["call"].messages, (TIME, other))
    assert refusal(talk, model) == f'the chat template leaves out the tool "tim" of field "tools". {LEFT_OUT}'


def test_a_template_that_knows_only_certain_tools_is_believed(tokenizer: Any) -> None:
    model = tokenizer_of("qwen3", tokenizer)
    model.chat_template = (
        "{%- for tool in tools or [] -%}{%- if tool.function.name != 'time' -%}{{ raise_exception('who?') }}"
        "{%- endif -%}{%- endfor -%}" + model.chat_template
    )
    assert render(CHATS["call"], model, "auto", 1000).ends


@pytest.mark.parametrize(
    "arguments",
    ["{{ c.function.arguments }}", "{{ '' ~ c.function.arguments }}", "{{ '' + c.function.arguments }}"],
)
def test_arguments_are_never_written_as_python_would(tokenizer: Any, arguments: str) -> None:
    model = with_template(
        tokenizer,
        "{% for m in messages %}<|im_start|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        f"({arguments})"
        "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}",
    )
    talk = Chat((ASKED[0], turn("assistant", "", tool_calls=[call(place="café", when=None)])))
    found = render(talk, model, "auto", 1000)
    assert model.decode(found.ids[found.weights == 1]) == 'time({"place": "café", "when": null})<|im_end|>'


def test_a_call_without_the_id_that_a_template_needs_is_refused_in_its_words(tokenizer: Any) -> None:
    named = {"type": "function", "function": {"name": "time", "arguments": {}}}
    talk = Chat((ASKED[0], turn("assistant", "", tool_calls=[named])))
    assert refusal(talk, tokenizer_of("mistral", tokenizer)) == (
        "the chat template refuses this conversation:"
        " Tool call IDs should be alphanumeric strings with length 9!"
    )


# ------------------------------------------------------------------------------------------------------------
# Begin and end


@pytest.mark.parametrize(
    ("template", "talk", "cause"),
    [
        ("{{ bos_token }}" + FAMILIES["gemma"].template, CHATS["one"], "the chat template writes both"),
        (
            "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            Chat((turn("user", "<s>Hi"), ONE[1])),
            "one is in the text of the row",
        ),
    ],
)
def test_two_begin_tokens_are_refused_with_the_cause(
    tokenizer: Any, template: str, talk: Chat, cause: str
) -> None:
    assert refusal(talk, with_template(tokenizer, template)) == (
        f"it begins with the begin-of-sequence token <s> twice: {cause}"
    )


@pytest.mark.parametrize("length", range(4, 40))
def test_a_cut_sample_ends_when_the_end_token_of_a_turn_is_left(tokenizer: Any, length: int) -> None:
    model = tokenizer_of("chatml", tokenizer)
    end = model.convert_tokens_to_ids("<|im_end|>")
    for train_on in ("auto", "last-turn"):
        found = render(CHATS["multi"], model, train_on, length)
        trained = found.ids[found.weights == 1].tolist()
        assert found.ends is (end in trained)


def test_a_template_that_asks_for_the_date_gets_one_date_for_ever(tokenizer: Any) -> None:
    """And not the day of the call: what was tokenized yesterday must be the same today."""
    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    found = render(CHATS["one"], with_template(tokenizer, dated), "all", 1000)
    model = tokenizer_of("chatml", tokenizer)
    assert model.decode(found.ids).startswith("26 Jul 2024<|user|>")
