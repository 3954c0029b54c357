"""What a configured value may be: each kind says so in words, and turns what was written into the value.

A kind takes what YAML gives, and text: all that `${VAR}` and the environment can give.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct


class Refused(ValueError):
    """This value is not of its kind; `got` says what it is instead."""

    def __init__(self, got: str) -> None:
        super().__init__(got)
        self.got = got


class Kind(Struct, frozen=True):
    """What a key takes: `expected` in words, and `parse`, which returns the value or raises Refused."""

    expected: str
    parse: Callable[[Any], Any]
    secret: bool = False


def show(value: Any) -> str:
    """The value as a fault names it; whoever prints it masks and shortens it first."""
    if value is None or value == "":
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "a mapping"
    return f"a {type(value).__name__}"


def text(expected: str = "text", longest: int = 4096, pattern: str | None = None) -> Kind:
    wanted = re.compile(pattern) if pattern else None

    def parse(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > longest or not value.isprintable():
            raise Refused(show(value))
        if wanted and not wanted.fullmatch(value):
            raise Refused(show(value))
        return value

    return Kind(expected, parse)


def maybe(kind: Kind) -> Kind:
    """The same, or null: an empty text is null too, because `${VAR:-}` cannot say null otherwise."""

    def parse(value: Any) -> Any:
        return None if value is None or value == "" else kind.parse(value)

    return Kind(f"{kind.expected}, or null", parse)


def _number(value: Any, whole: bool) -> int | float:
    if isinstance(value, str):
        written = value.strip()
        if len(written) <= 30 and re.fullmatch(r"[+-]?[0-9]+", written):
            return int(written)
        if not whole and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", written):
            return float(written)
    elif isinstance(value, int if whole else (int, float)) and not isinstance(value, bool):
        return value
    raise Refused(show(value))


def whole(least: int, most: int) -> Kind:
    def parse(value: Any) -> int:
        number = _number(value, whole=True)
        if not least <= number <= most:
            raise Refused(show(value))
        return int(number)

    return Kind(f"a whole number from {least} to {most}", parse)


def duration(unit: str, least: float, most: float) -> Kind:
    def parse(value: Any) -> float:
        number = _number(value, whole=False)
        if not least <= number <= most:  # NaN is not, either
            raise Refused(show(value))
        return float(number)

    return Kind(f"{unit} from {least:g} to {most:g}", parse)


def seconds(least: float, most: float = 86400) -> Kind:
    return duration("seconds", least, most)


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def flag() -> Kind:
    def parse(value: Any) -> bool:
        word = str(value).strip().lower()
        if word not in _TRUE and word not in _FALSE:
            raise Refused(show(value))
        return word in _TRUE

    return Kind("true or false", parse)


def one_of(*names: str, aliases: Mapping[str, str] | None = None) -> Kind:
    """One of the names, in whatever case it is written."""
    known = {name.lower(): name for name in names} | dict(aliases or {})

    def parse(value: Any) -> str:
        name = known.get(value.strip().lower()) if isinstance(value, str) else None
        if name is None:
            raise Refused(show(value))
        return name

    return Kind(f"one of {', '.join(names)}", parse)


def _items(value: Any) -> list[Any]:
    """A list as YAML has it, or as the environment must write it: JSON, or separated by commas."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                return list(msgspec.json.decode(value, type=list[Any]))
            except (msgspec.DecodeError, UnicodeError, RecursionError):
                raise Refused("a text that is no JSON list") from None
        return [item.strip() for item in value.split(",") if item.strip()]
    if isinstance(value, list):
        return value
    raise Refused(show(value))


def list_of(kind: Kind) -> Kind:
    def parse(value: Any) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(kind.parse(item) for item in _items(value)))

    return Kind(f"a list, each item {kind.expected}", parse)


def one_or_list(kind: Kind) -> Kind:
    """As it is written: a text stays a text, a list (or a text with commas) is a list."""

    def parse(value: Any) -> Any:
        if isinstance(value, str) and "," not in value and not value.lstrip().startswith("["):
            return kind.parse(value)
        items = tuple(kind.parse(item) for item in _items(value))
        if not items:
            raise Refused("an empty list")
        return items

    return Kind(f"{kind.expected}, or a list of it", parse)


def network() -> Kind:
    def parse(value: Any) -> str:
        try:
            return str(ipaddress.ip_network(value if isinstance(value, str) else ""))
        except ValueError as error:
            why = " (bits are set behind the prefix)" if "host bits" in str(error) else ""
            raise Refused(show(value) + why) from None

    return Kind("a network like 10.0.0.0/8 or ::1/128", parse)


def address() -> Kind:
    def parse(value: Any) -> str:
        try:
            return str(ipaddress.ip_address(value if isinstance(value, str) else ""))
        except ValueError:
            raise Refused(show(value)) from None

    return Kind("an IP address", parse)


def host(expected: str = "a host name or IP address") -> Kind:
    return text(expected, 253, r"[A-Za-z0-9._:%-]+")


def url() -> Kind:
    """http or https, a host, perhaps a port and a path prefix; credentials have their own keys."""
    any_text = text()

    def parse(value: Any) -> str:
        written: str = any_text.parse(value)
        try:
            parts = urlsplit(written)
            fits = parts.port != 0 and parts.scheme in ("http", "https")
        except ValueError:
            raise Refused("a text that is no URL") from None
        if parts.username is not None or parts.password is not None:
            raise Refused("a URL with credentials in it")
        if parts.query or parts.fragment or not written.isascii() or " " in written:
            fits = False
        if not fits or not re.fullmatch(r"[A-Za-z0-9._:-]+", parts.hostname or ""):
            raise Refused(show(value))
        return written.rstrip("/")

    return Kind("a URL like https://host[:port][/prefix]", parse)


def path() -> Kind:
    return text("a path")


def password() -> Kind:
    def parse(value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise Refused(show(value) if isinstance(value, (list, dict)) else "what YAML takes for no text")
        try:
            value.encode()
        except UnicodeError:
            raise Refused("a text that is not UTF-8") from None
        return value

    return Kind("text (in quotes, when it looks like a number)", parse, secret=True)


def key(required: bool) -> Kind:
    """What can be sent in a header."""
    any_text = password()

    def parse(value: Any) -> str:
        written: str = any_text.parse(value)
        if required and not written:
            raise Refused("nothing")
        if not (written.isascii() and written.isprintable()) or " " in written:
            raise Refused("a text with spaces, control or non-ASCII characters (not shown)")
        return written

    return Kind("a key of printable ASCII characters" + ("" if required else ", or null"), parse, secret=True)
