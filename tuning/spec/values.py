"""The values of a spec that has been read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Method = Literal["lora", "qlora"]
Sharding = Literal["full_shard", "hybrid_shard", "no_shard"]


@dataclass(frozen=True)
class Part:
    """A part of a mixture: which files, how many of their rows, and what their columns are."""

    path: str  # a URL of the input, a file's name, or a pattern of them
    weight: float | None = None  # of this part's rows among all parts with a weight
    rows: int | None = None  # neither weight nor rows: all of them
    messages_column: str | None = None
    context_column: str | None = None
    response_column: str | None = None


@dataclass(frozen=True)
class Settings:
    """Settings of the ConfigMap's sections; None means unset: the plan decides.

    A value equal to KAITO's template default is unset, too.
    """

    # ModelConfig
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    revision: str | None = None
    chat_template: str | None = None  # Jinja text (a path is read by load())
    attention: str | None = None
    new_tokens: tuple[str, ...] | None = None  # new_special_tokens
    start_adapter: str | None = None  # an image, oci:DIR or a folder's absolute path
    # QuantizationConfig
    quant_type: Literal["nf4", "fp4"] | None = None
    double_quant: bool | None = None
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    # LoraConfig
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None
    rslora: bool | None = None
    dora: bool | None = None
    layers: tuple[int, ...] | None = None  # layers_to_transform
    # TrainingArguments
    learning_rate: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    warmup: float | int | None = None  # an int counts steps, a float below 1 is a share of them
    schedule: str | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    epsilon: float | None = None
    max_grad_norm: float | None = None
    optimizer: str | None = None
    seed: int | None = None
    max_length: int | None = None
    packing: bool | None = None
    train_on: Literal["assistant", "all"] | None = None
    checkpointing: bool | None = None
    activation_offloading: bool | None = None
    sharding: Sharding | None = None  # fsdp
    fused: bool | None = None  # fused_kernels
    save_steps: int | None = None
    eval_steps: int | None = None
    keep_best: bool | None = None
    patience: int | None = None  # early_stopping_patience
    patience_threshold: float | None = None
    neftune_alpha: float | None = None
    beta: float | None = None  # of dpo and kto
    report_to: tuple[str, ...] | None = None  # trackers
    run_name: str | None = None
    project: str | None = None
    mlflow_uri: str | None = None
    wandb_url: str | None = None
    # DatasetConfig
    shuffle: bool | None = None
    shuffle_seed: int | None = None
    train_share: float | None = None  # train_test_split; 1 means no held-out rows
    messages_column: str | None = None
    context_column: str | None = None
    response_column: str | None = None
    dataset_path: str | None = None
    dataset_extension: str | None = None
    over_length: Literal["auto", "split", "truncate", "drop", "refuse"] | None = None
    objective: Literal["sft", "dpo", "kto"] | None = None  # None: the data's shape decides
    sources: tuple[Part, ...] | None = None


@dataclass(frozen=True)
class Source:
    """Where the data comes from: one of the four, or of --data URLs, files and one folder."""

    urls: tuple[str, ...] = ()
    image: str | None = None
    pull_secrets: tuple[str, ...] = ()
    # volumeSource: /data in the Job, hostPath locally
    folder: Path | None = None
    files: tuple[Path, ...] = ()  # --data FILE
    within: str | None = None  # dataset_path: subfolder or file to use
    ending: str | None = None  # dataset_extension: files of a folder to use
    apart: tuple[str, ...] = ()  # files of the folder or image that are not trained on


@dataclass(frozen=True)
class Destination:
    """Where the adapter goes; without image, folder, layout and hub it stays in the run folder."""

    image: str | None = None
    push_secret: str | None = None  # name of the Secret; its file comes from the command line
    folder: Path | None = None  # volumeSource: /output in the Job, hostPath locally
    layout: Path | None = None  # --output oci:DIR
    hub: tuple[str, str] | None = None  # --output hf://ORG/NAME[@BRANCH]: name and branch
    on_tag_exists: Literal["refuse", "overwrite"] = "refuse"
    index: bool = False  # the image is an index: amd64, arm64, ModelPack
    base_image: str | None = None  # by digest; its layers come first
    earlier: tuple[str, ...] = ()  # digests of earlier outputs, which may be replaced

    @property
    def named(self) -> bool:
        """Whether it is a place of its own, not the run directory."""
        return any((self.image, self.folder, self.layout, self.hub))

    @property
    def form(self) -> tuple[str, ...]:
        """Non-default image options."""
        return (*(("index",) if self.index else ()), *filter(None, (self.base_image,)))


@dataclass(frozen=True)
class Overrides:
    """What the command line replaces in the file."""

    base_model: str | None = None  # a preset, org/model or a folder
    data: tuple[str, ...] = ()  # files, URLs, and at most one folder
    instance: str | None = None
    output: str | None = None  # oci:DIR, dir:DIR, hf://ORG/NAME, or an image reference
    allow_hosts: tuple[str, ...] = ()  # hosts of URLs that may be private or local
    method: str | None = None  # lora or qlora
    set: tuple[str, ...] = ()  # KEY=VALUE, for keys of the ConfigMap


@dataclass(frozen=True)
class Spec:
    """One Workspace, its ConfigMap resolved and the command line applied."""

    name: str
    preset: str  # tuning.preset.name as written: a preset's name or org/model
    method: Method
    source: Source
    destination: Destination
    base_model: str | None = None  # --base-model, if given; it replaces the preset's weights
    instance: str | None = None
    nodes: int = 1  # resource.count: machines that train together
    gpus: int | None = None  # annotation gpus: of each machine, what a Job asks for
    namespace: str | None = None
    hub_secret: str | None = None  # presetOptions.modelAccessSecret
    data_secret: str | None = None  # annotation data-secret; its files are mounted
    tracker_secret: str | None = None  # annotation tracker-secret, likewise
    evaluate: tuple[str, ...] = ()  # annotation: files of questions, names of lm-eval's tasks
    settings: Settings = field(default_factory=Settings)
    notes: tuple[str, ...] = ()  # one line for each key that was translated or ignored, with why
    cluster_notes: tuple[str, ...] = ()  # those of them that hold in a cluster, too
    document: dict[str, Any] = field(default_factory=dict)  # the Workspace, normalised
    config: dict[str, Any] | None = None  # the ConfigMap that tuning.config names, normalised
    overrides: Overrides = field(default_factory=Overrides)  # of the command line
