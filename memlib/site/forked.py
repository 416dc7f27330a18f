"""Python processes, forked from one that has the book's packages imported already.

To import torch, diffusers and the rest is a third of most chapters' time. On Linux it is done once:
``python -SP forked.py SOCKET -m ipykernel_launcher ...`` stands for a fork of that process which
runs ``-m ipykernel_launcher ...``, in its folder and environment, with its input and output. It
passes signals on and has the fork's exit status, 137 where that was killed or ended by `os._exit`.
Neither outlives the other.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from typing import NoReturn

PACKAGES = (  # the first one silences what the others say
    "memlib.hub.weights", "memlib.runs.tracing", "memlib.site.page", "memlib.plot", "scipy.stats",
    "seaborn", "ipykernel.kernelapp",
)  # fmt: skip
READ = (
    "CUDA_", "HF_", "HOME", "MATPLOTLIB", "MKL_", "MPL", "OMP_", "OPENBLAS_", "PYTHONHASHSEED",
    "PYTHONPATH", "TMPDIR", "TRANSFORMERS_", "TZ", "XDG_",
)  # fmt: skip
GPUS = ("/dev/nvidiactl", "/dev/kfd")  # what has looked at one cannot be forked


@contextlib.contextmanager
def python(environment: dict[str, str], begin: bool = True):
    """The beginning of a command, to be used in place of Python's name as long as this lasts.

    `environment` : of the process that imports; what packages read of it then, names that begin
    with `READ`, must be the same for all. It is Python itself with `begin` false, where there is a
    GPU or no Linux, and where the imports end that process.
    """
    import subprocess
    import tempfile

    able = sys.platform == "linux" and not any(map(os.path.exists, GPUS))
    if not begin or not able or len(os.fsencode(tempfile.gettempdir())) > 80:  # sockets': 108
        yield [sys.executable]
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        command = [sys.executable, "-P", __file__, str(listener.fileno()), *PACKAGES]
        process = subprocess.Popen(
            command, env=environment, pass_fds=[listener.fileno()], start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        listener.close()
        try:
            imported = process.stdout.read(1)
            yield [sys.executable, *(["-SP", __file__, f"{folder}/socket"] if imported else [])]
        finally:
            process.kill()
            process.communicate()


def stand_in(address: str, arguments: list[str]) -> int:
    """Ask for a fork that runs Python with these arguments; return its exit status, at its end."""
    asked = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
        answers = connection.makefile()
        child = int(answers.readline() or sys.exit("the process that forks has ended"))

        def pass_on(number, _) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        return int(answers.readline() or 137)


def serve(listener: socket.socket, packages: list[str]) -> None:
    """Import packages, and fork for whoever asks; ends when its input does."""
    import importlib
    import select

    read = {name: value for name, value in os.environ.items() if name.startswith(READ)}
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # ipykernel reads it when it is imported
    for name in packages:
        with contextlib.suppress(Exception):  # who needs it is told so
            importlib.import_module(name)
    os.write(1, b"\n")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here asks how they ended
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            run(connection, read)
        connection.close()


def run(connection: socket.socket, read: dict[str, str]) -> NoReturn:
    """In the fork: be what was asked for, and end without clearing up what was imported."""
    import atexit
    import fcntl
    import runpy
    import threading
    import traceback

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    main, status = type(sys)("__main__"), 1
    try:
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        while not message.endswith(b"\n"):
            message += connection.recv(1 << 20) or os._exit(1)
        os.setsid()
        connection.send(b"%d\n" % os.getpid())
    except OSError:
        os._exit(1)
    os.register_at_fork(after_in_child=connection.close)  # it is not a grandchild's to hold
    fcntl.fcntl(connection, fcntl.F_SETOWN, -os.getpid())  # all of this go with who asked
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):
        connection.recv(1, socket.MSG_DONTWAIT) or os._exit(1)  # who has gone before
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    asked = json.loads(message)
    how, what, *sys.argv[1:] = asked["arguments"]
    try:
        wanted = {k: v for k, v in asked["environment"].items() if k.startswith(READ)}
        if others := {name for name, _ in wanted.items() ^ read.items()}:
            raise SystemExit(f"{min(others)} is another one than where packages were imported")
        os.chdir(asked["folder"])
        parent = {"JPY_PARENT_PID": os.environ["JPY_PARENT_PID"]}
        os.environ.clear()
        os.environ.update(asked["environment"] | parent)
        sys.argv[0] = what if how == "-m" else how
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, "")
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), main.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    main.__dict__.clear()  # files that were left open are written
    for stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError, ValueError):  # the latter in a grandchild
        fcntl.fcntl(connection, fcntl.F_SETFL, 0)
        connection.send(b"%d\n" % (status & 255))
    os._exit(status & 255)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    else:
        sys.exit(stand_in(sys.argv[1], sys.argv[2:]))
