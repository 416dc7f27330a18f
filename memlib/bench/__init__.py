"""What recording costs: ``python -m memlib.bench``."""
