"""What an evaluation asks is found among the training problems, however it is disguised; what is only like it is kept."""

import json
import random
import re

import pytest

from stages.contract.config import external_paths, semantic
from stages.contract.errors import UserError
from stages.evals.contamination import decontaminated, lm_eval_questions
from stages.kinds.rl import RLConfig
from stages.problems.decontamination import Decontamination, without_leaks
from stages.problems.episode import Problem
from stages.problems.ngrams import Questions, tokens, words
from stages.problems.sources import FileSource, load_problems
from stages.recipe.resolve import load_recipe, resolve
from tests.conftest import ROOT
from tests.problems.test_problems import DATA, jsonl
from tests.requirements import needs

NAMES, ITEMS = ["Tom", "Ann", "Raj", "Mei", "Eva"], ["pens", "well-used caps", "figs", "kites", "bolts", "small drums"]


def without_punctuation(text):
    return re.sub(r"[.,](?!\d)|[;:?\"]", "", text).replace("'", "’")  # a decimal point is part of its number


DISGUISES = {
    "verbatim": lambda text: text,
    "case": str.upper,
    "punctuation": lambda text: without_punctuation(text) + " ...?!",
    "white space": lambda text: "\n " + text.replace(" ", " \n\t "),
    "embedded": lambda text: f"Here is one from last week's exam:\n{text}\nExplain every step. Then answer in one line.",
}


def story(rng, a, b, c, d):
    name, friend, item = rng.choice(NAMES), rng.choice(NAMES), rng.choice(ITEMS)
    asked = f"{name} has {a} {item} and buys {b} more at the old market's stand for ${c} each."
    return asked + f" After giving {d} of them to {friend}, how many {item} remain with {name}?"


def asked_by_evaluations():
    """100 questions: 60 of more than 13 words, 20 of 12, 20 of few words and signs."""
    rng = random.Random(0)
    numbers = iter(rng.sample(range(10, 2000), 400))
    long = [story(rng, *(next(numbers) for _ in range(4))) for _ in range(60)]
    middle = [
        f"What is the remainder when {next(numbers)} times {next(numbers)} is divided by {next(numbers)}?" for _ in range(20)
    ]
    short = [f"Compute {next(numbers)} + {next(numbers)} * {next(numbers)}." for _ in range(20)]
    return long + middle + short


def problems_of(questions):
    return [Problem(f"train:{number}", question, "1", "train") for number, question in enumerate(questions)]


def test_a_hundred_planted_leaks_are_found_and_located():
    asked = asked_by_evaluations()
    assert len(set(asked)) == 100
    kinds = list(DISGUISES.values())
    planted = [kinds[number % 5](question) for number, question in enumerate(asked)]
    rng = random.Random(1)
    honest = [story(rng, *rng.sample(range(3000, 9000), 4)) for _ in range(900)]  # other numbers throughout
    mixed = problems_of([*honest[:450], *planted, *honest[450:]])
    cleaned = without_leaks(mixed, [(f"evaluation: e:{number}", text) for number, text in enumerate(asked)], 13)
    assert [(leak.problem, leak.found_in) for leak in cleaned.leaks] == [
        (f"train:{450 + n}", f"evaluation: e:{n}") for n in range(100)
    ]
    assert [problem.question for problem in cleaned.problems] == honest
    assert cleaned.remarks("problems") == [
        "problems: 100 left out, because an evaluation asks them (100 × evaluation: e; the first: train:450 is evaluation: e:0)"
    ]
    assert cleaned.report()["n"] == 13 and len(cleaned.report()["left_out"]) == 100


@needs("problem sets")
def test_every_disguise_of_real_questions_is_found_among_real_ones():
    forms = {
        "gsm8k_test": "gsm8k",
        "math500_test": "math",
        "aime24_test": "aime",
        "amc23_test": "amc",
        "mawps_singleop": "mawps",
    }
    sources = {
        name: load_problems(FileSource(path=str(DATA / f"{name}.jsonl"), format=form), "p") for name, form in forms.items()
    }
    asked = [problem for problems in sources.values() for problem in random.Random(0).sample(problems, min(150, len(problems)))]
    train = load_problems(FileSource(path=str(DATA / "gsm8k_train.jsonl"), format="gsm8k", limit=1500), "p")
    assert len(asked) == 150 * 3 + 40 + 30
    kinds = list(DISGUISES.values())
    planted = [Problem(f"leak:{n}", kinds[n % 5](p.question), "1", "leak") for n, p in enumerate(asked)]
    cleaned = without_leaks(train + planted, [(p.id, p.question) for p in asked], 13)
    found = {leak.problem: leak.found_in for leak in cleaned.leaks}
    assert found.keys() == {problem.id for problem in planted}  # all of them, and nothing that is honest
    assert (
        sum(found[f"leak:{n}"] == problem.id for n, problem in enumerate(asked)) >= len(asked) - 2
    )  # MAWPS is nearly doubled in places


NEIGHBOURS = [
    ("What is 3 + 5?", "What is 3 - 5?"),
    ("What is 3 + 5?", "What is 3 + 51?"),
    ("What is 3 + 5?", "What is 3 + 5 * 2?"),
    ("What is 3 + 5?", "Tom knows what is 3 + 5 and asks for twice that."),
    ("Compute 5!", "Compute 5."),
    ("Evaluate (2 + 3) * 4.", "Evaluate 2 + (3 * 4)."),
    ("Add 1 and 23.", "Add 12 and 3."),
    ("Simplify $x^2$.", "Simplify $x^{-2}$."),
    ("What is the remainder when 12 times 7 is divided by 5?", "What is the remainder when 12 times 7 is divided by 9?"),
    ("Evaluate 3x + 5 when x is equal to 2.", "Evaluate 3x - 5 when x is equal to 2."),
    ("What is the value of 2 + 3 + 4?", "What is the value of 2 + 3 + 4 + 5?"),
    ("What is the value of 2 + 3 + 4?", "What is the value of 12 + 3 + 4?"),
    ("What is the value of 2 + 3 + 4?", "What is the value of 2 + 3 + 42?"),
    ("Tom has 3 pens and buys 4 more of them, then loses 2 in the park. How many has he?",
     "Tom has 9 pens and buys 8 more of them, then loses 5 in the park. How many has he?"),
    ("", "What is 3 + 5?"),
    ("?!", "?!!"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "honest"), NEIGHBOURS)
def test_what_is_only_like_a_question_is_kept(asked, honest):
    questions = Questions(13)
    questions.add("e:1", asked)
    assert questions.find([honest]) == [None]


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not():
    common = "one two three four five six seven eight nine ten eleven twelve"
    questions = Questions(13)
    questions.add("e:1", f"{common} thirteen and what is asked of it in the end?")
    (found,) = questions.find([f"Quite another beginning: {common} thirteen, and quite another end"])
    assert found is not None and (found.name, found.words) == ("e:1", f"{common} thirteen")
    assert questions.find([f"Quite another beginning: {common} and quite another end"]) == [None]
    fewer = Questions(10)
    fewer.add("e:1", f"{common} thirteen and what is asked of it in the end?")
    assert fewer.find([f"Quite another beginning: {common} and quite another end"])[0] is not None


PHRASE = "can be written as m over n where m and n are relatively prime positive integers"


def test_a_phrase_of_several_questions_or_of_many_texts_is_no_leak():
    honest = [f"The chance of drawing {n} red balls {PHRASE}. Find m + {n}." for n in range(12)]
    questions = Questions(13)
    questions.add("e:1", f"The share of blue squares {PHRASE}. Find m.")
    assert all(questions.find(honest[:10]))  # ten may be copies
    assert questions.find(honest) == [None] * 12  # twelve share a phrase
    whole = f"Exercise. The share of blue squares {PHRASE}. Find m."
    assert [found is not None for found in questions.find([*honest, whole, whole.upper()])] == [False] * 12 + [True] * 2
    questions.add("e:2", f"The area of the kite {PHRASE}. Find m as well.")
    assert questions.find(honest[:10]) == [None] * 10
    assert questions.find([whole])[0].name == "e:1"  # whole questions are found all the same


LONG = "A farmer with 12 cows and 31 hens sells 4 cows on Monday, then buys 9 hens from a neighbour: how many animals are his?"
PART = f"Warm up. {' '.join(LONG.split()[2:17])} has he for his land? Say why."


def test_one_question_that_is_there_in_several_texts_is_no_phrase():
    wrapped = f"Read the task and think before you answer.\nQuestion: {LONG}\nAnswer:"
    for texts in (
        [("t: 1", LONG), ("t: 1", wrapped)],
        [("t: 1", wrapped), ("t: 1", LONG)],
        [("t: 1", wrapped), ("t: 1", f"{LONG} Give a number.")],  # of one document, and neither contains the other
        [("evaluation: e:1", LONG), ("t: 8", LONG), ("t: 8", wrapped), ("held_out: h:3", LONG.upper())],
        [("t: 1", wrapped), ("u: 1", f"Q: {LONG} A:"), ("held_out: h:3", LONG)],
    ):
        questions = Questions(13)
        for name, text in texts:
            questions.add(name, text)
        (found,) = questions.find([PART])
        assert found is not None and found.name in {name for name, _ in texts}
        assert questions.find(["Again, with hens alone: " + LONG[:40]]) == [None]


def test_what_the_prompts_of_a_task_share_is_no_leak():
    rule = "Think about it step by step and then give the answer as one number on the last line of your reply."
    asked = [(f"t: {n}", text) for n in range(12) for text in (f"What is {n} + {n + 1}?", f"{rule} What is {n} + {n + 1}?")]
    questions = Questions(13)
    for name, text in asked:
        questions.add(name, text)
    assert questions.find([f"{rule} Where is Rome?"]) == [None]
    for n in range(12):  # in tasks whose instructions are a field of every document
        questions.add(f"u: {n}", rule)
    assert questions.find([f"{rule[:-12]} sheet. Where is Rome?"]) == [None]


def test_a_part_that_one_prompt_of_many_answers_has_is_found():
    questions = Questions(13)
    questions.add("e:1", LONG)
    assert all(questions.find([PART] * 16))


def test_words_and_signs():
    assert " ".join(words("Émile's  naïve 9-kilometer walk: $1,000 or 2.5?!")) == "émiles naïve 9 kilometer walk 1000 or 2 5"
    assert words("Ｗｈａｔ ½ x²") == ["what", "1", "2", "x2"]
    assert words("计算 3+5") == ["计", "算", "3", "5"]
    text = "Is 5! = 120 (in full)? Wow! A well-known 3.5% of x-1, – 4 × 2"
    assert " ".join(tokens(text)) == "is 5 ! = 120 in full wow a well known 3.5 % of x - 1 - 4 * 2"


def test_a_recipe_tells_its_evaluations(tmp_path):
    test = jsonl(tmp_path / "test.jsonl", *({"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(9)))
    more = [f"stages.evaluation.held_out={{source: file, path: {test}}}"]
    plain = load_recipe(ROOT / "configs/quickstart.yaml", more)
    recipe = load_recipe(ROOT / "configs/quickstart.yaml", [*more, "shared.decontaminate={n: 8}"])
    zero, data = recipe.stages["zero"], recipe.stages["cold_start_data"]
    assert zero.decontaminate == data.decontaminate
    assert zero.decontaminate == Decontamination(n=8, against=(FileSource(path=str(test)),), tasks=(), task_files=())
    assert external_paths(zero) == {"decontaminate.against.0.path": str(test)}
    assert resolve(recipe.document).stages == recipe.stages
    assert recipe.stages["evaluation"] == plain.stages["evaluation"]
    # Off by default, and then no part of the fingerprint.
    assert plain.stages["zero"].decontaminate is None and "decontaminate" not in semantic(plain.stages["zero"])
    assert semantic(zero) != semantic(plain.stages["zero"])
    mine = load_recipe(ROOT / "configs/quickstart.yaml", [*more, "stages.zero.decontaminate={against: []}"]).stages["zero"]
    assert mine.decontaminate.against == ()


def test_a_recipe_tells_the_users_own_documents_too(tmp_path):
    own = jsonl(tmp_path / "own.jsonl", {"prompt": "x", "completion": "y"})
    more = [f"stages.own={{kind: dataset, path: {own}}}", "shared.decontaminate={}"]
    recipe = load_recipe(ROOT / "configs/quickstart.yaml", more)
    assert recipe.stages["own"].decontaminate == recipe.stages["zero"].decontaminate
    assert recipe.stages["own"].decontaminate.against


def config(tmp_path, **settings):
    toy = {"source": "toy", "count": 3}
    given = {
        "kind": "rl",
        "policy": "base",
        "problems": toy,
        "held_out": {**toy, "split": "held_out"},
        "decontaminate": settings,
    }
    return RLConfig.model_validate(given)


def test_against_sources_held_out_and_lm_eval_tasks(tmp_path):
    rows = [{"question": "What is 1 + 1?", "answer": "2"}, {"question": "How many legs have two dogs?", "answer": "8"}]
    data = jsonl(tmp_path / "data.jsonl", *rows)
    task = tmp_path / "task.yaml"
    task.write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        'output_type: generate_until\ndoc_to_text: "Question: {{question}} Answer:"\ndoc_to_target: answer\n'
    )
    told = list(lm_eval_questions((), (str(task),)))
    assert told[:2] == [("mine: 1", "What is 1 + 1?"), ("mine: 1", "Question: What is 1 + 1? Answer:")]
    test = jsonl(tmp_path / "test.jsonl", "{", {"question": "What is 2 + 2?", "answer": "4"})
    train = problems_of(
        ["what is 1+1", "What is 2 + 2", "Say: how many legs have two dogs?", "What is 3 + 3?", "What is 4 + 4?"]
    )
    settings = config(tmp_path, against=[{"source": "file", "path": str(test)}], task_files=[str(task)])
    cleaned = decontaminated(settings, train, [Problem("h:7", "What is 3+3", "6", "h")])
    assert [(leak.problem, leak.found_in) for leak in cleaned.leaks] == [
        ("train:0", "mine: 1"),
        ("train:1", "evaluation: test:2"),
        ("train:2", "mine: 2"),
        ("train:3", "held_out: h:7"),
    ]
    assert [problem.question for problem in cleaned.problems] == ["What is 4 + 4?"]
    with pytest.raises(UserError, match=r"evaluations ask every problem \(train:1 is evaluation: test:2"):
        decontaminated(settings, train[1:2])


def test_a_part_of_a_tasks_question_is_found_and_located(tmp_path):
    rows = [{"question": f"{name}: {LONG[2:]}".replace("12", f"{n}2"), "answer": "48"} for n, name in enumerate(NAMES, 1)]
    rows.append(
        {"question": "What is left of a cake of 8 parts when Ann, Tom and Raj eat 2 of them each at noon?", "answer": "2"}
    )
    data = jsonl(tmp_path / "data.jsonl", *rows)
    task = tmp_path / "task.yaml"
    task.write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        'output_type: generate_until\ndoc_to_text: "Q: {{question}} A:"\ndoc_to_target: answer\n'
    )
    train = problems_of(["Say what is left of a cake of 8 parts when Ann, Tom and Raj eat one each.", "How old is Eva?"])
    again = {"against": [{"source": "file", "path": str(data)}], "task_files": [str(task)]}
    for settings, place in (({"task_files": [str(task)]}, "mine: 6"), (again, "evaluation: data:6")):
        cleaned = decontaminated(config(tmp_path, **settings), train, [Problem("h:1", rows[-1]["question"], "2", "h")])
        assert [(leak.problem, leak.found_in) for leak in cleaned.leaks] == [("train:0", place)]


def test_the_report_is_plain_json(tmp_path):
    cleaned = without_leaks(problems_of(["What is 1 + 1?"]), [("evaluation: e:1", "what is 1+1")], 13)
    assert json.loads(json.dumps(cleaned.report())) == {
        "n": 13,
        "left_out": [{"problem": "train:0", "found_in": "evaluation: e:1", "words": "what is 1 + 1"}],
    }
