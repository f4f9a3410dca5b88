"""Conversations through chat templates: nothing that they hold is dropped without a word."""

import pytest

from stages.supervised.conversations import Chat, Refused, read_messages, read_tools
from tests.kinds.test_dataset import lines, make, written
from tests.tokenizers_by_kind import TAGS, byte_level

# As Qwen3 and DeepSeek-R1 do: a place for the reasoning of the last turn, the generation prompt opens it.
REASONING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last and m.reasoning_content is defined %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n"
    "{% endif %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENS = REASONING.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")
TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}call {{ c.function | tojson }}{% endfor %}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    def save(template, **names):
        tokenizer = byte_level(special=TAGS, **names)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "chat")
        return tmp_path / "chat"

    return save


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def render(folder, messages, tools=None):
    return Chat(folder).render(read_messages(messages), read_tools(tools))


def test_an_answer_that_the_prompt_has_opened_is_accepted(folder):
    rendered = render(folder(OPENS), [user("1+1"), assistant("<think>\nso\n</think>\n2")])
    assert rendered.prompt == "<user>1+1</s>\n<assistant><think>\n"
    assert rendered.completion == "so\n</think>\n2"


def test_an_answer_that_does_not_go_on_from_an_opened_thinking_is_refused_with_the_reason(folder):
    with pytest.raises(Refused, match="it opens the thinking with `<think>` and the answer does not go on from there"):
        render(folder(OPENS), [user("1+1"), assistant("2")])


def test_reasoning_goes_where_the_template_puts_it(folder):
    rendered = render(folder(OPENS), [user("1+1"), assistant("2", reasoning_content="so")])
    assert (rendered.completion, rendered.thinking_left_out) == ("so\n</think>\n2", False)


def test_reasoning_without_a_place_is_refused_by_name(folder):
    with pytest.raises(Refused, match="leaves out `reasoning_content` of a message"):
        render(folder(PLAIN), [user("1+1"), assistant("2", reasoning_content="so")])


def test_reasoning_that_stands_elsewhere_by_chance_is_refused_all_the_same(folder):
    with pytest.raises(Refused, match="leaves out `reasoning_content`"):
        render(folder(PLAIN), [user("1+1"), assistant("2", reasoning_content="1+1")])


def test_thinking_of_earlier_turns_may_go_and_is_counted(tmp_path, folder):
    talk = [user("1+1"), assistant("2", reasoning_content="one"), user("2+2"), assistant("4", reasoning_content="two")]
    assert render(folder(REASONING), talk).thinking_left_out
    talk[1] = assistant("<think>one</think>2")
    assert render(folder(REASONING), talk).thinking_left_out
    path = lines(tmp_path / "m.jsonl", [{"messages": talk}, {"messages": talk[2:]}])
    result = make(tmp_path / "stage", path, folder(REASONING), tokenizer="base")
    assert result.remarks == [
        "path: 1 conversations without the thinking of their earlier turns, which the chat template leaves out"
    ]
    assert len(written(tmp_path / "stage")) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("weight", 0), ("name", "Ann"), ("refusal", "no"), ("annotations", [{"url": "u"}])]
)
def test_an_unknown_field_is_refused_by_name(folder, field, value):
    with pytest.raises(Refused, match=f"leaves out `{field}` of a message"):
        render(folder(PLAIN), [user("1+1"), assistant("2", **{field: value})])


@pytest.mark.parametrize("value", [None, []])
def test_a_field_with_nothing_in_it_is_no_field(folder, value):
    assert render(folder(PLAIN), [user("1+1"), assistant("2", tool_calls=value)]).completion == "2"


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "two words"}'}}
TOOL_TALK = [
    user("1+1"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
    assistant("It is 2."),
]


def test_tool_calls_and_their_results_are_rendered(folder):
    rendered = render(folder(TOOLS), TOOL_TALK, '[{"name": "add", "parameters": {"a": null}}]')
    assert rendered.prompt.startswith('tools: [{"name": "add", "parameters": {}}]\n<user>1+1</s>\n<assistant>call {')
    assert "two words" in rendered.prompt and "<tool>2</s>" in rendered.prompt
    assert rendered.completion == "It is 2."
    # A call itself may be what is learned.
    learned = render(folder(TOOLS), [user("1+1"), {"role": "assistant", "tool_calls": [CALL]}])
    assert learned.completion.startswith("call {")


def test_tool_calls_without_a_place_are_refused_by_name(folder):
    with pytest.raises(Refused, match="leaves out `tool_calls` of a message"):
        render(folder(PLAIN), TOOL_TALK)
    with pytest.raises(Refused, match="leaves out `tool_calls`"):  # only a part of them has one
        render(folder(TOOLS.replace("c.function | tojson", "c.function.name")), TOOL_TALK)
    with pytest.raises(Refused, match="no place for `tools`"):
        render(folder(PLAIN), [user("1+1"), assistant("2")], [{"name": "add"}])


def test_tools_of_a_row_are_read_from_their_column(tmp_path, folder):
    rows = [
        {"messages": TOOL_TALK, "tools": [{"name": "add"}]},
        {"messages": TOOL_TALK, "tools": "not json"},
        {"messages": TOOL_TALK, "tools": 7},
    ]
    path = lines(tmp_path / "m.jsonl", rows)
    result = make(tmp_path / "stage", path, folder(TOOLS), tokenizer="base")
    assert str(written(tmp_path / "stage")[0]["prompt"]).startswith('tools: [{"name": "add"}]')
    assert result.notes["refused"] == {"`tools` is no JSON": 1, "`tools` is no list of definitions": 1}


def test_a_system_message_that_the_template_leaves_out_is_refused(folder):
    template = PLAIN.replace(
        "<{{ m.role }}>{{ m.content }}</s>\n", "{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>\n{% endif %}"
    )
    with pytest.raises(Refused, match="leaves out a part of a message of `system`"):
        render(folder(template), [{"role": "system", "content": "Be brief."}, user("1+1"), assistant("2")])


def test_lists_of_texts_are_joined_and_other_parts_refused(folder):
    part = {"type": "text", "text": "1+", "image": None}
    assert render(folder(PLAIN), [user([part, {"type": "text", "text": "1"}]), assistant("2")]).prompt.startswith("<user>1+1<")
    with pytest.raises(Refused, match="a part that is no text"):
        render(folder(PLAIN), [user([{"type": "image_url", "image_url": "x"}]), assistant("2")])


def test_half_a_character_in_a_field_is_refused():
    with pytest.raises(Refused, match="a message without role or text"):
        read_messages([user("1"), assistant("2", reasoning_content="\ud800")])


def test_the_begin_token_is_put_there_once(folder):
    from stages.rollout.token_text import TokenText
    from stages.rollout.torch_engine import load_tokenizer

    place = folder("{{ bos_token }}" + PLAIN, append=True)
    rendered = render(place, [user("1"), assistant("2")])
    assert rendered.prompt == "<user>1</s>\n<assistant>"
    ids = TokenText(load_tokenizer(place)).prompt(rendered.prompt)
    assert (ids[0], ids.count(2), ids[-1]) == (2, 1, load_tokenizer(place)(">").input_ids[1])
