"""The route table, and the routes that generate nothing: page, probes, metrics, models."""

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

from tuning.serve import replies, talk
from tuning.serve.adapters import Model
from tuning.serve.guard import Guard, note
from tuning.serve.schema import Refusal
from tuning.serve.service import Service

PAGE = (Path(__file__).parent / "page.html").read_bytes()


def app(service: Service, *, keys: Sequence[bytes] = ()) -> Guard:
    """The whole application, behind its guard."""
    routes = {
        ("GET", "/"): _page,
        ("GET", "/healthz"): _healthz,
        ("GET", "/readyz"): _readyz,
        ("GET", "/metrics"): _metrics,
        ("GET", "/v1/models"): _models,
        ("GET", "/v1/models/{name:path}"): _model,
        ("POST", "/v1/chat/completions"): talk.chat,
        ("POST", "/v1/completions"): talk.completions,
        ("POST", "/chat"): talk.quick,
    }
    inner = Starlette(
        routes=[
            Route(path, _answering(service, path, work), methods=[method])
            for (method, path), work in routes.items()
        ],
        exception_handlers={HTTPException: _unknown, Refusal: _refused, Exception: _failed},
    )
    inner.router.redirect_slashes = False
    known = {path for _, path in routes}

    def done(path: str, status: int) -> None:
        shown = path if path in known else "other"
        service.metrics.requests.labels(shown, str(status)).inc()

    guard = Guard(
        inner,
        keys=keys,
        largest=lambda: service.largest,
        draining=lambda: service.phase == "draining",
        done=done,
    )
    return guard


Handler = Callable[[Service, Request], Awaitable[Response]]


def _answering(service: Service, path: str, work: Handler) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        note(request.scope, route=path)
        try:
            return await work(service, request)
        except talk.Gone:
            return Response(status_code=499)  # nobody reads it; the log and the metrics do

    return endpoint


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, str(error.detail))
    return JSONResponse(replies.error(refusal), error.status_code, headers=error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(replies.error(error), error.status, headers=headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A bug of ours; uvicorn logs the traceback."""
    return JSONResponse(replies.error(Refusal(500, "something went wrong here")), 500)


async def _page(service: Service, request: Request) -> Response:
    return Response(PAGE, media_type="text/html", headers={"Content-Security-Policy": POLICY})


def _policy(page: bytes) -> str:
    """Nothing from anywhere, but the page's own style and script."""

    def allowed(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


POLICY = _policy(PAGE)


async def _healthz(service: Service, request: Request) -> Response:
    state = service.phase if service.healthy else "failed"
    return JSONResponse({"status": state}, 200 if service.healthy else 503)


async def _readyz(service: Service, request: Request) -> Response:
    refused = [one.to_json() for one in service.loaded.refused] if service.loaded else []
    state = service.phase if service.healthy else "failed"
    return JSONResponse({"status": state, "refused": refused}, 200 if service.ready else 503)


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _listed(service: Service, model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": service.started,
        "owned_by": "tuning",
        "kind": model.kind,
        "parent": None if model.kind == "base" else service.base,
        "version": model.version,
        "default": model.name == service.default,
        "max_model_len": service.there().context,
    }


async def _models(service: Service, request: Request) -> Response:
    found = [_listed(service, model) for model in service.there().models.values()]
    return JSONResponse({"object": "list", "data": found})


async def _model(service: Service, request: Request) -> Response:
    return JSONResponse(_listed(service, service.choose(request.path_params["name"])))
