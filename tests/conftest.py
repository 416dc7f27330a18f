"""Shared by all tests. Set before torch is imported: two workers, one thread each."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# The suite compares on the CPU. On a card: CUDA_VISIBLE_DEVICES=0 python -m pytest -k on_a_gpu
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from jaxtyping import install_import_hook

# shapes and types of memlib's functions are checked here and nowhere else
install_import_hook("memlib", "beartype.beartype")
