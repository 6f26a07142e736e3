"""Which process-wide settings of Ray and Ray Serve Manta wants, why, and what is lost without them. Starts nothing.

Ray reads these when it is imported, in every process, so they must be in the environment of `ray start`: the config
file of an application comes too late. `deployments.private_ray` sets them for a Ray of its own.
"""

import os
from collections.abc import Mapping

FAST_PATH = {
    # HAProxy instead of a Python proxy, gRPC between gateway and replica instead of actor calls.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}

NODE_FAILURE = {
    # A dead node is noticed within seconds rather than a minute. Not tighter: with every core computing, a raylet may
    # well be late by a second.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}

HANGING = {
    # What does not answer health checks is ended when it is replaced. By default Serve asks it to leave, and a gateway
    # that hangs would hold its connections for all the time that one may take to drain.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}

_HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
_HARD_STOP_DEFAULT_S = 120.0

DRAIN = {
    # HAProxy replaces itself whenever a gateway comes or goes, and its old process ends what is left of its clients'
    # streams after so many seconds: longer than a gateway may take to finish them.
    _HARD_STOP: "660",
}

QUIET = {
    # The controller wakes ten times a second by default, which is most of what an idle application costs.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_SERVE_EVENT_LOOP_MONITORING_INTERVAL_S": "60",
    # Ray's own metrics; Manta's are exported by its hub.
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def missing_settings(environment: Mapping[str, str] = os.environ) -> str:
    """One line that says which settings of the fast path are missing, what that costs and where they belong.

    Empty if none is missing.
    """
    missing = [f"{name}={value}" for name, value in FAST_PATH.items() if environment.get(name) != value]
    if not missing:
        return ""
    return (
        f"Running without {' '.join(missing)}: everything works, but each streamed token costs several times the CPU "
        "time on its way to the client, and requests take longer to start. "
        "Put them into the environment of every `ray start` of this cluster."
    )


def hasty_proxy(drain_timeout_s: float, environment: Mapping[str, str] = os.environ) -> str:
    """One line that says so if HAProxy ends streams before `drain_timeout_s`, the seconds a gateway gives them.

    Empty if it does not.
    """
    after = float(environment.get(_HARD_STOP, _HARD_STOP_DEFAULT_S))
    if environment.get("RAY_SERVE_ENABLE_HA_PROXY") != "1" or after >= drain_timeout_s:
        return ""
    return (
        f"HAProxy ends the streams that still run {after:g} s after a gateway has come or gone, although the gateway "
        f"gives them {drain_timeout_s:g} s. Put {_HARD_STOP}={drain_timeout_s + 60:.0f} into the environment of every "
        "`ray start` of this cluster."
    )
