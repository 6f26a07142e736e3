"""What an operator is told when the CUDA path cannot run as it was set up."""

import logging
import subprocess
import sys

import pytest
import torch

from engine.kernels.cuda.backend import PAGE_TOKENS, CudaBackend, check, tried
from engine.kernels.cuda.fused import Fused, TorchFused
from tests.engine.kernels.cuda.device import HAS_GPU


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device")
def test_no_device_is_said_plainly() -> None:
    with pytest.raises(ValueError, match='device "cuda" needs a CUDA device'):
        CudaBackend(torch.bfloat16, max_sequences=8)


@pytest.mark.parametrize(
    ("dtype", "page_tokens", "capability", "fp8", "words"),
    [
        (torch.float32, 256, (9, 0), False, "dtype float32"),
        (torch.bfloat16, 16, (9, 0), False, r"kv.page_tokens \(16\) must be a multiple of 256"),
        (torch.float16, 384, (9, 0), False, r"kv.page_tokens \(384\)"),
        (torch.bfloat16, 256, (8, 6), True, r'quantization "fp8": compute capability 8.6'),
    ],
)
def test_the_setting_to_change_is_named(
    dtype: torch.dtype, page_tokens: int, capability: tuple[int, int], fp8: bool, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check(dtype, page_tokens, capability, fp8=fp8)


def test_what_can_run_passes() -> None:
    check(torch.bfloat16, PAGE_TOKENS, (8, 9), fp8=True)
    check(torch.float16, 2 * PAGE_TOKENS, (7, 5), fp8=False)


class Uncompiled(TorchFused):
    """As Triton where there is no C compiler: what is launched first raises."""

    name = "Triton"

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("Failed to find C compiler.\nPlease specify it.")


def _broken() -> Fused:
    raise ImportError("libcuda.so.1")


@pytest.mark.parametrize(("make", "words"), [(Uncompiled, "Failed to find C compiler."), (_broken, "libcuda.so.1")])
def test_kernels_that_cannot_be_launched_are_torchs_with_one_warning(
    make: type[Fused], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert tried(make, torch.device("cpu")).name == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert words in record.getMessage() and "python3-dev" in record.getMessage() and "\n" not in record.getMessage()


def test_kernels_that_can_be_launched_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    class Compiled(TorchFused):
        name = "Triton"

    assert tried(Compiled, torch.device("cpu")).name == "Triton"
    assert not caplog.records


def test_importing_it_costs_neither_torchs_compiler_nor_triton() -> None:
    """A replica on a CPU imports it to choose; either would add seconds to its start."""
    program = (
        "import sys, engine.kernels.cuda.backend; sys.exit(bool({'torch._dynamo', 'triton'} & set(sys.modules)) * 3)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
