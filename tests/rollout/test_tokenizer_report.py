"""What is seen of a tokenizer when its model comes in: refused, warned of, noted."""

import json

import pytest
from transformers import GenerationConfig

from stages.contract.errors import UserError
from stages.kinds.model import KIND, ModelConfig
from stages.rollout.tokenizer_report import report_tokenizer
from stages.rollout.torch_engine import load_model, load_tokenizer
from stages.store.folders import StageFolder
from stages.store.stage import StageContext, StopRequest
from tests.tokenizers_by_kind import TAGS, byte_level, saved, sentence_piece, word_piece

EXACT = {"<think>": "exact", "<answer>": "exact", r"\boxed{}": "exact"}


def report(tokenizer, folder, **model):
    saved(tokenizer, folder, **model)
    return report_tokenizer(load_tokenizer(folder), load_model(folder))


def test_a_plain_tokenizer_has_no_warning(tmp_path):
    seen = report(byte_level(), tmp_path, rows=300)
    assert seen.warnings == []
    assert seen.notes == {
        "class": "TokenizersBackend",
        "tokens": 259,
        "embedding_rows": 300,
        "end_tokens": {"1": "</s>"},
        "bos_token": None,
        "pad_token": "<pad>",
        "before_texts": [],
        "appended": [],
        "special_tags": [],
        "round_trip": EXACT,
        "chat_template": "none",
        "turn_end": None,
    }


def test_special_tags_are_noted_and_read_back(tmp_path):
    seen = report(byte_level(special=TAGS), tmp_path)
    assert (seen.warnings, seen.notes["special_tags"], seen.notes["round_trip"]) == ([], list(TAGS), EXACT)


def test_an_appended_end_token_is_said(tmp_path):
    seen = report(byte_level(append=True), tmp_path)
    assert seen.notes["before_texts"] == ["<s>"]
    assert seen.warnings == ["the tokenizer appends `</s>` to every text; prompts are encoded without it"]


def test_a_tokenizer_that_loses_the_tags_is_warned_of(tmp_path):
    seen = report(word_piece(), tmp_path)
    assert set(seen.notes["round_trip"].values()) == {"lost"}
    assert "loses `<think>`, `<answer>`, `\\boxed{}`" in seen.warnings[0]
    assert "is read back as `< think >" in seen.warnings[0]


def test_spaces_around_special_tags_are_warned_of(tmp_path):
    seen = report(sentence_piece(special=TAGS), tmp_path)
    assert seen.notes["round_trip"] == {"<think>": "spaces", "<answer>": "spaces", r"\boxed{}": "exact"}
    assert seen.warnings == [
        "warning: the tokenizer changes white space around `<think>`, `<answer>`: texts are not read back exactly"
    ]


def test_unicode_normalisation_is_warned_of(tmp_path):
    from tokenizers import normalizers

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    seen = report(tokenizer, tmp_path)
    assert seen.notes["round_trip"] == EXACT
    assert seen.warnings == ["warning: the tokenizer changes characters: `x² + ½ ≤ Ab` is read back as `x2 + 1⁄2 ≤ Ab`"]


def test_no_end_token_is_warned_of(tmp_path):
    folder = saved(byte_level(eos_token=None), tmp_path, eos_token_id=None)
    seen = report_tokenizer(load_tokenizer(folder), load_model(folder))
    assert seen.notes["end_tokens"] == {}
    assert "no end token is declared" in seen.warnings[0]


def test_padding_may_be_the_end_token_or_missing(tmp_path):
    same = report(byte_level(pad_token="</s>"), tmp_path / "same")
    none = report(byte_level(pad_token=None), tmp_path / "none")
    assert (same.notes["pad_token"], none.notes["pad_token"]) == ("</s>", None)
    assert same.warnings == none.warnings == []


TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_turn_that_ends_with_no_declared_end_token_is_warned_of(tmp_path):
    tokenizer = byte_level(special=("<|im_end|>",))
    tokenizer.chat_template = TURNS
    saved(tokenizer, tmp_path)
    seen = report_tokenizer(load_tokenizer(tmp_path), load_model(tmp_path))
    assert (seen.notes["chat_template"], seen.notes["turn_end"]) == ("renders", "<|im_end|>")
    assert "ends a turn with `<|im_end|>`, which is no declared end token" in seen.warnings[0]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    GenerationConfig(eos_token_id=[1, end]).save_pretrained(tmp_path)
    again = report_tokenizer(load_tokenizer(tmp_path), load_model(tmp_path))
    assert (again.warnings, again.notes["end_tokens"]) == ([], {"1": "</s>", str(end): "<|im_end|>"})


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('only tools') }}", "fails on a question and its answer (only tools)"),
        ("{{ messages[0].content }}", "fails: it leaves out the question or the answer"),
        ("{% for m in %}", "fails on a question and its answer"),
    ],
)
def test_a_chat_template_that_does_not_render_is_warned_of(tmp_path, template, what):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    seen = report(tokenizer, tmp_path)
    assert seen.notes["chat_template"].startswith(what)
    assert f"warning: the chat template {what}" in seen.warnings[0]


def made(folder, path, **fields):
    config = ModelConfig(kind="model", path=str(path), **fields)
    return KIND.run(StageContext(config, StageFolder(folder), {}, {}, StopRequest()))


def test_the_stage_writes_the_report_down_and_says_its_warnings(tmp_path, capsys):
    result = made(tmp_path / "stage", saved(byte_level(append=True), tmp_path / "model"))
    assert result.notes["tokenizer"]["appended"] == ["</s>"]
    assert result.remarks == ["the tokenizer appends `</s>` to every text; prompts are encoded without it"]
    assert result.remarks[0] in capsys.readouterr().err
    json.dumps(result.notes)  # they go into the manifest


@pytest.mark.parametrize("task", ["text", "preference"])
def test_tokens_without_a_row_in_the_embedding_are_a_mistake(tmp_path, task):
    tokenizer = byte_level(special=("<a>", "<b>", "<c>", "<d>"))
    folder = saved(tokenizer, tmp_path / "model", rows=259)
    if task == "preference":
        from transformers import LlamaConfig, LlamaForSequenceClassification

        config = LlamaConfig.from_pretrained(folder, num_labels=1)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        made(tmp_path / "stage", folder, task=task)
    assert "the embedding has 259 rows" in caught.value.what
    assert "`<a>` (259), `<b>` (260), `<c>` (261) and 1 more" in caught.value.what
    assert "resize" in caught.value.mend
    assert not (tmp_path / "stage/model").exists()
