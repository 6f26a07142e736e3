"""From `manta quantize` to an answer over HTTP: what one writes the other serves."""

from pathlib import Path

import httpx
import pytest

from deployments.config import GatewayConfig
from deployments.gateway_app import build_http
from deployments.replica import load_engine
from engine.config import EngineConfig, KVConfig
from monitoring.recorder import Recorder
from tests.compiled import compiled_library
from tests.deployments.cli.command import manta
from tests.deployments.in_process import Setting, run


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_a_quantized_copy_answers_as_the_model_does(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_library()
    copy = tmp_path / "copy"
    done = manta("quantize", "manta-tiny", copy, "--scheme", scheme)
    assert done.returncode == 0, done.stderr
    config = EngineConfig(model=str(copy), device="cpu", threads=1, max_model_len=256, kv=KVConfig(memory=2**24))

    async def scenario(setting: Setting) -> None:
        await setting.deployment.serve("a", config, load_engine)
        app = build_http(setting.backend, GatewayConfig(), Recorder(), "1.0")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta") as client:
            messages = [{"role": "user", "content": "What is 3 plus 4?"}]
            body = {"model": "fake", "messages": messages, "temperature": 0, "max_tokens": 100}
            answer = (await client.post("/v1/chat/completions", json=body)).json()
        (choice,) = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("3 plus 4 is 7.", "stop")

    run(monkeypatch, tmp_path, scenario)
