"""configs/classes.yaml: what is measured of each class in transformers' causal-LM mapping.

    python tools/write_classes.py [MODEL_TYPE ...]    measure all (a quarter of an hour), or some

A tiny random checkpoint of each (tests/architectures.py) is loaded, adapted and trained by one step
as a run does: which attention its class has, whether a token sees the ones after it, whether packed
documents stay apart, whether each adapter gets a gradient. What LoRA reaches is counted on the
default config at its real size. A plan reads the table without torch.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from trl.trainer.utils import add_fused_lm_head

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import architectures  # noqa: E402

from tuning.models import four_bit, lora  # noqa: E402
from tuning.models.kernels import apart, whole  # noqa: E402
from tuning.models.load import load_base  # noqa: E402
from tuning.models.survey import survey  # noqa: E402
from tuning.plan.backends import FUSED, HEAD, VARLEN  # noqa: E402
from tuning.presets import Class  # noqa: E402
from tuning.training import own_head, trainer  # noqa: E402
from tuning.training.simulate.child import judge  # noqa: E402

TABLE = ROOT / "configs" / "classes.yaml"
HEADING = "# Measured on tiny models by tools/write_classes.py; see there. By model_type.\n"
IDS = torch.arange(5, 53).reshape(2, 24)
NF4 = {"type": "nf4", "double": True, "compute": "float32"}
SAME = 1e-4  # of the spread of log-probabilities
LEAK = 1e-4  # of the largest logit: later words must change nothing


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The record of one class."""
    if name in architectures.UNBUILT:
        return {"unmeasured": architectures.UNBUILT[name]}
    try:
        architectures.write(name, folder)
        base = load_base(
            folder, precision="float32", quantisation=None, device="cpu", attention="sdpa"
        )
        record = {"architecture": type(base).__name__, "attention": apart.plain(base)}
        if refusal := survey(base).verdict().refusal(dora=False, kind=Class(**reach(name))):
            return record | {"refused": refusal[0]}
        record |= _settled(folder)
        if refused := record.get("refused") or _trained(base):
            return record | {"refused": refused}
    except Exception as error:  # whatever a class may raise
        return {"refused": f"fails in transformers ({_words(error)})"}
    try:
        base = load_base(
            folder, precision="float32", quantisation=NF4, device="cpu", attention="sdpa"
        )
        if refused := _packed(base) or _trained(base):
            return record | {"four_bit": refused}
    except Exception as error:
        return record | {"four_bit": f"fails in 4 bits ({_words(error)})"}
    return record


def reach(name: str) -> dict[str, Any]:
    """What LoRA reaches of the class's default config, at its real size and without memory."""
    kind = next(k for k in MODEL_FOR_CAUSAL_LM_MAPPING if k.model_type == name)
    try:
        found, *_ = judge(kind().to_dict())
    except Exception as error:  # some have no default
        logging.debug("%s: %s", name, error)
        return {}
    return {} if found.refused else {"reach": found.text(), "share": round(found.share, 4)}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _packed(base: Any) -> str:
    """What is wrong with the packing, if anything is."""
    share = four_bit.share(survey(base), dict(four_bit.packed(base)))
    return "" if share >= lora.REACHED else f"has only {share:.0%} of its weights packed"


def _settled(folder: Path) -> dict[str, Any]:
    """The attention, packing and head with which a run computes what transformers does."""
    base = load_base(folder, precision="float32", quantisation=None, device="cpu")
    plain = apart.plain(base)
    tuned = lora.put(base, {"r": 8, "task_type": "CAUSAL_LM"}, survey(base).adaptable)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.name_backbone(base)
    add_fused_lm_head(base)
    own = own_head.differs(tuned, torch.float32, SAME)
    kernels = [kernel for kernel in FUSED if not own or kernel != HEAD]
    found = {"own_head": True} if own else {}
    for packing in (True, False):
        for way in (VARLEN, plain) if packing else (plain,):
            try:
                whole.replace(tuned, kernels, way, precision=torch.float32, packing=packing)
            except Exception as error:  # it has no such attention
                logging.debug("%s: %s", way, error)
            else:
                attention = base.config._attn_implementation
                return {"attention": attention, "packing": packing} | found
    return {"refused": "computes another loss with our attention than without it"}


def _trained(base: Any) -> str:
    """Why a step does not train each adapter, if it does not."""
    found = survey(base)
    tuned = lora.put(base, {"r": 8, "task_type": "CAUSAL_LM"}, found.adaptable).eval()
    weights = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    later = IDS.clone()
    later[:, 16:] += 7
    with torch.no_grad():
        one, other = (tuned(input_ids=ids, use_cache=False).logits for ids in (IDS, later))
    if (one - other)[:, :16].abs().max() > LEAK * one.abs().max():
        return "sees the tokens that it is to predict"
    loss = tuned(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    grads = torch.autograd.grad(
        torch.nn.functional.cross_entropy(loss[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()),
        list(weights.values()),
        allow_unused=True,
    )
    dead = [n for n, grad in zip(weights, grads, strict=True) if grad is None or not grad.any()]
    if dead:
        name = dead[0].removeprefix("base_model.model.").partition(".lora_")[0]
        return f"gives no gradient to {len(dead)} adapters, such as {name}"
    return ""


def main(names: list[str]) -> None:
    """Measure, and write the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8")) if names else {}
    for name in names or architectures.model_types():
        with tempfile.TemporaryDirectory() as folder:
            table[name] = measure(name, Path(folder) / "model") | reach(name)
        print(name, table[name], flush=True)
    text = yaml.safe_dump(dict(sorted(table.items())), sort_keys=False, width=100)
    TABLE.write_text(HEADING + text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
