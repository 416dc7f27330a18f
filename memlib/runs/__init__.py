"""Traces of many prompts: in batches, on disk, resumed and verified, by several workers."""

# What makes a trace's bits: another of these is another trace, whatever else of memlib changes.
MAKES = (
    "models prompts sampler schedule trace measures hub/sscd hub/accelerated hub/flow runs/tracing"
).split()
