"""What NVIDIA's driver answered on twenty machines, from public reports.

Totals are torch's (`_CudaDeviceProperties`) or deviceQuery's; free memory is NVML's, on idle cards.
  V100-SXM2   16160 MB, in many notebooks with ultralytics' banner
  A100-40     "40339 MBytes (42298834944 bytes)", CUDA 12.2: bottlerocket-os/bottlerocket#3873
  MIG         "NVIDIA A100 80GB PCIe MIG 1g.10gb ... total_memory=9728MB"; in a container memory
              is "[Insufficient Permissions]" for nvidia-smi, driver 535.161.08:
              Stability-AI/StableSwarmUI#388; NVML_ERROR_NO_PERMISSION:
              NVIDIA/nvidia-container-toolkit#842; nor of the slice: NVIDIA/k8s-device-plugin#1683
  H100        81090 MB: SXM5, torch 2.7;  H200  143156 MB: Modal
  GB10        "122,570 MBytes", 12.1, integrated, driver 580.142: deviceQuery;
              NVML_ERROR_NOT_SUPPORTED: forums.developer.nvidia.com, topic 358869; free memory as
              in sgl-project/sglang#10075
  802         H100 and H200 without fabric manager: gpustack/gpustack#1254
  803         driver updated under a running machine: NVIDIA/nvidia-docker#1256
  WSL         segments that grow fail: pytorch/pytorch#192330; vGPU: unslothai/unsloth#1446
Drivers and the CUDA they run: 535 12.2, 550 12.4, 570 12.8, 580 13.0 (NVIDIA, release notes).
"""

from dataclasses import dataclass, replace

from fake_driver import NO_PERMISSION, NOT_SUPPORTED, Card, Machine


@dataclass(frozen=True)
class Expected:
    """How a machine is planned for; without a code, training starts with this build of torch."""

    name: str
    gib: float  # free, for each GPU
    build: str  # the newest build of torch that runs there
    gpus: int = 1
    bf16: bool = True
    cu130: str = ""  # the refusal of torch+cu130
    cu126: str = ""  # and of torch+cu126


def _gpus(cuda: int, *cards: Card) -> Machine:
    driver = {11040: "470.256.02", 12020: "535.161.08", 12040: "550.127.08", 12080: "570.86.15"}
    return Machine(driver.get(cuda, "580.126.09"), cuda, cards)


V100 = Card("Tesla V100-SXM2-16GB", (7, 0), 16160)
T4 = Card("Tesla T4", (7, 5), 15095)
A10 = Card("NVIDIA A10", (8, 6), 22500)
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 81039)
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 81090)
B200 = Card("NVIDIA B200", (10, 0), 182630)
SLICE = "NVIDIA A100 80GB PCIe MIG 1g.10gb"
MIG = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"
OLD, NO_KERNELS = "PLAN-115", "PLAN-116"

MACHINES = {
    "v100": (
        _gpus(13000, V100),
        Expected("V100-SXM2-16GB", 15.8, "cu126", bf16=False, cu130=NO_KERNELS),
    ),
    "t4": (_gpus(13000, T4), Expected("T4", 14.7, "cu130", bf16=False)),
    "a10 in use": (
        _gpus(13000, Card("NVIDIA A10", (8, 6), 22500, free=10240)),
        Expected("A10", 10.0, "cu130"),
    ),
    "l4": (_gpus(13000, Card("NVIDIA L4", (8, 9), 22477)), Expected("L4", 21.95, "cu130")),
    "a100-40": (
        _gpus(12020, Card("NVIDIA A100-SXM4-40GB", (8, 0), 40339, free=40326)),
        Expected("A100-SXM4-40GB", 39.4, "cu126", cu130=OLD),
    ),
    "8 x a100-80": (_gpus(13000, *[A100] * 8), Expected("A100-SXM4-80GB", 79.1, "cu130", gpus=8)),
    "mig": (
        _gpus(13000, Card(SLICE, (8, 0), 9728, free=9700, uuid=MIG)),
        Expected("A100-PCIE-80GB MIG 1g.10gb", 9.5, "cu130"),
    ),
    "mig without permission": (
        _gpus(12020, Card(SLICE, (8, 0), 9728, free=NO_PERMISSION, inside=9300, uuid=MIG)),
        Expected("A100-PCIE-80GB MIG 1g.10gb", 9.1, "cu126", cu130=OLD),
    ),
    "mig of whose card nvml reports": (  # 80 GB of it
        _gpus(13000, Card(SLICE, (8, 0), 9728, free=81000, uuid=MIG)),
        Expected("A100-PCIE-80GB MIG 1g.10gb", 9.5, "cu130"),
    ),
    "h100": (_gpus(13000, H100), Expected("H100-SXM5-80GB", 79.2, "cu130")),
    "h200": (
        _gpus(13000, Card("NVIDIA H200", (9, 0), 143156, free=143167)),
        Expected("H200-SXM5", 139.8, "cu130"),
    ),
    "gb10": (
        _gpus(13000, Card("NVIDIA GB10", (12, 1), 122570, free=NOT_SUPPORTED, integrated=True)),
        Expected("NVIDIA GB10", 119.7, "cu130", cu126=NO_KERNELS),
    ),
    "b200": (_gpus(12080, B200), Expected("B200", 178.3, "None", cu130=OLD, cu126=NO_KERNELS)),
    "driver 550": (_gpus(12040, H100), Expected("H100-SXM5-80GB", 79.2, "cu126", cu130=OLD)),
    "driver 570": (_gpus(12080, A10), Expected("A10", 22.0, "cu126", cu130=OLD)),
    "driver 470": (
        _gpus(11040, T4),
        Expected("T4", 14.7, "None", bf16=False, cu130=OLD, cu126=OLD),
    ),
    "two different cards": (
        _gpus(13000, H100, T4),
        Expected("H100-SXM5-80GB + T4", 14.7, "cu130", gpus=2, bf16=False),
    ),
    "cards of which no build runs both": (
        _gpus(13000, B200, V100),
        Expected(
            "B200 + V100-SXM2-16GB", 15.8, "None", 2, False, cu130=NO_KERNELS, cu126=NO_KERNELS
        ),
    ),
    "vgpu": (
        _gpus(12040, Card("NVIDIA A10-4Q", (8, 6), 3800, virtual_memory=False)),
        Expected("A10-4Q", 3.7, "cu126", cu130=OLD),
    ),
    "wsl": (
        _gpus(13000, Card("NVIDIA RTX A4000", (8, 6), 16375, free=15000)),
        Expected("NVIDIA RTX A4000", 14.6, "cu130"),
    ),
    "no nvml": (
        Machine("", 13000, (Card("NVIDIA A10", (8, 6), 22500, inside=22000),), nvml=999),
        Expected("A10", 21.5, "cu130"),
    ),
    "a full card": (
        Machine("", 13000, (Card("NVIDIA A10", (8, 6), 22500, inside=-2),), nvml=999),
        Expected("A10", 0.0, "cu130"),
    ),
}

# what cuInit answers -> words of the reason, words of the remedy
BROKEN = {
    100: ("driver finds none", "--gpus all"),
    802: ("system not yet initialized (error 802)", "nvidia-fabricmanager"),
    803: ("unsupported display driver / cuda driver combination", "restart"),
    804: ("forward compatibility was attempted", "LD_LIBRARY_PATH"),
    999: ("unknown error", "nvidia-modprobe"),
    -9: ("asking the driver ended", "dmesg"),
    -8: ("did not answer in", "dmesg"),
}

# With different UUIDs, of which a start is enough to name one.
TWO = (
    replace(H100, uuid="GPU-aaaaaaaa-4157-249a-65e5-000000000001"),
    replace(T4, uuid="GPU-bbbbbbbb-4157-249a-65e5-000000000002", free=9000),
    Card(SLICE, (8, 0), 9728, uuid=MIG),
)
