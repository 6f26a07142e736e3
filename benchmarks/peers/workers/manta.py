"""The engine of this project, as `manta generate` drives it, without text."""

from collections.abc import Sequence

import engine as _spinning  # noqa: F401  Bounds the spinning of threads; has to come before torch.
from engine.ahead import begin_compiling
from engine.config import EngineConfig, KVConfig, Quantization, SchedulerConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Request

from .wire import Item, Load, Timeline, bytes_of_files, serve

_QUANTIZATION: dict[str, Quantization] = {"bf16": "auto", "w8a8": "w8a8", "w4a8": "w4a16"}


class Manta:
    version = "this tree"

    def __init__(self, load: Load) -> None:
        config = EngineConfig(
            model=load.model,
            device="cpu",
            threads=load.threads,
            quantization=_QUANTIZATION[load.format],
            # As the other engines' formats of 4 bits have them.
            activations="int8" if load.format == "w4a8" else "auto",
            kv=KVConfig(memory=load.kv_bytes, prefix_caching=False),
            scheduler=SchedulerConfig(max_stall_s=None),
        )
        begin_compiling(config)
        # Not before, as it imports torch.
        from engine.build import assemble

        assembly = assemble(config)
        self._engine = assembly.engine
        # Weights that are not quantized are what the file holds, and the other engines are measured by their files.
        is_full = config.quantization == "auto"
        self.weight_bytes = bytes_of_files(load.model, ".safetensors") if is_full else assembly.weight_bytes

    def prepare(self, items: Sequence[Item]) -> None:
        pass

    def run(self, items: Sequence[Item], timeline: Timeline) -> None:
        for index, item in enumerate(items):
            params = SamplingParams(max_tokens=item.output_tokens, temperature=0.0, ignore_eos=True)
            self._engine.add(Request(str(index), tuple(item.prompt), params))
        while self._engine.has_work():
            emissions = self._engine.step()
            errors = [emission.error for emission in emissions if emission.error is not None]
            if errors:
                raise RuntimeError(errors[0])
            timeline.note((int(emission.request_id), emission.token_ids) for emission in emissions)


if __name__ == "__main__":
    serve(Manta)
