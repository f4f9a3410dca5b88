"""Parts, weights, gates, functions of the user's own, the preference model; answers without verdict in training."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from stages.contract.errors import UserError
from stages.engine.packing.pack import micro_batches
from stages.problems.episode import PARTS, Episode, Group, Problem, Reward
from stages.recipe.resolve import load_recipe
from stages.rewards.answers.verifiers import VERIFIERS, Asked, Verifier, canaries_missed, judge
from stages.rewards.language import language_share
from stages.rewards.repetition import repetition
from stages.rewards.score import Rewards, score
from stages.rewards.settings import PreferenceModel
from stages.rl import prepare as preparing
from stages.rl.metrics import reward_metrics, rewards_of, rollout_metrics
from stages.rl.prepare import _answer_advantages, prepare
from stages.rl.settings import GRPO
from stages.rollout.records import read_groups, write_groups
from tests.conftest import ROOT, group_of
from tests.requirements import require

OWN = "tests.rewards.reward_functions"
RIGHT, WRONG = "<think>4*3=5,f+c=a</think><answer>5</answer>", "<think>4*3=5,f+c=a</think><answer>6</answer>"


def scored(rewards, *texts, metadata=None):
    episodes = [
        Episode(Problem("p:1", "q", "5", "p", metadata), n, "q", [1], [2, 3], [0.0, 0.0], text, "stop")
        for n, text in enumerate(texts)
    ]
    score(rewards, episodes, max_tokens=64, key="")
    return episodes


def test_a_gated_part_counts_only_where_its_gate_is_one():
    rewards = Rewards(verifier="exact", language_target="digits", format=0.0, language=0.5, gates={"language": "accuracy"})
    right, wrong, unformed = scored(rewards, RIGHT, WRONG, RIGHT + "!")
    assert [e.scored.total for e in (right, wrong, unformed)] == [1.25, 0.0, 1.25]
    assert right.scored.parts["language"] == wrong.scored.parts["language"] == 0.5  # measured all the same
    # A gate that is not 1 is shut, however near; so is one that was not measured.
    rewards = rewards.model_copy(update={"gates": {"accuracy": "language"}})
    assert [e.scored.total for e in scored(rewards, RIGHT, "<answer>5</answer>")] == [0.25, 0.0]
    # A gate looks at what was measured, not at what is left of it behind another gate.
    rewards = rewards.model_copy(update={"format": 1.0, "gates": {"accuracy": "language", "format": "accuracy"}})
    assert scored(rewards, RIGHT)[0].scored.total == 1.25


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"gates": {"language": "acuracy"}}, "there is no part `acuracy`"),
        ({"gates": {"brevity": "accuracy"}}, "there is no part `brevity`"),
        ({"gates": {"format": "format"}}, "its own gate"),
        ({"functions": {"format": {"function": "a:b"}}}, "cannot name a reward"),
        ({"functions": {"x": {"function": "a.b"}}}, "should match pattern"),
        ({"preference": 1.0}, "preference and preference_model go together"),
        ({"preference": 1.0, "preference_model": {}}, "exactly one of `stage` and `path`"),
        ({"verifier": "exactly"}, "'exact', 'numeric'"),
    ],
)
def test_mistakes_in_rewards_are_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        Rewards(**fields)


def test_the_fields_of_before_mean_what_they_meant():
    old = {"accuracy": 1.0, "format": 0.2, "language": 0.5, "verifier": "exact", "require_thinking": False}
    assert Rewards(**old, language_target="digits").total({"accuracy": 1.0, "format": 1.0, "language": 0.5}) == 1.45


def test_repetition():
    # 12 words, sequences of 3: 10 in all, 3 different ones
    assert repetition("a b c " * 4, 3) == pytest.approx(3 / 10 - 1)
    assert repetition(" ".join(map(str, range(100))), 3) == 0
    rewards = Rewards(verifier="exact", repetition=2.0, repetition_words=1)
    answer = scored(rewards, "<think>a a</think> <answer>5</answer>")[0].scored
    assert answer.parts["repetition"] == 0  # four words, all of them different with their tags
    looping = scored(rewards, "<think> a a </think> <answer>5</answer>")[0].scored  # 5 words, 4 different
    assert looping.parts["repetition"] == pytest.approx(-0.2)
    assert looping.total == pytest.approx(2.0 - 0.4)


@pytest.mark.parametrize(
    ("text", "language", "by", "share"),
    [
        ("我们先算 so", "chinese", "script", 0.8), ("まず計算", "japanese", "script", 1.0),
        ("まず計算", "chinese", "script", 0.5),
        ("먼저 계산", "korean", "script", 1.0), ("сначала add", "russian", "script", 0.5),
        ("für zwei", "german", "script", 1.0),
        ("We first add the two numbers together.", "english", "sentence", 1.0),
        ("Wir addieren zuerst die beiden Zahlen miteinander.", "english", "sentence", 0.0),
        ("Wir addieren zuerst die beiden Zahlen miteinander.", "german", "sentence", 1.0),
        ("Wir addieren zuerst die beiden Zahlen.\nThen we divide the result by two.", "german", "sentence", 6 / 13),
        ("Primero sumamos los dos números y luego dividimos.", "spanish", "sentence", 1.0),
        ("4*3=12. x+y=5", "english", "sentence", 1.0), ("4*3=12.", "english", "sentence", None),
        ("So 12.", "english", "sentence", 1.0),
    ],
)  # fmt: skip
def test_language(text, language, by, share):
    assert language_share(text, language, by) == (share if share is None else pytest.approx(share))


def test_functions_of_the_users_own():
    rewards = Rewards(
        verifier="exact",
        format=0.0,
        functions={
            "brevity": {"function": f"{OWN}:brevity", "weight": 0.1},
            "told": {"function": f"{OWN}:told", "weight": 0.0},
        },
        gates={"brevity": "accuracy"},
        verify_timeout_s=0.5,
    )
    texts = [f"<think>{word}</think> <answer>{answer}</answer>" for word, answer in [("a", 5), ("a b", 6)]]
    odd = [f"<think>{word}</think> <answer>5</answer>" for word in ("spin", "raise", "nan")]
    found = [e.scored for e in scored(rewards, *texts, "no answer", *odd)]
    assert [f.total for f in found[:3]] == pytest.approx([1.0 - 0.2, 0.0, 0.0])
    assert [f.parts.get("brevity") for f in found] == [-2.0, -3.0, None, None, None, None]
    assert found[0].parts["told"] == 1.0
    # What went wrong leaves no verdict: nobody knows the reward. None of the function is no fault.
    assert [f.verdict for f in found] == ["right", "wrong", "wrong", "none", "none", "none"]
    with pytest.raises(UserError, match="no_such"):
        scored(Rewards(verifier="exact", functions={"x": {"function": f"{OWN}:no_such"}}), RIGHT)


def test_what_was_scored_is_read_back_and_shown(tmp_path):
    rewards = Rewards(verifier="exact", functions={"told": {"function": f"{OWN}:told"}})
    episodes = scored(rewards, RIGHT, WRONG, metadata='{"a": 1}')
    write_groups(tmp_path / "x.parquet", [Group(episodes[0].problem, episodes)])
    assert read_groups(tmp_path / "x.parquet") == [Group(episodes[0].problem, episodes)]
    assert reward_metrics(episodes)["reward/told"] == 1.0


def test_several_answers_are_counted():
    group = group_of(0, [3], [[5, 1]] * 4, [0.0] * 4)
    texts = ["<answer>1</answer>", "<answer>1</answer><answer>2</answer>", r"\boxed{1} \boxed{2}", r"\boxed{1} \boxed{1}"]
    for episode, text in zip(group.episodes, texts, strict=True):
        episode.text = text
    assert rollout_metrics([group])["rollout/several_answers"] == 0.5


def test_the_table_of_verifiers_is_whole():
    assert set(VERIFIERS) == set(Verifier.__args__)
    assert set(PARTS) <= set(Rewards.model_fields)


@pytest.mark.parametrize("verifier", ["exact", "numeric", "math", "reasoning_gym"])
def test_canaries_live(verifier):
    if verifier == "reasoning_gym":
        require("reasoning-gym")
    assert canaries_missed(Rewards(verifier=verifier, verify_timeout_s=20.0)) == []
    assert {verdict for _, verdict in VERIFIERS[verifier].canaries} >= {"right", "wrong"}


def test_a_verifier_that_fails_misses_its_canaries(monkeypatch):
    monkeypatch.setattr("stages.rewards.answers.judges.exact", lambda asked, rewards: ["wrong"] * len(asked))
    assert canaries_missed(Rewards(verifier="exact")) == ["` 5 ` for `5` is wrong, not right"]


def test_reasoning_gyms_own_scorer():
    require("reasoning-gym")
    import reasoning_gym as gym

    rewards = Rewards(verifier="reasoning_gym", verify_timeout_s=20.0)
    for task in ("countdown", "chain_sum", "basic_arithmetic"):
        item = gym.create_dataset(task, size=1, seed=3)[0]
        problem = Problem("g:1", item["question"], item["answer"], "gym", json.dumps(item["metadata"]))
        asked = [Asked(problem, item["answer"]), Asked(problem, "nothing like it"), Asked(Problem("g:2", "q", "5", "gym"), "5")]
        assert judge(asked, rewards) == ["right", "wrong", "none"], task
    # Countdown has many right answers; the stored one is only one of them.
    problem = Problem("g:3", "q", "2*3", "gym", json.dumps({"source_dataset": "countdown", "numbers": [2, 3], "target": 6}))
    assert judge([Asked(problem, "3*2"), Asked(problem, "3+2"), Asked(problem, "6")], rewards) == ["right", "wrong", "wrong"]


# --- the preference model ---


@pytest.fixture(scope="module")
def preference_folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("preference")
    words = {word: n for n, word in enumerate(["<pad>", "<unk>", "q", "a", "b", "c", "d"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), num_labels=1, pad_token_id=0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_preference_is_the_models_logit_whatever_the_batch(preference_folder, batch):
    from transformers import LlamaForSequenceClassification

    model = PreferenceModel(path=str(preference_folder), batch=batch, device="cpu")
    rewards = Rewards(accuracy=0.0, format=0.0, preference=2.0, preference_model=model, verifier="exact")
    summaries = ["a", "b c d", "c", "a a a a b", "d c"]
    found = scored(rewards, *[f"<think>b</think> {text}" for text in summaries])
    alone = LlamaForSequenceClassification.from_pretrained(preference_folder).eval()
    ids = {"q": 2, "a": 3, "b": 4, "c": 5, "d": 6}
    with torch.inference_mode():
        logits = [float(alone(torch.tensor([[2, *(ids[w] for w in text.split())]])).logits) for text in summaries]
    assert len({round(x, 3) for x in logits}) == 5
    assert [e.scored.parts["preference"] for e in found] == pytest.approx(logits, abs=1e-5)
    assert [e.scored.total for e in found] == pytest.approx([2 * x for x in logits], abs=1e-5)


def test_an_answer_cut_at_the_limit_is_liked_no_better_than_any_of_its_group(preference_folder, monkeypatch):
    """Also where the model says numbers below 0 of all, and nothing would be better."""
    model = PreferenceModel(path=str(preference_folder), device="cpu")
    rewards = Rewards(accuracy=0.0, format=0.0, preference=2.0, preference_model=model, verifier="exact")
    said = {"a": -3.0, "b": -1.0, "c": 5.0, "d": 4.0}
    monkeypatch.setattr(
        "stages.rewards.preference.preferences", lambda _, episodes: [said[e.text.rpartition(" ")[2]] for e in episodes]
    )
    asked = [("1", "a"), ("1", "cut"), ("1", "b"), ("2", "c"), ("2", "cut"), ("2", "d"), ("3", "cut")]
    episodes = [
        Episode(
            Problem(of, "q", "5", ""),
            n,
            "q",
            [1],
            [2],
            [0.0],
            f"<think>b</think> {text}",
            "length" if text == "cut" else "stop",
        )
        for n, (of, text) in enumerate(asked)
    ]
    score(rewards, episodes, max_tokens=8, key="k")
    assert [e.scored.parts["preference"] for e in episodes] == [-3.0, -3.0, -1.0, 5.0, 4.0, 4.0, 0.0]
    assert [e.scored.total for e in episodes] == [-6.0, -6.0, -2.0, 10.0, 8.0, 8.0, 0.0]


def test_a_gate_never_makes_a_wrong_answer_worth_more_than_a_right_one():
    """Whatever sign the reward model's numbers have: right and liked as well is never less than wrong."""
    model = PreferenceModel(path="somewhere")
    rewards = Rewards(format=0.0, preference=0.5, preference_model=model, gates={"preference": "accuracy"})
    total = {
        (right, liked): rewards.total({"accuracy": float(right), "preference": liked})
        for right in (True, False)
        for liked in (-4.0, 6.0)
    }
    assert total == {(True, -4.0): -1.0, (False, -4.0): -2.0, (True, 6.0): 4.0, (False, 6.0): 0.0}
    assert rewards.total({"preference": 6.0}) == 3.0, "unjudged: nothing to wait for"


def test_a_folder_without_a_preference_model_is_told(tmp_path):
    from tests.conftest import tiny_llama

    for name in ("empty", "causal"):
        (tmp_path / name).mkdir()
    tiny_llama().float().save_pretrained(tmp_path / "causal")
    for name, says in (("empty", r"no config\.json"), ("causal", "preference model")):
        model = {"path": str(tmp_path / name), "device": "cpu"}
        with pytest.raises(UserError, match=says):
            scored(Rewards(preference=1.0, preference_model=model, verifier="exact"), RIGHT)


def test_the_preference_model_of_a_stage_is_an_input_of_the_stage():
    from stages.contract.config import stage_inputs

    changes = "stages.reasoning.rewards={preference: 1.0, preference_model: {stage: base}}"
    config = load_recipe(ROOT / "configs/quickstart.yaml", [changes]).stages["reasoning"]
    role = "rewards.preference_model.stage"
    assert stage_inputs(config)[role] == ("base", "model")
    located = config.rewards.located({role: Path("/x/model")})
    assert (located.preference_model.path, located.preference_model.stage) == ("/x/model", None)


# --- answers without verdict in training ---


def trio(verdicts, rewards=(1.0, 0.0, 1.0, 0.0)):
    return group_of(0, [3], [[5, 1], [6, 1], [7, 1], [8, 1]], list(rewards), verdicts=verdicts)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo", "reinforce++-baseline", "gspo", "dapo", "cispo"])
def test_an_answer_without_verdict_has_no_advantage_and_no_part_in_its_groups_statistics(algorithm):
    settings = GRPO(algorithm=algorithm)

    def advantages(*groups):
        answers = [preparing.Answer(e) for group in groups for e in group.episodes]
        _answer_advantages(answers, groups, settings)
        return [float(a.advantages[0]) for a in answers]

    other = group_of(1, [4], [[5, 1], [6, 1], [7, 1], [8, 1]], [0.0, 1.0, 1.0, 1.0])
    seen = [advantages(trio(["right", "wrong", "right", "none"], [1.0, 0.0, 1.0, junk]), other) for junk in (0.0, 1.0, -50.0)]
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][3] == 0.0
    mean = 2 / 3
    centred = [1 - mean, -mean, 1 - mean]
    ratio = [a / b for a, b in zip(seen[0][:3], centred, strict=True)]
    assert ratio == pytest.approx([ratio[0]] * 3)  # centred on the three alone
    assert ratio[0] > 0
    # As a wrong one it would have had an advantage.
    assert advantages(trio(["right", "wrong", "right", "wrong"]), other)[3] < 0


def test_answers_without_verdict_are_in_no_minibatch():
    groups = [trio(["right", "wrong", "right", "none"]), trio(["none"] * 4, [0.0, 1.0, 0.0, 1.0])]

    class Whole:
        rank, world_size = 0, 1

        def equalise(self, micro, filler):
            return micro

        def micro_batches(self, texts, tokens):
            return micro_batches(texts, tokens, self.rank, self.world_size)

    settings = GRPO(kl=0.0)
    prepared = prepare(groups, settings, Whole(), seed=0, step=0, temperature=1.0, max_tokens=8)
    batches = list(prepared.minibatches)
    assert [a.episode.sample for batch in batches for a in batch.answers] == [0, 1, 2]
    assert all(a.episode.problem is groups[0].problem for batch in batches for a in batch.answers)
    # Nor do they take weight from the others: three answers of two tokens each.
    assert [weight for batch in batches for weight in batch.weights] == pytest.approx([1 / 6] * 3)
    assert [bool(v) for v in rewards_of(groups)[1][1]] == [False] * 4
    assert rollout_metrics(groups)["rollout/zero_variance"] == 0.5  # nothing to be learned from a group without verdicts


def test_no_verdict_is_measured_apart():
    group = trio(["right", "wrong", "none", "none"])
    for episode in group.episodes:
        episode.reward = Reward(0.0, {"accuracy": 0.0}, episode.scored.verdict)
    found = rollout_metrics([group])
    assert found["rollout/no_verdict"] == 0.5
    assert found["rollout/length_wrong"] == 2
