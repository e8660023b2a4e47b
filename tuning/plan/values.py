"""The values of a plan: recipe, placement, lengths."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tuning import files
from tuning.plan.activations import Activations
from tuning.plan.device import Device
from tuning.plan.sharding import Layout
from tuning.plan.sizing import HOST_SHARE, Fit

# fields that records hold only if set
LATER = (
    *("new_tokens", "start_adapter", "sources", "patience", "patience_threshold"),
    *("objective", "beta"),
)
DDP_EFFICIENCY = 0.97  # speed of a GPU that shares its gradients; reported elsewhere


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the adapter's bytes; its hash is the run id. No path, host, clock."""

    base_model: str  # hub id, preset's hub id, or "local"
    base_revision: str  # commit of the hub, or "sha256:..." of a local folder's files
    data: tuple[str, ...]  # sha256 of each file, in order
    method: Literal["lora", "qlora"]
    precision: Literal["bfloat16", "float16", "float32"]  # weights and compute
    quantisation: dict[str, Any] | None  # {"type": "nf4", "double": true, "compute": "bfloat16"}
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | None  # None: every attention and MLP projection of the model
    exclude: tuple[str, ...]
    layers: tuple[int, ...] | None
    rslora: bool
    dora: bool
    optimizer: str  # a name transformers knows: adamw_torch_fused, adamw_torch, ...
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    max_grad_norm: float
    neftune_alpha: float | None
    max_length: int
    packing: bool
    train_on: Literal["assistant", "all"]
    chat_template: str | None  # sha256 of a user's template
    columns: dict[str, str]  # messages_column, context_column, response_column as set
    shuffle: bool
    train_share: float
    global_batch: int  # rows (packed rows when packing) an optimizer step
    epochs: float
    steps: int
    seed: int
    eval_steps: int | None
    keep_best: bool = False  # the weights with the lowest evaluation loss, not the last ones
    patience: int | None = None  # evaluations without a lower loss that end the training
    patience_threshold: float | None = None  # by how much it must be lower
    over_length: str | None = None  # None: auto
    split_seed: int | None = None  # of the evaluation split; None: the seed
    new_tokens: tuple[str, ...] = ()  # of the tokenizer; their rows are trained
    start_adapter: str | None = None  # sha256 of the weights to go on from
    objective: Literal["dpo", "kto"] | None = None  # None: sft
    beta: float | None = None  # of the objective
    sources: tuple[dict[str, Any], ...] = ()  # of a mixture: shares, columns, files of each part
    versions: dict[str, str] = field(
        default_factory=dict
    )  # torch, transformers, trl, peft, bitsandbytes

    def to_json(self) -> dict[str, Any]:
        """The record that the adapter holds; fields of later versions only if they are set."""
        record = asdict(self)
        return {k: v for k, v in record.items() if v or k not in LATER}

    @property
    def answers(self) -> int:
        """Sequences of up to max_length in a training row: a pair has two."""
        return 2 if self.objective == "dpo" else 1

    @property
    def passes(self) -> float:
        """What an epoch takes, counted in forward and backward passes; a forward one is half.

        The reference's passes are made once; kto has one more for each row, of another's answer.
        """
        if self.objective is None:
            return 1.0
        own, reference = (1.0, 0.5) if self.objective == "dpo" else (1.5, 1.0)
        return own + reference / max(self.epochs, 1e-9)

    @property
    def run_id(self) -> str:
        """sha256 of the canonical recipe, 64 hexadecimal digits."""
        record = self.to_json()
        for name in ("over_length", "split_seed"):  # unknown to earlier versions
            if record[name] is None:
                del record[name]
        return files.digest(files.canonical(record))


def recipe_from_json(record: dict[str, Any]) -> Recipe:
    """The recipe in a record of `dataclasses.asdict`."""
    tuples = ("data", "targets", "exclude", "layers", "betas", "new_tokens", "sources")
    fixed = {k: tuple(record[k]) for k in tuples if record.get(k) is not None}
    return Recipe(**(record | fixed))


@dataclass(frozen=True)
class Placement:
    """How the machines run the recipe; derived again at each start.

    Each rank trains rows of its own. With `shards` of 1 each holds the whole model; else `shards`
    of them hold one copy together, and there are ranks / shards copies.
    """

    device: Literal["cuda", "cpu"]
    ranks: int  # training processes of all machines together
    micro_batch: int  # rows at once on one rank
    accumulation: int  # global_batch == micro_batch * accumulation * ranks
    checkpointing: bool
    attention: str
    threads: int | None = None  # intra-op threads on a CPU; None leaves torch's choice
    kernels: tuple[str, ...] = ()  # fused ones, of backends.FUSED
    nodes: int = 1  # machines, each with ranks / nodes processes
    shards: int = 1  # ranks that share one copy of base, adapters and optimizer (FSDP2)
    offload: bool = False  # shards and optimizer lie in host memory
    recomputed_layers: int | None = None  # with checkpointing, of the first so many; None: of all
    activation_offloading: bool = False  # inputs of checkpointed layers lie in host memory
    tiled_mlp: bool = False  # MLPs compute a share of the tokens at a time
    host_embeddings: bool = False  # input embeddings lie in host memory, if the output has its own
    unpacked_layer: bool = False  # 4-bit weights of a recomputed layer, until its backward
    float_constants: bool = False  # those of 4-bit blocks lie in float32, not again in 8 bits

    @property
    def activations(self) -> Activations:
        """What is kept of the layers' activations."""
        return Activations(
            self.checkpointing,
            self.recomputed_layers,
            self.activation_offloading,
            self.tiled_mlp,
            self.host_embeddings,
            self.unpacked_layer,
        )

    @property
    def text(self) -> str:
        """How the ranks hold the model, in words."""
        things = "GPUs" if self.device == "cuda" else "processes"
        return Layout(self.ranks, self.nodes, self.shards, self.offload).text(things)


def placement_from_json(record: dict[str, Any]) -> Placement:
    """The placement in a record of `dataclasses.asdict`."""
    return Placement(**record | {"kernels": tuple(record.get("kernels") or ())})


@dataclass(frozen=True)
class Lengths:
    """Lengths of the tokenised rows, and what they are trained for."""

    rows: int  # of pairs, each answer
    tokens: int
    longest: int
    objective: Literal["sft", "dpo", "kto"] = "sft"

    @property
    def mean(self) -> float:
        """Mean tokens of a row."""
        return self.tokens / max(1, self.rows)


@dataclass(frozen=True)
class Price:
    """Of an hour of one machine."""

    per_hour: float
    currency: str


@dataclass(frozen=True)
class Plan:
    """A recipe, a placement, and the reason of each number.

    A plan from the spec alone is a draft (`rows` is None): lengths are upper bounds, the number of
    steps is unknown. `freeze` completes it.
    """

    recipe: Recipe
    placement: Placement
    device: Device
    reasons: dict[str, str]
    lengths: Lengths | None = None
    rows: int | None = None  # training rows after packing
    fit: Fit | None = None  # its memory and speed, where they can be predicted
    price: Price | None = None  # of a machine, where the administrator's policy names one

    @property
    def offloads(self) -> bool:
        """Whether the host has memory for the layers' inputs of one row on each GPU."""
        if self.device.kind == "cpu" or self.fit is None or self.fit.inputs_bytes is None:
            return False
        if self.fit.activations.offload or self.device.host_bytes is None:
            return True
        inputs = self.fit.layout.each * self.fit.inputs_bytes
        return self.fit.host_bytes + inputs <= self.device.host_bytes * HOST_SHARE

    @property
    def looks_up(self) -> bool:
        """Whether the host has memory for the input embeddings besides."""
        fit, host = self.fit, self.device.host_bytes
        if not self.offloads or fit is None or fit.embedding_bytes is None:
            return False
        if fit.activations.host_embeddings or host is None:
            return True
        inputs = 0 if fit.activations.offload else fit.inputs_bytes or 0
        return fit.host_bytes + inputs + fit.embedding_bytes <= host * HOST_SHARE

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of training, once the steps are known."""
        if self.rows is None or self.tokens_per_second is None:
            return None
        recipe = self.recipe
        tokens = recipe.steps * recipe.global_batch * recipe.max_length * recipe.answers
        return tokens * recipe.passes / self.tokens_per_second

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted tokens a second of all GPUs together, padding counted."""
        if self.fit is None or self.fit.seconds_per_token is None:
            return None
        ranks = self.placement.ranks
        return ranks * (DDP_EFFICIENCY if ranks > 1 else 1.0) / self.fit.seconds_per_token

    @property
    def hours(self) -> float | None:
        """Predicted hours of training; of a draft, those of a million tokens."""
        if self.seconds is not None:
            return self.seconds / 3600
        return 1e6 / self.tokens_per_second / 3600 if self.tokens_per_second else None

    @property
    def cost(self) -> str | None:
        """What the machines cost in `hours`; None without a price."""
        if self.price is None or self.hours is None:
            return None
        amount = self.hours * self.placement.nodes * self.price.per_hour
        unit = "" if self.seconds is not None else " for each million tokens"
        return f"{amount:,.2f} {self.price.currency}{unit}"

    def predicted(self) -> dict[str, Any]:
        """Predictions to compare a run with; None where unknown.

        `peak_bytes` counts torch's allocations, on a CPU the whole process.
        """
        memory = self.fit.memory if self.fit else None
        cuda = self.placement.device == "cuda"
        return {
            "peak_bytes": memory and (memory.allocated if cuda else memory.total),
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """For `plan.json` and `plan --json`."""
        return {
            "run_id": self.recipe.run_id if self.rows is not None else None,
            "recipe": asdict(self.recipe),
            "placement": asdict(self.placement),
            "device": asdict(self.device),
            "reasons": self.reasons,
            "lengths": asdict(self.lengths) if self.lengths else None,
            "rows": self.rows,
            "memory": _memory_json(self),
            "speed": {"tokens_per_second": self.tokens_per_second, "seconds": self.seconds},
            "cost": _cost_json(self),
        }


def _cost_json(plan: Plan) -> dict[str, Any] | None:
    if plan.price is None or plan.hours is None:
        return None
    hourly = plan.placement.nodes * plan.price.per_hour
    speed = plan.tokens_per_second
    return {
        "currency": plan.price.currency,
        "per_hour": hourly,
        "total": None if plan.seconds is None else hourly * plan.seconds / 3600,
        "per_million_tokens": hourly * 1e6 / speed / 3600 if speed else None,
    }


def _memory_json(plan: Plan) -> dict[str, Any] | None:
    if plan.fit is None:
        return None
    memory = plan.fit.memory
    return {
        "terms": memory.terms,
        "total": memory.total,
        "allocated": plan.predicted()["peak_bytes"],
        "free": plan.device.rank_bytes,
        "host": plan.fit.host_bytes,
        "moment": memory.moment,
    }
