"""Traces of many prompts: in batches, on disk, resumed and verified, by several workers."""
