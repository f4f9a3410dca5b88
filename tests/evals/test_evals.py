"""lm-eval over a rollout that answers from a table: numbers worked out by hand, chunks resumed."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance

from stages.contract.config import stage_inputs
from stages.contract.errors import Interrupted, UserError
from stages.evals.likelihood import continuation_scores
from stages.evals.lm import Hooks, RolloutLM, sampling_of
from stages.evals.settings import EvaluationConfig
from stages.evals.task import run_lm_eval
from stages.kinds.evaluate import EvaluateConfig, expand
from stages.kinds.evaluate_model import KIND as EVALUATE_MODEL
from stages.kinds.evaluate_model import EvaluateModelConfig
from stages.kinds.summary import KIND as SUMMARY
from stages.kinds.summary import SummaryConfig
from stages.problems.episode import Problem
from stages.rewards.score import Rewards, score
from stages.rollout.protocol import Completion, Sampling
from stages.rollout.sampled_check import SampledCheck
from stages.store.files import read_json
from stages.store.folders import StageFolder
from stages.store.stage import StageContext, StopRequest
from stages.tracking import journal
from tests.small_models import small_model

PROBLEMS = {name: Problem(id=name, question=f"{name}=? ", answer=a, source="t") for name, a in
            (("p0", "5"), ("p1", "3"), ("p2", "1"))}  # fmt: skip
ANSWERS = {
    ("p0", 0): "<think>1</think><answer>5</answer>",
    ("p0", 1): "<think>12</think><answer>5</answer>",
    ("p1", 0): "<think>1</think><answer>3</answer>",
    ("p1", 1): "<answer>4</answer>",  # wrong, and no thinking
    ("p2", 0): "<think>a</think><answer>0</answer>",  # wrong, thinks in letters
    ("p2", 1): "<think>1",  # cut at the limit
}
"""Two samples of each problem: means 1, 1/2, 0."""
CUT = "<think>1"
"""This answer reached the limit."""
EXPECTED = {
    "accuracy": 0.5,
    "accuracy_stderr": (0.5**2 / 3) ** 0.5,  # sample deviation of 1, .5, 0 is .5
    "accuracy_lenient": 2 / 3,  # 1, 1/2, 1/2: the last number of the answer that was cut is right
    "cons_at_k": 0.5,  # 1, a tie, 0
    "pass_at_2": 2 / 3,
    "format": (1 + 0.5 + 0.5) / 3,
    "truncated": 1 / 6,
    "no_verdict": 0.0,
    "mean_length": (34 + 35 + 34 + 18 + 34 + 8) / 6,  # a token per character
    "mean_length_right": (34 + 35 + 34) / 3,
    "mean_length_wrong": (18 + 34 + 8) / 3,
    "language": 3 / 4,  # of the four answers that think and end, three in digits
    "problems": 3.0,
    "samples": 2.0,
}
CONFIG = EvaluationConfig(
    kind="x",
    held_out={"source": "toy", "count": 3},
    template={"name": "question"},
    rewards=Rewards(verifier="exact", language_target="digits"),
    chunk=2,
)


class Table:
    """A rollout that looks its answers up; token ids are character codes."""

    def __init__(self, answers=ANSWERS):
        self.answers, self.asked, self.prompts = answers, [], []

    def encode(self, prompt):
        self.prompts.append(prompt)
        return tuple(map(ord, prompt))

    def sample(self, requests, sampling, *, seed, purpose, step, done=None):
        names = [request.key.removesuffix("=? ") for request in requests]  # a request's key is its question
        self.asked.append((names, sampling))
        found = []
        for name, request in zip(names, requests, strict=True):
            keys = [(name, request.first_sample + i) for i in range(request.samples)]
            found.append([
                Completion(ids=list(map(ord, t := self.answers.get(key, "The answer\nis 7"))), text=t,
                           logprobs=[-0.5] * len(t), finish="length" if t == CUT else "stop")
                for key in keys
            ])  # fmt: skip
        return found


def language_model(rollout, folder, **hooks):
    def judge(groups):
        score(CONFIG.rewards, [e for g in groups for e in g.episodes], max_tokens=64, key="")

    return RolloutLM(rollout, folder, seed=0, problems=PROBLEMS, chunk=2, hooks=Hooks(score=judge, **hooks))


def test_the_numbers_of_a_real_lm_eval_run(tmp_path):
    rollout, chunks = Table(), []
    lm = language_model(rollout, tmp_path, chunk_done=lambda done, total: chunks.append((done, total)))
    found = run_lm_eval(CONFIG, lm)
    assert found.metrics == pytest.approx(EXPECTED, abs=1e-12)
    assert {name: row["accuracy"] for name, row in found.problems.items()} == {"p0": 1.0, "p1": 0.5, "p2": 0.0}
    assert rollout.asked == [(["p0", "p1"], CONFIG.sampling), (["p2"], CONFIG.sampling)]
    assert rollout.prompts == ["p0=? ", "p1=? ", "p2=? "]  # as the template gives them, blanks at the end too
    assert chunks == [(1, 2), (2, 2)]
    assert [e.sample for e in lm.groups["p1"].episodes] == [0, 1]


def test_repeated_requests_get_numbered_samples_in_order(tmp_path):
    """lm-eval repeats a request by listing the same object."""
    settings = {"until": [], "do_sample": True}
    first, second = (
        Instance("generate_until", {"problem_id": name}, (f"{name}=? ", settings), 0, ("sampled", i, 2))
        for i, name in enumerate(("p0", "p1"))
    )
    texts = language_model(Table(), tmp_path).generate_until([first, first, second, second])
    assert texts == [ANSWERS[key] for key in (("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1))]


def test_finished_chunks_are_not_sampled_again(tmp_path):
    looks = []

    def stop_at_second_look():
        looks.append(1)
        if len(looks) == 2:
            raise Interrupted

    first = Table()
    with pytest.raises(Interrupted):
        run_lm_eval(CONFIG, language_model(first, tmp_path, check_stop=stop_at_second_look))
    assert [keys for keys, _ in first.asked] == [["p0", "p1"]]
    before = (tmp_path / "chunk-00000.parquet").read_bytes()

    second = Table()
    found = run_lm_eval(CONFIG, language_model(second, tmp_path))
    assert [keys for keys, _ in second.asked] == [["p2"]]
    assert found.metrics == pytest.approx(EXPECTED, abs=1e-12)
    assert (tmp_path / "chunk-00000.parquet").read_bytes() == before


def test_a_task_of_lm_eval_runs_through_the_same_engine(tmp_path):
    rows = [{"q": "one", "a": "The answer"}, {"q": "two", "a": "Nothing"}]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    task = f"""
        task: mine
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path}/data.json}}}}
        test_split: test
        output_type: generate_until
        doc_to_text: "Q: {{{{q}}}}"
        doc_to_target: a
        generation_kwargs: {{until: ["\\n"], max_gen_toks: 9, do_sample: false}}
        metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
    """
    (tmp_path / "mine.yaml").write_text(task)
    rollout = Table()
    config = CONFIG.model_copy(update={"task_files": (str(tmp_path / "mine.yaml"),)})
    found = run_lm_eval(config, language_model(rollout, tmp_path / "rollouts"))
    assert found.metrics["mine/exact_match"] == 0.5  # cut before the line's end: one of two
    assert found.metrics["accuracy"] == 0.5
    assert rollout.asked[-1] == (["Q: one", "Q: two"], Sampling(temperature=0, max_tokens=9, stop=("\n",)))
    assert rollout.prompts[-2:] == ["Q: one", "Q: two"]


def test_a_task_that_cannot_be_loaded_is_a_mistake(tmp_path):
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere.json}\n")
    config = CONFIG.model_copy(update={"task_files": (str(tmp_path / "bad.yaml"),)})
    with pytest.raises(UserError, match="task_files: an lm-eval task cannot be loaded"):
        run_lm_eval(config, language_model(Table(), tmp_path))


def test_settings_of_tasks():
    assert sampling_of({"until": ["\n", ""], "temperature": 0.6, "do_sample": False}).temperature == 0.0
    wanted = Sampling(temperature=0.6, top_p=0.9, max_tokens=7, stop=("x",))
    assert sampling_of({"until": "x", "temperature": 0.6, "do_sample": True, "top_p": 0.9, "max_gen_toks": 7}) == wanted


def test_likelihoods_equal_those_of_single_rows():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=8))
    pairs = [([1, 2, 3], [4, 5]), ([1], [2, 3, 4, 5]), ([6, 7], []), ([1, 2, 3, 4, 5, 6, 7, 8], [9, 10])]
    scores = continuation_scores(model, pairs)
    for (context, continuation), (total, greedy) in zip(pairs, scores, strict=True):
        row = (context + continuation)[-9:]  # eight positions, and the last token is only predicted
        logp = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
        targets = range(len(row) - len(continuation), len(row))
        assert total == pytest.approx(sum(logp[i - 1, row[i]].item() for i in targets), abs=1e-5)
        assert greedy == all(logp[i - 1].argmax().item() == row[i] for i in targets)


def test_likelihoods_of_a_model_without_a_limit_of_positions():
    model = small_model("mamba")
    del model.config.max_position_embeddings
    ((total, _),) = continuation_scores(model, [([5, 6, 7], [8, 9])])
    logp = model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    assert total == pytest.approx(float(logp[2, 8] + logp[3, 9]), abs=1e-5)


def test_engines_without_a_model_say_so(tmp_path):
    with pytest.raises(UserError, match="gives no likelihoods"):
        language_model(Table(), tmp_path).loglikelihood_rolling([None])


def stage(tmp_path, monkeypatch, name, answers, stop=None, chunk=2):
    monkeypatch.setattr("stages.rollout.torch_engine.load_rollout", lambda folder, device, tokens: Table(answers))
    monkeypatch.setattr("stages.rollout.sampled_check.check_rollout", lambda *_: SampledCheck(0.0, 1e-4))
    (tmp_path / "p.jsonl").write_text("".join(f'{{"question": "q{i}", "answer": "{a}"}}\n' for i, a in enumerate("531")))
    source = {"source": "file", "path": str(tmp_path / "p.jsonl")}
    settings = {**CONFIG.model_dump(), "kind": "evaluate_model", "model": "base", "held_out": source, "chunk": chunk}
    folder = StageFolder(tmp_path / name)
    folder.path.mkdir(exist_ok=True)
    config = EvaluateModelConfig.model_validate(settings)
    context = StageContext(config, folder, {"model": tmp_path}, {"model": "d"}, stop or StopRequest())
    return EVALUATE_MODEL.run(context), folder


class StopAtSecondLook(StopRequest):
    looks = 0

    def check(self):
        self.looks += 1
        if self.looks == 2:
            raise Interrupted


def renamed_answers():
    """The table under the questions that `stage` writes into its file."""
    names = ["q0", "q1", "q2"]
    return {(names[int(name[1])], sample): text for (name, sample), text in ANSWERS.items()}, names


def test_stages_from_models_to_summary(tmp_path, monkeypatch):
    answers, ids = renamed_answers()
    with pytest.raises(Interrupted):
        stage(tmp_path, monkeypatch, "a", answers, StopAtSecondLook())
    result, first = stage(tmp_path, monkeypatch, "a", answers)
    checked = {"check/sampled_logprob_difference": 0.0, "check/sampled_tolerance": 1e-4}
    assert result.metrics == pytest.approx(EXPECTED | checked, abs=1e-12)
    assert result.tokens == 34 + 35 + 34 + 18 + 34 + 8
    lines = journal.read(first.journal)
    assert [(line.step, line.of) for line in lines] == [(1, 2), (2, 2)]
    assert [line.metrics["eval/accuracy"] for line in lines] == [0.75, 0.5]

    # Another attempt samples nothing and says nothing twice; with chunks of another size it starts over.
    _, first = stage(tmp_path, monkeypatch, "a", answers)
    assert journal.read(first.journal) == lines
    _, first = stage(tmp_path, monkeypatch, "a", answers, chunk=1)
    assert [(line.step, line.of) for line in journal.read(first.journal)] == [(1, 3), (2, 3), (3, 3)]

    better = {**answers, (ids[2], 0): "<think>1</think><answer>1</answer>"}
    _, second = stage(tmp_path, monkeypatch, "b", better)
    config = SummaryConfig(kind="summary", reports={"base": "e.base", "zero": "e.zero"})
    inputs = {"reports.base": first.output("report"), "reports.zero": second.output("report")}
    folder = StageFolder(tmp_path / "s")
    folder.path.mkdir()
    done = SUMMARY.run(StageContext(config, folder, inputs, {}, StopRequest()))
    summary = read_json(folder.output("report") / "summary.json")
    assert summary["models"]["base"] == pytest.approx(EXPECTED, abs=1e-12)
    assert summary["models"]["zero"]["accuracy"] == pytest.approx(4 / 6)
    # Differences 0, 0, 1/2: mean 1/6, sample deviation sqrt(1/12), error sqrt(1/36).
    pair = summary["paired"]["zero - base"]
    assert (pair["difference"], pair["stderr"], pair["problems"]) == (pytest.approx(1 / 6), pytest.approx(1 / 6), 3)
    assert done.metrics["zero/accuracy"] == pytest.approx(4 / 6)
    text = (folder.output("report") / "summary.md").read_text()
    assert "| base | 50.0 % ± 28.9 | 66.7 % | 50.0 % | 27.2 | 66.7 % | 75.0 % | 16.7 % |" in text
    assert "| zero - base | +16.7 ± 16.7 | +16.7 ± 16.7 |" in text


def test_an_evaluation_becomes_a_stage_per_model_and_a_summary():
    settings = {"kind": "evaluate", "models": ["base", "zero"], "held_out": {"source": "toy", "count": 3}, "seed": 4}
    config = EvaluateConfig.model_validate(settings)
    stages = expand("evaluation", config)
    assert list(stages) == ["evaluation.base", "evaluation.zero", "evaluation"]
    assert stage_inputs(stages["evaluation.zero"]) == {"model": ("zero", "model")}
    assert stage_inputs(config) == {"models.0": ("base", "model"), "models.1": ("zero", "model")}
    assert stage_inputs(stages["evaluation"]) == {
        "reports.base": ("evaluation.base", "report"),
        "reports.zero": ("evaluation.zero", "report"),
    }
    assert (stages["evaluation.zero"].seed, stages["evaluation.zero"].held_out.count) == (4, 3)
    with pytest.raises(ValueError, match="`base` is named twice"):
        EvaluateConfig.model_validate({**settings, "models": ["base", "base"]})
