"""Health of the rewards: alarms of windows made by hand; a watch that is resumed sees what it would have seen."""

import pytest
from pydantic import ValidationError

from stages.rewards.health import AlarmName, Health, Watch, alarms, summary
from stages.rl.metrics import NAMES

HEALTH = Health(window=10)


def steps(count=10, **curves):
    """Metrics of so many steps; each curve is a function of the step's number."""
    names = {"format": "reward/format", "accuracy": "reward/accuracy", "length": "rollout/length"}
    return [{names.get(name, f"rollout/{name}"): float(curve(n)) for name, curve in curves.items()} for n in range(count)]


def flat(value):
    return lambda n: value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (steps(no_verdict=flat(0.11)), {"no_verdict"}),
        (steps(no_verdict=flat(0.09)), set()),
        (steps(no_verdict=lambda n: n == 3), set()),  # one bad step in ten is a tenth, not more
        (steps(9, no_verdict=flat(1.0)), set()),  # not a whole window yet
        (steps(several_answers=flat(0.2)), {"several_answers"}),
        # format from 0.2 to 0.7 in the halves' means, by steps of 0.1
        (steps(format=lambda n: n / 10, accuracy=flat(0.3)), {"format_gain"}),
        (steps(format=lambda n: n / 10, accuracy=lambda n: n / 100), set()),  # accuracy rises by 0.05
        (steps(format=lambda n: n / 10, accuracy=lambda n: -n / 100), {"format_gain"}),
        (steps(format=lambda n: n / 100, accuracy=flat(0.3)), set()),
        # lengths: 100 and 160 in the two halves
        (steps(length=lambda n: 100 if n < 5 else 160, accuracy=flat(0.3)), {"length_factor"}),
        (steps(length=lambda n: 160 if n < 5 else 100, accuracy=flat(0.3)), {"length_factor"}),
        (steps(length=lambda n: 100 if n < 5 else 140, accuracy=flat(0.3)), set()),
        (steps(length=lambda n: 100 if n < 5 else 160, accuracy=lambda n: n / 10), set()),  # the paper's own story
        ([{"health/canaries_missed": 2.0}], {"canary"}),
        ([{"health/canaries_missed": 2.0}, {}], set()),
        ([], set()),
    ],
)
def test_alarms(given, expected):
    assert set(alarms(given, HEALTH)) == expected


def test_only_the_last_window_counts():
    bad, good = steps(no_verdict=flat(1.0)), steps(no_verdict=flat(0.0))
    assert alarms(bad + good, HEALTH) == {}
    assert set(alarms(good + bad, HEALTH)) == {"no_verdict"}


def test_the_sentences_say_the_numbers():
    assert alarms(steps(no_verdict=flat(0.25)), HEALTH) == {"no_verdict": "25% of the answers of 10 steps have no verdict"}
    drift = steps(length=lambda n: 100 if n < 5 else 160, accuracy=lambda n: 0.5 if n < 5 else 0.25)
    said = "the mean length went from 100 to 160 tokens in 10 steps while accuracy fell by 0.25"
    assert alarms(drift, HEALTH) == {"length_factor": said}


def test_null_switches_an_alarm_off():
    given = steps(no_verdict=flat(1.0), several_answers=flat(1.0), format=lambda n: n / 10, accuracy=flat(0.0))
    off = Health(window=10, no_verdict=None, format_gain=None)
    assert set(alarms(given, HEALTH)) == {"no_verdict", "several_answers", "format_gain"}
    assert set(alarms(given, off)) == {"several_answers"}


def test_every_alarm_has_a_metric_and_can_stop():
    for name in AlarmName.__args__:
        assert f"health/{name}" in NAMES
        assert Health(stop=(name,)).stop == (name,)
    with pytest.raises(ValidationError):
        Health(stop=("weather",))


def seen(watch, given, start=1):
    return [watch.see(number, metrics) for number, metrics in enumerate(given, start)]


def test_a_watch_tells_an_alarm_once_and_marks_every_step_of_it(capsys):
    health = Health(window=4, no_verdict=0.5, canary_every=0)
    shares = [0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1]  # means of four: -, -, -, .75, 1, .75, .5, .25, .25, .5, .75
    found = seen(Watch(health, [], list), steps(len(shares), no_verdict=lambda n: shares[n]))
    assert [n for n, f in enumerate(found, 1) if f] == [4, 5, 6, 11]
    assert all(f == {"health/no_verdict": 1.0} for f in found if f)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["step 4", "step 11"]
    assert told[0] == "step 4: warning: 75% of the answers of 4 steps have no verdict (no_verdict)"
    assert summary(found) == ["rewards: alarm `no_verdict` in 4 steps"]


def test_canaries_are_judged_in_their_steps(capsys):
    asked = []

    def canaries():
        asked.append(1)
        return ["`5` for `5` is wrong, not right"] if len(asked) == 2 else []

    watch = Watch(Health(canary_every=3, stop=("canary",)), [], canaries)
    found = seen(watch, [{}] * 5)
    assert [n for n, f in enumerate(found, 1) if f] == [3]
    assert not watch.stopping
    assert watch.see(6, {}) == {"health/canaries_missed": 1.0, "health/canary": 1.0}
    assert watch.stopping == "stopped at step 6: the verifier misjudged 1 answers whose verdicts are known"
    assert "`5` for `5` is wrong, not right" in capsys.readouterr().err
    watch.see(7, {})
    assert not watch.stopping


@pytest.mark.parametrize("cut", [0, 1, 5, 9, 13])
def test_a_watch_resumed_from_the_journal_sees_what_it_would_have_seen(cut, capsys):
    health = Health(window=6, no_verdict=0.5, stop=("no_verdict",), canary_every=4)
    given = steps(16, no_verdict=lambda n: n % 5 != 0, accuracy=flat(0.1), format=lambda n: n / 16)
    whole = Watch(health, [], list)
    journal = [{**metrics, **more} for metrics, more in zip(given, seen(whole, given), strict=True)]
    told = capsys.readouterr().err
    first, second = Watch(health, [], list), Watch(health, journal[:cut], list)
    again = seen(first, given[:cut]) + seen(second, given[cut:], cut + 1)
    assert [{**metrics, **more} for metrics, more in zip(given, again, strict=True)] == journal
    assert second.stopping == whole.stopping != ""
    assert capsys.readouterr().err == told
