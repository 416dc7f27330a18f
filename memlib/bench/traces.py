"""The traces that come with the book, in ``data/traces``: made, and compared with new ones.

    make traces                                      # records them all anew and packs them
    python -m memlib.bench.traces --add _build/traces    # packs what a book had to record
    python -m memlib.bench.traces --compare FILE     # samples some again; what differs, as JSON
    python -m memlib.bench.traces --prove _build/fresh   # all of them, against `make book FRESH=1`
    python -m memlib.bench.traces --proved           # whether that was done with this code

`memlib.cached` takes them by weights and settings, whatever has become of the code. So `make book`
samples some prompts of them again, others each time, and stops where they are no longer what this
code makes. When code that makes their numbers has changed, all of them are proved from nothing:
``data/traces/PROVED`` says with which code that was done last, and CI does it where it was not.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xarray as xr

import memlib
from memlib.hub.files import code, sha256, whole
from memlib.hub.names import SHIPPED
from memlib.paths import LAB, LAB_FLOW, REDRAWN, REDRAWN_FLOW, ROOT, STEPS_FLOW, TRACES
from memlib.runs import MAKES, kept, packed
from memlib.runs.store import Run
from memlib.site.about import processor

BUDGET = 33_800_000  # bytes of all files
PROVED = "PROVED"
# what makes the numbers of shipped results, besides what makes traces
ALSO = ("detection", "mitigation", "lab")
SHARE = 0.02  # of the prompts, sampled again with each book
# Another processor rounds otherwise, and sampling makes more of it: scalar products by the lengths
# of their vectors, severities, grey levels of 255 (mean over a picture).
TOLERANCE = {"gram": 0.01, "severity": 0.02, "image": 1.0}


@functools.cache
def models() -> dict:
    """The labs, and what the first one was earlier in training, by name."""
    found = {name: memlib.load(name).uncached for name in SHIPPED}
    steps = sorted((LAB / "checkpoints").glob("step-*"))
    earlier = (memlib.training_step(found["lab"], step).uncached for step in steps)
    return found | {model.source: model for model in earlier}


def make(folder: Path, add: bool = False) -> None:
    """Pack what a book has recorded in a cache of its own; the dearest for its size, first.

    With `add` what is there stays, and what it lacks is added.
    """
    runs = [Run(path.parent) for path in sorted(folder.glob("*/plan.json"))]
    runs = [run for run in runs if run.planned()["identity"]["model"]["source"] in models()]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    by = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "machine": processor()}
    with tempfile.TemporaryDirectory(dir=TRACES.parent) as scratch:
        made = {}
        for file in TRACES.glob("*.zip") if add else ():
            made[Path(shutil.copy(file, scratch))] = np.inf
        for run in runs:
            plan, name = run.planned(), Path(run.address).name.rsplit("-", 1)[0]
            if Path(scratch, f"{name}.zip") in made:
                continue
            about = {
                "identity": plan["identity"], "seeds": plan["seeds"], "by": by,
                "prompts": [row["prompt_id"] for row in plan["prompts"]],
            }  # fmt: skip
            file = Path(scratch) / f"{name}.zip"
            packed.pack(run.read(), file, **about)
            made[file] = _calls(about) / file.stat().st_size
            print(f"{name}: {file.stat().st_size / 1e6:.2f} MB, {_calls(about)} calls", flush=True)
        for kept in folder.glob("kept-*.zip"):  # experiments of chapters (`memlib.runs.kept`)
            file = Path(scratch) / f"{kept.stem.rsplit('-', 1)[0]}.zip"
            if file in made:
                continue
            packed.pack(xr.Dataset(packed.unpack(kept)), file, **packed.read_about(kept), by=by)
            made[file] = np.inf
        shutil.rmtree(TRACES, ignore_errors=True)
        TRACES.mkdir()
        room = BUDGET
        for file in sorted(made, key=made.get, reverse=True):
            if (size := file.stat().st_size) <= room:
                room -= size
                shutil.move(file, TRACES / file.name)
    sums = [f"{sha256(file)}  {file.name}\n" for file in sorted(TRACES.glob("*.zip"))]
    (TRACES / "SHA256SUMS").write_text("".join(sums))
    print(f"{len(sums)} of {len(made)} files, {(BUDGET - room) / 1e6:.1f} MB: data/traces")


def _calls(about: dict) -> int:
    """How often the network was called for a trace."""
    settings = about["identity"]["settings"]
    if "steps" not in settings:
        return len(about["prompts"]) * len(settings["timesteps"]) * settings["draws"] * 2
    branches = 1 if settings["guidance_scale"] == 1 else 2
    return len(about["prompts"]) * len(about["seeds"]) * settings["steps"] * branches


def compare(share: float = SHARE, seed: int | None = None) -> dict | None:
    """Sample some recorded prompts again; the largest differences. None where the lab is another.

    Raises
    ------
    ValueError
        A file is damaged, or a difference is larger than `TOLERANCE`: which, and by how much.
    """
    seed = time.time_ns() % 1_000_000 if seed is None else seed
    listed = memlib.load_pairs("lab")
    files = sorted(TRACES.glob("*.zip"))
    sums = dict(line.split()[::-1] for line in (TRACES / "SHA256SUMS").read_text().splitlines())
    for name in sorted(sums.keys() | {file.name for file in files}):
        if not (TRACES / name).exists() or sums.get(name) != sha256(TRACES / name):
            raise ValueError(
                f"data/traces/{name} is missing or damaged, by the checksum in SHA256SUMS; "
                "git checkout -- data/traces restores it"
            )
    abouts = {file: packed.read_about(file) for file in files if not file.name.startswith("kept-")}
    known = {file: about["identity"]["model"] for file, about in abouts.items()}
    if any(models()[m["source"]].fingerprint != m["fingerprint"] for m in known.values()):
        return None
    every = [(file, p) for file, about in abouts.items() for p in range(len(about["prompts"]))]
    count = max(1, round(share * len(every)))
    chosen: dict[Path, list[int]] = {}
    for n in np.random.default_rng(seed).permutation(len(every))[:count]:
        chosen.setdefault(every[n][0], []).append(every[n][1])
    largest = dict.fromkeys(TOLERANCE, 0.0)
    for file, places in chosen.items():
        settings = dict(abouts[file]["identity"]["settings"])
        function = getattr(memlib, abouts[file]["identity"]["function"])
        if "severity" in settings:
            settings |= {"similarity": settings.pop("severity"), "seeds": abouts[file]["seeds"]}
        rows = listed.set_index("prompt_id", drop=False).loc[
            [abouts[file]["prompts"][p] for p in places]
        ]
        model = models()[known[file]["source"]]
        new = function(model, rows.reset_index(drop=True), **settings, progress=False)
        old = {name: v[places] for name, v in packed.unpack(file).items()}
        for name, value in differences(old, new).items():
            if value > TOLERANCE[name]:
                raise ValueError(
                    f"data/traces/{file.name} is not what this code makes: {name} differs by "
                    f"{value:.2g}, {TOLERANCE[name]:g} is tolerated (prompts "
                    f"{', '.join(rows.prompt_id)}); where it should, make traces records anew"
                )
            largest[name] = max(largest[name], value)
    first = next(iter(abouts.values()))
    return {
        "seed": seed, "sampled": count, "of": len(every), "largest": largest, "by": first["by"],
        "tolerance": TOLERANCE, "traces": len(abouts), "versions": _versions(first),
    }  # fmt: skip


def _versions(about: dict) -> dict:
    return json.loads(about["attrs"].get("versions", "{}"))


def differences(old: dict[str, xr.Variable], new: xr.Dataset) -> dict[str, float]:
    """The largest differences of scalar products, severities and pictures."""
    gram, other = old["gram"].values, new.gram.values
    length = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1).clip(min=1e-12))
    found = {"gram": abs(gram - other) / (length[..., None] * length[..., None, :])}
    if "image" in old:
        found["image"] = abs(old["image"].values.astype(int) - new.image.values).mean((-3, -2, -1))
        found["severity"] = abs(old["severity"].values - new.severity.values)
    return {name: float(np.nanmax(values, initial=0)) for name, values in found.items()}


def digest() -> str:
    """What the shipped results hang on: code, packages, weights, and the results themselves."""
    files = [ROOT / "memlib" / f"{name}.py" for name in MAKES]
    files += [file for room in ALSO for file in sorted((ROOT / "memlib" / room).glob("*.py"))]
    packages = ("torch", "diffusers", "transformers", "numpy", "pillow", "onnxruntime")
    words = [code(file) for file in files] + [version(package) for package in packages]
    weights = (LAB, LAB_FLOW, REDRAWN, REDRAWN_FLOW, STEPS_FLOW)
    words += [(folder / "SHA256SUMS").read_text() for folder in (*weights, TRACES)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def proved() -> bool:
    """Whether all shipped results were made from nothing with this code, and were the same."""
    file = TRACES / PROVED
    return file.exists() and file.read_text().strip() == digest()


def prove(folder: Path) -> None:
    """Compare all shipped results with those that a fresh book left in its cache; note it.

    Raises
    ------
    ValueError
        One is not there, or differs by more than is tolerated.
    """
    for file in sorted(TRACES.glob("*.zip")):
        if file.name.startswith("kept-"):
            new = [xr.Dataset(packed.unpack(f)) for f in folder.glob(f"{file.stem}-*.zip")]
            apart = [rows_apart(xr.Dataset(packed.unpack(file)), each) for each in new]
            limits = dict.fromkeys(apart[0] if apart else (), kept.TOLERANCE)
        else:
            runs = [Run(f) for f in folder.glob(f"{file.stem}-*") if f.is_dir()]
            apart = [differences(packed.unpack(file), run.read()) for run in runs]
            limits = TOLERANCE
        if not apart:
            raise ValueError(f"{folder} has no {file.stem}: run make book FRESH=1 first")
        for name, value in apart[0].items():
            if value > limits[name]:
                raise ValueError(f"data/traces/{file.name}: {name} differs by {value:.2g}")
    (TRACES / PROVED).write_text(digest() + "\n")


def rows_apart(old: xr.Dataset, new: xr.Dataset) -> dict[str, float]:
    """Of each variable of a kept result the largest of its rows' median differences."""
    return {name: kept.apart(v.values, new[name].values) for name, v in old.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pack", type=Path, help="the cache that a fresh book has filled")
    parser.add_argument("--add", type=Path, help="the cache of a book; what is there stays")
    parser.add_argument("--prove", type=Path, help="the cache that a fresh book has filled")
    parser.add_argument("--proved", action="store_true", help="exit status 0 where it is proved")
    parser.add_argument("--compare", type=Path, help="where to write what differs")
    parser.add_argument("--part", type=float, default=1.0, help="of the share that is compared")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.pack:
        make(arguments.pack)
        prove(arguments.pack)
    if arguments.add:
        make(arguments.add, add=True)
    if arguments.prove:
        try:
            prove(arguments.prove)
        except ValueError as error:
            sys.exit(f"error: {error}")
    if arguments.proved:
        sys.exit(not proved())
    if arguments.compare:
        try:
            result = compare(SHARE * arguments.part)
        except ValueError as error:
            sys.exit(str(error))
        if result is None:
            print("data/traces is of another training of the lab: everything is recorded anew")
            arguments.compare.unlink(missing_ok=True)
            sys.exit()
        with whole(arguments.compare) as partial:
            partial.write_text(json.dumps(result))
