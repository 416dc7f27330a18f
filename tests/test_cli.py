"""The command line: what it answers without torch, and names that are still taken."""

import hashlib
import os
import subprocess
import sys

import pandas as pd
import pytest

from memlib import cli
from memlib.hub.lists import LISTS

HEAVY = ("torch", "diffusers", "transformers", "onnxruntime", "matplotlib")
SCRIPT = f"""
import dataclasses, sys
from memlib import cli
from memlib.hub import lists
name = "webster-sd14"
lists.LISTS[name] = dataclasses.replace(lists.LISTS[name], md5=sys.argv[1])
try:
    status = cli.main(sys.argv[2:])
except SystemExit as end:
    status = end.code
print("status", status, "loaded", *{{*{HEAVY}}} & {{*sys.modules}})
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--help", "memlib trace | verify | fetch | book | doctor"),
        ("trace --help", "--ray-address"),
        ("verify", "no run in "),
        ("doctor --quick", "webster-sd14     1 prompts, 0 with an image"),
        ("fetch webster-sd14 --images .", "webster-sd14: 1 prompts, 0 with an image"),
        ("fetch sscd-large", "status 1"),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments, said, tmp_path):
    """In a process of its own."""
    file = tmp_path / "data/webster-sd14" / LISTS["webster-sd14"].file
    file.parent.mkdir(parents=True)
    row = {"index": [7], "caption": ["a boat"], "url": ["http://a/1"], "overfit_type": ["MV"]}
    pd.DataFrame(row).to_parquet(file)
    (tmp_path / "empty").mkdir()
    folders = {"MEMLIB_DATA": str(tmp_path / "data"), "MEMLIB_CACHE": str(tmp_path / "cache")}
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, md5, *arguments.split()], cwd=tmp_path / "empty",
        env=os.environ | folders, capture_output=True, text=True,
    )  # fmt: skip
    assert said in run.stdout, run.stderr
    status = 1 if said == "status 1" else 0
    assert run.stdout.splitlines()[-1] == f"status {status} loaded"


def test_the_quick_doctor_says_what_the_doctor_says(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLIB_DATA", str(tmp_path))
    assert cli.main(["doctor", "--quick"]) == 0
    quick = capsys.readouterr().out.splitlines()
    assert cli.main(["doctor"]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert [line for line in quick if line not in whole] == ["Folders"]
    more = [line.split()[0] for line in whole if line not in quick]
    assert more == ["Device", "GPU", "CPU", "Time", "sd14", "sd21", "the", "batch", "lab"]


def test_an_older_name_of_an_option(capsys):
    for name in ("--ray-address", "--address"):
        assert cli.parser().parse_args(["trace", name, "auto"]).ray_address == "auto"
    with pytest.raises(SystemExit):
        cli.main(["trace", "--help"])
    out = capsys.readouterr().out
    assert "--ray-address" in out
    assert " --address" not in out
