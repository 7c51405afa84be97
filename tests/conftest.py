"""One thread a process: on models this small a second one costs more than it gives."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                # read when torch is imported
