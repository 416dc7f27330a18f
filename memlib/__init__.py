"""The instruments of the executable book *How Diffusion Models Memorize*."""

from memlib.cache import recorded
from memlib.findings import (
    deviations,
    image_error,
    noise_loss,
    overestimation,
    reference_weights,
    spread,
    weights,
    x0_hat,
)
from memlib.gram import cosine, inner, norm
from memlib.models import ExactModel, load
from memlib.pairs import load_pairs
from memlib.record import record
from memlib.sample import forward_trace, reverse_trace
from memlib.severity import severity as similarity
from memlib.store import open_run, verify

__all__ = [
    "ExactModel", "cosine", "deviations", "forward_trace", "image_error", "inner", "load",
    "load_pairs", "noise_loss", "norm", "open_run", "overestimation", "record", "recorded",
    "reference_weights", "reverse_trace", "similarity", "spread", "verify", "weights", "x0_hat",
]  # fmt: skip
