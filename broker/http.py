"""As much of HTTP/1.1 as a page needs: a request's bytes in, an answer's bytes out. No socket and no clock.

Knows the requests of browsers, health checks and Prometheus: GET and HEAD without a body, one per connection. Does not know
what the pages say. Source: RFC 9112.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final

from penstock.broker.wire import record

MAX_REQUEST_BYTES: Final = 8192
_END = re.compile(rb"\r?\n\r?\n")
_REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (\S+) HTTP/1\.[01]")
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}
_REASONS |= {500: "Internal Server Error", 503: "Service Unavailable"}


@record
class Page:
    """An answer."""

    status: int
    body: str
    content_type: str = "text/plain; charset=utf-8"


Pages = Mapping[str, Callable[[float], Page]]
"""Path -> what makes the page at a time."""


class BadRequest(ValueError):
    """What came is no request that we know; the text says why."""


@record
class Request:
    """The first line of a request; the query is left out of the path."""

    method: str
    path: str


def parse(data: bytes) -> Request | None:
    """The request at the beginning of what a peer sent; None while it is incomplete.

    Raises:
        BadRequest: it cannot become one.
    """
    end = _END.search(data)
    if end is None or end.end() > MAX_REQUEST_BYTES:
        if len(data) > MAX_REQUEST_BYTES or end is not None:
            raise BadRequest(f"a request has at most {MAX_REQUEST_BYTES} bytes")
        return None
    line, *headers = data[: end.start()].decode("latin-1").split("\n")
    match = _REQUEST_LINE.fullmatch(line.removesuffix("\r"))
    if match is None:
        raise BadRequest("the first line is METHOD /path HTTP/1.1")
    for header in headers:
        name, _, value = header.partition(":")
        if name.strip().lower() == "host" and not _HOST.fullmatch(value.strip()):
            # A web page that has its own name point here must not read what this machine alone should see.
            raise BadRequest("the Host header names another host than this one")
    return Request(match[1], match[2].partition("?")[0])


def respond(data: bytes, pages: Pages, now: float) -> bytes | None:
    """All that is sent in answer to what a peer sent; None while that is incomplete."""
    try:
        request = parse(data)
    except BadRequest as e:
        return _written(Page(400, f"{e}\n"))
    if request is None:
        return None
    make = pages.get(request.path)
    if make is None:
        page = Page(404, f"there is: {', '.join(pages)}\n")
    elif request.method not in ("GET", "HEAD"):
        page = Page(405, "GET or HEAD\n")
    else:
        page = make(now)
    return _written(page, request.method == "HEAD")


def _written(page: Page, is_head: bool = False) -> bytes:
    body = page.body.encode("utf-8", "replace")
    lines = [
        f"HTTP/1.1 {page.status} {_REASONS[page.status]}", f"Content-Type: {page.content_type}",
        f"Content-Length: {len(body)}", "Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Connection: close",
    ]  # fmt: skip
    if page.status == 405:
        lines.append("Allow: GET, HEAD")
    head = "\r\n".join((*lines, "", "")).encode("latin-1", "replace")
    return head if is_head else head + body
