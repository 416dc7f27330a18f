"""What comes from elsewhere: weights, lists of prompts, pictures, networks that compare them."""

from memlib.hub import sscd  # noqa: F401, it adds the official SSCD to the measures
