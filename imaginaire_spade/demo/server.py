"""Serve the painting page over HTTP: its files, and JSON requests to the service.

Responsible for who may ask (host and origin), how much may be sent, and how answers and errors look on the wire. It is
made for people at one machine: it has no accounts and no encryption.
"""

import errno
import ipaddress
import json
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from imaginaire_spade.demo.service import BusyError, PaintingService
from imaginaire_spade.errors import ConfigError, DataError, UserError
from imaginaire_spade.inference.sizes import format_size

MAX_JSON_BYTES = 6 * 2**20
"""A label map of ``MAX_CANVAS_PIXELS`` with two bytes per id, in base64, is 5.3 MiB."""
MAX_UPLOAD_BYTES = 32 * 2**20
JSON_COPIES, FILE_COPIES = 15, 2
"""Memory of a request as a multiple of its body: what JSON becomes (lists of short texts 15, label maps 10), and a file
as it comes in."""
MAX_BRACKETS = 8
"""Of a JSON request, which has one or two. Six MiB of empty lists would take 200 MiB."""
MAX_BODY_S, LINGER_S = 60, 5
"""Seconds that a body may take to arrive; and those in which a client may read its answer before it is cut off."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

MODULES = ("main", "classes", "easel", "history", "label_map", "messages", "picture", "server", "text", "view")
PAGE_FILES = {"/": "index.html", "/page.css": "page.css"} | {f"/{name}.js": f"{name}.js" for name in MODULES}
"""Path -> file in ``page/``. The server never opens a path that a client sends."""
CONTENT_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class RefusedError(Exception):
    """The server refuses a request."""

    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


@dataclass(frozen=True)
class _Answer:
    content: bytes
    content_type: str = "image/png"
    headers: Mapping[str, str] | None = None


class PaintingServer(ThreadingTCPServer):
    """Serves the page at http://host:port.

    No HTTPServer, which looks up the host's full name: that can take many seconds.

    Args:
        host: address to listen at. If it is a loopback address, requests must name it as such in their Host header: the
            server refuses a page from elsewhere that points its name at this machine (DNS rebinding).
        port: 0 takes any free one; ``server_port`` says which.
    Raises:
        ConfigError: the server cannot listen there.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = 128
    """Connections that may wait to be accepted; the system resets others."""

    def __init__(self, service: PaintingService, host: str, port: int) -> None:
        self.service = service
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.local_only = is_loopback(host)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(_why_not(host, port, error)) from None
        except OverflowError:
            raise ConfigError(f"--port {port}: ports are 0 to 65535") from None
        self.server_port = self.server_address[1]

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def shutdown_request(self, request: Any) -> None:
        """Close a connection when its client has done so, or soon: to close it on what is still being sent would reset
        it, and the client would never see its answer."""
        end = time.monotonic() + LINGER_S
        try:
            request.shutdown(socket.SHUT_WR)
            request.settimeout(LINGER_S)
            while request.recv(2**16) and time.monotonic() < end:
                pass
        except OSError:
            pass
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a browser that went away is no fault
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_authority(host: str) -> bool:
    """Return whether a Host header is a name or an address, perhaps with a port, and nothing besides."""
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    name = f"[{name}]" if ":" in name else name
    return host.lower() == (name if port is None else f"{name}:{port}")


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"--port {port}: taken by another program, perhaps an earlier painting page. End that one, or write --port"
            f" {port + 1 if port < 65535 else 0} (--port 0 takes any free one)"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"--port {port}: no permission; ports below 1024 belong to the system. Write --port 7860"
    return f"--host {host}: cannot listen there ({error.strerror or error}). Write --host 127.0.0.1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "imaginaire_spade", ""
    timeout = 60
    """Seconds that a connection may stay silent."""
    server: PaintingServer

    def do_GET(self) -> None:
        self._body_read = "Content-Length" not in self.headers and "Transfer-Encoding" not in self.headers
        try:
            with ExitStack() as self._held:  # what the request holds of the budget
                self._check_origin()
                answer = self._answer()
            self._send(HTTPStatus.OK, answer)
        except RefusedError as refused:
            self._send(refused.status, _error(str(refused), refused.headers))
        except BusyError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, _error(str(error), {"Retry-After": "2"}))
        except UserError as error:
            self._send(HTTPStatus.BAD_REQUEST, _error(str(error)))
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            traceback.print_exc()
            self._send(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                _error("a fault of the painting page itself; the terminal it was started in says more"),
            )

    do_POST = do_GET

    def _answer(self) -> _Answer:
        path, _, query = self.path.partition("?")
        if path not in ROUTES:
            raise RefusedError(HTTPStatus.NOT_FOUND, "no such page")
        wanted, function = ROUTES[path]
        if self.command != wanted:
            raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"{wanted} is wanted here", {"Allow": wanted})
        return function(self, self.server.service, query)

    def _check_origin(self) -> None:
        """Refuse requests that a page from elsewhere sends through the user's browser."""
        if self.headers.get_payload():  # the standard library ended the headers early: others are among these lines
            raise RefusedError(HTTPStatus.BAD_REQUEST, "lines among the headers that are none")
        host, *more = self.headers.get_all("Host") or [""]
        name = urlsplit(f"//{host}").hostname if _is_authority(host) else None
        if more or not name or (self.server.local_only and name not in LOOPBACK_NAMES):
            raise RefusedError(
                HTTPStatus.FORBIDDEN,
                "this page answers to localhost and 127.0.0.1 only; to reach it from elsewhere start it with --host",
            )
        origins = {origin.lower() for origin in self.headers.get_all("Origin") or ()}
        if not origins <= {f"{scheme}://{host.lower()}" for scheme in ("http", "https")}:  # https: by a server in front
            raise RefusedError(HTTPStatus.FORBIDDEN, "a request from a page of another origin")

    def read_json(self) -> dict[str, Any]:
        # A page of another origin must ask this server before it sends this type or those below; it never consents.
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "application/json is wanted here")
        content = self._read(MAX_JSON_BYTES, JSON_COPIES)
        try:
            if content.count(b"[") + content.count(b"{") > MAX_BRACKETS:
                raise ValueError
            fields = json.loads(content)
        except (ValueError, RecursionError):
            raise DataError("the request is not JSON, or not such as the page sends") from None
        if not isinstance(fields, dict):
            raise DataError("the request is not a JSON object")
        return fields

    def read_file(self) -> bytes:
        content_type = self.headers.get_content_type()
        if content_type != "application/octet-stream" and not content_type.startswith("image/"):
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"an image file is wanted here, not {content_type}")
        return self._read(MAX_UPLOAD_BYTES, FILE_COPIES)

    def _read(self, most: int, copies: int) -> bytes:
        lengths = self.headers.get_all("Content-Length") or []
        if len(lengths) != 1 or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "one Content-Length is wanted")
        if not (lengths[0].isascii() and lengths[0].isdecimal()):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "Content-Length is no number")
        if len(lengths[0]) > 18 or int(lengths[0]) > most:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"too large: at most {most >> 20} MiB are taken")
        left = int(lengths[0])
        self._held.enter_context(self.server.service.budget.take(left * copies, jobs=1))
        parts, end = list[bytes](), time.monotonic() + MAX_BODY_S
        while left:
            part = self.rfile.read1(left)
            if not part or time.monotonic() > end:
                raise ConnectionResetError("the request broke off, or came too slowly")
            parts.append(part)
            left -= len(part)
        self._body_read = True
        return b"".join(parts)

    def _send(self, status: HTTPStatus, answer: _Answer) -> None:
        if not self._body_read:  # the rest of this body must not count as the next request
            self.close_connection = True
        self.send_response(status)
        for name, value in {**HEADERS, **(answer.headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in the same form what the standard library itself refuses (methods, request lines, headers)."""
        self._body_read = False
        self._send(HTTPStatus(code), _error(message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests; faults print their traceback."""


def _json(value: Any, headers: Mapping[str, str] | None = None) -> _Answer:
    return _Answer(json.dumps(value).encode(), "application/json", headers)


def _error(message: str, headers: Mapping[str, str] | None = None) -> _Answer:
    return _json({"error": message}, headers)


def _numbers(query: str, *names: str) -> dict[str, int]:
    given = dict(parse_qsl(query, keep_blank_values=True))
    if set(given) != set(names) or not all(v.isascii() and v.isdecimal() and len(v) < 10 for v in given.values()):
        raise DataError(f"whole numbers {', '.join(names)} are wanted in the address")
    return {name: int(value) for name, value in given.items()}


def _page_file(handler: _Handler, *_: object) -> _Answer:
    name = PAGE_FILES[handler.path.partition("?")[0]]
    content_type = f"{CONTENT_TYPES[name.rpartition('.')[2]]}; charset=utf-8"
    return _Answer((files("imaginaire_spade.demo") / "page" / name).read_bytes(), content_type)


def _generate(handler: _Handler, service: PaintingService, _: str) -> _Answer:
    fields = handler.read_json()
    image = service.generate(fields)
    return _Answer(image, headers={"Generated-Size": format_size(service.generated_size(fields))})


ROUTES: dict[str, tuple[str, Callable[[_Handler, PaintingService, str], _Answer]]] = {
    **dict.fromkeys(PAGE_FILES, ("GET", _page_file)),
    "/api/model": ("GET", lambda _, service, query: _json(service.describe())),
    "/api/sample": ("GET", lambda _, service, query: _json(service.read_sample(**_numbers(query, "number")))),
    "/api/picture": ("POST", _generate),
    "/api/label_map": ("POST", lambda handler, service, _: _json(service.read_label_map(handler.read_file()))),
    "/api/label_map_file": ("POST", lambda handler, service, _: _Answer(service.encode_label_map(handler.read_json()))),
    "/api/style": ("POST", lambda handler, service, _: _json(service.encode_style(handler.read_file()))),
}
"""Path -> method, and what answers it: (request, service, query)."""
