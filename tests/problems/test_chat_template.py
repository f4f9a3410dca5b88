"""A template as a chat template: for one question exactly the training's prompt, for others an answer or a clear refusal."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from stages.problems.chat_template import NO_SYSTEM, ONE_QUESTION, chat_template
from stages.problems.templates import Example, Template

WORKED = Example(question='what {{ is }}\n"1\\n"? 😀', thinking="{% raw %}\n\tü", answer="  one ")
TEMPLATES = [
    Template(),
    Template(open_thinking=True),
    Template(name="question"),
    Template(name="question", open_thinking=True),
    Template(examples=(WORKED, WORKED), open_thinking=True),
]


def rendered(template: Template, messages: list[dict[str, Any]], *, begin: str = "", prompt: bool = True) -> str:
    """What transformers makes of messages."""
    texts, _ = render_jinja_template([messages], chat_template=chat_template(template, begin), add_generation_prompt=prompt)
    text: str = texts[0]
    return text


@given(question=st.text(min_size=1), template=st.sampled_from(TEMPLATES))
def test_a_question_becomes_the_prompt_of_the_training(question: str, template: Template) -> None:
    message = [{"role": "user", "content": question}]
    assert rendered(template, message) == template.render(question)
    assert rendered(template, message, begin='<s "x">') == '<s "x">' + template.render(question)


def test_a_conversation_has_the_form_of_the_worked_examples() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    head, _, _ = Template().render("a").partition("User: a")
    assert rendered(Template(), said) == f"{head}User: a\nAssistant: b\n\nUser: c\nAssistant:"
    assert rendered(Template(), said[:2], prompt=False) == f"{head}User: a\nAssistant: b"


def test_what_it_was_not_trained_on_is_refused() -> None:
    system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    with pytest.raises(TemplateError, match=NO_SYSTEM):
        rendered(Template(), system)
    for said in (system, [system[1], system[1]]):
        with pytest.raises(TemplateError, match=ONE_QUESTION):
            rendered(Template(name="question"), said)


def test_an_exported_template_gives_the_prompts_of_a_tokenizer_that_appends_its_end_token(tmp_path: Path) -> None:
    from flows.cli.export import PROBES, _begin, _chat_ids
    from stages.rollout.token_text import TokenText
    from tests.tokenizers_by_kind import byte_level

    text = TokenText(byte_level(append=True))
    assert _begin(text) == "<s>"
    template = Template()
    text.tokenizer.chat_template = chat_template(template, _begin(text))
    assert [_chat_ids(text.tokenizer, question) for question in PROBES] == [
        text.prompt(template.render(question)) for question in PROBES
    ]
