"""Every metric of Manta, listed once: name, help, kind, labels and buckets.

Names are those of vLLM behind the prefix `manta:`, with vLLM's suffixes and buckets, so that its dashboards work after
a change of prefix. Owns no value; the recorder and the store look metrics up here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_LATENCY_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
TOKEN_COUNT_BUCKETS = tuple(
    float(step * 10**power) for power in range(6) for step in (1, 2, 5) if step * 10**power <= 200_000
)
ITERATION_BUCKETS = (1.0, *(float(2**power) for power in range(3, 15)))
SAMPLES_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)

FINISH_REASONS = ("stop", "length", "abort", "error")


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Owner(Enum):
    """Who measures: it decides which labels identify a series."""

    REPLICA = "replica"
    """Labelled with `model_name` and `engine`: the replica's slot, a small number."""
    GATEWAY = "gateway"
    """Labelled with `model_name`: measured next to the client's socket, over all engines."""
    HOST = "host"
    """Labelled with `model_name`; each metric has a label `node` of its own: the beginning of the node's id."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    help: str
    kind: Kind
    owner: Owner
    labels: tuple[str, ...] = ()
    """Labels beyond those of the owner; their values are given with each increment or observation."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, ascending, without +Inf."""
    initial: tuple[tuple[str, ...], ...] = ()
    """Values of `labels` that are exported as 0 from the start; a metric without labels always is."""

    @property
    def series_at_start(self) -> tuple[tuple[str, ...], ...]:
        return self.initial if self.labels else ((),)


_METRICS = (
    Metric("manta:num_requests_running", "Number of sequences that hold KV pages.", Kind.GAUGE, Owner.REPLICA),
    Metric("manta:num_requests_waiting", "Number of sequences waiting for admission.", Kind.GAUGE, Owner.REPLICA),
    Metric("manta:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", Kind.GAUGE, Owner.REPLICA),
    Metric("manta:num_preemptions_total", "Cumulative number of preemptions.", Kind.COUNTER, Owner.REPLICA),
    Metric("manta:prompt_tokens_total", "Number of prompt tokens of admitted requests.", Kind.COUNTER, Owner.REPLICA),
    Metric(
        "manta:prefix_cache_queries_total",
        "Number of prompt tokens that were looked for in the prefix cache.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:prefix_cache_hits_total",
        "Number of prompt tokens that were found in the prefix cache.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_pages_saved_total",
        "Number of KV pages copied to the KV host.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_pages_refused_total",
        "Number of KV pages that could not be copied to the KV host.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_pages_loaded_total",
        "Number of KV pages loaded from the KV host.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_pages_corrupt_total",
        "Number of KV pages that came from the KV host with a wrong checksum.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_failures_total",
        "Number of times that a replica lost its KV host.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_load_seconds_total",
        "Seconds that loads from the KV host took.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_load_predicted_seconds_total",
        "Seconds that those loads were predicted to take.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_saved_seconds_total",
        "Seconds by which computing the same tokens was predicted to take longer than loading them took.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric(
        "manta:kv_tier_regretted_seconds_total",
        "Seconds by which computing the same tokens was predicted to take less than loading them took.",
        Kind.COUNTER,
        Owner.REPLICA,
    ),
    Metric("manta:generation_tokens_total", "Number of generation tokens produced.", Kind.COUNTER, Owner.REPLICA),
    Metric(
        "manta:iteration_tokens_total",
        "Histogram of the number of tokens per engine iteration.",
        Kind.HISTOGRAM,
        Owner.REPLICA,
        buckets=ITERATION_BUCKETS,
    ),
    Metric(
        "manta:request_success_total",
        "Count of finished choices by the reason they ended.",
        Kind.COUNTER,
        Owner.GATEWAY,
        labels=("finished_reason",),
        initial=tuple((reason,) for reason in FINISH_REASONS),
    ),
    Metric(
        "manta:request_continuations_total",
        "Count of interruptions of streams, by why: a replica was lost, or drains, or the client did not read.",
        Kind.COUNTER,
        Owner.GATEWAY,
        labels=("reason",),
        initial=(("lost",), ("moved",), ("paused",)),
    ),
    Metric(
        "manta:resumed_streams_total",
        "Count of streams whose client came back for the rest.",
        Kind.COUNTER,
        Owner.GATEWAY,
    ),
    Metric(
        "manta:adopted_streams_total",
        "Count of streams that went on at another gateway because theirs had fallen silent.",
        Kind.COUNTER,
        Owner.GATEWAY,
    ),
    Metric(
        "manta:stream_journal_bytes",
        "Memory of the streams that are kept outside their gateways, estimated.",
        Kind.GAUGE,
        Owner.GATEWAY,
    ),
    Metric(
        "manta:stream_journal_streams",
        "Number of streams that are kept outside their gateways.",
        Kind.GAUGE,
        Owner.GATEWAY,
    ),
    Metric(
        "manta:time_to_first_token_seconds",
        "Histogram of time from a request's arrival to its first token in seconds.",
        Kind.HISTOGRAM,
        Owner.GATEWAY,
        buckets=FIRST_TOKEN_BUCKETS,
    ),
    Metric(
        "manta:inter_token_latency_seconds",
        "Histogram of inter-token latency in seconds.",
        Kind.HISTOGRAM,
        Owner.GATEWAY,
        buckets=TOKEN_LATENCY_BUCKETS,
    ),
    Metric(
        "manta:request_time_per_output_token_seconds",
        "Histogram of the mean time per output token after the first, per choice, in seconds.",
        Kind.HISTOGRAM,
        Owner.GATEWAY,
        buckets=TOKEN_LATENCY_BUCKETS,
    ),
    Metric(
        "manta:e2e_request_latency_seconds",
        "Histogram of end-to-end request latency in seconds.",
        Kind.HISTOGRAM,
        Owner.GATEWAY,
        buckets=LATENCY_BUCKETS,
    ),
    Metric(
        "manta:request_prompt_tokens",
        "Histogram of prompt tokens per request.",
        Kind.HISTOGRAM,
        Owner.GATEWAY,
        buckets=TOKEN_COUNT_BUCKETS,
    ),
    Metric(
        "manta:request_generation_tokens",
        "Histogram of generation tokens per choice.",
        Kind.HISTOGRAM,
        Owner.GATEWAY,
        buckets=TOKEN_COUNT_BUCKETS,
    ),
    Metric(
        "manta:request_params_n",
        "Histogram of the n request parameter.",
        Kind.HISTOGRAM,
        Owner.GATEWAY,
        buckets=SAMPLES_BUCKETS,
    ),
    Metric(
        "manta:request_params_max_tokens",
        "Histogram of the max_tokens request parameter.",
        Kind.HISTOGRAM,
        Owner.GATEWAY,
        buckets=TOKEN_COUNT_BUCKETS,
    ),
    Metric(
        "manta:http_requests_total",
        "Total number of HTTP requests by method, status class and handler.",
        Kind.COUNTER,
        Owner.GATEWAY,
        labels=("method", "status", "handler"),
    ),
    Metric(
        "manta:kv_host_memory_bytes",
        "Bytes of the KV pages that the host of a node keeps in memory.",
        Kind.GAUGE,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_memory_pages",
        "Number of KV pages that the host of a node keeps in memory.",
        Kind.GAUGE,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_disk_bytes",
        "Bytes of the files of KV pages on a node's disk.",
        Kind.GAUGE,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_disk_pages",
        "Number of KV pages on a node's disk that can be found.",
        Kind.GAUGE,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_clients",
        "Number of replicas that are connected to the KV host of their node.",
        Kind.GAUGE,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_evictions_total",
        "Number of KV pages that left a host's memory and are on no disk.",
        Kind.COUNTER,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_demotions_total",
        "Number of KV pages that left a host's memory and are on disk.",
        Kind.COUNTER,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_promotions_total",
        "Number of KV pages that a host read from disk into memory.",
        Kind.COUNTER,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_pages_received_total",
        "Number of KV pages that came from the hosts of other nodes.",
        Kind.COUNTER,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_pages_served_total",
        "Number of KV pages that went to the hosts of other nodes.",
        Kind.COUNTER,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_pages_corrupt_total",
        "Number of KV pages that were not as they had been written.",
        Kind.COUNTER,
        Owner.HOST,
        labels=("node",),
    ),
    Metric(
        "manta:kv_host_disk_errors_total",
        "Number of reads and writes that a host's disk failed.",
        Kind.COUNTER,
        Owner.HOST,
        labels=("node",),
    ),
)

CATALOGUE: Mapping[str, Metric] = {metric.name: metric for metric in _METRICS}
