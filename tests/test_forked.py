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
        ("import sys; sys.exit(-1)", 255, "", ""),
        ("import sys; sys.exit(['a list'])", 1, "", "['a list']\n"),
        ("import sys; sys.stderr.write('no end of line')", 0, "", "no end of line"),
        ("import sys; print('x'); sys.stdout = None", 0, "x\n", ""),
        ("import os; os.fork() or os._exit(3); print('parent')", 0, "parent\n", ""),
        ("import os, sys; os.fork() or sys.exit(3); os.wait(); print('parent')", 0, "parent", ""),
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


def test_a_file_that_was_left_open_is_written(forks, tmp_path):
    script = f"file = open({str(tmp_path / 'file')!r}, 'w'); file.write('hello')"
    subprocess.run([*forks(), "-c", script], check=True)
    assert (tmp_path / "file").read_text() == "hello"


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


def test_what_a_fork_has_begun_goes_with_it(forks):
    """Also where the fork is busy outside of Python."""
    script = "import os, re, subprocess; print(subprocess.Popen(['sleep', '60']).pid, os.getpid())"
    script += "\nimport sys; sys.stdout.flush(); re.match('(a+)+$', 'a' * 40 + 'b')"
    process = subprocess.Popen([*forks(), "-c", script], stdout=subprocess.PIPE, text=True)
    grandchild, child = map(int, process.stdout.readline().split())
    process.kill()
    process.communicate()
    gone(child)
    gone(grandchild)


def test_a_dead_fork_is_noticed_though_a_grandchild_lives(forks):
    script = (
        "import os, signal, subprocess, time\nif os.fork(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    script += "\nos.closerange(0, 3); time.sleep(30)"
    began = time.monotonic()
    assert subprocess.run([*forks(), "-c", script]).returncode == 137
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_kernels_end_with_who_began_them(how):
    script = """
import os, time
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec
from memlib.site import forked
forked.PACKAGES = ("ipykernel.kernelapp",)
with forked.python(dict(os.environ)) as python:
    spec = get_kernel_dict()
    spec["argv"] = [*python, *spec["argv"][1:]]
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(**spec)
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    code = "import os; print(os.getpid(), os.getppid(), flush=True); import time; time.sleep(60)"
    client.execute_interactive(code)
"""
    command = [sys.executable, "-u", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as p:
        kernel, first = map(int, p.stdout.readline().split())
        p.send_signal(how)
    gone(kernel)
    gone(first)


def test_where_imports_end_the_process_python_itself_is_taken(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("import os; os._exit(1)")
    monkeypatch.setattr(forked, "PACKAGES", ("broken",))
    with forked.python(os.environ | {"PYTHONPATH": str(tmp_path)}) as python:
        assert python == [sys.executable]


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
