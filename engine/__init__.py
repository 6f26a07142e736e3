"""One replica: from token ids to token ids. Knows no Ray, no HTTP, no Prometheus.

Importing it bounds how long the threads of the arithmetic spin while they wait for each other.
"""

import os

# By default libgomp's threads spin for milliseconds at every barrier. Alone on the machine that costs nothing; with one
# other busy process per core each barrier waits for a thread that a spinning one keeps from running, and a step takes
# tens of times longer. A bounded spin covers the gaps between the operators of a step and then sleeps. libgomp reads
# this when torch loads it, so it has to be set before any module of this package imports torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
