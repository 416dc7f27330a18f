"""Python processes, forked from one that has the book's packages imported already.

To import torch, diffusers and the rest is a third of most chapters' time. On Linux it is done once:
``python -SP forked.py SOCKET -m ipykernel_launcher ...`` stands for a fork of that process which
runs ``-m ipykernel_launcher ...``, in its folder and environment, with its input and output. It
passes signals on and has the fork's exit status (137 where it was killed); neither outlives the
other.
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

    able = sys.platform == "linux" and not any(map(os.path.exists, GPUS))
    if not begin or not able or len(tempfile.gettempdir()) > 80:  # a socket's name ends at 108
        yield [sys.executable]
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        command = [sys.executable, "-P", __file__, str(listener.fileno()), *PACKAGES]
        process = subprocess.Popen(
            command, env=environment, pass_fds=[listener.fileno()], start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
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
        return int(answers.readline() or 137)


def serve(listener: socket.socket, packages: list[str]) -> None:
    """Import packages, and fork for whoever asks; ends when its input does."""
    import importlib
    import select

    for name in packages:
        with contextlib.suppress(Exception):  # who needs it is told so
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here asks how they ended
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            run(connection)
        connection.close()


def run(connection: socket.socket) -> NoReturn:
    """In the fork: be what was asked for, and end without clearing up what was imported."""
    import atexit
    import runpy
    import threading
    import traceback

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
    how, what, *sys.argv[1:] = asked["arguments"]
    try:
        wanted, here = asked["environment"].items(), os.environ.items()
        if others := {name for name, _ in wanted ^ here if name.startswith(READ)}:
            raise SystemExit(f"{min(others)} is another one than where packages were imported")
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"] | {"JPY_PARENT_PID": str(os.getppid())})
        sys.argv[0] = what if how == "-m" else how
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = main = type(sys)("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    connection.send(b"%d\n" % status)
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    else:
        sys.exit(stand_in(sys.argv[1], sys.argv[2:]))
