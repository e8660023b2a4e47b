"""What there is to compute with."""

import pytest

from tuning.plan import device

TWO_H100 = "NVIDIA H100 NVL, 95830, 95000, 9.0\nNVIDIA H100 NVL, 95830, 90000, 9.0\n"


def test_gpus_count_as_the_least_free_of_them():
    """A rank on the fuller card must fit, too: memory is the smallest free amount."""
    found = device.parse_gpus(TWO_H100)

    assert ("cuda", "NVIDIA H100 NVL", 2) == (found.kind, found.name, found.count)
    assert 90000 * 2**20 == found.memory_bytes
    assert ((9, 0), True) == (found.capability, found.bf16)


def test_a_volta_card_has_no_bfloat16():
    """Below compute capability 8.0 there is no native bfloat16."""
    found = device.parse_gpus("Tesla V100-PCIE-16GB, 16384, 16100, 7.0\n")

    assert ((7, 0), False) == (found.capability, found.bf16)


@pytest.mark.parametrize(
    ("visible", "count"),
    [("0", 1), ("0,1", 2), ("", None), ("-1", None), ("1,-1,0", 1), ("7", None)],
)
def test_cuda_visible_devices_is_obeyed(visible, count):
    """Hidden GPUs do not count, as CUDA itself has it."""
    found = device.parse_gpus(TWO_H100, visible=visible)

    assert count == (found.count if found else None)


def test_an_answer_that_is_no_table_is_no_gpu():
    """nvidia-smi without a working driver prints a sentence."""
    assert device.parse_gpus("NVIDIA-SMI has failed because it couldn't communicate") is None


def test_the_cpu_reports_memory_that_is_there():
    """Some memory is free, and not more than the machine has."""
    found = device.cpu()

    assert "cpu" == found.kind
    assert 2**28 < found.memory_bytes < 2**45
