"""Errors as the OpenAI API has them: {"error": {"message", "type", "param", "code"}}.

A message says what is wrong with the request and holds nothing of it but names of its members, and
nothing at all of another request.
"""

from __future__ import annotations

from typing import Any

from fedark.foundation.errors import EnclaveFailed, FedarkError, InputError, Refused, printable

__all__ = ["ApiError", "api_error"]

_TYPES = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class ApiError(Exception):
    """Why a request is not answered.

    Args:
        status: of HTTP.
        message: for the person who made the request.
        param: the member of the request that is wrong.
        code: for programs; the status's own, if it has one.
        wait: seconds after which the request may come again; None where that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        wait: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)
        self.headers = {} if wait is None else {"Retry-After": str(wait)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        kind = _TYPES.get(self.status, "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }


def api_error(error: FedarkError) -> ApiError:
    """What a client is told of an error of ours."""
    what = printable(error.what, 1000)
    if isinstance(error, Refused):
        return ApiError(403, what, code="lease_refused")
    if isinstance(error, InputError):
        return ApiError(400, what)
    if isinstance(error, EnclaveFailed):
        return ApiError(503, "The enclave has ended and is started again.", wait=5)
    return ApiError(500, what)
