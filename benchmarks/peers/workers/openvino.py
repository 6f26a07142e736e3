"""OpenVINO GenAI's continuous batching pipeline, stepped, without prefix caching.

Weights are as exported; the plugin chooses the type it computes in and that of the keys and values, as it does for
everybody who does not ask.
"""

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found,unused-ignore]
import openvino_genai  # type: ignore[import-not-found,unused-ignore]

from .wire import Item, Load, Timeline, bytes_of_files, serve

_BATCH_TOKENS = 2048


class OpenVino:
    version = version("openvino-genai")

    def __init__(self, load: Load) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = math.ceil(load.kv_bytes / 2**30)
        scheduler.max_num_seqs = load.max_sequences
        scheduler.max_num_batched_tokens = _BATCH_TOKENS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        self.weight_bytes = bytes_of_files(load.model, "openvino_model.bin")
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            load.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": load.threads}
        )

    def prepare(self, items: Sequence[Item]) -> None:
        pass

    def run(self, items: Sequence[Item], timeline: Timeline) -> None:
        handles = {
            index: self._pipeline.add_request(
                index, openvino.Tensor(np.array([item.prompt], dtype=np.int64)), _config(item.output_tokens)
            )
            for index, item in enumerate(items)
        }
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            timeline.note((index, _new_tokens(handle)) for index, handle in handles.items())


def _config(output_tokens: int) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = output_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


def _new_tokens(handle: Any) -> list[int]:
    """What the last step brought one request, if anything."""
    if not handle.can_read():
        return []
    (output,) = handle.read().values()
    return list(output.generated_ids)


if __name__ == "__main__":
    serve(OpenVino)
