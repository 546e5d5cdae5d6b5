"""What the tests share: running a script as one process or as several, without starting Python anew for each."""

import io
import multiprocessing
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from utils.run import run_main

# One thread is what keeps several processes on few cores from waiting for each other.
torch.set_num_threads(1)

# Processes are forked from a server that has imported what takes long and has done nothing else: a process forked from
# this one would inherit autograd's threads and the CUDA context of the tests before it, and could use neither.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["timm", "torchvision", "sklearn.metrics", "pytest", "retrieval", "classify",
                                  "segment"])


def call_main(main, words):
    """Runs a script's main function with these command-line words here; returns (status, standard output, error)."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["script.py", *map(str, words)])
        try:
            run_main(main)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def keep_store():
    """The processes' store, which outlives them, as torchrun keeps it."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def torchrun_variables(store, rank, processes):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}


def _process(main, words, environment, pipe):
    torch.set_num_threads(1)
    os.environ.update(environment)
    # A script that leaves without ceremony still has to say how; the workers of its data loaders leave as ever.
    leave, os._exit = os._exit, sys.exit
    os.register_at_fork(after_in_child=lambda: setattr(os, "_exit", leave))
    try:
        pipe.send(call_main(main, words))
    except BaseException:
        pipe.send((1, "", traceback.format_exc()))
    pipe.close()
    # Gloo's threads may wait for processes that have gone.
    leave(0)


@pytest.fixture
def launch():
    """launch(main, words, processes=1, status=0) -> (standard output of the first process, errors of all); the first
    ends in status, all where that is 0. Several processes join through gloo, by torchrun's variables; they get main by
    pickle, so it is a function of a module (or functools.partial of one), and see the environment of this process but
    nothing patched into it."""
    def run(main, words, processes=1, status=0):
        if processes == 1:
            results = [call_main(main, words)]
        else:
            store = keep_store()
            results, running = [], []
            for rank in range(processes):
                receive, send = PROCESSES.Pipe(duplex=False)
                environment = os.environ | torchrun_variables(store, rank, processes)
                process = PROCESSES.Process(target=_process, args=(main, words, environment, send))
                process.start()
                send.close()
                running.append((process, receive))
            for process, receive in running:
                results.append(receive.recv() if receive.poll(300) else (1, "", "no answer in 300 s"))
                process.join(10)
                process.kill()
        for code, out, err in results if status == 0 else results[:1]:
            assert code == status, out + err
        return results[0][1], "".join(err for _, _, err in results)
    return run


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are written, one after another."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **how: kept.append(figure) or save(figure, *to, **how))
    return kept
