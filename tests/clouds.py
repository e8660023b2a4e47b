"""A cloud's token service on loopback, which asks for exactly what the real one does.

with Cloud(sts=lambda form, turn: {"access_token": "..."}) as cloud:
    ask(f"http://{cloud.host}/sts")
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from faults.proxy import Proxy, Reply, Turn

POD = "pod.token.words"  # what the kubelet projects


class Cloud(Proxy):
    """Answers each path with a function of the request's form or JSON; anything else is a 404."""

    def __init__(self, **routes: Callable[[dict[str, Any], Turn], Any]) -> None:
        super().__init__(("127.0.0.1", 9))
        self.routes = routes

    def pass_on(self, turn: Turn) -> None:
        for name, route in self.routes.items():
            if turn.seen.path.strip("/").endswith(name.replace("_", "/")):
                return turn.answer(reply_of(route(form_of(turn), turn)))
        return turn.answer(Reply(404))


def form_of(turn: Turn) -> dict[str, Any]:
    if "json" in turn.seen.headers.get("content-type", ""):
        return dict(json.loads(turn.body))
    return {name: values[0] for name, values in parse_qs(turn.body.decode()).items()}


def reply_of(answer: Any) -> Reply:
    if isinstance(answer, Reply):
        return answer
    return Reply(200, [("Content-Type", "application/json")], json.dumps(answer).encode())
