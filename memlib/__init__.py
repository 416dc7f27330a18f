"""The instruments of the executable book *How Diffusion Models Memorize*.

A name is loaded when it is first used: what needs no torch does not wait for it.
"""

from importlib import import_module

PLACES = {
    "runs.cache": "recorded",
    "findings": "deviations image_error noise_loss overestimation reference_weights spread weights "
    "x0_hat",
    "gram": "cosine inner norm",
    "hub.loading": "load training_step",
    "hub.manifests": "load_pairs",
    "models": "ExactModel",
    "runs.store": "open_run verify",
    "runs.tracing": "forward_trace reverse_trace trajectories",
    "runs.work": "record",
}
HOMES = {name: module for module, names in PLACES.items() for name in names.split()}

__all__ = [*HOMES, "similarity"]


def __getattr__(name: str):
    if name == "similarity":
        value = import_module("memlib.measures").severity
    elif name in HOMES:
        value = getattr(import_module(f"memlib.{HOMES[name]}"), name)
    else:
        try:
            return import_module(f"memlib.{name}")  # a module
        except ModuleNotFoundError as error:
            if error.name != f"memlib.{name}":
                raise
            raise AttributeError(f"module 'memlib' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
