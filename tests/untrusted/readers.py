"""The functions that read sampled text: how each is called with any text, and what it must give back.

`test_total.py` draws texts for every reader, and fails when a function of the source that takes sampled text is neither here
nor in `NOT_SAMPLED`. A reader is keyed by `module:qualified name`.
"""

import json

from tests.untrusted.calls import (
    Reader,
    _are_scored,
    _asked,
    _asserts,
    _bars_hold,
    _choice,
    _decoded,
    _document,
    _failure,
    _found,
    _gym,
    _harmless_on_page,
    _leaks,
    _messages,
    _mlflow_table,
    _near,
    _panels,
    _plain_rows,
    _printed,
    _problem_numbers,
    _records,
    _reply,
    _review,
    _rewards,
    _score,
    _shown_on_page,
    _vote,
    answer_of,
    are_finite,
    are_verdicts,
    are_words,
    episode,
    group,
    is_bool,
    is_one_line,
    is_one_line_shown,
    is_part,
    is_seen,
    is_share,
    is_text,
    is_text_or_none,
    of,
    plain,
    program_in,
    thinking_of,
)

LONGEST_ANSWER = 1000
"""Characters of an answer that the math verifier reads (`LONGEST_EXPRESSION`): its parsers need not be linear."""
SORTED_MARKS = ("marks", "mixed marks")
"""CPython's normalization sorts a run of combining marks by insertion. What is normalized are questions, which a model does not
write."""
READERS: dict[str, Reader] = {
    "stages.store.unicode_text:replace_surrogates": plain(
        holds=lambda _, value: bool(value.encode("utf-8", "strict")) or value == ""
    ),
    "stages.contract.secrets:redact": plain(holds=is_text),
    "stages.contract.secrets:Secrets.redact": plain(
        lambda f, text: f(of("stages.contract.secrets:known")(), text), holds=is_text
    ),
    "stages.contract.secrets:Secrets.named_in": plain(
        lambda f, text: f(of("stages.contract.secrets:known")(), text), holds=is_text_or_none
    ),
    "stages.contract.errors:UserError": plain(lambda f, text: str(f(text, where=text, mend=text)), holds=is_one_line),
    "stages.rewards.tags:thinking": plain(holds=is_part, place=thinking_of),
    "stages.rewards.tags:final_answer": plain(
        lambda f, text: [f(text), f(text, "boxed")],
        holds=lambda text, value: all(is_part(text, v) for v in value),
        place=answer_of,
    ),
    "stages.rewards.tags:boxes": plain(holds=lambda text, value: all(is_part(text, box) for box in value)),
    "stages.rewards.tags:several_answers": plain(holds=is_bool),
    "stages.rewards.format:well_formed": plain(holds=is_bool, place=answer_of),
    "stages.rewards.language:language_share": plain(
        lambda f, text: max((f(text, name) or 0.0 for name in ("english", "chinese", "digits")), default=0.0), holds=is_share
    ),
    "stages.rewards.language:readable": plain(lambda f, text: f(text, "german", 0.5, "sentence"), holds=is_bool, slow=4.0),
    "stages.rewards.repetition:repetition": plain(lambda f, text: f(text, 8), holds=lambda _, value: -1.0 <= value <= 0.0),
    "stages.rewards.reflection:reflective_words": plain(holds=lambda text, value: 0 <= value <= len(text)),
    "stages.rewards.answers.expression_size:too_big": plain(holds=is_bool),
    "stages.rewards.answers.numbers:parse_number": plain(holds=lambda _, value: value is None or value == value + 0),
    "stages.rewards.answers.numbers:last_number": plain(holds=lambda _, value: value is None or value == value + 0),
    "stages.rewards.answers.judges:exact": plain(lambda f, text: f(_asked(text), _rewards()), holds=are_verdicts),
    "stages.rewards.answers.judges:numeric": plain(lambda f, text: f(_asked(text), _rewards()), holds=are_verdicts),
    "stages.rewards.answers.verifiers:judge": plain(
        lambda f, text: f(_asked(text, verifier="exact") + _asked(text, verifier="numeric"), _rewards()), holds=are_verdicts
    ),
    "stages.rewards.score:score": Reader(_score, _are_scored, answer_of, slow=3.0),
    "stages.rewards.score:same_answer": plain(
        lambda f, text: [f(text, "5", _rewards(verifier=name)) for name in ("exact", "numeric")],
        holds=lambda _, value: set(value) <= {True, False},
    ),
    "stages.rewards.code.verifier:program_of": plain(holds=is_text_or_none, place=program_in),
    "stages.rewards.code.asserts:read_asserts": Reader(_asserts, lambda _, value: value >= 0),
    "stages.rewards.code.asserts:decode": Reader(
        _decoded, lambda text, value: value[-1] == text and set(value[:-1]) <= {True, False}
    ),
    "stages.rewards.code.supervisor:cause": plain(holds=is_text_or_none),
    "stages.rewards.gym_guard:refused": Reader(_gym, lambda _, value: set(value) <= {True, False}),
    "stages.rewards.preference:read": plain(lambda f, text: f(text, "summary") + f(text, "all"), holds=is_text),
    "stages.rewards.answers.math_pool:verdict_of": plain(
        lambda f, text: f(of("stages.rewards.verifier_pool.pool:Reply")(text, text)),
        holds=lambda _, value: value in ("right", "wrong", "none"),
    ),
    "stages.curation.filters:first_failure": Reader(
        _failure, lambda _, value: all(v is None or v in _FILTERS for v in value), thinking_of, slow=3.0
    ),
    "stages.curation.filters:longest_paragraph": plain(holds=lambda text, value: 0 <= value <= len(text)),
    "stages.curation.filters:most_repeats": plain(
        lambda f, text: f(text, 2), holds=lambda text, value: 0 <= value <= len(text)
    ),
    "stages.curation.duplicates:grams": plain(
        lambda f, text: f(text, 5), holds=lambda _, value: bool((value[1:] > value[:-1]).all()) if len(value) > 1 else True
    ),
    "stages.curation.duplicates:Finder.near": Reader(_near, lambda _, value: value == (False, True), cost=12, slow=3.0),
    "stages.curation.choose:fates": Reader(_choice, lambda _, value: sorted(value) == [0, 1, 2], cost=8, slow=3.0),
    "stages.curation.reply:read_whole": Reader(_reply, lambda _, value: len(json.dumps(value).encode()) > 0),
    "stages.curation.rewrite:Rewrite.messages": Reader(_messages, lambda _, value: b"Solution:" in value),
    "stages.curation.review:review_id": plain(lambda f, text: f("p", 0, text), holds=lambda _, value: len(value) == 16),
    "stages.curation.review:write_review": Reader(_review, lambda _, value: value == [True, True], cost=12),
    "stages.evals.headline:problem_metrics": Reader(_problem_numbers, are_finite, answer_of),
    "stages.evals.headline:answer_metrics": plain(lambda f, text: f([group(text, text)]), holds=are_finite),
    "stages.evals.statistics:majority_credit": Reader(_vote, lambda _, value: 0.0 <= value <= 1.0),
    "stages.problems.ngrams:words": plain(holds=are_words, unlike=SORTED_MARKS),
    "stages.problems.ngrams:tokens": plain(holds=are_words, unlike=SORTED_MARKS, slow=2.0),
    "stages.problems.ngrams:Questions.find": Reader(
        _found, lambda _, value: len(value) == 2, unlike=SORTED_MARKS, slow=6.0, cost=4
    ),
    "stages.problems.decontamination:without_leaks": Reader(
        _leaks, lambda _, value: value == 1, unlike=SORTED_MARKS, slow=3.0, cost=2
    ),
    "stages.problems.columns:last_boxed": plain(holds=is_part),
    "stages.rollout.records:write_groups": Reader(_records, lambda _, value: value is True, cost=12),
    "stages.report.text:shown": Reader(_shown_on_page, _harmless_on_page),
    "stages.tracking.mlflow.artifacts:sampled_answers": Reader(_mlflow_table, lambda _, value: value is True, cost=20),
    "stages.rewards.answers.numbers:parse_amount": plain(
        holds=lambda _, value: value is None or value.value == value.value + 0
    ),
    "stages.rewards.answers.text:plain_text": plain(lambda f, text: f(text[:LONGEST_ANSWER]), holds=is_text),
    "stages.rewards.answers.text:closing": plain(
        lambda f, text: f("{" + text, 0), holds=lambda text, value: -1 <= value <= len(text)
    ),
    "stages.rewards.answers.amounts:compound_in": plain(holds=lambda _, value: True),
    "stages.rewards.answers.words:date_of": plain(holds=lambda _, value: value is None or len(value) == 3),
    "stages.rewards.answers.words:words_key": plain(holds=is_text),
    "stages.rewards.answers.form_reader:closed": plain(holds=is_bool),
    "stages.rewards.answers.form_reader:split": plain(
        lambda f, text: f(text[:LONGEST_ANSWER]), holds=lambda _, value: len(value) == 2
    ),
    "stages.rewards.answers.form_reader:read_form": plain(
        lambda f, text: f(text[:LONGEST_ANSWER]), holds=lambda _, value: value is not None, slow=3.0
    ),
    "stages.rewards.functions:answer_fields": plain(
        lambda f, text: f(_rewards(), episode(text)), holds=lambda _, value: len(json.dumps(value).encode()) > 0
    ),
    "stages.rewards.functions:number_of": plain(
        lambda f, text: f(of("stages.rewards.verifier_pool.pool:Reply")(text)),
        holds=lambda _, value: value[0] is None and len(value[1]) < 200,
    ),
    "stages.rewards.verifier_pool.user_fault:Fault.from_json": plain(lambda f, text: str(f(text)), holds=is_text),
    "stages.runtime.plain_text:plain": plain(holds=lambda _, value: value.isascii()),
    "flows.runs.markdown:escaped": plain(holds=is_one_line_shown),
    "flows.runs.markdown:fenced": plain(holds=is_text),
    "flows.output:single_line": plain(holds=is_one_line_shown),
    "flows.output:printable": plain(holds=is_seen),
    "flows.output:printable_json": Reader(_document, lambda text, value: value == json.loads(json.dumps(text))),
    "flows.output:one_line": plain(holds=lambda text, value: is_seen(text, value) and "\n" not in value and len(value) <= 200),
    "flows.cli.rollouts:_lines": Reader(_plain_rows, _bars_hold),
    "flows.cli.rollouts:_panels": Reader(_panels, is_seen, slow=8.0, cost=4),
    "flows.cli.sample:_show": Reader(_printed, is_seen),
}
"""Function -> how it is called."""
_FILTERS = ("finished", "correct", "format", "thinking", "language", "repetition", "length", "paragraph", "code")

IN_A_PROCESS = "judges in processes; test_reading_path.py and test_workers.py send texts through it"
NUMBERS_ONLY = "reads verdicts, rewards and lengths, not texts; test_reading_path.py calls it with real groups"
BY_READ_FORM = "called by `read_form`, which is called here"
OURS = "its text is ours or the user's, never a model's"
NOT_SAMPLED: dict[str, str] = {
    "stages.curation.choose:Selection.choose": "calls `fates` for each group",
    "stages.curation.rewrite:Rewriting.rewrite": "sends `messages` and judges replies; tests/curation/test_rewrite.py",
    "stages.evals.likelihood:continuation_scores": "token ids",
    "stages.rl.collect:Scene.together": NUMBERS_ONLY,
    "stages.rl.collect:has_signal": NUMBERS_ONLY,
    "stages.rewards.coverage:check_coverage": "verdicts and faults of a step's answers; tests/kinds/test_rl_without_signal.py",
    "stages.rl.metrics:reward_metrics": NUMBERS_ONLY,
    "stages.rl.metrics:rollout_metrics": IN_A_PROCESS,
    "stages.rl.metrics:held_out_metrics": NUMBERS_ONLY,
    "stages.rl.metrics:pass_at_k": NUMBERS_ONLY,
    "stages.rl.metrics:rewards_of": NUMBERS_ONLY,
    "stages.rl.prepare:prepare": "token ids and rewards",
    "stages.problems.gym:gym_score": IN_A_PROCESS,
    "stages.rewards.answers.judges:verdicts": IN_A_PROCESS,
    "stages.rewards.answers.judges:math": IN_A_PROCESS,
    "stages.rewards.answers.judges:reasoning_gym": IN_A_PROCESS,
    "stages.rewards.code.verifier:judge": IN_A_PROCESS,
    "stages.rewards.code.verifier:of_rewards": IN_A_PROCESS,
    "stages.rewards.code.verifier:judgements": IN_A_PROCESS,
    "stages.rewards.answers.math_verify:judge": IN_A_PROCESS,
    "stages.rewards.functions:function_parts": IN_A_PROCESS,
    "stages.rewards.gym:score": IN_A_PROCESS,
    "stages.rewards.answers.amounts:based_in": BY_READ_FORM,
    "stages.rewards.answers.amounts:clock_in": BY_READ_FORM,
    "stages.rewards.answers.amounts:quantity_in": BY_READ_FORM,
    "stages.rewards.answers.words:words_in": BY_READ_FORM,
    "stages.rewards.answers.form_reader:outside": BY_READ_FORM,
    "stages.rewards.answers.formula:read_formula": IN_A_PROCESS,
    "stages.contract.config:expanded_path": OURS,
    "stages.rewards.answers.math_pool:MathPool.judge": IN_A_PROCESS,
    "stages.rewards.preference:preferences": "a model of its own; test_preference.py calls it with hostile texts",
    "stages.rewards.code.sandbox:run": "the program's expressions, which are the user's",
    "stages.store.files:append": OURS,
    "flows.pipeline.artifacts:Artifacts.note": OURS,
    "flows.plan.counts:Counts.assume": OURS,
    "flows.pipeline.progress:Progress.note": OURS,
    "flows.pipeline.progress:Lines.note": OURS,
    "flows.pipeline.live_view:Live.note": OURS,
    "stages.store.json_keys:unique_keys": "names and values of a file of settings",
}
"""Functions whose parameters look like sampled text -> why they are not called here."""
