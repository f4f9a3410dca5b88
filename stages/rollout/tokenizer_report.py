"""What a model's tokenizer does to the texts of this recipe, looked at once when the model comes in.

A tokenizer that drops a tag, changes a character or has tokens without a row in the embedding gives wrong numbers without an
error. What makes a model unusable is refused, what makes its results doubtful is a warning, and the rest stands in the notes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stages.contract.errors import UserError
from stages.rewards.chat_rendering import TemplateFault, rendered
from stages.rollout.token_text import TAGS, TokenText, end_tokens

BOXED = r"\boxed{}"
SAMPLES = {
    "<think>": "<think>\n1 + 2 = 3\n</think>",
    "<answer>": "<answer>3</answer>",
    BOXED: r"so \boxed{\frac{1}{2}}",
}
"""What has to be read back as it is written: the name of each and a text with it."""
CHARACTERS = "x² + ½ ≤ Ab"
"""Characters that Unicode normalisation and lower-casing change."""
SHOWN = 3
RoundTrip = Literal["exact", "spaces", "lost"]


@dataclass
class TokenizerReport:
    """What was seen."""

    notes: dict[str, Any] = field(default_factory=dict)
    """Facts, for the manifest."""
    warnings: list[str] = field(default_factory=list)
    """Sentences for whoever sees the model's results."""


def check_rows(tokenizer: Any, model: Any) -> int:
    """The rows of the model's input embedding. Raises UserError when the tokenizer has ids without one."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    if beyond := sorted((number, token) for token, number in vocabulary.items() if number >= rows):
        names = ", ".join(f"`{token}` ({number})" for number, token in beyond[:SHOWN])
        more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
        what = f"the embedding has {rows} rows, and the tokenizer has tokens beyond them: {names}{more}"
        mend = "take the tokenizer that belongs to the model, or resize the embedding (`resize_token_embeddings`) and save both"
        raise UserError(what, where="tokenizer", mend=mend)
    return rows


def report_tokenizer(tokenizer: Any, model: Any) -> TokenizerReport:
    """Look at the tokenizer of a language model. Raises UserError when the tokenizer does not belong to the model."""
    rows = check_rows(tokenizer, model)
    text = TokenText(tokenizer, end_tokens(model, tokenizer))
    before, behind = (tokenizer.convert_ids_to_tokens(ids) for ids in text.affixes)
    ends = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(text.ends)}
    trips = {name: round_trip(text, sample) for name, sample in SAMPLES.items()}
    special = {*tokenizer.all_special_ids, *(n for n, t in tokenizer.added_tokens_decoder.items() if t.special)}
    chat, turn_end = _chat(text)
    report = TokenizerReport(
        notes={
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
            "embedding_rows": rows,
            "end_tokens": {str(number): token for number, token in ends.items()},
            "bos_token": tokenizer.bos_token,
            "pad_token": tokenizer.pad_token,
            "before_texts": before,
            "appended": behind,
            "special_tags": [tag for tag in TAGS if tokenizer.get_vocab().get(tag) in special],
            "round_trip": trips,
            "chat_template": chat,
            "turn_end": turn_end,
        }
    )
    report.warnings += _warnings(text, trips, ends, chat, turn_end)
    if behind:
        report.warnings.append(f"the tokenizer appends {_quoted(behind)} to every text; prompts are encoded without it")
    return report


def round_trip(text: TokenText, sample: str) -> RoundTrip:
    """Whether a text is read back as it was written; if not, whether more than white space between its tags has changed."""
    back = text.decode(text.continuations([sample])[0])
    if back == sample:
        return "exact"
    whole = all(tag in back for tag in (*TAGS, r"\boxed{") if tag in sample)
    return "spaces" if whole and _squeezed(back) == _squeezed(sample) else "lost"


def _warnings(
    text: TokenText, trips: Mapping[str, RoundTrip], ends: Mapping[int, str], chat: str, turn_end: str | None
) -> list[str]:
    found = []
    if not ends:
        found.append(
            "no end token is declared (eos_token): answers end at `max_tokens` alone, and the model cannot be fine-tuned"
        )
    if lost := [name for name, trip in trips.items() if trip == "lost"]:
        sample = SAMPLES[lost[0]]
        back = text.decode(text.continuations([sample])[0])
        what = f"the tokenizer loses {_quoted(lost)} (`{sample}` is read back as `{back}`)"
        found.append(f"{what}: rewards and verifiers that look for them give 0")
    elif spaces := [name for name, trip in trips.items() if trip == "spaces"]:
        found.append(f"the tokenizer changes white space around {_quoted(spaces)}: texts are not read back exactly")
    if not lost and round_trip(text, CHARACTERS) == "lost":
        back = text.decode(text.continuations([CHARACTERS])[0])
        found.append(f"the tokenizer changes characters: `{CHARACTERS}` is read back as `{back}`")
    if chat.startswith("fails"):
        found.append(f"the chat template {chat}")
    if turn_end is not None and turn_end not in ends.values():
        what = f"the chat template ends a turn with `{turn_end}`, which is no declared end token"
        found.append(f"{what}: answers go on behind it; add it to eos_token_id in generation_config.json")
    return [f"warning: {sentence}" for sentence in found]


def _chat(text: TokenText) -> tuple[str, str | None]:
    """What becomes of the chat template, and the special token with which it ends a turn, if it does."""
    tokenizer = text.tokenizer
    if not tokenizer.chat_template:
        return "none", None
    question, answer = {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}
    try:
        rendered(tokenizer, [question], generation=True)
        whole = rendered(tokenizer, [question, answer])
    except TemplateFault as error:
        return f"fails on a question and its answer ({error})", None
    if "Q1" not in whole or "A1" not in whole:
        return "fails: it leaves out the question or the answer", None
    behind = whole.rpartition("A1")[2].strip()
    first = text.continuations([behind])[0][:1] if behind else []
    added = tokenizer.added_tokens_decoder
    return "renders", str(tokenizer.convert_ids_to_tokens(first)[0]) if first and first[0] in added else None


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _squeezed(text: str) -> str:
    return "".join(text.split())
