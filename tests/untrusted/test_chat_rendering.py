"""Chat templates of others: rendered as transformers renders them, in a sandbox, within limits of time, memory and size."""

import time

import pytest
from transformers import PreTrainedTokenizerFast

from stages.rewards import chat_rendering
from stages.rewards.chat_rendering import TemplateFault, rendered
from stages.rewards.verifier_pool.pool import Limits
from tests.untrusted.reading_path import byte_tokenizer
from tests.untrusted.texts import FRAGMENTS, surrogate_free

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'x' * 10**11 }}",
    "a long text": "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "powers": "{{ 9**(9**(9**9)) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "imports": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "changes": "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
    "raising": "{{ raise_exception('no \u202e\x1b[2J') }}",
    "a syntax error": "{% for %}",
}
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(autouse=True)
def _limits(monkeypatch):
    monkeypatch.setattr(chat_rendering, "LIMITS", Limits(cpu_s=1.0, wall_s=60.0, memory_bytes=1 << 29, reply_bytes=1 << 22))


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_text_equals_that_of_transformers(generation, tools):
    tokenizer = tokenizer_with(CHATML)
    messages = [*MESSAGES, {"role": "user", "content": None, "name": "x"}]
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generation)
    assert rendered(tokenizer, messages, tools, generation=generation) == expected
    assert "<s>" in expected


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_a_fault_within_the_limits(name):
    begun = time.monotonic()
    with pytest.raises(TemplateFault) as fault:
        rendered(tokenizer_with(HOSTILE[name]), MESSAGES)
    assert str(fault.value).strip()
    assert time.monotonic() - begun < 60.0
    assert rendered(tokenizer_with("{{ messages[1].content }}"), MESSAGES) == "5"


def test_any_text_in_a_message_is_rendered_as_it_is():
    tokenizer = tokenizer_with("{{ messages[0].content }}")
    text = "".join(fragment for fragment in FRAGMENTS if surrogate_free(fragment))
    assert rendered(tokenizer, [{"role": "user", "content": text}]) == text


def test_value_that_json_does_not_have_is_a_fault():
    with pytest.raises(TemplateFault, match="not JSON serializable"):
        rendered(tokenizer_with(CHATML), [{"role": "user", "content": b"bytes"}])
