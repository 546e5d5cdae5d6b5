"""What the tests share: running a script as one process or as several, without starting Python anew for each."""

import io
import multiprocessing
import os
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from utils.run import exit_with_one_line_errors

# Processes are forked from this one, and a fork does not take OpenMP's threads along. One thread is also what keeps
# several processes on few cores from waiting for each other.
torch.set_num_threads(1)


def call_main(main, words):
    """Runs a script's main function with these command-line words here; returns (status, standard output, error)."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["script.py", *map(str, words)])
        try:
            exit_with_one_line_errors(main)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def _process(main, words, rank, processes, port, pipe):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    try:
        pipe.send(call_main(main, words))
    except BaseException:
        pipe.send((1, "", traceback.format_exc()))
    pipe.close()
    # Not the way out that pytest's own exit handlers are on.
    os._exit(0)


@pytest.fixture
def launch():
    """launch(main, words, processes=1, status=0) -> (standard output, error) of the first process; all end in status.
    Several processes join through gloo, by torchrun's variables."""
    def run(main, words, processes=1, status=0):
        if processes == 1:
            results = [call_main(main, words)]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            context, results, running = multiprocessing.get_context("fork"), [], []
            for rank in range(processes):
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_process, args=(main, words, rank, processes, port, send))
                process.start()
                send.close()
                running.append((process, receive))
            for process, receive in running:
                results.append(receive.recv() if receive.poll(300) else (1, "", "no answer in 300 s"))
                process.join(10)
                process.kill()
        for code, out, err in results:
            assert code == status, out + err
        return results[0][1:]
    return run
