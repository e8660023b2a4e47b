"""What machines cost, as the administrator's policy file says: nothing is known without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from tuning import presets
from tuning.errors import SpecError
from tuning.plan.values import Plan, Price
from tuning.spec import Spec, policy_file


def _known(name: str) -> str:
    """The name of an instance type as its table has it."""
    try:
        return presets.instance(name).name
    except SpecError as error:
        problem = error.problems[0]
        what = f"{problem.what}; {problem.change}"
        raise PydanticCustomError("instance_type", "{what}", {"what": what}) from None


class Prices(BaseModel):
    """The section `prices` of the policy file.

    prices:
      currency: EUR
      perHour: {Standard_NC24ads_A100_v4: 3.40, p5.48xlarge: 52.10}
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, use_attribute_docstrings=True
    )

    currency: str = Field("USD", pattern="^[A-Z]{3}$")
    """Code of the currency, such as USD or EUR."""
    per_hour: dict[
        Annotated[str, AfterValidator(_known)], Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ] = {}
    """Price of an hour of each instance type, whole machines."""

    def of(self, instance: str | None) -> float | None:
        """The price of an hour of this instance type, if there is one."""
        if not instance or not self.per_hour:
            return None
        try:
            return self.per_hour.get(presets.instance(instance).name)
        except SpecError:
            return None

    def priced(self, plan: Plan, spec: Spec, *, source: str) -> Plan:
        """`plan` with what it costs and why; unchanged where no price is known.

        `source` is the file that the price is from.
        """
        per_hour = self.of(spec.instance)
        if per_hour is None:
            return plan
        plan = replace(plan, price=Price(per_hour, self.currency))
        hours = plan.hours
        if hours is None:
            return plan
        nodes = plan.placement.nodes
        machines = f" x {nodes} machines" if nodes > 1 else ""
        reason = f"{hours:,.4g} h{machines} at {per_hour:g} {self.currency}/h ({source})"
        return replace(plan, reasons=plan.reasons | {"cost": reason})


def load(path: Path) -> Prices:
    """The section `prices` of the policy file at `path`. Raises SpecError with all problems."""
    return policy_file.section(path, "prices", Prices)
