"""One thread per process: tiny models gain nothing from more, and lose a lot where cores are shared."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
