"""Text to tokens and back: the one place that encodes prompts and completions and decodes what was sampled.

Tokenizers differ in what they add to a text (a beginning-of-text token, an end token, a space) and in what they call special.
Three rules hold for every engine and every kind of stage:

- A prompt is encoded as the tokenizer does it, without the end token that some post-processors append.
- A completion is encoded as it reads behind a prompt, and is learned with exactly one end token.
- Decoding drops end, padding and beginning-of-text tokens, by id. Every other token is text, special or not: `<think>` is
  a special token of many tokenizers, and a reward that does not see it is 0.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from stages.contract.errors import UserError
from stages.problems.templates import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
"""What the rewards read. A token whose text has one of them is never dropped, whatever it is declared to be."""
_PROBES = ("a", "1", "The")
_ANCHORS = ("\n", ".", "0")
"""Texts before a completion that no tokenizer merges with what follows, as a rule; checked each time."""
_SPACE = "▁"
"""SentencePiece's mark of a space."""


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of every declared end token: of the generation config, the model config and the tokenizer.

    model: anything with `generation_config` and `config`. Ids below 0, with which some configs say "none", are left out.
    """
    # Not every config has the field (CpmAnt), and a config of several models has it in that of its language model (Gemma 3).
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    declared = [getattr(each, "eos_token_id", None) for each in (model.generation_config, model.config, config, tokenizer)]
    ids: set[int] = set()
    for item in declared:
        ids.update(item if isinstance(item, list | tuple) else [] if item is None else [item])
    return frozenset(token for token in ids if token >= 0)


class TokenText:
    """Encodes and decodes with one tokenizer."""

    def __init__(self, tokenizer: Any, ends: Iterable[int] = ()) -> None:
        """`ends`: ids of the end tokens, see `end_tokens`; the tokenizer's own is added."""
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.ends = frozenset(ends) | (frozenset() if own is None else {own})

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and behind every text."""
        tokenizer = self.tokenizer
        for probe in _PROBES:
            bare, whole = self._bare(probe), list(tokenizer([probe]).input_ids[0])
            for start in range(len(whole) - len(bare) + 1):
                if bare and whole[start : start + len(bare)] == bare:
                    return whole[:start], whole[start + len(bare) :]
        whole = list(tokenizer([""]).input_ids[0])
        count = next((n for n, token in enumerate(reversed(whole)) if token not in self.ends), len(whole))
        return whole[: len(whole) - count], whole[len(whole) - count :]

    @cached_property
    def dropped(self) -> frozenset[int]:
        """Ids that decoding drops. An ordinary piece of text (a digit) is kept, whatever it is declared to be."""
        tokenizer = self.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        filling = {tokenizer.pad_token_id, tokenizer.bos_token_id} - self.ends
        # Some declare an ordinary character as padding (`!`), which an answer may well contain.
        names = self.ends | {token for token in filling & special if len(self._raw([token]).strip()) > 1}
        return frozenset(token for token in names & special if not any(tag in self._raw([token]) for tag in TAGS))

    @cached_property
    def anchor(self) -> tuple[str, list[int]]:
        """A text before completions and its ids, where the tokenizer puts a space before each text; else ("", []).

        SentencePiece's models encode `5` as `▁5`, a space and a 5, and decoding takes the space away again. Behind a prompt
        both are wrong: the space is part of the text that the model reads, or writes.
        """
        first, second = self._bare("a"), self._bare("1")
        marked = bool(second) and str(self.tokenizer.convert_ids_to_tokens(second[:1])[0]).startswith(_SPACE)
        if not marked or not first or self._raw(first + second) != "a 1":
            return "", []
        for text in _ANCHORS:
            ids = self._bare(text)
            if ids and self._raw(ids) == text:
                return text, ids
        return "", []

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts: with what the tokenizer puts before a text, without what it puts behind one.

        A prompt that begins with the beginning-of-text token in words gets no second one.
        """
        if not texts:
            return []
        before, behind = self.affixes
        encoded = []
        for ids in map(list, self.tokenizer(list(texts)).input_ids):
            if behind and ids[len(ids) - len(behind) :] == behind:
                ids = ids[: len(ids) - len(behind)]
            if before == [self.tokenizer.bos_token_id] and ids[:2] == before * 2:
                ids = ids[1:]
            encoded.append(ids)
        return encoded

    def prompt(self, text: str) -> list[int]:
        """Ids of one prompt."""
        return self.prompts([text])[0]

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they stand behind another one, without any that the tokenizer adds."""
        if not texts:
            return []
        before, ids = self.anchor
        encoded = [list(row) for row in self.tokenizer([before + text for text in texts], add_special_tokens=False).input_ids]
        if not before:
            return encoded
        merged = [n for n, row in enumerate(encoded) if row[: len(ids)] != ids]
        for number in merged:
            encoded[number] = ids + self._bare(texts[number])
        return [row[len(ids) :] for row in encoded]

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers that are learned: each ends with exactly one end token.

        A text may bring it along in words, also one that is not the tokenizer's own but declared (`<|im_end|>`), with white
        space behind it as chat templates write it; it is kept then, and more of them are cut off.
        Raises UserError when the tokenizer has no end token.
        """
        own = self.tokenizer.eos_token_id
        if own is None:
            mend = "set eos_token in its tokenizer_config.json"
            raise UserError("the tokenizer has no end token, so no answer would end", where="model", mend=mend)
        words = {name: token for token in self.ends if (name := self._raw([token]).strip())}
        plain, last = [], []
        for text in texts:
            end = own
            while name := next((name for name in words if text.rstrip().endswith(name)), ""):
                if words[name] not in self.dropped:  # a tag that is an end token: the answer's own
                    break
                end, text = words[name], text.rstrip().removesuffix(name)
            plain.append(text)
            last.append(end)
        encoded = self.continuations(plain)
        return [ids if ids[-1:] and ids[-1] in self.ends else [*ids, end] for ids, end in zip(encoded, last, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, as it stands behind a prompt."""
        kept = [token for token in ids if token not in self.dropped]
        before, anchor = self.anchor
        text = self._raw([*anchor, *kept])
        return text.removeprefix(before)

    def _bare(self, text: str) -> list[int]:
        """The ids of a text alone, without any that the tokenizer adds."""
        return list(self.tokenizer([text], add_special_tokens=False).input_ids[0])

    def _raw(self, ids: Sequence[int]) -> str:
        """The text of ids, all of them. Ids without a token (rows that only fill the embedding up) have none."""
        if not getattr(self.tokenizer, "is_fast", False):
            ids = [token for token in ids if self.tokenizer.convert_ids_to_tokens(token) is not None]
        # Cleaning up would take spaces out of answers: `x = -1 , 2` is not `x = -1, 2`.
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
