"""Out of memory is recognised by whatever says it, and what the failed step held is freed."""

from __future__ import annotations

import weakref

import pytest
import torch

from tuning.training.memory_errors import is_out_of_memory, release

OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 8589934592 bytes. Error code 12"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    RuntimeError("NCCL error in: ../NCCLUtils.cpp:77, unhandled cuda error (run with "
                 "NCCL_DEBUG=INFO for details), NCCL version 2.27.3\nncclUnhandledCudaError: "
                 "Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 608"),
    RuntimeError("NCCL error ... Last error:\nCuda failure 2 'out of memory'"),
]  # fmt: skip
OTHER = [
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
    RuntimeError("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
    ValueError("the column is called out of memory"),
]


@pytest.mark.parametrize("error", OUT, ids=str)
def test_every_face_of_out_of_memory_is_known(error: Exception) -> None:
    """Allocator, CUDA, driver, Triton, cuBLAS, cuDNN, cuSOLVER, NCCL; raised from another, too."""
    assert is_out_of_memory(error)
    try:
        raise RuntimeError("the step failed") from error
    except RuntimeError as wrapped:
        assert is_out_of_memory(wrapped)


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_failures_of_a_card_are_not(error: Exception) -> None:
    """A smaller micro-batch would not mend them."""
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(("free", "out"), [(1 << 28, True), (40 << 30, False)])
@pytest.mark.parametrize(
    "text",
    [
        "NCCL error: unhandled cuda error",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    ],
)
def test_an_error_without_a_reason_is_judged_by_the_card(
    text: str, free: int, out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries say so for many things: with no memory left it is that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))

    assert out is is_out_of_memory(RuntimeError(text))


def test_what_the_failed_step_held_is_freed_before_its_predecessor_is_saved() -> None:
    """Tensors on the frames of the traceback, those in a cycle, and gradients."""
    model = torch.nn.Linear(4, 4)
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        activations = torch.ones(1000)
        cycle = [torch.ones(1000)]
        cycle.append(cycle)  # type: ignore[arg-type]
        held.extend((weakref.ref(activations), weakref.ref(cycle[0])))
        model(torch.ones(4)).sum().backward()
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        step()
    assert all(each() is not None for each in held) and model.weight.grad is not None

    release(caught.value, model)

    assert [None, None] == [each() for each in held]
    assert model.weight.grad is None
