"""The documentation says what the code does: pages are generated, commands exist, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from edgetune.cli import app
from edgetune.recipe import parse_recipe
from edgetune.runtime.report.write import write_report
from tests.report_sample import sample_report

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / name))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Give language and text of every fenced block."""
    yield from FENCE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Give the words after `program` of every line of a fenced block that calls it."""
    for language, text in blocks(page):
        for line in text.replace("\\\n", " ").splitlines() if language == "sh" else ():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name == program:
                yield words[1:]


def complaint(words: list[str]) -> str | None:
    """Say what is wrong with the words after `edgetune`, or None."""
    group: Any = typer.main.get_command(app)
    verbs = group.commands
    while words and words[0].startswith("--"):
        if words.pop(0) not in {flag for option in group.params for flag in option.opts} | {"--help"}:
            return "unknown flag before the verb"
    if not words:
        return None
    if words[0] not in verbs:
        return f"no verb {words[0]}"
    if hasattr(verbs[words[0]], "commands"):
        verbs, words = verbs[words[0]].commands, words[1:]
        if not words or words[0] not in verbs:
            return f"no such verb in the group: {' '.join(words[:1])}"
    flags = {f for p in verbs[words[0]].params for f in (*p.opts, *p.secondary_opts) if f.startswith("-")} | {"--help"}
    unknown = [word for word in words[1:] if word.startswith("--") and word.partition("=")[0] not in flags]
    return f"{words[0]} has no {', '.join(unknown)}" if unknown else None


def test_generated_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    code = script("make_docs.py")["main"](["--check"])
    assert code == 0, capsys.readouterr().out


@by_page
def test_commands_name_verbs_and_flags_that_exist(page: Path) -> None:
    for words in commands(page, "edgetune"):
        assert complaint(list(words)) is None, f"edgetune {' '.join(words)}"


def test_the_check_of_commands_finds_what_does_not_exist() -> None:
    assert complaint(["run", "a.yaml", "--out", "b"]) is None
    assert complaint(["serve", "a"]) == "no verb serve"
    assert complaint(["data", "check", "a", "--json", "b"]) is None
    assert complaint(["data", "chekc"]) == "no such verb in the group: chekc"
    assert complaint(["data", "check", "--fast"]) == "check has no --fast"
    assert complaint(["run", "a.yaml", "--fast"]) == "run has no --fast"
    assert any(True for page in PAGES for _ in commands(page, "edgetune"))


@by_page
def test_scripts_that_are_called_exist(page: Path) -> None:
    for words in commands(page, "python"):
        if words[0] != "-m":
            assert (ROOT / words[0]).is_file(), words[0]


@by_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)", text)) | {w[0] for w in commands(page, "make") if w}
    assert named <= targets
    if page.name == "README.md":
        assert {"demo", "test"} <= named


@by_page
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, link


@by_page
def test_recipes_in_the_pages_are_valid(page: Path) -> None:
    small = {"name": "a", "base": "pkg:b", "data": {"train": "t", "heldout": "h"}, "candidates": {"c": {}}}
    for language, text in blocks(page):
        if language == "yaml":
            parse_recipe(small | yaml.safe_load(text), page.name)


def test_pages_name_no_folder_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/(work|home|root|tmp)/", page.read_text(encoding="utf-8")), page.name


def test_readme_holds_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    update = script("update_readme.py")
    assert update["main"](["--check"]) == 0, capsys.readouterr().out


def test_results_are_filled_in_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = script("update_readme.py")["main"]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    where = ["--report", str(tmp_path / "report.json"), "--readme", str(readme)]
    assert main(where) == 1
    assert "is not there" in capsys.readouterr().out
    write_report(sample_report(n_rows=60), tmp_path)
    assert main([*where, "--check"]) == 1
    assert "old" in readme.read_text()
    assert main(where) == 0
    assert main([*where, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n| Candidate |")
    assert text.endswith("\n<!-- /results -->\nafter\n")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert {"q4-gguf", "q4-onnx", "student-q4", "q2-rtn", "reference"} <= set(rows)
    assert {len(row) for row in rows.values()} == {9}
    assert float(rows["q4-gguf"][7].rstrip("×")) > 2
    assert rows["reference"][7] == "1.00×"
    readme.write_text("no markers\n")
    assert main(where) == 1
    assert "markers" in capsys.readouterr().out
