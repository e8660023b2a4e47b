"""What there is to compute with, on machines of many kinds.

The probe is the real one, in a process of its own; the driver's libraries that it loads are a
stand-in (`fake_driver.c`) that answers what real machines answered (`gpu_machines.py`).
"""

import dataclasses
import importlib.metadata
import importlib.util

import fake_driver
import pytest
from fake_driver import NOT_SUPPORTED, Card, Machine
from gpu_machines import A10, A100, BROKEN, H100, MACHINES, MIG, T4, TWO

import tuning.plan as plan
from tuning import presets
from tuning.errors import SpecError
from tuning.plan import device, probe, torch_build
from tuning.plan.torch_build import TorchBuild
from tuning.spec import parse

CU126, CU130 = TorchBuild("2.13.0+cu126", (12, 6)), TorchBuild("2.13.0+cu130", (13, 0))
CPU_BUILD = TorchBuild("2.13.0+cpu", None)


@pytest.fixture
def on(tmp_path, monkeypatch):
    """Detects the device of a machine, with a build of torch installed."""

    def detect(machine, build=CU130, visible=None):
        fake_driver.install(machine, tmp_path, monkeypatch)
        monkeypatch.setattr(torch_build, "installed", lambda: build)
        monkeypatch.setattr(device, "_free_memory", lambda: 125_000 << 20)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return device.detect()

    return detect


def spec_of(model="llama-3.1-8b-instruct", method="qlora", instance=""):
    """A Workspace that tunes `model`."""
    resource = f"resource: {{instanceType: {instance}}}" if instance else ""
    return parse(
        f"""
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: w}}
{resource}
tuning:
  method: {method}
  preset: {{name: {model}}}
  input: {{urls: ["https://example.com/d.jsonl"]}}
  output: {{image: registry.example.com/a/b:c, imagePushSecret: s}}
""",
        origin="w",
    )


def refusal(here):
    """The code with which a plan for `here` is refused, or ""; sizes do not count."""
    try:
        plan.draft(spec_of("phi-3-mini-4k-instruct"), here=here)
    except SpecError as error:
        return error.problems[0].code if not error.problems[0].code.startswith("PLAN-12") else ""
    return ""


@pytest.mark.parametrize("kind", MACHINES)
def test_each_kind_of_machine_is_planned_as_what_it_is(kind, on):
    """Card, number, memory of the slice or card, precision, and the build of torch that runs there;
    another build is refused before weights move."""
    machine, expected = MACHINES[kind]
    found = on(machine)

    assert ("cuda", expected.name, expected.gpus) == (found.kind, found.name, found.count)
    assert found.memory_bytes / 2**30 == pytest.approx(expected.gib, abs=0.06)
    assert (expected.bf16, expected.build) == (found.bf16, str(found.engine))
    assert min(card.capability for card in machine.cards) == found.capability
    assert machine.driver == found.driver
    assert all(card.virtual_memory for card in machine.cards) == found.virtual_memory
    assert expected.cu130 == refusal(found)
    assert expected.cu126 == refusal(dataclasses.replace(found, torch=CU126))
    assert not refusal(dataclasses.replace(found, torch=None))  # a plan only: nothing is installed


@pytest.mark.parametrize(
    ("kind", "build", "words"),
    [
        ("v100", CU130, ["no kernels", "7.0", "TORCH_INDEX=cu126"]),
        ("driver 550", CU130, ["550.127.08 runs CUDA 12.4", "TORCH_INDEX=cu126", "580.65.06"]),
        ("driver 470", CU126, ["470.256.02 runs CUDA 11.4", "Change: update", "525.60.13"]),
        ("b200", CU126, ["10.0", "580.65.06", "TORCH_INDEX=cu130"]),
        ("gb10", CU126, ["12.1", "TORCH_INDEX=cu130"]),
        ("cards of which no build runs both", CU126, ["10.0", "CUDA_VISIBLE_DEVICES"]),
        *(
            ("v100", TorchBuild(f"2.13.0+cu{a}{b}", (a, b)), ["7.0", "TORCH_INDEX=cu126"])
            for a, b in ((12, 8), (12, 9), (13, 2))
        ),
        ("driver 550", TorchBuild("2.12.0", (13, 2)), ["needs CUDA 13.2", "TORCH_INDEX=cu126"]),
    ],
)
def test_a_refusal_names_the_build_of_torch_or_the_driver_that_fits(kind, build, words, on):
    """What is wrong, and what to do on this machine, cluster included."""
    with pytest.raises(SpecError) as caught:
        plan.draft(spec_of(), here=on(MACHINES[kind][0], build))

    (problem,) = caught.value.problems
    assert all(word in str(problem) for word in words), str(problem)
    assert ("TORCH_INDEX" in str(problem)) == ("images.cu1" in str(problem))


@pytest.mark.parametrize("cuda", [(11, 8), (14, 0)])
def test_a_build_of_a_cuda_that_no_table_lists_is_not_judged(cuda, on):
    """The card itself says whether there are kernels."""
    here = on(dataclasses.replace(MACHINES["v100"][0], cuda=14000), TorchBuild("9", cuda))
    assert plan.draft(spec_of(), here=here).device == here


def test_a_build_of_a_newer_minor_version_runs_on_an_older_driver(on):
    """CUDA's minor version compatibility: cu128 runs on a driver of CUDA 12.2."""
    here = on(MACHINES["a100-40"][0], TorchBuild("2.11.0+cu128", (12, 8)))

    assert not refusal(here)


def test_a_card_that_no_table_lists_is_judged_by_its_capability(on):
    """A GTX 1080 and a Quadro M2000: bitsandbytes packs on the first; a K40 has no build at all."""
    gtx = on(Machine("580.65.06", 13000, (Card("NVIDIA GeForce GTX 1080", (6, 1), 8110),)), CU126)
    old = on(Machine("535.54.03", 12020, (Card("Quadro M2000", (5, 2), 4040),)), CU126)
    older = on(Machine("470.256.02", 11040, (Card("Tesla K40m", (3, 5), 11441),)), CU126)

    assert ["", "PLAN-106", "PLAN-106"] == [refusal(gtx), refusal(old), refusal(older)]


@pytest.mark.parametrize("code", BROKEN)
def test_a_driver_that_does_not_work_is_named_where_a_gpu_is_needed(code, on, monkeypatch):
    """The processor is used, and PLAN-102 says what is wrong with the GPU and what to do."""
    monkeypatch.setattr(device, "PATIENCE", 1.0)
    here = on(Machine("580.65.06", 13000, (), error=code))
    reason, remedy = BROKEN[code]

    assert "cpu" == here.kind and reason in str(here)
    with pytest.raises(SpecError, match="PLAN-102") as caught:
        plan.draft(spec_of(), here=here)
    assert reason in str(caught.value) and remedy in str(caught.value)


def test_without_any_driver_there_is_nothing_to_explain(monkeypatch, tmp_path):
    """A machine without NVIDIA's driver is a CPU."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    answer = device._ask()
    if answer["error"][0] != device.MISSING or answer["nodes"]:
        pytest.skip("this machine has NVIDIA's driver")

    assert ("cpu", "") == (device.of_answer(answer, CU130).kind, device.detect().no_gpu)


@pytest.mark.parametrize(
    ("nodes", "elsewhere", "words"),
    [
        (True, "/usr/local/nvidia/lib64", ["LD_LIBRARY_PATH=/usr/local/nvidia/lib64"]),  # GKE
        (True, None, ["NVIDIA_DRIVER_CAPABILITIES=compute,utility"]),  # "utility" alone
        (False, "/usr/lib/wsl/lib", ["LD_LIBRARY_PATH=/usr/lib/wsl/lib"]),
    ],
)
def test_a_driver_that_the_loader_does_not_find_is_named(nodes, elsewhere, words):
    """Mounted where nobody looks, or only half of it given to the container."""
    error = [device.MISSING, "libcuda.so.1: cannot open shared object file"]
    answer = {"devices": [], "nodes": nodes, "elsewhere": elsewhere, "error": error}
    with pytest.raises(SpecError, match="PLAN-102") as caught:
        plan.draft(spec_of(), here=device.of_answer(answer, CU130))

    assert all(word in str(caught.value) for word in words)


def test_the_build_for_processors_leaves_the_gpu_alone(on):
    """The CPU is used, and said to be; a model that needs a GPU names the build to install."""
    here = on(MACHINES["v100"][0], CPU_BUILD)

    assert "cpu" == here.kind and "2.13.0+cpu" in str(here)
    with pytest.raises(SpecError, match=r"PLAN-102 .*TORCH_INDEX=cu126"):
        plan.draft(spec_of(), here=here)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0", "H100-SXM5-80GB"),
        ("1,0", "H100-SXM5-80GB + T4"),
        ("1,-1,0", "T4"),
        ("GPU-bbbb", "T4"),
        (f"{MIG}", "A100-PCIE-80GB MIG 1g.10gb"),
        ("7", None),
        ("-1", None),
        ("", None),
        ("0,0", None),
        ("all", None),
        ("none", None),
    ],
)
def test_cuda_visible_devices_is_obeyed(visible, names, on):
    """Indices, UUIDs, slices, and none at all: as CUDA itself reads them."""
    here = on(Machine("580.65.06", 13000, TWO), visible=visible)

    assert (names or "cpu") == (here.name if here.kind == "cuda" else "cpu")
    assert ("CUDA_VISIBLE_DEVICES" in here.no_gpu) == (names is None)
    assert ("name each once" in here.remedy) == (visible == "0,0")


def gib(card: Card, free: float) -> Card:
    """The card with so much free memory."""
    return dataclasses.replace(card, free=int(free * 1024))


GT_710 = Card("NVIDIA GeForce GT 710", (3, 5), 1998)
GTX_1080 = Card("NVIDIA GeForce GTX 1080 Ti", (6, 1), 11162)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 24080)
DISPLAY = Card("NVIDIA DGX Display", (7, 5), 3911)


@pytest.mark.parametrize(
    ("cards", "visible", "keep"),
    [
        ([*[H100] * 3, gib(H100, 4.9), *[H100] * 4], None, "0,1,2,4,5,6,7"),
        ([gib(H100, 2), H100], None, "1"),
        ([*[A100] * 4, DISPLAY], None, "0,1,2,3"),
        ([RTX_4090, GT_710], None, "0"),
        ([RTX_4090, GTX_1080], None, "0"),
        ([gib(H100, 2), H100], "1,0", "1,0 shows: 1"),
        ([H100, H100], None, ""),
        ([H100, gib(H100, 60)], None, ""),
        ([gib(H100, 1), gib(H100, 2)], None, ""),
        ([gib(H100, 1)], None, ""),
    ],
)
def test_cards_that_are_in_the_way_are_named(cards, visible, keep, on):
    """All GPUs count as the fullest, so that one that is taken, old or small costs the others."""
    here = on(Machine("580.65.06", 13000, tuple(cards)), CU126, visible=visible)
    if visible:  # number 1 is first, and free
        assert ("CUDA_VISIBLE_DEVICES=1", "0 (H100-SXM5-80GB, 2.0 GiB" in here.odd) == (
            here.without,
            True,
        )
        return
    assert here.without == (keep and f"CUDA_VISIBLE_DEVICES={keep}")
    assert len(cards) == here.count
    if keep:  # following the advice leaves nothing to say
        again = on(Machine("580.65.06", 13000, tuple(cards)), CU126, visible=keep)
        assert "" == again.without and len(keep.split(",")) == again.count
        asked = spec_of("phi-3-mini-4k-instruct")
        plan.draft(asked, here=again)
        try:
            said = plan.draft(asked, here=here).reasons["ranks"]
        except SpecError as error:
            said = str(error)
        assert f"set {here.without}" in said


def test_what_other_processes_hold_is_said_where_it_matters(on):
    """How much is taken, and that ending it would do, before another machine is named."""
    here = on(Machine("580.65.06", 13000, (gib(H100, 3),)))
    assert "3.0 GiB free of 79.2" in str(here)
    with pytest.raises(SpecError, match="PLAN-120") as caught:
        plan.draft(spec_of(), here=here)
    assert "76.2 GiB of the GPU are held by other processes" in str(caught.value)
    assert "end what holds 76.2 GiB of the GPU: nvidia-smi shows it" in str(caught.value)
    idle = on(Machine("580.65.06", 13000, (gib(H100, 78.9),)))
    assert "free;" in str(idle)


def test_fewer_ranks_than_gpus_are_planned_for_the_first_ones(on):
    """Which are those that they train on."""
    on(Machine("580.65.06", 13000, (gib(H100, 9), H100, T4)))
    first, two = device.detect(1), device.detect(2)

    assert (1, "H100-SXM5-80GB", 9) == (first.count, first.name, round(first.memory_bytes / 2**30))
    assert (2, "H100-SXM5-80GB") == (two.count, two.name)


@pytest.mark.parametrize(
    ("card", "error", "remedy"),
    [
        (Card("NVIDIA A10", (8, 6), 22500, mode=3, inside=-46), "busy", "nvidia-smi -c DEFAULT"),
        (Card("NVIDIA A10", (8, 6), 22500, mode=2, inside=-46), "busy", "nvidia-smi -c DEFAULT"),
        (Card("NVIDIA A10", (8, 6), 22500, free=NOT_SUPPORTED, inside=-214), "ECC", "damaged"),
    ],
)
def test_a_card_that_takes_no_process_is_not_planned_for(card, error, remedy, on):
    """In exclusive mode beside another process, or with memory that fails: no GPU, with words."""
    here = on(Machine("580.65.06", 13000, (H100, card)))
    assert "cpu" == here.kind and error in here.no_gpu and "NVIDIA A10" in here.no_gpu
    with pytest.raises(SpecError, match="PLAN-102") as caught:
        plan.draft(spec_of(), here=here)
    assert remedy in str(caught.value)


def test_a_card_for_one_process_is_used_while_it_is_free(on):
    """Exclusive mode alone is no reason."""
    here = on(Machine("580.65.06", 13000, (dataclasses.replace(A10, mode=3, inside=22000),)))
    assert ("cuda", "A10") == (here.kind, here.name)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"error": [100, "no device"], "denied": ["/dev/nvidia0"]}, ["may not open /dev/nvidia0"]),
        ({"error": [304, "OS call failed"], "denied": ["/dev/nvidiactl"]}, ["group that owns"]),
        ({"error": [100, "no device"], "denied": []}, ["though a GPU is there", "mig -cgi"]),
        ({"error": [999, "unknown error"], "denied": []}, ["unknown error", "nvidia-modprobe"]),
    ],
)
def test_why_a_driver_shows_no_gpu_that_is_there(answer, words):
    """Permissions, MIG mode without an instance, half a driver."""
    here = device.of_answer({"devices": [], "nodes": True} | answer, CU130)
    text = f"{here.no_gpu} {here.remedy}"
    assert all(word in text for word in words), text


def test_devices_that_the_user_may_not_open_are_found(tmp_path, monkeypatch):
    """Of the driver's alone; root may open all."""
    for name in ("nvidiactl", "nvidia0", "nvidia1", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(probe.os, "access", lambda path, mode: path.name != "nvidia1")
    assert [str(tmp_path / "nvidia1")] == probe.denied(str(tmp_path))


def test_where_mapping_fails_segments_do_not_grow(tmp_path):
    """On WSL and Jetson boards, which say that they do."""

    class Says:
        def attribute(self, number, device):
            return int(number == probe.VIRTUAL_MEMORY)

    there = tmp_path / "dxg"
    assert probe.segments_grow(Says(), 0, (str(there),))
    there.touch()
    assert not probe.segments_grow(Says(), 0, (str(there),))


USED = {
    (one.gpu.name, one.gpus): one
    for one in presets.instances()
    if one.gpu.capability and one.gpu.capability >= (6, 0)
}


@pytest.mark.parametrize("machine", USED.values(), ids=lambda one: f"{one.gpus}x{one.gpu.name}")
def test_a_machine_is_planned_alike_by_its_type_and_by_its_driver(machine):
    """Recipe, placement, estimates and speed of `plan --instance` are those of the run: for every
    card and number of cards that a machine type has."""
    card = machine.gpu
    row = {"capability": card.capability, "integrated": False, "virtual_memory": True}
    row |= {"name": (f"NVIDIA {card.name}", *card.products)[-1]}
    row |= {"total": card.memory_bytes, "free": card.memory_bytes}
    answer = {"devices": [row] * machine.gpus, "driver": "580.65.06", "cuda": [13, 0]}
    model = "llama-3.1-8b-instruct" if card.nominal_gib >= 16 else "phi-3-mini-4k-instruct"
    bought = plan.device_of(machine.name)
    met = device.of_answer(answer, None)
    first, second = (plan.draft(spec_of(model), here=each) for each in (bought, met))

    assert (bought.name, bought.gpu, bought.engine) == (met.name, met.gpu, met.engine)
    assert (first.recipe, first.placement, first.fit) == (
        second.recipe,
        second.placement,
        second.fit,
    )
    assert first.predicted() == second.predicted()
    assert first.fit.seconds_per_token


def test_a_slice_of_a_card_is_as_fast_as_its_share():
    """MIG, by the driver's name and by a node's label; a time-sliced card is a whole one."""
    card, part = (
        presets.gpu("NVIDIA A100-SXM4-80GB"),
        presets.gpu("NVIDIA-A100-SXM4-80GB-MIG-3g.40gb"),
    )

    assert card.bf16_flops * 3 / 7 == pytest.approx(part.bf16_flops)
    assert card.bandwidth / 2 == part.bandwidth
    assert (card.memory_bytes // 2, card.capability) == (part.memory_bytes, part.capability)
    assert presets.gpu("NVIDIA H100 80GB HBM3 MIG 1c.2g.20gb").nominal_gib == 20
    assert card == presets.gpu("NVIDIA-A100-SXM4-80GB-SHARED")
    with pytest.raises(SpecError, match="SPEC-306"):
        presets.gpu("NVIDIA X9 MIG 1g.10gb")


def test_the_installed_build_is_read_without_importing_torch(tmp_path, monkeypatch):
    """Also where the version does not name it: wheels from PyPI, and vendors' containers."""
    here = torch_build.installed()
    assert importlib.metadata.version("torch") == here.version
    assert ("+cpu" in here.version) == (here.cuda is None)
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    lines = ["__version__ = '2.13.0a0+nv26.09'", "cuda: Optional[str] = '13.0'", "hip = None"]
    (package / "version.py").write_text("\n".join(lines))
    found = importlib.util.spec_from_file_location("torch", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert TorchBuild("2.13.0a0+nv26.09", (13, 0)) == torch_build.installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert torch_build.installed() is None


def test_the_cpu_reports_memory_that_is_there():
    """Some memory is free, and not more than the machine has."""
    found = device.cpu()

    assert "cpu" == found.kind
    assert 2**28 < found.memory_bytes < 2**45


def test_unified_memory_is_counted_once() -> None:
    """What a GB10's GPU takes, its processor has not: nothing can lie in host memory besides."""
    rows = [
        {"name": "NVIDIA GB10", "capability": [12, 1], "total": 120 << 30, "free": None}
        | {"integrated": integrated, "virtual_memory": True}
        for integrated in (True, False)
    ]
    one, other = (
        device.of_answer({"devices": [row], "driver": "580.142", "cuda": [13, 0]}, None)
        for row in rows
    )
    assert 0 == one.host_bytes and other.host_bytes
