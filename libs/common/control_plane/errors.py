"""What a call to the ControlPlane can end in, named for the fact; the base class is the verdict.

    ControlPlaneError
    ├── BreakerOpen             nothing was sent: the breaker is open        -> ask again after `retry_after`
    ├── Transient               the ControlPlane or the network failed       -> again, later
    │   ├── ConnectFailed *     no connection came about
    │   ├── TimedOut *          no whole answer in time
    │   └── BrokenAnswer *      the connection was lost, or what came is no HTTP
    ├── Unconfirmed             a 2xx that nobody may believe                -> again, later
    ├── NotFound                404, 410                                     -> a heartbeat: register again
    ├── AuthRefused             401, 403                                     -> the key is read again
    │   └── TlsFailed *         a certificate was refused, theirs or ours
    ├── ConfigurationFault      3xx, 501                                     -> an operator must look
    │   └── CannotSend *        no client can be made of the configuration (CA file, certificate, URL)
    └── Rejected                any other 4xx, 409 with a conflict           -> never again as it is
        └── NotARequest *       a header or path that HTTP cannot carry

    * TransportError: there is no answer. The request may have arrived all the same, save after the last two.

What is known is in attributes; no text is ever parsed for a verdict.
"""

from __future__ import annotations


class ControlPlaneError(Exception):
    """A call that did not succeed. `status` of the answer, `retry_after` in seconds, where there are any."""

    def __init__(self, text: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after


class BreakerOpen(ControlPlaneError):
    """Nothing was sent, because the breaker is open; `retry_after` says how long its pause still lasts."""


class Transient(ControlPlaneError):
    """The ControlPlane or the network failed; the same request may succeed later."""


class Unconfirmed(ControlPlaneError):
    """A 2xx without what such an answer must carry, an HTML page of a proxy for one."""


class NotFound(ControlPlaneError):
    """The ControlPlane knows no such thing, or not yet."""


class AuthRefused(ControlPlaneError):
    """The ControlPlane does not accept who we are."""


class ConfigurationFault(ControlPlaneError):
    """What answers is not the API we were configured for."""


class Rejected(ControlPlaneError):
    """The ControlPlane's final no to this request."""


class TransportError(ControlPlaneError):
    """No answer; the request may have arrived all the same. `seconds`: how long it took to find out."""

    seconds: float = 0.0


class ConnectFailed(TransportError, Transient):
    """No connection came about: refused, unreachable, no such name."""


class TimedOut(TransportError, Transient):
    """No whole answer came in time."""


class BrokenAnswer(TransportError, Transient):
    """The connection was lost under way, or what came back is no HTTP."""


class TlsFailed(TransportError, AuthRefused):
    """A certificate was refused: the ControlPlane's by us, or ours by it."""


class CannotSend(TransportError, ConfigurationFault):
    """No client can be made of the configuration; nothing was sent."""


class NotARequest(TransportError, Rejected):
    """HTTP cannot carry this path or header; nothing was sent."""
