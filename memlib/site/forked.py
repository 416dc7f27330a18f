"""Python processes, forked from one that has the book's packages imported already.

To import torch, diffusers and the rest is a third of most chapters' time. On Linux it is done once:
``python -SP forked.py SOCKET -m ipykernel_launcher ...`` stands for a fork of that process which
runs ``-m ipykernel_launcher ...``, in its folder and environment, with its input and output. It
passes signals on and has the fork's exit status; neither outlives the other.
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
READ = ("CUDA_", "HF_", "MATPLOTLIB", "MKL_", "MPL", "OMP_", "OPENBLAS_", "TRANSFORMERS_")
GPUS = ("/dev/nvidiactl", "/dev/kfd")  # what has looked at one cannot be forked


@contextlib.contextmanager
def python(environment: dict[str, str], begin: bool = True):
    """The beginning of a command, to be used in place of Python's name as long as this lasts.

    `environment` : of the process that imports; what packages read of it then, names that begin
    with `READ`, must be the same for all. Where there is a GPU or no Linux, and with `begin` false,
    it is Python itself.
    """
    import subprocess
    import tempfile

    if not begin or sys.platform != "linux" or any(map(os.path.exists, GPUS)):
        yield [sys.executable]
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(listener.fileno())], env=environment,
            pass_fds=[listener.fileno()], start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        listener.close()
        try:
            yield [sys.executable, "-SP", __file__, f"{folder}/socket"]
        finally:
            process.kill()
            process.communicate()


def stand_in(address: str, arguments: list[str]) -> int:
    """Ask for a fork that runs Python with these arguments; return its exit status, at its end."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        asked = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
        answers = connection.makefile()
        child = int(answers.readline() or sys.exit("the process that forks has ended"))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(child, number))
        status = int(answers.readline() or 1)
    if status < 0:  # end by the same signal
        with contextlib.suppress(OSError):  # of SIGKILL, which has no other action
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def serve(listener: socket.socket) -> None:
    """Import the packages, and fork for whoever asks; ends when its input does."""
    import importlib
    import select

    for name in PACKAGES:
        with contextlib.suppress(Exception):  # who needs it is told so
            importlib.import_module(name)
    connections = {}

    def reap(*_) -> None:
        while connections:
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                return
            with connections.pop(child) as connection, contextlib.suppress(OSError):
                connection.send(b"%d\n" % os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGCHLD, reap)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connections[child] = connection
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        if not child:
            listener.close()
            for other in connections.keys() - {0}:
                connections[other].close()
            run(connection)


def run(connection: socket.socket) -> NoReturn:
    """In the fork: be what was asked for, and end without clearing up what was imported."""
    import atexit
    import runpy
    import threading
    import traceback
    from types import ModuleType

    message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    asked = json.loads(message)
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    connection.send(b"%d\n" % os.getpid())
    threading.Thread(target=lambda: connection.recv(1) or os._exit(1), daemon=True).start()
    wanted, here = asked["environment"].items(), os.environ.items()
    if others := {name for name, _ in wanted ^ here if name.startswith(READ)}:
        print(f"{min(others)} is another one than where packages were imported", file=sys.stderr)
        os._exit(1)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"] | {"JPY_PARENT_PID": str(os.getppid())})
    how, what, *rest = asked["arguments"]
    status: int | str | None = 0
    try:
        if how == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        sys.exit(stand_in(sys.argv[1], sys.argv[2:]))
