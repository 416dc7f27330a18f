"""The oldest versions that pyproject.toml admits; and what an import error is said to be."""

import itertools

import pytest

from memlib.errors import first_line


def chain(*errors: Exception) -> Exception:
    """The first error, raised from the second, and so on."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


LAZY = "Failed to import {} because of the following error (look up to see its traceback):\n{}"
TRANSFORMERS = "Could not import module 'CLIPImageProcessor'. Are this object's requirements right?"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such file\nand more"), "no such file"),
        (chain(ValueError("no such file"), KeyError("x")), "no such file"),
        (ValueError(), "ValueError"),
        (RuntimeError(LAZY.format("diffusers.x", "No module named 'httpx'")),
         "No module named 'httpx'"),
        (chain(RuntimeError(LAZY.format("diffusers.x", TRANSFORMERS)), ImportError(TRANSFORMERS),
               RuntimeError("operator torchvision::nms does not exist")),
         "operator torchvision::nms does not exist"),
        (chain(ModuleNotFoundError(TRANSFORMERS), ImportError("advice:\n\n  libx.so: not found\n")),
         "libx.so: not found"),
    ],
)  # fmt: skip
def test_the_cause_of_an_import_error_is_said(error, said):
    assert first_line(error) == said
