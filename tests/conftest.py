"""What holds for all tests."""

import signal

# A shell that runs this in the background has it ignore Ctrl-C, and nohup the end of the terminal; so would every
# command that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
