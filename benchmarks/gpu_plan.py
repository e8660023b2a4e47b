"""Predicted against measured: peak memory and speed of training steps, on the GPU of this machine.

    python -m benchmarks.gpu_plan            an NVIDIA GPU of 80 GB or more, under 8 minutes
    python -m benchmarks.gpu_plan --dry      tiny models on a CPU: that it runs, from end to end

Predictions of all cases are written and flushed to disk before the first step runs. Models have
the shapes of presets and random weights made on the GPU; nothing is downloaded. The loss, the 4-bit
layers and attention are the real ones, and the prediction is made with the torch and transformers
that are installed here. Every case appends two lines of JSON, then one line sums up.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes as bnb
import peft
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from tuning import presets
from tuning.errors import SpecError
from tuning.models.kernels import attention, fuse, head
from tuning.models.survey import survey
from tuning.plan import memory
from tuning.plan.backends import FUSED, VARLEN
from tuning.plan.coefficients import Coefficients, Variant
from tuning.plan.memory import MemoryEstimate
from tuning.plan.speed import seconds_per_token
from tuning.training.simulate import coefficients
from tuning.training.simulate.__main__ import configs
from tuning.training.simulate.standins import PackedLinear
from tuning.training.simulate.step import DTYPES, build, read

RESULTS = Path(__file__).parent / "results" / "plan.jsonl"
DRY_RESULTS = Path("build") / "plan-dry.jsonl"
WARM, TIMED = 2, 3  # steps: the first makes the optimizer's state
GOALS = {"median": 0.03, "worst": 0.08, "under": 0.02}
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One configuration to foretell and to measure."""

    preset: str
    variant: Variant
    rows: int
    length: int
    rank: int = 16

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.length


PHI, LLAMA, FALCON = "phi-3-mini-4k-instruct", "llama-3.1-8b-instruct", "falcon-7b"
LORA, QLORA = Variant(), Variant(method="qlora")
CASES = (
    Case(PHI, LORA, 4, 2048),
    Case(PHI, replace(LORA, checkpointing=False), 4, 2048),
    Case(PHI, replace(LORA, checkpointing=False, dropout=True), 2, 2048),
    Case(PHI, QLORA, 4, 2048),
    Case(PHI, QLORA, 16, 2048),
    Case(PHI, replace(QLORA, checkpointing=False), 1, 4096),
    Case(PHI, replace(QLORA, checkpointing=False), 4, 2048, rank=64),
    Case(PHI, replace(QLORA, precision="float16", attention="sdpa"), 2, 2048),
    Case(LLAMA, LORA, 4, 2048),
    Case(LLAMA, replace(LORA, checkpointing=False), 4, 2048),
    Case(LLAMA, replace(LORA, attention="sdpa"), 2, 2048),
    Case(LLAMA, QLORA, 1, 2048),
    Case(LLAMA, QLORA, 64, 256),
    Case(LLAMA, replace(QLORA, checkpointing=False), 4, 2048),
    Case(PHI, replace(LORA, checkpointing=False, fused=True), 4, 2048),
    Case(LLAMA, replace(LORA, checkpointing=False, fused=True), 8, 2048),
    Case(LLAMA, replace(QLORA, fused=True), 1, 2048),
    Case(LLAMA, replace(QLORA, fused=True), 64, 256),
    Case(LLAMA, replace(QLORA, checkpointing=False, fused=True), 4, 2048),
    Case(FALCON, replace(QLORA, attention="sdpa", checkpointing=False), 2, 512),
)


def dry_cases() -> tuple[Case, ...]:
    """The same on a CPU, where torch's own attention is all there is."""
    cpu = Variant(attention="sdpa", device="cpu")
    return tuple(
        Case(preset, replace(cpu, method=method, checkpointing=again, fused=fused), 2, 96)
        for preset in (PHI, LLAMA, FALCON)
        for method in ("lora", "qlora")
        for again in (True, False)
        for fused in (False, True)
    )


def shape(case: Case) -> dict[str, Any]:
    """The model's config; on a CPU a small one of the same class."""
    config: dict[str, Any] = json.loads(json.dumps(configs()[case.preset]))
    if case.variant.device == "cpu":
        sizes = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 512}
        config |= sizes | {"intermediate_size": 688, "num_attention_heads": 4}
        if "num_key_value_heads" in config:
            config["num_key_value_heads"] = 2 if case.preset == LLAMA else 4
        config |= {"pad_token_id": 0}
    return config


# Foretell.


def foretell(cases: tuple[Case, ...]) -> dict[Case, MemoryEstimate]:
    """The ledger of each case, from a simulation with the libraries of this machine."""
    known: dict[str, Coefficients] = {}
    for preset in dict.fromkeys(case.preset for case in cases):
        some = [case for case in cases if case.preset == preset]
        known[preset] = coefficients(shape(some[0]), variants=[case.variant for case in some])
    return {case: estimate(case, known[case.preset]) for case in cases}


def estimate(case: Case, known: Coefficients) -> MemoryEstimate:
    """The ledger of a case from the coefficients of its model."""
    return memory.predict(
        known,
        method=case.variant.method,
        rank=case.rank,
        tokens=case.tokens,
        rows=case.rows,
        checkpointing=case.variant.checkpointing,
        precision=case.variant.precision,
        dropout=0.05 if case.variant.dropout else 0.0,
        attention=case.variant.attention,
        device=case.variant.device,
        fused=case.variant.fused,
    )


def foretold_speed(case: Case) -> float | None:
    """Tokens a second by the roofline; None for a GPU that is not in the table."""
    if case.variant.device == "cpu":
        return None
    preset = presets.find(case.preset)
    seconds = preset and seconds_per_token(
        preset.facts,
        card(),
        method=case.variant.method,
        checkpointing=case.variant.checkpointing,
        tokens=case.tokens,
        effective_length=case.length,
        rank=case.rank,
        precision=case.variant.precision,
        attention=case.variant.attention,
        fused=case.variant.fused,
    )
    return 1 / seconds if seconds else None


def card() -> presets.Gpu | None:
    """This machine's GPU in the table of GPUs, if it is there."""
    try:
        return presets.gpu(torch.cuda.get_device_name())
    except SpecError:
        return None


# Measure.


def make(case: Case) -> Any:
    """The base model with random weights, on the device, packed if the case is QLoRA."""
    config, variant = read(shape(case)), case.variant
    config.get_text_config().use_cache = False
    transformers.models.falcon.modeling_falcon.FalconLinear = torch.nn.Linear
    with torch.device(variant.device):
        base = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=DTYPES[variant.precision]
        )
    base.requires_grad_(False)
    if variant.method == "qlora":
        planned = build(shape(case), variant=variant_on_meta(variant)).named_modules()
        for name in [name for name, part in planned if isinstance(part, PackedLinear)]:
            base.set_submodule(name, pack(base.get_submodule(name), variant))
        base.is_loaded_in_4bit = True
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    head.install(base)
    return base


def variant_on_meta(variant: Variant) -> Variant:
    """The same with an attention that every class has: only the layers' names are asked for."""
    return replace(variant, attention="eager")


def pack(linear: Any, variant: Variant) -> Any:
    """A real 4-bit layer of `linear`."""
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=DTYPES[variant.precision],
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(variant.device)
    layer.bias = linear.bias
    return layer


def adapt(base: Any, case: Case) -> Any:
    """`base` with LoRA on every projection, as training has it."""
    variant = case.variant
    base.config._attn_implementation = VARLEN if variant.attention == "varlen" else "sdpa"
    options = LoraConfig(
        r=case.rank,
        lora_dropout=0.05 if variant.dropout else 0.0,
        target_modules=list(survey(base).linears),
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(base, options)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    base.gradient_checkpointing_disable()
    if variant.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.enable_input_require_grads()
    if variant.fused:
        fuse.fuse(tuned, FUSED)
    return tuned.train()


def batch(case: Case, vocab: int) -> dict[str, Any]:
    """Random tokens, all of them labelled, as trl's collators lay them out."""
    device, packed = case.variant.device, case.variant.attention == "varlen"
    ids = torch.randint(0, vocab, (case.rows, case.length), device=device)
    if not packed:
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0  # a row without padding would take another way through torch
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}
    ids = ids.reshape(1, -1)
    bounds = torch.arange(0, case.tokens + 1, case.length, dtype=torch.int32, device=device)
    positions = torch.arange(case.length, device=device).repeat(case.rows)[None]
    extra = {"position_ids": positions, "cu_seq_lens_q": bounds, "max_length_q": case.length}
    return {"labels": ids.clone()} | attention.without_mask({"input_ids": ids} | extra)


def step(tuned: Any, inputs: dict[str, Any], case: Case) -> None:
    """A forward and a backward as trl runs them."""
    dtype = DTYPES[case.variant.precision]
    with torch.autocast(case.variant.device, dtype):
        if case.variant.fused:
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            loss = tuned(**rest, scored=inputs["labels"]) / inputs["labels"].numel()
        else:
            loss = tuned(**inputs, fused_lm_head=True).loss
    loss.backward()


def measure(base: Any, case: Case, *, before: int = 0) -> dict[str, Any]:
    """Peak bytes and tokens a second of the case, without those allocated `before` the base."""
    gc.collect()  # the case before is in cycles
    tuned = adapt(base, case)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    cuda = case.variant.device == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)
    inputs = batch(case, base.get_input_embeddings().num_embeddings)

    def forward_and_backward() -> None:
        step(tuned, inputs, case)

    def once() -> None:
        forward_and_backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        for _ in range(WARM):
            once()
        found = _on_gpu(once, case, before) if cuda else _on_cpu(forward_and_backward)
    except torch.OutOfMemoryError as error:
        found = {"error": str(error).splitlines()[0]}
    optimizer.zero_grad()
    tuned.disable_input_require_grads()
    tuned.unload()  # leaves the base as it was; what is local here is freed on return
    if cuda:
        torch.cuda.empty_cache()
    return found


def _on_gpu(once: Any, case: Case, before: int) -> dict[str, Any]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(TIMED):
        once()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / TIMED
    free, whole = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        "allocated": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved() - before,
        "context": whole - free - reserved,
        "tokens_per_second": case.tokens / seconds,
    }


def _on_cpu(once: Any) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        once()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return {"step": max(itertools.accumulate(change for _, change in changes))}


# Report.


def compared(case: Case, said: MemoryEstimate, found: dict[str, Any]) -> float | None:
    """(predicted - measured) / measured: of what torch allocates, on a CPU of a step alone."""
    if "error" in found:
        return None
    if case.variant.device == "cpu":
        return said.step / float(found["step"]) - 1
    return said.allocated / float(found["allocated"]) - 1


def summary(errors: list[float]) -> dict[str, Any]:
    """Median and worst error, most under, and whether the goals are met."""
    found = {
        "median": statistics.median(map(abs, errors)),
        "worst": max(map(abs, errors)),
        "under": max(0.0, -min(errors)),
    }
    met = all(found[name] <= goal for name, goal in GOALS.items())
    return found | {"cases": len(errors), "goals": GOALS, "met": met}


def machine(dry: bool) -> dict[str, Any]:
    """What ran: libraries and device."""
    modules = (torch, transformers, trl, peft, bnb)
    return {
        "device": "CPU" if dry else torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in modules},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """Append one line of JSON, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def groups(cases: tuple[Case, ...]) -> Iterator[tuple[Any, list[Case], int]]:
    """Cases that share a base model in memory, with the model, and what is allocated beside it."""

    def key(case: Case) -> tuple[str, str, str]:
        return case.preset, case.variant.method, case.variant.precision

    for _, some in itertools.groupby(sorted(cases, key=key), key=key):
        members = list(some)
        gc.collect()  # of what ran before in this process
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        base = make(members[0])
        yield base, members, before
        del base
        if members[0].variant.device == "cuda":
            torch.cuda.empty_cache()


def run(cases: tuple[Case, ...], path: Path, *, seconds: float) -> dict[str, Any]:
    """Foretell and file, then measure and file, within about `seconds`; the summary."""
    start, errors = time.monotonic(), []
    about = machine(cases[0].variant.device == "cpu")
    foretold = foretell(cases)
    for case, said in foretold.items():
        record = asdict(said) | {"allocated": said.allocated, "total": said.total}
        speed = foretold_speed(case)
        write(path, {"kind": "predicted", "case": asdict(case), "speed": speed} | record | about)
    print(f"predicted {len(foretold)} cases in {time.monotonic() - start:.0f} s", flush=True)
    for base, members, before in groups(cases):
        for case in members:
            if time.monotonic() - start > seconds:
                print("out of time, skipped:", case, flush=True)
                continue
            found, said = measure(base, case, before=before), foretold[case]
            error = compared(case, said, found)
            if error is not None:
                errors.append(error)
            write(path, {"kind": "measured", "case": asdict(case), "error": error} | found | about)
            print(line(case, said, found, error), flush=True)
        del base
    result = summary(errors)
    write(path, {"kind": "summary", "seconds": time.monotonic() - start} | result | about)
    return result


def line(case: Case, said: MemoryEstimate, found: dict[str, Any], error: float | None) -> str:
    """One case for people."""
    v = case.variant
    flags = f"{v.method:5} {v.precision} {v.attention:6} {'gc' if v.checkpointing else '--'}"
    flags += " dropout" if v.dropout else ""
    flags += " fused" if v.fused else ""
    speed = f", {found['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in found else ""
    if error is None:
        return f"{case.preset:24} {flags} {case.rows}x{case.length}: {found['error']}"
    measured = found.get("allocated") or found["step"]
    predicted = said.allocated if "allocated" in found else said.step
    return (
        f"{case.preset:24} {flags} r{case.rank} {case.rows}x{case.length}: "
        f"{predicted / GIB:.3f} said, {measured / GIB:.3f} GiB found, {error:+.2%}{speed}"
    )


def main() -> int:
    """The command line; 1 where the goals are missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--seconds", type=float, default=420, help="start no case after these")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if not options.dry and not torch.cuda.is_available():
        print("no GPU here: --dry runs on a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        if options.dry:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        cases = dry_cases() if options.dry else CASES
        path = options.out or (DRY_RESULTS if options.dry else RESULTS)
        result = run(cases, path, seconds=options.seconds)
    print(json.dumps(result))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
