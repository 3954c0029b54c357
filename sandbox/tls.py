"""The sandbox's certificate authority: made once per file, so that a restarted server is still trusted."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import trustme

Certificate = Literal["renewed", "expired", "foreign"]
"""What a server can show: a new one, one of yesterday, one of an authority that nobody trusts."""


class Authority:
    """A CA whose certificate lies at `ca_file`, its private key beside it (`<ca_file>.key`, mode 0600)."""

    def __init__(self, ca_file: Path) -> None:
        self.ca_file = ca_file
        key_file = ca_file.with_name(ca_file.name + ".key")
        if ca_file.exists() and key_file.exists():
            self._ca = trustme.CA.from_pem(ca_file.read_bytes(), key_file.read_bytes())
            return
        self._ca = trustme.CA(organization_name="DataPlaneAgent sandbox")
        ca_file.parent.mkdir(parents=True, exist_ok=True)
        write_secret(key_file, self._ca.private_key_pem.bytes())
        ca_file.write_bytes(self._ca.cert_pem.bytes())

    def server_context(self, names: Sequence[str], *, client_certificates: bool = False) -> ssl.SSLContext:
        """A context that answers to `names`; with `client_certificates` only this CA's clients get in."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # Nobody resumes a session: whoever connects looks at the certificate.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        self.show(context, names)
        if client_certificates:
            self._ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def show(
        self, context: ssl.SSLContext, names: Sequence[str], certificate: Certificate = "renewed"
    ) -> None:
        """From the next connection on, the server shows another certificate."""
        authority = trustme.CA(organization_name="Somebody else") if certificate == "foreign" else self._ca
        yesterday = datetime.now(UTC) - timedelta(days=1)
        until = yesterday if certificate == "expired" else None
        authority.issue_cert(*names, not_after=until).configure_cert(context)

    def issue_client(self, cert_file: Path, key_file: Path) -> None:
        """Write a client certificate and its key as PEM files."""
        issued = self._ca.issue_cert("sandbox-client.test")
        cert_file.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        write_secret(key_file, issued.private_key_pem.bytes())


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read, from its first byte on."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_bytes(content)
