"""Where a server is, from a URL (control path)."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

import msgspec

__all__ = ["Address", "parse_url"]

PORTS = {"http": 80, "https": 443, "resp": 6380, "resps": 6380}
EXAMPLES = "http://host:8000, resp://:password@host:6380, http+unix:///run/penstock.sock"


class Address(msgspec.Struct, frozen=True):
    """protocol: "http" or "resp". unix: the socket's path, where host and port mean nothing. path: prefix of paths."""

    protocol: str
    host: str
    port: int
    tls: bool
    unix: str | None
    user: str | None
    password: str | None
    path: str

    @property
    def authority(self) -> str:
        """The Host field of HTTP."""
        if self.unix is not None:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"


def parse_url(url: str) -> Address:
    """The Address of http, https, resp, resps (TLS), http+unix or resp+unix URLs. Raises ValueError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"url: {error}; expected such as {EXAMPLES}") from None
    scheme, _, way = parts.scheme.partition("+")
    if scheme not in PORTS or way not in ("", "unix") or (way and scheme.endswith("s")):
        raise ValueError(f"url: expected such as {EXAMPLES}; the scheme is {parts.scheme!r}")
    if parts.query or parts.fragment:
        raise ValueError("url: expected nothing after the path")
    user = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password is not None else None
    protocol = scheme.removesuffix("s")
    if protocol == "http" and (user is not None or password is not None):
        raise ValueError("url: HTTP takes no password in the URL; give headers={'Authorization': ...} for a proxy's")
    if way:
        if parts.hostname or not parts.path.startswith("/"):
            raise ValueError(f"url: expected {scheme}+unix:///path/of/socket")
        return Address(protocol, "", 0, False, unquote(parts.path), user, password, "")
    if not parts.hostname:
        raise ValueError(f"url: no host; expected such as {EXAMPLES}")
    path = parts.path.rstrip("/")
    if protocol == "resp" and path:
        raise ValueError(f"url: expected nothing after the port, got {path!r}")
    return Address(
        protocol,
        parts.hostname,
        port if port is not None else PORTS[scheme],
        scheme in ("https", "resps"),
        None,
        user,
        password,
        path,
    )
