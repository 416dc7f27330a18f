"""Shared by all tests. Set before torch is imported: two workers, one thread each."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# The suite compares on the CPU. On a card: CUDA_VISIBLE_DEVICES=0 python -m pytest -k on_a_gpu
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from jaxtyping import install_import_hook

# shapes and types of memlib's functions are checked here and nowhere else
install_import_hook("memlib", "beartype.beartype")

import contextlib
import functools
import hashlib
import socket

import pandas as pd
import pytest

import memlib
from memlib import measures
from memlib.hub import lists, sscd
from memlib.site import forked


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, and large ones: at the end a worker would wait for one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -item.path.stat().st_size))


@pytest.fixture(scope="module")
def lab():
    return memlib.load("lab")


@pytest.fixture(scope="session")
def forks():
    """What stands for Python's name in a command, with packages imported in this environment."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def python(**more: str) -> list[str]:
            return stack.enter_context(forked.python(os.environ | more))

        yield python


@pytest.fixture(scope="session")
def hub_of_ours(tmp_path_factory):
    """Where a made-up Hub is, and the folder of its downloads, as the environment says them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    home = str(tmp_path_factory.mktemp("hub") / "home")
    return {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="module")
def atoms():
    import torch  # here, for what needs no torch shall not wait for it

    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def webster(tmp_path, monkeypatch):
    """A list in Webster's format, where `memlib fetch` would put it, and its folder of images."""
    table = pd.DataFrame({
        "caption": ["A cat, sleeping", "a CAT sleeping!", "Two dogs", "A poster", "A tree"],
        "index": [7, 12, 12, 40, 41],
        "url": ["http://a/1", "http://a/2", "http://a/3", "http://a/1", None],
        "overfit_type": ["MV", "RV", "N", "TV", "MV"],
        "retrieved_urls": [["http://b/1", "http://a/1"], [], None, ["http://b/4"], None],
    })  # fmt: skip
    monkeypatch.setenv("MEMLIB_DATA", str(tmp_path))
    file = lists.list_file("webster-sd14")
    (file.parent / "images").mkdir(parents=True)
    table.to_parquet(file)
    known = lists.PromptList(file.name, hashlib.md5(file.read_bytes()).hexdigest())
    monkeypatch.setitem(lists.LISTS, "webster-sd14", known)
    return file.parent


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A stand-in by the names of both networks of SSCD, with its checksum in place of theirs."""
    import torch

    class Stand(torch.nn.Module):
        """Colour means of a 2 x 2 grid, so that scale, order and shape all matter."""

        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)

    file = tmp_path / "sscd.pt"
    torch.jit.script(Stand()).save(str(file))
    for network in sscd.OFFICIAL.values():
        monkeypatch.setenv(network.variable, str(file))
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setenv(f"{network.variable}_SHA256", checksum)
    measures.descriptor.cache_clear()
    yield file
    measures.descriptor.cache_clear()
