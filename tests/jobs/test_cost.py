"""What a Workspace has cost: its provisioned nodes, by the policy's prices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cluster import Scene, ended, engine

from jobs.api import crd
from jobs.api.kinds import NODE_CLAIM, Object
from jobs.api.options import Options, with_policy
from tuning.plan.prices import Prices

PRICE = 3.6  # so that a second costs 0.001
NAME = "Standard_NC24ads_A100_v4"
PRICES = Prices.model_validate({"currency": "EUR", "perHour": {NAME: PRICE}})


def amount(status: Object) -> float:
    return float((status.get("cost") or {}).get("amount", 0.0))


def running(**more: Any) -> Scene:
    scene = Scene(prices=PRICES, **more).with_node()
    scene.pod(phase="Running", **engine({"running": {}}))
    scene.look(1)
    return scene


@pytest.mark.parametrize("count", [1, 3])
def test_each_second_of_each_node_is_paid_once(count: int) -> None:
    """However often the operator looks, and although it was away for an hour; no more after it was
    given back."""
    scene = Scene(prices=PRICES, count=count).with_node()
    start = scene.api.now
    for index in range(count):
        pod = scene.pod(index=index, phase="Running", **engine({"running": {}}))
    for seconds in (10, 0, 20, 0, 3600, 60, 0):
        scene.look(seconds)
    spent = (scene.api.now - start).total_seconds()
    assert spent * count == pytest.approx(1000 * amount(scene.status), abs=5 * count)
    pod["status"] |= {"phase": "Failed"} | engine(ended(10))
    scene.ends_job("Failed")
    for _ in range(4):
        scene.look(7)
    assert [] == scene.owned(NODE_CLAIM)
    last = scene.status["cost"]
    assert "EUR" == last["currency"]
    assert (spent + 14) * count == pytest.approx(1000 * last["amount"], abs=15 * count)
    hours = last["amount"] / PRICE
    assert hours == pytest.approx(last["nodeHours"], abs=1e-5)
    assert f"{last['amount']:.2f} EUR for {hours:.2f} node-hours" == last["text"]
    assert last == scene.look(10_000)["cost"]


def test_a_further_run_is_added() -> None:
    """The Workspace is edited and runs again: its cost goes on from where it was."""
    scene = running()
    scene.look(600)
    first = amount(scene.status)
    item = scene.api.stored["workspaces", "phi"]
    item["tuning"]["output"]["image"] = "registry.example.com/team/a:2"
    item["metadata"]["generation"] += 1
    for _ in range(4):
        scene.look(10)
        scene.nodes_are_ready()
    scene.look(600)
    assert amount(scene.status) == pytest.approx(first + 0.64, abs=0.05)


def test_it_is_written_once_a_minute_at_most() -> None:
    """The status is a write to the API server, and each is an event for all who watch."""
    scene = running()
    scene.look(60)
    seen = [scene.look(15)["cost"]["countedUntil"] for _ in range(40)]
    assert 10 <= len(set(seen)) <= 11


@pytest.mark.parametrize("prices", [{}, {"perHour": {"p5.48xlarge": 50}}])
def test_without_a_price_there_is_no_cost(prices: dict[str, Any]) -> None:
    """Neither what it has cost nor what it is expected to."""
    scene = Scene(prices=Prices.model_validate(prices)).with_node()
    scene.pod(phase="Running", **engine({"running": {}}))
    status = scene.look(300)
    assert "cost" not in status and "cost" not in status["plan"]


def test_the_expected_cost_is_in_the_plan() -> None:
    """With its reason; the schema keeps both fields."""
    scene = running()
    status = scene.look(300)
    assert "EUR for each million tokens: " in status["plan"]["cost"]
    assert status["plan"]["cost"].endswith("h at 3.6 EUR/h (the policy)")
    schema = crd.schema("v1beta1")["properties"]["status"]["properties"]
    assert status["plan"].keys() <= schema["plan"]["properties"].keys()
    assert status["cost"].keys() == schema["cost"]["properties"].keys()


def test_another_currency_starts_anew() -> None:
    """Two currencies do not add up: all hours since the launch count in the new one."""
    scene = running()
    scene.look(600)
    prices = Prices.model_validate({"currency": "USD", "perHour": {NAME: 36}})
    scene.options.__dict__["prices"] = prices
    status = scene.look(600)
    assert "USD" == status["cost"]["currency"]
    assert 12 == pytest.approx(amount(status), abs=0.1)


def test_the_policy_file_has_the_prices(tmp_path: Path) -> None:
    """Of the operator, too; a file without them leaves those of the options."""
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump({"prices": {"perHour": {NAME: 2}}}))
    assert 2 == with_policy(Options(), file).prices.of(NAME)
    file.write_text("data: {}")
    assert PRICE == with_policy(Options(prices=PRICES), file).prices.of(NAME)


@given(st.lists(st.integers(0, 400), max_size=40))
@settings(max_examples=30, deadline=None)
def test_no_rhythm_of_reconciles_changes_the_sum(waits: list[int]) -> None:
    """At most the last minute is not counted yet, and never more than passed."""
    scene = running()
    start, before = scene.api.now, amount(scene.status)
    last = before
    for seconds in waits:
        scene.look(seconds)
        assert amount(scene.status) >= last
        last = amount(scene.status)
    passed = (scene.api.now - start).total_seconds() / 1000
    assert passed - 0.061 <= last - before <= passed + 0.061
