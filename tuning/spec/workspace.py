"""The Workspace document: `kaito.sh/v1alpha1` and `v1beta1`.

The models hold types, defaults and descriptions, for error messages, the JSON schema and the CRD.
Constraints across fields are in `rules`. A field marked with `beta_only` is not part of v1alpha1.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

ANNOTATION = "tuning.kaito.sh/"  # the prefix of our annotations
# Labels with these prefixes choose no node: KAITO and the operator set them.
RESERVED_LABELS = ("kaito.sh/", "karpenter.kaito.sh/")
LABEL = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"  # DNS-1123
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"

_SECRET: dict[str, JsonValue] = {"pattern": SUBDOMAIN, "maxLength": 253}
beta_only: dict[str, JsonValue] = {"x-kaito-since": "v1beta1"}


class _Part(BaseModel):
    """A part of the document: no unknown keys, no coercion of types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=to_camel, use_attribute_docstrings=True
    )


class Metadata(_Part):
    """Kubernetes' own description of the object; what the cluster fills in is read over."""

    name: str = Field(json_schema_extra={"pattern": LABEL, "maxLength": 63})
    """Name of the Workspace, a DNS label; the Job and the run directory are called so, too."""
    namespace: str | None = Field(None, json_schema_extra={"pattern": LABEL, "maxLength": 63})
    """Namespace of the Workspace, of its ConfigMap and of its Secrets."""
    labels: dict[str, str] | None = None
    """Labels of the object."""
    annotations: dict[str, str] | None = None
    """Annotations; those that begin with tuning.kaito.sh/ are ours."""
    generate_name: Any = None
    """Ignored: a Workspace has a fixed name."""
    uid: Any = None
    """Set by the cluster."""
    resource_version: Any = None
    """Set by the cluster."""
    generation: Any = None
    """Set by the cluster."""
    creation_timestamp: Any = None
    """Set by the cluster."""
    deletion_timestamp: Any = None
    """Set by the cluster."""
    deletion_grace_period_seconds: Any = None
    """Set by the cluster."""
    finalizers: Any = None
    """Set by the cluster."""
    owner_references: Any = None
    """Set by the cluster."""
    managed_fields: Any = None
    """Set by the cluster."""
    self_link: Any = None
    """Set by the cluster."""


class LabelExpression(_Part):
    """One requirement of a label selector."""

    key: str
    """The label's key."""
    operator: str
    """Only "In" is supported."""
    values: list[str] | None = None
    """The label's value, as a list of one."""


class LabelSelector(_Part):
    """Which nodes may run the job."""

    match_labels: dict[str, str] | None = None
    """Labels that a node must carry."""
    match_expressions: list[LabelExpression] | None = None
    """The same as requirements; only "In" with one value."""


class Partition(_Part):
    """A share of a GPU; for inference only."""

    mode: Literal["mig", "accelerator"] = "mig"
    """How the GPU is shared."""
    profile: str | None = None
    """Profile of the share, for example "1g.10gb"."""
    count: int = Field(1, ge=1)
    """How many shares."""


class Resource(_Part):
    """The machine. Ignored by a local run, which uses the device that it finds."""

    count: int = Field(1, ge=1, le=64)
    """Number of machines that train together, each with all of its GPUs."""
    instance_type: str | None = Field(None, json_schema_extra={"maxLength": 128})
    """Cloud machine to plan for and to buy, for example Standard_NC24ads_A100_v4 or g6.xlarge.
    Leave it out to use nodes of your own."""
    label_selector: LabelSelector | None = None
    """Which nodes may run the job."""
    preferred_nodes: list[str] | None = Field(None, json_schema_extra={"deprecated": True})
    """Names of nodes that the scheduler prefers among those that labelSelector allows. A node that
    is provisioned comes first."""
    partition: Partition | None = Field(None, json_schema_extra={**beta_only})
    """A share of a GPU; for inference only."""


class PresetOptions(_Part):
    """Options of the preset."""

    image: str | None = Field(None, json_schema_extra={"deprecated": True})
    """Ignored: weights come from the hub, a volume or a folder."""
    image_pull_secrets: list[str] | None = Field(None, json_schema_extra={"deprecated": True})
    """Ignored, as image is."""
    model_access_secret: str | None = Field(None, json_schema_extra={**beta_only, **_SECRET})
    """Secret with the key HF_TOKEN, for a gated or private base model."""


class Preset(_Part):
    """The base model."""

    name: str = Field(json_schema_extra={"minLength": 1, "maxLength": 200})
    """A preset's name in any case (`python -m tuning presets` lists them), or org/model of the
    Hugging Face hub."""
    access_mode: Literal["public", "private"] = Field(
        "public", json_schema_extra={"deprecated": True}
    )
    """Ignored."""
    preset_options: PresetOptions | None = None
    """Options of the preset."""


class DataSource(_Part):
    """Where data comes from: exactly one of urls, volumeSource and image."""

    name: str | None = None
    """A name for the data. Fixed once the Workspace is made."""
    urls: list[str] | None = Field(None, json_schema_extra={"maxItems": 1000})
    """Addresses of the data files: https, http, hf, s3, gs or az. hf://datasets/ORG/NAME is a whole
    dataset of the hub: its default config, its split train."""
    volume_source: dict[str, Any] | None = Field(
        None, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """A Kubernetes volume that holds the data files. A local run reads hostPath.path."""
    image: str | None = None
    """An image that holds the data files under /data."""
    image_pull_secrets: list[str] | None = None
    """Secrets of type kubernetes.io/dockerconfigjson with which the image is pulled."""


class DataDestination(_Part):
    """Where the adapter goes: image, volumeSource, or both."""

    volume_source: dict[str, Any] | None = Field(
        None, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """A Kubernetes volume for the adapter's files. A local run writes to hostPath.path."""
    image: str | None = None
    """Reference under which the adapter is pushed, for example registry.example.com/team/a:1."""
    image_push_secret: str | None = Field(None, json_schema_extra=_SECRET)
    """Secret of type kubernetes.io/dockerconfigjson with which the image is pushed. A local run
    takes the file from --push-secret, or your docker config."""


class Tuning(_Part):
    """Which model, which data, where to push."""

    preset: Preset
    """The base model. Fixed once the Workspace is made."""
    method: str = Field(json_schema_extra={"pattern": "^([lL][oO][rR][aA]|[qQ][lL][oO][rR][aA])$"})
    """lora (16-bit base) or qlora (4-bit base), in any case. Fixed once the Workspace is made."""
    config: str | None = Field(None, json_schema_extra={"maxLength": 253})
    """ConfigMap with the key training_config.yaml, for what the defaults should not decide. See
    docs/config-keys.md."""
    input: DataSource | None = None
    """Where the data comes from."""
    output: DataDestination | None = None
    """Where the adapter goes."""


class Adapter(_Part):
    """An adapter to serve."""

    source: DataSource | None = None
    """Where the adapter comes from: image or volumeSource, and a name of its own."""
    strength: str | None = None
    """Weight of the adapter, 0 to 1, as a text: "0.5". The default is "1.0"."""


class Inference(_Part):
    """What to serve."""

    preset: Preset | None = None
    """The base model. Left out beside "tuning", it is the model that was tuned."""
    template: dict[str, Any] | None = Field(
        None, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """A pod template of your own, in place of a preset."""
    config: str | None = Field(None, json_schema_extra={"maxLength": 253})
    """ConfigMap with the key inference_config.yaml."""
    adapters: list[Adapter] | None = Field(None, json_schema_extra={"maxItems": 10})
    """Adapters to serve with the base model, ten at most. Beside "tuning" the adapter that it
    makes comes first, and is called tuned."""
    api_key_secret: str | None = Field(None, json_schema_extra=_SECRET)
    """Secret with the key API_KEY: then every request wants it, and may come from anywhere. Without
    one only pods of the namespace are let in."""


class Workspace(_Part):
    """One job: tune a model, serve it, or both."""

    api_version: Literal["kaito.sh/v1alpha1", "kaito.sh/v1beta1"]
    """Version of the API."""
    kind: Literal["Workspace"]
    """Always Workspace."""
    metadata: Metadata
    """Name, namespace, labels and annotations."""
    resource: Resource | None = None
    """The machine."""
    tuning: Tuning | None = None
    """Which model, which data, where to push."""
    inference: Inference | None = None
    """What to serve."""
    status: Any = None
    """Written by the operator. Of a file that is read, only `outputs` counts: the tag rule."""
