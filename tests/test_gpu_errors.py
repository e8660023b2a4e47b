"""What a failing GPU makes torch raise is told as that, not as a bug, and is worth another try."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuning import gpu_errors, process
from tuning.errors import RETRYABLE, SpecError, TransientError

START = [  # this build of torch will never run there
    AssertionError("Torch not compiled with CUDA enabled"),
    RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
    RuntimeError(
        "The NVIDIA driver on your system is too old (found version 12080). Please update"
    ),
]
KERNELS = [
    RuntimeError(
        "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors "
        "might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA error: the provided PTX was compiled with an unsupported toolchain."),
]
FAILED = [
    RuntimeError(text)
    for text in (
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: unknown error",
        "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing",
        "No CUDA GPUs are available",
        "CUDA driver initialization failed, you might not have a CUDA gpu.",
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "NCCL error in: ../NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO)",
    )
]
BUGS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: invalid argument"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
    AssertionError("Invalid device id"),
    ValueError("No CUDA GPUs are available"),
    KeyError("NCCL error"),
]


@pytest.mark.parametrize("error", [*START, *KERNELS], ids=str)
def test_a_build_that_does_not_fit_is_no_reason_to_try_again(error: Exception) -> None:
    """With torch's own first line, and what names the build that fits."""
    meaning = gpu_errors.known(error)
    assert isinstance(meaning, SpecError)
    assert ("RUN-142" if error in START else "RUN-143") == meaning.problems[0].code
    assert str(error).splitlines()[0][:60] in str(meaning)
    assert meaning.exit_code not in RETRYABLE


@pytest.mark.parametrize("error", FAILED, ids=str)
def test_a_card_that_fails_is_worth_another_try(error: Exception) -> None:
    """Exit 20: a Job goes on, on another node if need be. Wrapped in another error as well."""
    try:
        raise RuntimeError("the step failed") from error
    except RuntimeError as wrapped:
        meanings = [gpu_errors.known(each) for each in (error, wrapped)]
    for meaning in meanings:
        assert isinstance(meaning, TransientError)
        assert ("RUN-144", 20) == (meaning.problems[0].code, meaning.exit_code)


@pytest.mark.parametrize("error", BUGS, ids=str)
def test_what_a_program_does_wrong_stays_a_bug(error: Exception) -> None:
    """Its traceback is what helps."""
    assert gpu_errors.known(error) is None


@pytest.mark.parametrize("text", ["CUDA error: uncorrectable ECC error encountered", "else"])
def test_a_child_passes_it_on(text: str, tmp_path: Path) -> None:
    """As an error with its code; the traceback is in the child's log."""
    code = (
        "import sys; from tuning import process\n"
        f"def work(request):\n    raise RuntimeError({text!r})\n"
        "sys.exit(process.serve(work))"
    )
    request = tmp_path / "step.json"
    request.write_text("{}")
    command = [sys.executable, "-c", code, str(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(process.result_path(request).read_text())

    assert f"RuntimeError: {text}" in done.stderr
    if text == "else":
        assert (1, ["bug"]) == (done.returncode, list(result))
    else:
        assert 20 == done.returncode
        assert "RUN-144" == result["error"]["problems"][0]["code"]
