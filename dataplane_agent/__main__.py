"""`python -m dataplane_agent` runs all four services; the console script `dataplane` shows its commands."""

from __future__ import annotations

import sys

from dataplane_agent.cli import COMMANDS, call

CHECKS = ("--check-config", "--validate-config")


def main() -> int:
    """The console script `dataplane`."""
    return call(command(sys.argv[1:]))


def module() -> int:
    """`python -m dataplane_agent`."""
    return call(module_command(sys.argv[1:]))


def command(typed: list[str]) -> list[str]:
    """What the console script means: the command line as it was typed, with the files behind the command."""
    return _files_behind(_checked(typed))


def module_command(typed: list[str]) -> list[str]:
    """What the module means: what names no command is for `run`."""
    tokens = command(typed)
    return tokens if tokens and tokens[0] in COMMANDS else ["run", *tokens]


def _checked(tokens: list[str]) -> list[str]:
    """`--check-config` is spelled as with the services; here it is the command `config check`."""
    if not any(flag in tokens for flag in CHECKS):
        return tokens
    rest = [token for token in tokens if token not in CHECKS]
    return ["config", "check", *(rest[1:] if rest[:1] == ["run"] else rest)]


def _files_behind(tokens: list[str]) -> list[str]:
    """`--config` may stand before the command as well as behind it, where the command line wants it."""
    n = 0
    while n < len(tokens) and (tokens[n] == "--config" or tokens[n].startswith("--config=")):
        n += 2 if tokens[n] == "--config" else 1
    files, rest = tokens[:n], tokens[n:]
    words = next((i for i, token in enumerate(rest) if token.startswith("-")), len(rest))
    return [*rest[:words], *files, *rest[words:]]


if __name__ == "__main__":
    sys.exit(module())
