"""Exported GGUF files, read back by gguf's own reader and compared with what they are made of."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
import transformers
from commands import tuning
from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers, pre_tokenizers

from tuning import files
from tuning.errors import SpecError
from tuning.models import merge
from tuning.models.load import load_tokenizer, read_config
from tuning.training import train

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

from tuning.models.gguf_files import export, families, modelfile, vocabulary  # noqa: E402

Base = Callable[..., Path]
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def tuned(folder: Path, base: Path, **changes: Any) -> Path:
    """A tiny trained adapter with its recipe beside it."""
    recipe = tiny_runs.recipe(dropout=0.0, learning_rate=2e-2, **changes)
    train.work(tiny_runs.request(folder, base, recipe, tiny_runs.placement()))
    record = {"recipe": json.loads(json.dumps(vars(recipe), default=list))}
    (folder / "adapter" / "tuning.json").write_text(json.dumps(record))
    return folder / "adapter"


@pytest.fixture(scope="module", params=SUPPORTED)
def pair(
    request: pytest.FixtureRequest, tiny_base: Base, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A base of each family and its adapter."""
    base = tiny_base(request.param)
    return base, tuned(tmp_path_factory.mktemp(request.param), base)


def held(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Keys and tensors of a GGUF file, the tensors as float32 in torch's order of dimensions."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        each.name: torch.tensor(gguf.quants.dequantize(each.data, each.tensor_type)).reshape(
            *reversed(each.shape.tolist())
        )
        for each in reader.tensors
    }
    return keys, tensors


def as_published(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor of GGUF in the order of rows that transformers has: the inverse of the exporter."""
    if config.model_type not in ("llama", "mistral") or not name.endswith(("q_proj", "k_proj")):
        return tensor
    heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
    rows = torch.arange(tensor.shape[0]).reshape(heads, -1, 2).transpose(1, 2).reshape(-1)
    return tensor[rows]


def compare_model(path: Path, folder: Path) -> dict[str, Any]:
    """Every tensor of the model in `folder` is in the GGUF at `path`, and no other; its keys."""
    keys, tensors = held(path)
    config, published = read_config(folder), load_file(folder / "model.safetensors")
    if config.tie_word_embeddings:
        published.pop("lm_head.weight", None)
    names = families.Names(config)
    for name, tensor in published.items():
        layer = name.rpartition(".")[0]
        back = as_published(layer, tensors.pop(names(name, "")), config)
        assert torch.equal(tensor.float(), back), name
    assert set(tensors) <= {"rope_freqs.weight"}
    return keys


def test_an_adapter_is_read_back_as_it_is(pair, tmp_path):
    """Each LoRA matrix in llama.cpp's names, float32, and the alpha it was trained with."""
    base, adapter = pair
    made = export.export(base, adapter, tmp_path / "out", with_base=True)

    assert ["Modelfile", "adapter.gguf", "base.gguf"] == [path.name for path in made]
    keys, tensors = held(tmp_path / "out" / "adapter.gguf")
    config = read_config(base)
    assert ("adapter", "lora") == (keys["general.type"], keys["adapter.type"])
    assert (
        json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
        == (keys["adapter.lora.alpha"])
    )
    names = families.Names(config)
    trained = load_file(adapter / "adapter_model.safetensors")
    assert trained
    for name, tensor in trained.items():
        module, part = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        back = tensors.pop(f"{names(module + '.weight', '')}.{part.lower()}")
        if part == "lora_B":
            back = as_published(module, back, config)
        assert torch.equal(tensor.float(), back), name
    assert not tensors
    compare_model(tmp_path / "out" / "base.gguf", base)


def test_a_merged_model_is_read_back_as_merge_writes_it(pair, tmp_path):
    """The tensors of `merge`, its settings, and the vocabulary with the tokens' own numbers."""
    base, adapter = pair
    merge.merge(base, adapter, tmp_path / "merged")
    export.export(base, adapter, tmp_path / "out", merged=True)

    keys = compare_model(tmp_path / "out" / "model.gguf", tmp_path / "merged")
    config, tokenizer = read_config(base), load_tokenizer(base)
    arch = keys["general.architecture"]
    assert config.num_hidden_layers == keys[f"{arch}.block_count"]
    assert config.num_key_value_heads == keys[f"{arch}.attention.head_count_kv"]
    assert families.context_length(config) == keys[f"{arch}.context_length"]
    assert config.rms_norm_eps == pytest.approx(keys[f"{arch}.attention.layer_norm_rms_epsilon"])
    vocabulary_ = tokenizer.get_vocab()
    assert vocabulary_ == {
        text: id for id, text in enumerate(keys["tokenizer.ggml.tokens"]) if text in vocabulary_
    }
    assert tokenizer.chat_template == keys["tokenizer.chat_template"]
    assert tokenizer.eos_token_id == keys["tokenizer.ggml.eos_token_id"]
    assert not keys["tokenizer.ggml.add_bos_token"]


def test_exporting_twice_gives_the_same_bytes(pair, tmp_path):
    """No clock and no path is in the files."""
    base, adapter = pair
    one = export.export(base, adapter, tmp_path / "one", with_base=True)
    other = export.export(base, adapter, tmp_path / "other", with_base=True)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_the_scale_of_rslora_is_that_of_llama_cpp(tiny_base, tmp_path):
    """llama.cpp divides alpha by the rank; rsLoRA by its root."""
    base = tiny_base("llama")
    adapter = tuned(tmp_path, base, rslora=True)
    export.export(base, adapter, tmp_path / "out")

    keys, _ = held(tmp_path / "out" / "adapter.gguf")
    assert 16.0 / 8**0.5 == pytest.approx(keys["adapter.lora.alpha"] / 8)


def test_llama_3_divides_its_frequencies(tmp_path):
    """The factors by which frequencies are divided: 1 for the fastest, `factor` for the slowest."""
    base = tiny_models.build("llama", tmp_path / "base", rope_parameters=LLAMA3, head_dim=32)
    export.export(base, tuned(tmp_path, base), tmp_path / "out", with_base=True)

    _, tensors = held(tmp_path / "out" / "base.gguf")
    factors = tensors["rope_freqs.weight"]
    assert (16,) == tuple(factors.shape)
    assert pytest.approx([1.0, 8.0], abs=1e-5) == [factors[0].item(), factors[-1].item()]
    assert (factors.diff() >= -1e-5).all()


@pytest.mark.parametrize(
    ("family", "shape", "code"),
    [
        ("phi3", {}, "MODEL-320"),
        ("gemma3", {}, "MODEL-320"),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                }
            },
            "MODEL-321",
        ),
        ("llama", {"hidden_act": "gelu"}, "MODEL-321"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, family, shape, code):
    """Nothing is written; the remedy is llama.cpp's own converter."""
    base = tiny_models.build(family, tmp_path / "base", **shape)
    adapter = tuned(tmp_path, base)
    with pytest.raises(SpecError, match=r"convert_hf_to_gguf\.py") as refused:
        export.export(base, adapter, tmp_path / "out", merged=True)
    assert [code] == [problem.code for problem in refused.value.problems]
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_llama_cpp_does_not_load_is_merged(tiny_base, tmp_path):
    """DoRA: refused as an adapter, exported as a model."""
    base = tiny_base("qwen3")
    adapter = tuned(tmp_path, base, dora=True)
    with pytest.raises(SpecError, match=r"DoRA.*--merged") as refused:
        export.export(base, adapter, tmp_path / "out")
    assert ["MODEL-323"] == [problem.code for problem in refused.value.problems]
    export.export(base, adapter, tmp_path / "out", merged=True)
    merge.merge(base, adapter, tmp_path / "merged")
    compare_model(tmp_path / "out" / "model.gguf", tmp_path / "merged")


WORDS, REST = vocabulary._WORDS, vocabulary._REST


def _splitting(*steps: Any, normalizer: Any = None, ignore_merges: bool = False) -> Any:
    """A tokenizer of the rule `steps`."""
    backend = copy.deepcopy(tiny_models.build_tokenizer("chatml").backend_tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    backend.model.ignore_merges = ignore_merges
    if normalizer:
        backend.normalizer = normalizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def _words(digits: str, rest: str = REST) -> list[Any]:
    split = pre_tokenizers.Split(Regex(WORDS + digits + rest), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN2, LLAMA3_RULE = _words(r"\p{N}"), _words(r"\p{N}{1,3}")


@pytest.mark.parametrize(
    ("name", "steps", "more"),
    [
        ("gpt-2", [GPT2], {}),
        ("smollm", [pre_tokenizers.Digits(individual_digits=True), GPT2], {}),
        ("qwen2", QWEN2, {"normalizer": normalizers.NFC()}),
        ("llama-bpe", LLAMA3_RULE, {"ignore_merges": True}),
        (None, LLAMA3_RULE, {"ignore_merges": False}),
        (None, QWEN2, {"normalizer": normalizers.Lowercase()}),
        (None, _words(r"\p{N}{1,2}"), {}),
        (None, _words(r"\p{N}", r"| ?[^\s\p{L}\p{N}]+"), {}),
        (None, [pre_tokenizers.ByteLevel(add_prefix_space=True)], {}),
        (None, [pre_tokenizers.Digits(individual_digits=False), GPT2], {}),
        (None, [pre_tokenizers.Whitespace(), GPT2], {}),
    ],
)
def test_the_rule_of_a_tokenizer_has_a_name_or_is_refused(name, steps, more):
    """By what the tokenizer does, not by whose it is; near misses have none."""
    tokenizer = _splitting(*steps, **more)
    assert name == vocabulary.pre_tokenizer(tokenizer)
    expected = [] if name else ["MODEL-322"]
    assert expected == [each.code for each in vocabulary.problems(tokenizer, "base")]


LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    + tiny_models.CHATML
)
COUNTED = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"


def _renderer(template: str, bos: str) -> Any:
    import jinja2

    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)

    def render(messages: list[Any], tools: Any, ask: bool) -> str:
        return compiled.render(messages=messages, add_generation_prompt=ask, bos_token=bos)

    return render


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            tiny_models.CHATML,
            '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
            '<|im_end|>\n{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
            '<|im_start|>assistant\n{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n'
            "{{ end }}{{ end }}",
        ),
        (
            DEFAULT_SYSTEM,
            '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe good.{{ end }}'
            '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
            '{{ else if eq .Role "user" }}<|im_end|>\n<|im_start|>user\n{{ .Content }}<|im_end|>\n'
            '<|im_start|>assistant\n{{ else if eq .Role "assistant" }}{{ .Content }}'
            "{{ end }}{{ end }}",
        ),
        (
            "<s>" + LLAMA2.replace("{{ bos_token }}", ""),
            '{{ range .Messages }}{{ if eq .Role "user" }}[INST] {{ .Content }} [/INST]'
            '{{ else if eq .Role "assistant" }} {{ .Content }} </s>{{ end }}{{ end }}',
        ),
        (COUNTED, None),
        ("{% for m in messages %}{{ m.content }}{{ '{{' }}{% endfor %}", None),
    ],
)
def test_the_template_of_a_modelfile(template, expected):
    """A Go template where turns are plain, without the BOS that llama.cpp adds; else none."""
    found = modelfile.turns(_renderer(template, "<s>"), "<s>")
    assert expected == (found.go(with_head=False) if found else None)


def test_the_command_on_the_bundled_model(tmp_path, tiny_base):
    """What it wrote is printed; a contradiction and a full folder are refused."""
    base = tiny_base("llama")
    adapter = tuned(tmp_path, base)
    out = tmp_path / "out"
    command = ("export", "gguf", "--base", base, "--adapter", adapter, "--output", out)
    done = tuning(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out / "Modelfile"), str(out / "adapter.gguf")]
    text = (out / "Modelfile").read_text()
    assert "ADAPTER ./adapter.gguf" in text and 'PARAMETER stop "<|im_end|>"' in text
    assert "base.gguf is not here" in text
    again = tuning(*command)
    assert again.returncode == 11 and "IMAGE-103" in again.stderr
    both = tuning(*command, "--merged", "--with-base")
    assert both.returncode == 2 and "USE-110" in both.stderr


def test_a_tensor_without_a_name_is_refused(tiny_base, tmp_path):
    """A base with a tensor that the family does not have leaves no half a file."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("qwen3"), base)
    adapter = tuned(tmp_path, base)
    tensors = load_file(base / "model.safetensors") | {"model.odd.weight": torch.zeros(2, 2)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"model\.odd\.weight") as refused:
        export.export(base, adapter, tmp_path / "out", with_base=True, any_base=True)
    assert ["MODEL-321"] == [problem.code for problem in refused.value.problems]
    assert not (tmp_path / "out").exists()
    assert files.read_json(base / "config.json")["model_type"] == "qwen3"
