"""What a run costs: the administrator's prices, the plan's hours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tuning.plan as plan
from tuning import api, presets
from tuning.errors import SpecError
from tuning.plan import prices
from tuning.plan.prices import Prices
from tuning.spec import Spec

ROOT = Path(__file__).parents[2]
NAME = "Standard_NC24ads_A100_v4"
DOCUMENT = f"""\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: phi}}
resource:
  instanceType: {NAME}
  labelSelector: {{matchLabels: {{apps: phi}}}}
tuning:
  preset: {{name: phi-3-mini-4k-instruct}}
  method: qlora
  input: {{urls: ["https://data.example.com/train.jsonl"]}}
  output: {{image: registry.example.com/team/a:1, imagePushSecret: push}}
"""


def parsed(tmp_path: Path, text: str = DOCUMENT) -> Spec:
    file = tmp_path / "w.yaml"
    file.write_text(text)
    return api.load(file)


def policy(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", [NAME, "NC24ads_A100_v4", NAME.lower()])
def test_an_instance_type_has_one_price_however_it_is_written(name: str) -> None:
    """In the policy as in the Workspace: as `instanceType` is read."""
    found = Prices.model_validate({"perHour": {name: 3.5}})
    assert [3.5] * 3 == [found.of(each) for each in (NAME, "NC24ads_A100_v4", NAME.lower())]
    assert found.of("p5.48xlarge") is found.of("unknown") is found.of(None) is None


@given(
    name=st.sampled_from([each.name for each in presets.instances()]),
    price=st.floats(0.001, 1000),
)
def test_every_instance_type_can_have_a_price(name: str, price: float) -> None:
    """Of every cloud."""
    assert price == Prices.model_validate({"perHour": {name: price}}).of(name)


@pytest.mark.parametrize("nodes", [1, 3])
def test_hours_times_machines_times_price(nodes: int, tmp_path: Path) -> None:
    """Of a million tokens in a draft, of the training once the data is read; with the reason."""
    count = f"resource:\n  count: {nodes}\n"
    spec = parsed(tmp_path, DOCUMENT.replace("resource:\n", count))
    found = Prices.model_validate({"currency": "EUR", "perHour": {NAME: 2.0}})
    draft = plan.draft(spec, here=None)
    priced = found.priced(draft, spec, source="policy.yaml")
    assert priced.tokens_per_second
    million = 1e6 / priced.tokens_per_second / 3600 * nodes * 2.0
    cost = priced.to_json()["cost"]
    assert (None, "EUR", 2.0 * nodes) == (cost["total"], cost["currency"], cost["per_hour"])
    assert million == pytest.approx(cost["per_million_tokens"])
    assert f"{million:,.2f} EUR for each million tokens" == priced.cost
    machines = " x 3 machines" if nodes > 1 else ""
    assert priced.reasons["cost"].endswith(f" h{machines} at 2 EUR/h (policy.yaml)")
    frozen = found.priced(
        plan.freeze(draft, spec, rows=50_000, data=("d",)), spec, source="policy.yaml"
    )
    assert frozen.seconds
    total = frozen.seconds / 3600 * nodes * 2.0
    assert total == pytest.approx(frozen.to_json()["cost"]["total"])
    assert f"{total:,.2f} EUR" == frozen.cost
    schema = json.loads((ROOT / "configs/plan.schema.json").read_text())
    for each in (draft, priced, frozen):
        jsonschema.validate(json.loads(json.dumps(each.to_json())), schema)
    assert draft.recipe == priced.recipe and draft.placement == priced.placement


@pytest.mark.parametrize("text", ["{}", "prices: {}", "prices: {perHour: {p5.48xlarge: 50}}"])
def test_without_a_price_nothing_is_said(text: str, tmp_path: Path) -> None:
    """Neither a line nor a reason, and null in JSON."""
    spec = parsed(tmp_path)
    draft = plan.draft(spec, here=None)
    priced = prices.load(policy(tmp_path, text)).priced(draft, spec, source="policy.yaml")
    assert draft == priced and priced.cost is None and priced.to_json()["cost"] is None


def test_all_problems_of_the_section_are_told(tmp_path: Path) -> None:
    """With the nearest names; a typo of the administrator is no price that is missing."""
    text = (
        "prices: {curency: EUR, perHour: {Standard_NC24ads_A100_v3: 1, p5.48xlarge: -1,"
        " Standard_ND96isr_H100_v5: many}}\n"
    )
    with pytest.raises(SpecError) as error:
        prices.load(policy(tmp_path, text))
    said = str(error.value)
    assert 4 == len(error.value.problems)
    for words in ('did you mean "currency"', NAME, "p5.48xlarge: Input should be greater than 0",
                  "H100_v5: Input should be a valid number"):  # fmt: skip
        assert words in said
    with pytest.raises(SpecError, match=r"prices\.currency"):
        prices.load(policy(tmp_path, "prices: {currency: $}"))


def test_the_command_and_the_function_show_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan --policy`: a line with its reason, the same in JSON, and from Python."""
    from tuning.__main__ import main

    spec, file = parsed(tmp_path), policy(tmp_path, f"prices: {{perHour: {{{NAME}: 3.5}}}}")
    shown = []
    for more in ([], ["--json"]):
        arguments = ["tuning", "plan", "-f", str(tmp_path / "w.yaml"), "--policy", str(file), *more]
        monkeypatch.setattr(sys, "argv", arguments)
        main()
        shown.append(capsys.readouterr().out)
    table, text = shown
    (line,) = [line for line in table.splitlines() if line.split()[:1] == ["cost"]]
    made = api.plan(spec, logins=api.Logins(policy_file=file))
    assert made.cost and made.cost in line and "at 3.5 USD/h (policy.yaml)" in line
    assert made.to_json()["cost"] == json.loads(text)["cost"]
    assert api.plan(spec).cost is None
