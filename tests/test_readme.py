"""What the README points at is there."""

import re

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_and_pictures_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", TEXT) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_files_that_are_named_are_there():
    named = set(re.findall(r"`?((?:configs|infra|stages|flows|tests)/[\w./-]+\.(?:yaml|py|md|png|cpp))", TEXT))
    assert len(named) > 20
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
