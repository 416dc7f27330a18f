"""Numbers of a run for the prose around it."""


def glue(name: str, value: float | int | str) -> None:
    """Give a page the result of this run under a name, for ``{glue:text}``.

    The same output as myst_nb's own `glue`, without needing it: chapters also run on Colab.
    """
    from IPython.display import display

    plain = value if isinstance(value, str) else float(value)
    if isinstance(value, int):
        plain = int(value)
    prefix = "application/papermill.record/"
    display(
        {f"{prefix}text/plain": repr(plain)},
        metadata={"scrapbook": {"name": name, "mime_prefix": prefix}},
        raw=True,
    )
