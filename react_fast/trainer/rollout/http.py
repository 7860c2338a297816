"""JSON over HTTP with deadlines and retries, by the standard library."""

import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from .sampling import EngineError

# Busy or starting servers and the proxies before them answer with these for a while.
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 30.0  # seconds
_CHUNK = 1 << 16


class HttpError(EngineError):
    """An answer that is an error. Attributes: status, the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _FailedError(Exception):
    """One attempt that another may mend. Attributes: status, the HTTP status or 0; after, seconds to wait."""

    def __init__(self, reason: str, status: int = 0, after: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.after = status, after


@dataclass
class JsonClient:
    """Requests to one server; its methods may be called from several threads.

    Args:
        base_url: such as "http://localhost:8000/v1".
        timeout: seconds from sending a request to its whole answer.
        retries: further attempts when there is no answer, a broken one, or one of a busy server (HTTP 408, 425,
            429, 5xx).
        backoff: seconds before the first of them, doubled for each next one up to 30; a server's Retry-After
            counts if it is longer.
        api_key: sent as bearer token.
    Attributes:
        retried: attempts that were repeated so far.
    Raises: EngineError for an address that is none, ValueError for numbers out of range.
    """

    base_url: str
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 0.5
    api_key: str | None = None
    retried: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        if not _is_address(self.base_url):
            raise EngineError(f"base_url must be like http://localhost:8000/v1, got {self.base_url!r}")
        for name, kind in (("timeout", (int, float)), ("retries", int), ("backoff", (int, float))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number that is not negative, got {value!r}")
        if self.timeout == 0:
            raise ValueError("timeout must be above 0, got 0")

    def get(self, path: str) -> Any:
        return self.call(path)

    def post(self, path: str, body: Mapping[str, Any], final: Collection[int] = ()) -> Any:
        return self.call(path, body, final)

    def call(self, path: str, body: Mapping[str, Any] | None = None, final: Collection[int] = ()) -> Any:
        """The parsed answer.

        Args:
            path: below base_url, or a whole URL. body: None: a GET, else a POST.
            final: HTTP statuses that are taken for an answer and not retried.
        Raises: HttpError for an HTTP status of 400 or more, EngineError for no answer in time or one that is not
            JSON; in one line, after all attempts.
        """
        url = path if "://" in path else f"{self.base_url.rstrip('/')}/{path.lstrip('/')}"
        left = self.retries
        wait, attempts = self.backoff, 1
        while True:
            try:
                return self._once(url, body)
            except _FailedError as failure:
                if left <= 0 or failure.status in final:
                    times = f" (after {attempts} attempts)" if attempts > 1 else ""
                    raise _error(f"{url}: {failure}{times}", failure.status) from None
                time.sleep(min(max(wait, failure.after), _LONGEST_WAIT))
                wait, left, attempts = 2 * wait, left - 1, attempts + 1
                with self._lock:
                    self.retried += 1

    def _once(self, url: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(url, data, headers)
        deadline = time.monotonic() + self.timeout
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = self._read(answer, deadline)
        except urllib.error.HTTPError as error:
            with error:
                reason = f"HTTP {error.code}: {_message(error)}"
            if error.code not in _RETRIED:
                raise _error(f"{url}: {reason}", error.code) from None
            raise _FailedError(reason, error.code, _seconds(error.headers.get("Retry-After"))) from None
        except TimeoutError:
            raise _FailedError(f"no answer within {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _FailedError(f"no answer within {self.timeout:g} s") from None
            raise _FailedError(f"cannot be reached: {error.reason}") from None
        except http.client.IncompleteRead as error:
            raise _FailedError(f"the answer broke off after {len(error.partial)} bytes") from None
        except (http.client.HTTPException, OSError) as error:
            raise _FailedError(f"the connection broke: {error or type(error).__name__}") from None
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            raise _FailedError(f"the answer is not JSON: {_short(text)!r}") from None

    def _read(self, answer: http.client.HTTPResponse, deadline: float) -> str:
        """The body; a server that sends a byte now and then does not get around the deadline."""
        parts = []
        while part := answer.read1(_CHUNK):
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError
        if answer.length:
            raise http.client.IncompleteRead(b"".join(parts), answer.length)
        return b"".join(parts).decode("utf-8", "replace")


def _is_address(url: Any) -> bool:
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _error(message: str, status: int) -> EngineError:
    return HttpError(message, status) if status else EngineError(message)


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says about it, wherever its JSON puts it."""
    try:
        text = error.read(_CHUNK).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        found = json.loads(text)
        for key in ("error", "message", "detail"):
            found = found.get(key, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found)
    except ValueError:
        pass
    return _short(text) or str(error.reason)


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def _seconds(value: str | None) -> float:
    """Retry-After in seconds; its other form, a date, counts as not given."""
    try:
        return max(float(value or 0), 0.0)
    except ValueError:
        return 0.0
