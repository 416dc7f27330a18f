"""The instruments of the executable book *How Diffusion Models Memorize*.

A model (`load`) and prompts (`load_pairs`) make a trace (`reverse_trace`: `sampler`'s loop, whose
vectors become inner products in `trace`), and everything else is read off it (`gram`, `findings`,
`measures`, `claims`, `plot`). Rooms do the rest: `hub` brings models, lists and pictures, `runs`
records traces, `site` makes the book, `cli` has the commands, `detection` and `mitigation` use it.
A name is loaded when it is first used: what needs no torch does not wait for it.
"""

from importlib import import_module

from memlib.errors import warn_renamed

PLACES = {
    "findings": "deviations image_error mean_seed_distance noise_loss overestimation "
    "reference_weights weights x0_hat",
    "detection.detect": "detect",
    "gram": "cosine inner norm",
    "hub.loading": "load training_step",
    "hub.manifests": "load_pairs",
    "hub.sscd": "similarity",  # of `measures`, with the official networks among them
    "mitigation.guard": "guard",
    "models": "ExactModel",
    "runs.cache": "cached",
    "runs.store": "open_run verify",
    "runs.tracing": "forward_trace reverse_trace trajectories",
    "runs.work": "record",
}
HOMES = {name: module for module, names in PLACES.items() for name in names.split()}
RENAMED = {"recorded": "cached", "spread": "mean_seed_distance"}  # until the next version

__all__ = [*HOMES]


def __getattr__(name: str):
    if name in RENAMED:
        warn_renamed(f"memlib.{name}", f"memlib.{RENAMED[name]}")
        return getattr(import_module(__name__), RENAMED[name])
    if name not in HOMES:
        try:
            return import_module(f"memlib.{name}")  # a module
        except ModuleNotFoundError as error:
            if error.name != f"memlib.{name}":
                raise
            raise AttributeError(f"module 'memlib' has no attribute {name!r}") from None
    value = getattr(import_module(f"memlib.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
