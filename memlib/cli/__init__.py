"""The command line: ``memlib trace | verify | fetch | book | doctor``, each in a module here."""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib import import_module
from pathlib import Path

from memlib.errors import first_line
from memlib.hub.names import CHECKPOINTS

NAMES = (
    f"lab, lab-flow, exact, {', '.join(CHECKPOINTS)}, a Hub id owner/name[@revision], a diffusers "
    "folder or a .safetensors file"
)
LISTS = "lab, webster-sd14, webster-sd21, webster-realvis, or a CSV, JSON lines or parquet file"


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse reads it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """All commands; each says in which module the function of its name is."""
    top = argparse.ArgumentParser(prog="memlib", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, module: str, text: str):
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(module=module)
        return added.add_argument

    add = command(
        "trace", "memlib.cli.trace",
        "Sample every prompt with every seed, as far as it is not recorded yet.",
    )  # fmt: skip
    add("--model", default="lab", help=NAMES)
    add("--revision", help="of a Hub model, instead of the pinned one")
    add("--vae", help="a Hub id, folder or .safetensors file instead of the model's")
    add("--config", help="of one .safetensors file: sd14, sd21, sd21-base or a folder")
    add("--timestep-spacing", help="leading, trailing or linspace")
    add("--pairs", help=f"{LISTS}; by default the model's own")
    add("--images", type=Path, help="folder of training images, named by prompt or index")
    add("--only-with-images", action="store_true", help="leave the other prompts out")
    add("--every", type=positive, default=1, help="take every n-th prompt")
    add("--prompts", type=positive, help="then at most so many")
    add("--seeds", type=positive, default=10)
    add("--guidance-scale", type=float, default=7.5, help="1 is no guidance")
    add("--sampler", default="ddim", help="ddim or ddpm; flow-euler of a flow model")
    add("--steps", type=int, default=50)
    add("--similarity", "--severity", default="sscd", help="copy score; see memlib doctor")
    add("--no-images", action="store_true", help="keep no pictures, to save disk")
    add(
        "--batch-size", type=positive, help="of images; by default 20 on a CPU and what a GPU holds"
    )
    add(
        "--compile", action=argparse.BooleanOptionalAction,
        help="the U-Net; by default on a GPU where the run is long enough to pay for it",
    )  # fmt: skip
    add("--device", help="cuda, cuda:1, cpu; a GPU by default")
    add("--dtype", help="of the U-Net: float16, bfloat16 or float32")
    add("--out", type=Path, help="CSV file for D1, D2 and severity of each prompt")
    add("--store", help="folder or fsspec address of the run; else where the book looks")
    add("--engine", default="local", help="local, or ray for a cluster")
    add("--ray-address", help="of a running Ray cluster, as host:port or auto")
    add("--address", dest="ray_address", help=argparse.SUPPRESS)  # until the next version
    add("--workers", type=positive, help="by Ray; one on a CPU, all GPUs by default")
    add("--threads", type=positive, help="of each worker; the cores are divided by default")

    add = command(
        "detect", "memlib.cli.detect",
        "Which prompts of a list are memorized, from the first call; needs no images and no truth.",
    )  # fmt: skip
    add("--model", default="lab", help=NAMES)
    add("--revision", help="of a Hub model, instead of the pinned one")
    add("--prompts", help=f"{LISTS}; by default the model's own")
    add("--calibrate", help="a list of captions that are not memorized, to compare with")
    add("--statistic", default="detail", help="see memlib.detection.statistics")
    add("--seeds", type=positive, default=1, help="noises for each prompt")
    add("--rate", type=float, default=0.01, help="of false alarms")
    add("--batch-size", type=positive, default=16, help="of captions")
    add("--out", type=Path, help="CSV file of all prompts; stopped, it goes on where it was")
    add("--device", help="cpu, or GPUs, as cuda:0,cuda:1; by default all")
    add("--dtype", help="of the U-Net: float16, bfloat16 or float32")

    add = command(
        "verify", "memlib.cli.verify",
        "Compare recorded runs with their checksums; without an address, all that the book made.",
    )  # fmt: skip
    add("addresses", nargs="*", help="folders or fsspec addresses of runs")

    add = command(
        "fetch", "memlib.cli.fetch",
        "Bring a published list and its training images, a model's weights, or the official SSCD.",
    )  # fmt: skip
    add(
        "what",
        help="webster-sd14, webster-sd21, webster-realvis; sscd, sscd-large; "
        f"{', '.join(CHECKPOINTS)} or a Hub id",
    )
    add("--revision", help="of a Hub model, instead of the pinned one")
    add("--dtype", help="float16 for half-precision files, as by default with a GPU")
    add("--images", type=Path, help="take the images from this folder, zip or tar")
    add("--list-only", action="store_true", help="no images")
    add("--retry", action="store_true", help="also what an earlier run found gone")
    add("--sha256", help="of an official SSCD file: sscd-large needs it, for sscd it replaces ours")

    text = "Execute the chapters that changed and build the site."
    add = command("book", "memlib.cli.book", text)
    add("--model", help=NAMES)
    add("--profile", default="full", help="full, or one of book/profiles.toml")
    add("--set", default="", help='parameters: "name=value chapter.name=value"')
    add("--fresh", action="store_true", help="record everything anew, also what comes with it")

    add = command(
        "doctor", "memlib.cli.hardware",
        "What is installed, on which device, what can be run and how long it would take.",
    )  # fmt: skip
    add(
        "--quick", action="store_const", dest="module", const="memlib.cli.doctor",
        help="without torch: what is installed and what is here",
    )  # fmt: skip
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a wrong input or a full disk is one line, not a traceback."""
    options = parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        return getattr(import_module(options.module), options.command)(options) or 0
    except KeyboardInterrupt:
        print("\ninterrupted: what was complete is kept", file=sys.stderr)
        return 130
    except ImportError as error:  # of a package's, perhaps over many lines
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
