"""Programs in processes of their own, which are fresh but for having imported torch and torchvision.

These two take longer to import than most of what the programs do, so the processes are forks of one that has done it.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_RUNNER = """
import json, os, runpy, sys, traceback
import torch, torchvision

def run(program, *arguments):
    if program == "-c":
        code, *arguments = arguments
        sys.argv, sys.path[0] = ["-c", *arguments], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif program == "-m":
        sys.argv, sys.path[0] = list(arguments), ""
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [program, *arguments], os.path.dirname(os.path.abspath(program))
        runpy.run_path(program, run_name="__main__")

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(job["streams"][stream - 1], os.O_WRONLY | os.O_CREAT), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(job["env"])
        os.chdir(job["cwd"])
        if "OMP_NUM_THREADS" in os.environ:  # torch was imported under another environment
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        sys.path[1:1] = filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))
        code = 1
        try:
            run(*job["program"])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _runner() -> subprocess.Popen:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", _RUNNER], **pipes)  # ends with its standard input


def run_fresh(
    *program: str | Path, env: dict[str, str] | None = None, cwd: Path | str = "/"
) -> subprocess.CompletedProcess:
    """Run ``python PROGRAM``: a file and its arguments, ``-m`` and a module's name, or ``-c`` and code.

    Args:
        *program: What follows ``python``.
        env: The whole environment of the process; None for this one's.
        cwd: Its folder.

    Returns:
        As ``subprocess.run`` with captured text.
    """
    runner = _runner()
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("out", "err")]
        job = dict(
            program=list(map(str, program)), env=env or dict(os.environ), cwd=str(cwd), streams=list(map(str, streams))
        )
        print(json.dumps(job), file=runner.stdin, flush=True)
        exit_code = int(runner.stdout.readline())
        out, err = (stream.read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess(job["program"], exit_code, out, err)
