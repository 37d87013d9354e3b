"""One thread a worker: on busy cores, threads that wait for each other cost 20 times the work."""

import torch

torch.set_num_threads(1)
