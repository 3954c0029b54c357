"""Every mutation of the mutation check takes away a rule that is there; whether it is missed, seeds tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from simulation.mutations import MUTATIONS, ROOT, Caught, Mutation, Patch, table


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("core")
    shutil.copytree(ROOT / "libs", root / "libs", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_a_mutation_applies_to_the_core_as_it_is(mutation: Mutation, core: Path) -> None:
    files = {patch.file: core / "libs" / "common" / patch.file for patch in mutation.patches}
    before = {path: path.read_text() for path in files.values()}
    try:
        for patch in mutation.patches:
            patch.apply(core)
        for file, path in files.items():
            assert path.read_text() != before[path], file
            if path.suffix == ".py":
                compile(path.read_text(), file, "exec")
    finally:
        for path, text in before.items():
            path.write_text(text)


def test_a_patch_that_does_not_apply_is_an_error(core: Path) -> None:
    with pytest.raises(ValueError, match="expected once, found 0 times"):
        Patch("lanes.py", "no such line", "").apply(core)


def test_rules_have_names_of_their_own() -> None:
    rules = [mutation.rule for mutation in MUTATIONS]
    assert len(rules) == len(set(rules)) >= 10


def test_the_page_names_the_seed_that_missed_the_rule_or_none() -> None:
    first, second, *_ = MUTATIONS
    page = table({first.rule: Caught(7, "owner: a | b"), second.rule: None})
    assert f"| {first.rule} | 7 | owner: a \\| b |" in page
    assert f"| {second.rule} | none |  |" in page
