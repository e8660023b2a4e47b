"""The route table, and the routes that do not generate: page, probes, metrics, models."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuning.serve import completions, responses
from tuning.serve.adapters import ServedModel
from tuning.serve.middleware import Middleware, note
from tuning.serve.schema import ApiError
from tuning.serve.service import Service

PAGE = (Path(__file__).parent / "page.html").read_bytes()


def app(service: Service, *, keys: Sequence[bytes] = (), any_host: bool = False) -> Middleware:
    """The ASGI application, wrapped in the middleware."""
    routes = {
        ("GET", "/"): _page,
        ("GET", "/health"): _health,
        ("GET", "/healthz"): _healthz,
        ("GET", "/readyz"): _readyz,
        ("GET", "/metrics"): _metrics,
        ("GET", "/v1/models"): _models,
        ("GET", "/v1/models/{name:path}"): _model,
        ("POST", "/v1/chat/completions"): completions.chat,
        ("POST", "/v1/completions"): completions.completions,
        ("POST", "/chat"): completions.quick_start,
    }
    routed = Starlette(
        routes=[
            Route(path, _endpoint(service, path, handler), methods=[method])
            for (method, path), handler in routes.items()
        ],
        exception_handlers={HTTPException: _not_routed, ApiError: _api_error, Exception: _failed},
    )
    routed.router.redirect_slashes = False
    paths = {path for _, path in routes}

    def count(path: str, status: int) -> None:
        route = path if path in paths else "other"
        service.metrics.requests.labels(route, str(status)).inc()

    return Middleware(
        routed,
        keys=keys,
        any_host=any_host,
        max_body_bytes=lambda: service.max_body_bytes,
        is_draining=lambda: service.phase == "draining",
        count=count,
    )


Handler = Callable[[Service, Request], Awaitable[Response]]


def _endpoint(service: Service, path: str, handler: Handler) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        note(request.scope, route=path)
        try:
            return await handler(service, request)
        except completions.ClientDisconnected:
            return Response(status_code=499)  # for the log and the metrics

    return endpoint


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = responses.error(ApiError(error.status_code, str(error.detail)))
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(responses.error(error), error.status, headers=headers)


async def _failed(request: Request, error: Exception) -> Response:
    """An unexpected exception; uvicorn logs the traceback."""
    return JSONResponse(responses.error(ApiError(500, "internal server error")), 500)


async def _page(service: Service, request: Request) -> Response:
    return Response(PAGE, media_type="text/html", headers={"Content-Security-Policy": PAGE_CSP})


def _content_security_policy(page: bytes) -> str:
    """Allows nothing but the page's own inline style and script."""

    def allowed(tag: str) -> str:
        inline = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in inline]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


PAGE_CSP = _content_security_policy(PAGE)


async def _health(service: Service, request: Request) -> Response:
    """As vLLM has it, for load generators and gateways: a status and no body."""
    return Response(status_code=200 if service.ready else 503)


async def _healthz(service: Service, request: Request) -> Response:
    state = service.phase if service.healthy else "failed"
    return JSONResponse({"status": state}, 200 if service.healthy else 503)


async def _readyz(service: Service, request: Request) -> Response:
    refused = [one.to_json() for one in service.loaded.rejected] if service.loaded else []
    state = service.phase if service.healthy else "failed"
    return JSONResponse({"status": state, "refused": refused}, 200 if service.ready else 503)


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _model_card(service: Service, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": service.started,
        "owned_by": "tuning",
        "kind": model.kind,
        "parent": None if model.kind == "base" else service.base,
        "version": model.version,
        "default": model.name == service.default,
        "max_model_len": service.require_loaded().context,
    }


async def _models(service: Service, request: Request) -> Response:
    models = [_model_card(service, model) for model in service.require_loaded().models.values()]
    return JSONResponse({"object": "list", "data": models})


async def _model(service: Service, request: Request) -> Response:
    return JSONResponse(_model_card(service, service.find_model(request.path_params["name"])))
