"""One thread per process: tiny models gain nothing from more, and lose a lot where cores are shared.

Signals reach the processes that tests start, even where the tests themselves were started in the background or under
nohup, which ignore Ctrl-C and hang-ups for them and all below.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
