"Every command shows how it is called: its help ends in an example, and the example parses."
import re
from pathlib import Path

import pytest
from typer.main import get_command

from bnml.cli import app
from bnml.core.base import UsageError
from bnml.runner import make_parser

ROOT = get_command(app)
README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def leaves(command, path=()):
    "Every command that does something, with the words that lead to it."
    inner = getattr(command, "commands", None)
    return [leaf for name, c in inner.items() for leaf in leaves(c, (*path, name))] if inner else [(path, command)]


COMMANDS = dict(leaves(ROOT))


def parses(words):
    "The command that these words name; it is not run, and a wrong flag, value or missing word raises."
    command, ctx = ROOT, ROOT.make_context("bnml", list(words), resilient_parsing=False)
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(ctx, [*ctx._protected_args, *ctx.args])
        ctx = command.make_context(name, rest, parent=ctx)
    return command


def words_of(line):
    "A shell line as words, its comment left out."
    import shlex
    return shlex.split(line, comments=True)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_example(path):
    epilog = COMMANDS[path].epilog or ""
    found = re.fullmatch(r"Example: bnml (.+)", epilog)
    assert found, f"`bnml {' '.join(path)} --help` ends with {epilog!r}, not with an example"
    assert parses(words_of(found[1])) is COMMANDS[path]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_and_the_command_say_what_they_do(path):
    command = COMMANDS[path]
    assert command.help and command.help.strip().endswith((".", "!"))
    for p in command.params:
        if p.param_type_name == "option": assert p.help, f"{' '.join(path)} {p.opts} has no help"


def test_a_wrong_example_would_be_seen():
    for line in ("backtest --no-such-flag", "backtest --engine telepathy", "models rollback BTCUSDT", "data nosuch"):
        with pytest.raises(Exception) as e: parses(line.split())
        assert type(e.value).__module__.startswith(("click", "typer")), e.value


def test_the_runner_s_example():
    parser = make_parser()
    found = re.search(r"Example: python -m bnml.runner (.+)", parser.epilog)
    assert parser.parse_args(words_of(found[1])).replay == "2025-09-01:2025-09-30"
    with pytest.raises(UsageError): parser.parse_args(["--no-such-flag"])


LINES = [line.strip() for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(("bnml ", "python -m bnml.runner"))])
def test_a_line_of_the_readme(line):
    words = words_of(line)
    if words[0] == "bnml": parses(words[1:])
    else: make_parser().parse_args(words[3:])


def test_the_readme_s_make_targets():
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, re.M))
    assert {a or b for a, b in named} <= targets and len(named) >= 4


def test_the_readme_s_files_are_there():
    root = Path(__file__).resolve().parents[1]
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`(nbs/[\w/]+\.ipynb)`", README)
    assert links and [x for x in links if not (root / x).exists()] == []
