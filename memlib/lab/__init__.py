"""The model that the book ships: rendered scenes with planted duplicates, and its training."""
