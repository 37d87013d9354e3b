"""One thread a process: on busy cores, threads that wait for each other cost 20 times the work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands and scripts that tests run

import torch

torch.set_num_threads(1)
