"""Check that a folder is a base model that can be trained, from headers alone.

A checkpoint that is incomplete, quantised, needs custom code or has only pickles is refused before
a GPU is paid for.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from tuning import files, safetensors
from tuning.errors import Problem, SpecError
from tuning.presets import quantised, stored
from tuning.presets.config import families

log = logging.getLogger(__name__)

MAX_JSON = 64 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"

# The files a model needs beside its weights; no README, no code, no second copy.
COMPANIONS = frozenset(
    {
        "config.json", "generation_config.json", INDEX,
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
        "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json",
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    }
)  # fmt: skip
GENERATION = "generation_config.json"
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHERS = {".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX"}
_WRAPPERS = ("gemma3", "mistral3")
_memory_lock = threading.Lock()


def needed(names: Iterable[str]) -> tuple[list[str], list[Problem]]:
    """The files of a repository or folder that a training run reads, and problems with them.

    Takes the weights that transformers loads: a single file before sharded ones. Ignores pickles,
    code, and second copies of the weights in another format (`consolidated.safetensors`,
    `original/`). An adapter beside the model is a problem: transformers would load it, too.
    """
    top = sorted(name for name in names if "/" not in name)
    tensors = [name for name in top if name.endswith(".safetensors")]
    if SINGLE in tensors:
        weights = [SINGLE]
        top = [name for name in top if name != INDEX]
    elif INDEX in top:
        weights = [name for name in tensors if "-of-" in name] or tensors
    else:
        weights = [n for n in tensors if not n.startswith(("consolidated", "adapter_"))]
    required = sorted({name for name in top if name in COMPANIONS} | set(weights))
    problems = [] if weights else [_no_weights(top)]
    if weights and SINGLE not in weights and INDEX not in top:
        what = f"is missing, by which the weights are found: {weights[0][:80]} is not {SINGLE}"
        change = f"download {INDEX}, too; a single file is to be called {SINGLE}"
        problems.append(Problem("BASE-106", INDEX, what, change))
    if "config.json" not in top:
        problem = Problem("BASE-103", "", "has no config.json", "name a Hugging Face model")
        if ADAPTER in top:
            what = "is an adapter, not a base model"
            problem = Problem("BASE-110", "", what, "name the base model")
        problems = [problem]
    elif ADAPTER in top:
        what = "lies beside the model, so that transformers would load the adapter with it"
        change = "move the adapter's files (adapter_*) into a folder of their own"
        problems.append(Problem("BASE-111", ADAPTER, what, change))
    if not any(name in top for name in _TOKENIZERS):
        what = "has no tokenizer (tokenizer.json or tokenizer.model)"
        change = "add the tokenizer's files of the same model"
        problems.append(Problem("BASE-107", "", what, change))
    return required, problems


def _no_weights(names: list[str]) -> Problem:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    others = {kind for name in names for end, kind in _OTHERS.items() if name.endswith(end)}
    if pickles:
        what = f"has only pickled weights ({pickles[0]}), which can run code and are never loaded"
        change = "convert them to safetensors, or use a revision that has them"
        return Problem("BASE-101", "", what, change)
    if others:
        what = f"has weights as {' and '.join(sorted(others))} only"
        return Problem("BASE-102", "", what, "use the model's safetensors repository")
    return Problem("BASE-102", "", "has no *.safetensors", "name a folder that has the weights")


def verify(folder: Path) -> dict[str, Any]:
    """Check the base model in `folder`; returns its parsed config.json.

    Raises SpecError with all problems.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        change = "name a folder, a preset, or org/model of the hub"
        raise SpecError.at("BASE-100", str(folder), what, change)
    names, problems = needed(path.name for path in folder.iterdir())
    config: dict[str, Any] = {}
    try:
        if "config.json" in names:
            config = json_object(folder / "config.json")
            problems += config_problems(config)
    except ValueError as error:
        change = "download the file again"
        problems.append(Problem("BASE-103", "config.json", str(error), change))
    problems += _generation_problems(folder / GENERATION)
    problems += _tensor_problems(folder, names, config)
    if problems:
        raise at(str(folder), problems)
    return config


def at(place: str, problems: Iterable[Problem]) -> SpecError:
    """The error of `problems` at `place`."""
    return SpecError(
        Problem(p.code, f"{place} {p.where}".strip(), p.what, p.change) for p in problems
    )


def config_problems(
    config: dict[str, Any], *, name: str = "", made_from: str | None = None
) -> list[Problem]:
    """Reasons why a model with this config.json cannot be trained.

    `name` is its own at the hub, `made_from` that of the model it was quantised from.
    """
    problems = []
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        change = "name a Hugging Face model"
        problems.append(Problem("BASE-103", "config.json", "has no model_type", change))
    elif config.get("auto_map") and not native(model_type):
        what = f"needs custom code (auto_map; {model_type} is not part of transformers)"
        change = "use a model that transformers supports; remote code is never run"
        problems.append(Problem("BASE-108", "config.json", what, change))
    if named := config.get("transformers_weights"):
        what = f"makes transformers load {str(named)[:80]!r} in place of the model's weights"
        change = "remove the key transformers_weights, or use the model's original files"
        problems.append(Problem("BASE-112", "config.json", what, change))
    if reason := stored.refusal(how := stored.of(config)):
        change = stored.remedy(how, name, made_from)
        problems.append(Problem("BASE-109", "config.json", reason, change))
    return problems


def native(model_type: str) -> bool:
    """True if transformers has the class, checked without importing it."""
    if model_type in families() or model_type in _WRAPPERS:
        return True
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return False
    tables = Path(next(iter(spec.submodule_search_locations))) / "models" / "auto"
    paths = (tables / "auto_mappings.py", tables / "configuration_auto.py")
    return any(f'("{model_type}", ' in path.read_text() for path in paths if path.is_file())


def _generation_problems(path: Path) -> Iterator[Problem]:
    """What of generation_config.json, which transformers reads with the model, it cannot use."""
    change = "repair the value, or remove the file: training needs none"
    try:
        record = json_object(path) if path.is_file() else {}
    except ValueError as error:
        yield Problem("BASE-103", GENERATION, str(error), change)
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = record.get(key)
        ids = value if isinstance(value, list) else [value]
        if not all(each is None or type(each) is int for each in ids):
            yield Problem("BASE-103", GENERATION, f"{key} is {value!r:.80}, no token's id", change)
    for key in ("max_new_tokens", "max_length"):
        value = record.get(key)
        if value is not None and (type(value) is not int or value < 1):
            what = f"{key} is {value!r:.80}, no positive number"
            yield Problem("BASE-103", GENERATION, what, change)


def _tensor_problems(folder: Path, names: Collection[str], config: dict[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    where: dict[str, str] = {}  # tensor -> file
    tensors: dict[str, safetensors.Tensor] = {}
    for name in (name for name in names if name.endswith(".safetensors")):
        try:
            for key, tensor in safetensors.read_header(folder / name).items():
                where[key], tensors[key] = name, tensor
        except (OSError, ValueError) as error:
            code = "BASE-104" if "LFS" in str(error) else "BASE-105"
            what = (
                str(error) if isinstance(error, ValueError) else f"cannot be read: {error.strerror}"
            )
            change = "git lfs pull" if code == "BASE-104" else "download the file again"
            problems.append(Problem(code, name, what, change))
    how = stored.of(config)
    kinds = {tensor.dtype for tensor in tensors.values()}
    if how == stored.PLAIN:
        whole = [key for key, each in tensors.items() if _is_integer_weight(key, each)]
        if whole:
            kind = tensors[whole[0]].dtype.lower()
            what = (
                f"holds {len(whole)} weights as whole numbers ({whole[0][:80]}: {kind}), and "
                "config.json has no quantization_config that says what they stand for"
            )
            problems.append(Problem("BASE-109", "*.safetensors", what, stored.remedy(kind)))
        for kind in sorted(k for k in kinds if k.startswith(("F8", "F4", "F6"))):
            reason = stored.refusal(kind.lower())
            problems.append(Problem("BASE-109", "*.safetensors", str(reason), stored.remedy(kind)))
    elif how in stored.UNPACKED and not problems:
        try:
            quantised.weights(tensors, config)
        except ValueError as error:
            change = "download the model again, or use its 16-bit weights"
            problems.append(Problem("BASE-113", "*.safetensors", str(error), change))
    if INDEX in names and not problems:
        problems += _index_problems(folder / INDEX, where, names)
    return problems


def _is_integer_weight(name: str, tensor: safetensors.Tensor) -> bool:
    """Whether it is a matrix that a class multiplies with; buffers may hold whole numbers."""
    whole = tensor.dtype.startswith(("I", "U", "BOOL"))
    return whole and name.endswith("weight") and len(tensor.shape) > 1


def _index_problems(path: Path, where: dict[str, str], names: Collection[str]) -> list[Problem]:
    """Problems of an index whose tensors are not in the files it says."""
    try:
        record = json_object(path)
        index = record["weight_map"]
        if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
            raise ValueError("weight_map is not a mapping of names to files")
        if not isinstance(record.get("metadata"), dict):  # transformers reads it
            raise ValueError("has no metadata")
    except (KeyError, ValueError) as error:
        what = "has no weight_map" if isinstance(error, KeyError) else str(error)
        return [Problem("BASE-106", path.name, what, "download the file again")]
    absent = sorted(set(index.values()) - set(names))
    if absent:
        what = f"{len(absent)} of {len(set(index.values()))} weight files are missing: {absent[0]}"
        return [Problem("BASE-106", path.name, what, "download the model again, all of it")]
    lost = [tensor for tensor, file in index.items() if where.get(tensor) != file]
    if lost:
        what = f"{len(lost)} tensors are not where it says, such as {lost[0][:80]}"
        return [Problem("BASE-106", path.name, what, "download the model again, all of it")]
    return []


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError with the problem."""
    if path.stat().st_size > MAX_JSON:
        raise ValueError("is too large")
    if path.read_bytes().startswith(safetensors.LFS):
        raise ValueError("is a pointer of git LFS, not the file itself; git lfs pull gets it")
    try:
        value = files.read_json(path)
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    return value


def digest(path: Path, memory: Path) -> str:
    """The sha256 of `path`, from the file `memory` or computed and recorded there."""
    path = path.resolve()
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    known = _remembered(memory).get(str(path))
    if isinstance(known, list) and known[:2] == stamp:
        return str(known[2])
    sha256 = files.digest_file(path)
    with _memory_lock:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(memory, _remembered(memory) | {str(path): [*stamp, sha256]})
        except OSError as error:  # a read-only home costs time, not the run
            log.info("cannot remember digests in %s: %s", memory, error)
    return sha256


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        value = files.read_json(memory)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
