"""README and docs/ against what they speak of: links, commands and the example of a job."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from meshd.config.job import parse_job
from meshd.node.cli import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?:^|\n)\n((?:    [^\n]*\n)+)")
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
CALL = re.compile(r"(?:^|(?<=[\s(;&|$]))meshd[ ]+([^\n;&|)>]+)", re.M)
PLACEHOLDER = re.compile(r"\.\.\.|[A-Z]+(\.\.\.)?")


# ---- what a page says ---------------------------------------------------------------------


def without_code(text: str) -> str:
    """Return the prose of a page."""
    return SPAN.sub("", FENCE.sub("", text))


def code_in(text: str) -> Iterator[str]:
    """Yield every block of code, lines that end with a backslash joined, and every span."""
    for block in [*FENCE.findall(text), *INDENTED.findall(FENCE.sub("", text))]:
        yield re.sub(r"\\\n\s*", " ", block)
    for span in SPAN.findall(FENCE.sub("", text)):
        yield " ".join(span.split())


def commands_in(text: str) -> list[str]:
    """Return what follows `meshd` wherever a page quotes the command."""
    return [" ".join(call.split()) for code in code_in(text) for call in CALL.findall(code)]


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


# ---- whether it is so ---------------------------------------------------------------------


def link_problem(target: str, page: Path) -> str | None:
    """Return what is wrong with a link on *page*, None if it leads somewhere."""
    if re.match(r"[a-z]+:", target):
        return None
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.exists():
        return f"{target}: there is no such file"
    if not file.is_relative_to(ROOT):
        return f"{target}: leads out of the repository"
    if anchor and anchor not in anchors_of(file.read_text()):
        return f"{target}: {file.name} has no such heading"
    return None


def command_problem(call: str) -> str | None:
    """Return what is wrong with the call `meshd` *call*, None if there is such a command."""
    command: click.Command = cli
    for word in call.split():
        if word.startswith("--"):
            known = {
                option for p in command.get_params(click.Context(command)) for option in p.opts
            }
            if word.partition("=")[0] not in known:
                return f"meshd {call}: {command.name} has no option {word}"
        elif isinstance(command, click.Group):
            if PLACEHOLDER.fullmatch(word):
                return None
            found = command.get_command(click.Context(command), word)
            if found is None:
                return f"meshd {call}: {command.name} has no command {word}"
            command = found
    return None


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = LINK.findall(without_code(page.read_text()))
    problems = [link_problem(target, page) for target in targets]
    assert [problem for problem in problems if problem] == []


@every_page
def test_every_command_that_is_quoted_exists(page: Path) -> None:
    problems = [command_problem(call) for call in commands_in(page.read_text())]
    assert [problem for problem in problems if problem] == []


def test_the_readme_shows_a_swarm_by_hand() -> None:
    calls = commands_in((ROOT / "README.md").read_text())
    begun = {" ".join(call.split()[:2]) for call in calls}
    assert begun >= {"chain dev", "chain deploy", "chain fund", "up --data-dir", "stake 200"}
    assert begun >= {"program export", "data add", "job submit", "job result", "job receipts"}


def test_the_readmes_job_description_is_one() -> None:
    (text,) = re.findall(
        r"job\.toml <<'END'\n(.*?)^END$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    assert parse_job(text, now=0.0).rows_per_shard == 20


def test_the_index_names_every_page() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert {page.name for page in DOCS} - {"index.md"} <= listed


# ---- that the tests would see it ----------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["nowhere.md", "../../elsewhere", "cli.md#no-such-heading", "#no-such-heading"]
)
def test_a_link_that_leads_nowhere_is_seen(target: str) -> None:
    assert link_problem(target, ROOT / "docs" / "index.md") is not None


@pytest.mark.parametrize(
    "target",
    ["cli.md", "../README.md", "cli.md#meshd-job-submit", "#use-it", "https://example.org"],
)
def test_a_link_that_leads_somewhere_is_none_of_them(target: str) -> None:
    assert link_problem(target, ROOT / "docs" / "index.md") is None


@pytest.mark.parametrize(
    "call", ["fly", "job launch", "job submit --fast", "chain --rpc=x", "up --dir here"]
)
def test_a_command_that_does_not_exist_is_seen(call: str) -> None:
    assert command_problem(call) is not None


@pytest.mark.parametrize(
    "call",
    ["up --set=x", "--traceback COMMAND", "job", "job submit JOB.toml --watch", "... --help"],
)
def test_a_command_that_exists_is_none_of_them(call: str) -> None:
    assert command_problem(call) is None


def test_commands_are_found_in_blocks_spans_and_substitutions() -> None:
    text = (
        "Say `meshd status` or `meshd\njob ls`.\n\n    meshd up &\n\n```sh\n"
        "x=$(meshd peers --json | wc)\nmeshd stake \\\n    200; meshd demo\n```\n\n"
        "meshd is no span\n"
    )
    assert sorted(commands_in(text)) == [
        "demo", "job ls", "peers --json", "stake 200", "status", "up",
    ]  # fmt: skip
