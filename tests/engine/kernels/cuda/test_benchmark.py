"""What the GPU benchmark runs and counts; that it says so where it cannot run."""

import pytest
import torch

from benchmarks import gpu
from engine.kernels.cuda.forward import CudaForward
from engine.kernels.cuda.fused import TorchFused
from engine.kernels.cuda.operators import CudaOperators
from engine.kv.cache import PagedKVCache
from engine.models.decoder import Decoder
from tests.engine.kernels.cuda.device import HAS_GPU
from tests.engine.kernels.cuda.flash import flash_varlen

no_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device")


class HostBackend:
    """The CUDA path without its device."""

    def __init__(self, dtype: torch.dtype, *, max_sequences: int, fp8: bool) -> None:
        self.operators = CudaOperators(dtype, TorchFused(), (9, 0), fp8=fp8)

    def forward(self, decoder: Decoder, cache: PagedKVCache) -> CudaForward:
        return CudaForward(decoder, cache, (9, 0), max_sequences=1, record=None)


@no_gpu
@pytest.mark.parametrize("form", gpu.FORMS)
def test_a_decode_continues_the_prompt_that_is_timed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "CudaBackend", HostBackend)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_varlen)
    monkeypatch.setattr(gpu, "GROUP", 32)
    torch.manual_seed(0)
    model = gpu.Model("thin", form, 300)
    with torch.inference_mode():
        prompt = model.step(270, 270)
        assert model.step(270, 270).equal(prompt)
        assert model.step(1, 270).shape == (1,) and 0 <= int(model.step(1, 270)) < model.spec.vocab_size


def test_bytes_and_operations_are_those_of_the_weights() -> None:
    spec = gpu.spec_of(gpu.ALL_SHAPES["8b"])
    layers = sum(torch.Size(shape).numel() for name, shape in spec.parameter_shapes().items() if "layers" in name)
    assert 6.9e9 < layers < 7.1e9
    assert gpu.prompt_operations(spec, 1) == pytest.approx(2 * layers, rel=0.01)
    # At 4,096 wide, attention of 31 layers over 8,192 tokens adds half of them at 4 operations a value; and all but the
    # first projection of the last layer runs for one token.
    idle = 4096 * 4096 + 3 * 4096 * spec.intermediate
    extra = gpu.prompt_operations(spec, 8192) - 8192 * gpu.prompt_operations(spec, 1)
    assert extra == pytest.approx(4 * 31 * 4096 * 8192 * 8191 / 2 - 2 * idle * 8191, rel=0.01)


@no_gpu
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
