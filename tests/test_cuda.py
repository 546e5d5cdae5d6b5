"""What a machine with a GPU needs and one without can show."""

import os

import torch
from conftest import PROCESSES

DONE_HERE = []


def report_origin():
    print(os.getppid(), DONE_HERE, torch.get_num_threads())


def test_started_processes_inherit_nothing_of_this_one(launch):
    """CUDA's context and, where there is a GPU, autograd's threads cannot be used in a fork of the process that made
    them, so no test's process may be a fork of the one that runs the tests."""
    DONE_HERE.append("backward")
    torch.ones(1, requires_grad=True).backward()
    parent, done, threads = launch(report_origin, [], processes=2)[0].split()
    assert int(parent) != os.getpid() and done == "[]" and threads == "1"
    assert PROCESSES.get_start_method() == "forkserver"
