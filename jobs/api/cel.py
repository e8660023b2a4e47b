"""The CRD's CEL rules: those rules of the spec that need nothing but the object itself.

API servers without CEL ignore them; the reconciler then reports the same in the condition
SpecValid. Paths are those of the schema; `*` stands for the items of a list.
"""

from __future__ import annotations

from typing import NamedTuple

Path = tuple[str, ...]


class Rule(NamedTuple):
    """A CEL expression, and the message if it is false."""

    cel: str
    message: str


def _kept(field: str) -> str:
    """CEL: the optional field `field` is unchanged."""
    return (
        f"has(self.{field}) == has(oldSelf.{field}) && "
        f"(!has(self.{field}) || self.{field} == oldSelf.{field})"
    )


def _one_of(*fields: str) -> str:
    """CEL: exactly one of the fields is set."""
    return f"[{', '.join(f'has(self.{field})' for field in fields)}].filter(x, x).size() == 1"


_LABEL = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
# Literal addresses and names only; the engine checks the addresses that a name resolves to.
_LOCAL = (
    r"(?i)^https?://([^/?#]*@)?(localhost|[^/:?#]*[.]localhost|metadata[.]google([.]internal)?"
    r"|instance-data[.]ec2[.]internal|0[.]|10[.]|127[.]|169[.]254[.]|192[.]168[.]"
    r"|172[.](1[6-9]|2[0-9]|3[01])[.]|[[](::1?|::ffff:|f[cd]|fe[89ab])).*"
)

RULES: dict[Path, tuple[Rule, ...]] = {
    (): (
        Rule(
            f"self.metadata.name.size() <= 63 && self.metadata.name.matches('{_LABEL}')",
            "metadata.name must be a DNS label: the Job and its pods are called so, too",
        ),
        Rule(
            "has(self.tuning) || has(self.inference)",
            "Either Inference or Tuning must be specified, not neither",
        ),
        Rule(
            "!has(self.inference) || (has(self.tuning) ? !has(self.inference.template) : "
            "has(self.inference.preset) != has(self.inference.template))",
            "Preset or Template must be specified, and not both at the same time",
        ),
        Rule(
            "!has(self.tuning) || !has(self.inference) || !has(self.inference.preset) || "
            "self.inference.preset.name.lowerAscii() == self.tuning.preset.name.lowerAscii()",
            "inference.preset must be that of tuning, or be left out",
        ),
        Rule("has(self.tuning) == has(oldSelf.tuning)", "Tuning field cannot be toggled once set"),
        Rule(
            "has(self.inference) == has(oldSelf.inference)",
            "Inference field cannot be toggled once set",
        ),
        Rule("has(self.resource) == has(oldSelf.resource)", "resource cannot be toggled once set"),
    ),
    ("resource",): (
        Rule("self.count == oldSelf.count", "resource.count: field is immutable"),
        Rule(_kept("instanceType"), "instanceType cannot be changed once set"),
        Rule(_kept("labelSelector"), "resource.labelSelector: field is immutable"),
    ),
    ("resource", "labelSelector", "matchExpressions", "*"): (
        Rule(
            "self.operator == 'In' && has(self.values) && self.values.size() == 1",
            "Only allow matchLabels or 'IN' matchExpression",
        ),
    ),
    ("tuning", "preset"): (Rule("self == oldSelf", "Preset cannot be changed"),),
    ("tuning", "method"): (
        Rule("self.lowerAscii() == oldSelf.lowerAscii()", "Method cannot be changed"),
    ),
    ("tuning", "input"): (
        Rule(
            _one_of("urls", "volumeSource", "image"),
            "Exactly one of URLs, Volume, or Image must be specified",
        ),
        Rule(_kept("name"), "During tuning Name field cannot be changed once set"),
    ),
    ("tuning", "input", "urls", "*"): (
        Rule(
            "self.matches('^([hH][tT][tT][pP][sS]?|[hH][fF]|s3|gs|az)://')",
            "data source URL must use HTTP or HTTPS, hf, s3, gs or az",
        ),
        Rule(
            f"!self.matches(r'{_LOCAL}')",
            "data source URL must not target a loopback, private, link-local or metadata address",
        ),
    ),
    ("tuning", "output"): (
        Rule(
            "has(self.volumeSource) || has(self.image)",
            "Exactly one of Volume or Image must be specified",
        ),
        Rule(
            "!has(self.image) || has(self.imagePushSecret)",
            "Must specify imagePushSecret with destination image",
        ),
        Rule(
            "!has(self.image) || !(self.image.startsWith('oci:') || "
            "self.image.startsWith('dir:') || self.image.startsWith('hf://'))",
            "output.image must be in a registry, such as registry.example.com/name:tag",
        ),
    ),
    ("inference",): (
        Rule("has(self.preset) == has(oldSelf.preset)", "field cannot be unset/set if it was set"),
        Rule(
            "!has(self.adapters) || self.adapters.all(a, self.adapters.exists_one(b, "
            "has(a.source) && has(b.source) && has(a.source.name) && has(b.source.name) && "
            "a.source.name == b.source.name))",
            "Name of Adapter field must be specified, once each",
        ),
    ),
    ("inference", "preset"): (Rule("self == oldSelf", "field is immutable"),),
    ("inference", "adapters", "*"): (
        Rule(
            "!has(self.strength) || self.strength.matches('^(0([.][0-9]+)?|1([.]0+)?)$')",
            "Strength value for Adapter must be between 0 and 1",
        ),
    ),
    ("inference", "adapters", "*", "source"): (
        Rule("!has(self.urls)", "URLs are not supported as adapter source"),
        Rule(
            "has(self.image) != has(self.volumeSource)",
            "Either Image or Volume must be specified for adapter source",
        ),
    ),
}

BETA_RULES: dict[Path, tuple[Rule, ...]] = {
    (): (
        Rule(
            "!has(self.tuning) || !has(self.resource) || !has(self.resource.partition)",
            "GPU partitioning is not supported for tuning workloads",
        ),
    ),
    ("resource",): (Rule(_kept("partition"), "resource.partition: field is immutable"),),
}
