"""vLLM's engine, stepped as its `LLM.generate` does, compiled, without prefix caching."""

import math
import os
from collections.abc import Sequence

from .wire import Item, Load, Timeline, bytes_of_files, serve


class Vllm:
    def __init__(self, load: Load) -> None:
        cores = sorted(os.sched_getaffinity(0))[: load.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(load.kv_bytes / 2**30))
        os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        import vllm  # type: ignore[import-not-found,unused-ignore]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found,unused-ignore]

        self.version = str(vllm.__version__)
        self.weight_bytes = bytes_of_files(load.model, ".safetensors")
        self._params = lambda count: vllm.SamplingParams(
            max_tokens=count,
            ignore_eos=True,
            temperature=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        model = vllm.LLM(
            model=load.model,
            dtype="bfloat16",
            max_model_len=load.max_length,
            max_num_seqs=load.max_sequences,
            enable_prefix_caching=False,
        )
        self._engine = model.llm_engine

    def prepare(self, items: Sequence[Item]) -> None:
        pass

    def run(self, items: Sequence[Item], timeline: Timeline) -> None:
        for index, item in enumerate(items):
            self._engine.add_request(str(index), {"prompt_token_ids": item.prompt}, self._params(item.output_tokens))
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            timeline.note((int(output.request_id), output.outputs[0].token_ids) for output in outputs)


if __name__ == "__main__":
    serve(Vllm)
