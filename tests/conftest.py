"""What holds for all tests."""

import signal

from hypothesis import HealthCheck, settings

# A shell that runs this in the background has it ignore Ctrl-C, and nohup the end of the terminal; so would every
# command that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says how busy the machine is.
settings.register_profile("manta", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("manta")
