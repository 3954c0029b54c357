"""`python -m sandbox`: the ControlPlane, the simulated AudioAPIServers, the reconciliation of their books."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def _control_plane(argv: Sequence[str]) -> int:
    """serve the ten calls over TLS, with a page and an admin port"""
    from sandbox.process import main

    return main(argv)


def _simulate(argv: Sequence[str]) -> int:
    """be AudioAPIServers: write sessions, usage and quota requests into the streams"""
    from sandbox.audio_api_server import main

    return main(argv)


def _reconcile(argv: Sequence[str]) -> int:
    """compare what was produced with what the ControlPlane and Redis have"""
    from sandbox.reconciler import main

    return main(argv)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "control-plane": _control_plane,
    "simulate": _simulate,
    "reconcile": _reconcile,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named command; 2 for a wrong one."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in _COMMANDS:
        return _COMMANDS[name](rest)
    print("usage: python -m sandbox COMMAND [--help]\n")
    for command, run in _COMMANDS.items():
        print(f"  {command:<14} {run.__doc__}")
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
