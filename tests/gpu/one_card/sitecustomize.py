"""On the PYTHONPATH of processes that share one card: NCCL takes each for a host of its own, else it refuses two on a card."""

import os

os.environ["NCCL_HOSTID"] = str(os.getpid())
os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"  # every place of Ray's is device 0
if "ONE_CARD" in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["ONE_CARD"]
