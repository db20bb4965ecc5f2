"""One thread per process: tiny models gain nothing from more, and lose a lot where cores are shared.

Ctrl-C reaches the processes that tests start, even where the tests themselves were started in the background, which
ignores it for them and all below.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
