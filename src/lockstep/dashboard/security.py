"""Security: the token, the hosts that are answered, the headers of every answer.

A page of another site can have the browser send a request here, but neither with the token's header
nor, where something is changed, with this origin. One that has its own name lead here (DNS
rebinding) fails at the host.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
from collections.abc import Iterator
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.system.private_files import replace_private

TOKEN_BYTES = 32
ADDRESS = "dashboard.url"
"""The file with the page's address."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LONGEST_BODY = 4096
"""Bytes of a request's body."""


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(TOKEN_BYTES)


@contextlib.contextmanager
def address_file(folder: Path, address: str) -> Iterator[Path | None]:
    """A file with the page's address, which has the token, for its owner alone; None where the
    folder cannot be written to."""
    path = folder / ADDRESS
    try:
        replace_private(path, f"{address}\n".encode())
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == address + "\n":  # and not another server's
                path.unlink()


class Guard:
    """Guard: lets through what comes from the page itself, and adds the headers to each answer."""

    def __init__(self, app: ASGIApp, *, token: str, origins: frozenset[str]) -> None:
        """`origins`: those of the page, such as `http://127.0.0.1:8700`."""
        self._app, self._token = app, token.encode()
        self._origins = origins
        self._hosts = {origin.partition("://")[2] for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope) if scope["type"] == "http" else (403, "only HTTP is spoken")
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "http":
            status, why = refusal
            await JSONResponse({"what": why}, status)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is not answered, with the status; None: it is."""
        headers = Headers(scope=scope)
        if headers.getlist("host") != [headers.get("host", "")] or headers["host"] not in (
            self._hosts
        ):
            return 421, "this address is not served here"
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            return 403, "requests of other pages are not answered"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "there is nothing of this kind"
        if scope["path"].startswith("/api/") and not self._knows_token(headers):
            return 401, "open the address with the token that the command printed"
        if scope["method"] == "POST":
            if origin is None:
                return 403, "a request has to say from which page it comes"
            length = headers.get("content-length", "")
            if not length.isdecimal() or int(length[:9]) > LONGEST_BODY:
                return 413, "a request has a short body of known length"
            if headers.get("content-type") != "application/json":
                return 415, "a request is JSON"
        return None

    def _knows_token(self, headers: Headers) -> bool:
        kind, _, shown = headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(shown.encode("utf-8", "replace"), self._token)
        return kind == "Bearer" and known
