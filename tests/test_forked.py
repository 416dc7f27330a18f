"""A forked Python is like one that was started: input, output, status, signals, environment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memlib.site import forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
WAITS = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("script", "status", "out", "error"),
    [
        ("print(input(), __name__)", 0, "hello __main__\n", ""),
        ("import sys; print(sys.argv); sys.exit(7)", 7, "['-c', 'a', 'b']\n", ""),
        ("raise SystemExit('what is wrong')", 1, "", "what is wrong\n"),
        ("1 / 0", 1, "", "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "", ""),
        ("import atexit; atexit.register(print, 'end')", 0, "end\n", ""),
        ("import os; print(os.environ['OWN'], os.getcwd())", 0, "x /\n", ""),
        ("import sys; print(*{'torch', 'diffusers'} & {*sys.modules})", 0, "torch diffusers", ""),
    ],
)
def test_it_runs_like_python(forks, script, status, out, error):
    run = subprocess.run(
        [*forks(), "-c", script, "a", "b"], cwd="/", env=os.environ | {"OWN": "x"},
        input="hello\n", capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == status
    assert sorted(run.stdout.split()) == sorted(out.split())
    assert run.stderr.endswith(error)
    assert error or not run.stderr


def test_a_module_is_run(forks):
    run = subprocess.run([*forks(), "-m", "memlib.cli", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "memlib trace | verify" in run.stdout


def test_forks_do_not_share_what_they_change(forks):
    change = "import memlib; print(hasattr(memlib, 'new')); memlib.new = 1"
    for _ in range(2):
        run = subprocess.run([*forks(), "-c", change], capture_output=True, text=True)
        assert run.stdout == "False\n"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both(forks, how):
    command = [*forks(), "-c", WAITS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    assert child != process.pid
    process.send_signal(how)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == {"SIGINT": 1, "SIGTERM": 137, "SIGKILL": -9}[how.name]
    assert errors.endswith("KeyboardInterrupt\n" if how == signal.SIGINT else "")
    gone(child)


def gone(pid: int) -> None:
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_the_process_that_forks_ends_with_who_began_it():
    script = f"""
import os, subprocess
from memlib.site import forked
forked.PACKAGES = ()
with forked.python(dict(os.environ)) as python:
    subprocess.run([*python, "-c", {WAITS!r}])
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as p:
        child = int(p.stdout.readline())
        parent = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        p.kill()
    gone(parent)
    os.kill(child, signal.SIGKILL)


def test_what_packages_have_read_is_not_changed_afterwards(forks):
    other = os.environ | {"HF_HOME": "elsewhere"}
    run = subprocess.run([*forks(), "-c", "1"], env=other, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "HF_HOME is another one than where packages were imported\n"


def test_elsewhere_it_is_python_itself(monkeypatch):
    with forked.python({}, begin=False) as python:
        assert python == [sys.executable]
    monkeypatch.setattr(forked, "GPUS", (os.devnull,))
    with forked.python({}) as python:
        assert python == [sys.executable]


def test_tables_are_shown_as_in_a_kernel_that_was_started(forks):
    """Pandas looks for IPython while it is imported, and else cuts them to a terminal's width."""
    script = "import pandas, memlib.site.page; print(pandas.get_option('display.max_columns'))"
    run = subprocess.run([*forks(), "-c", script], capture_output=True, text=True)
    assert run.stdout == "20\n"
