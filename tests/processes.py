"""Several processes of a script, as `torchrun` starts them, but at once.

They are forks of a server that has imported torch and the scripts, which takes seconds. Where it
matters how a script is started or ended, the tests use `torchrun` itself.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from unittest import mock

from tests.conftest import WITH_PATH
from utils.script import run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.imported"])


def ranks(count: int, script: str, *arguments, first: str = "") -> str:
    """What `count` processes of a script print together; they must end well.

    Each executes the code `first` before it.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [f"{script}.py", *map(str, arguments)]
    printed = Path("printed")
    printed.unlink(missing_ok=True)
    processes = []
    for rank in range(count):
        own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = (script, command, own, os.getcwd(), first)
        processes.append(FORKS.Process(target=one_rank, args=given))
    with mock.patch.dict(os.environ, WITH_PATH):  # for the server, where this starts it
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout=120)
    text = printed.read_text("utf-8")
    assert [process.exitcode for process in processes] == [0] * count, text
    return text


def one_rank(script, command, group, folder, first):
    os.environ.update(group)
    os.chdir(folder)
    printed = os.open("printed", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.argv = command
    exec(first)
    run(importlib.import_module(script).main)
