"""Several processes, under torchrun: they compute what one does; the job goes on if one dies."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from conftest import assert_same_step, first_step
from test_common import (
    EVALUATE, HERE, STAGES, load, read_log, read_results, run_stage, same, stage_argv)


def torchrun(*command, flags=("--standalone", "--nproc-per-node=2")):
    """Start a command in two processes, or in those that the flags say."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *flags]
    return subprocess.Popen([*launcher, *map(str, command)], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process):
    """Wait for a process -> its exit status and what it has written to stderr."""
    try:
        _, error = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, error[-5000:]


def succeeds(process):
    status, error = end(process)
    assert status == 0, error


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The folder of stage 1 in two processes, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    succeeds(torchrun("pretrain_inv.py", *stage_argv("inv", toy, out)))
    return out


@pytest.mark.parametrize("stage, flags", [
    ("dist", ["--invariant-weight", 1, "--name", "dist"]), ("student", [])])
def test_two_processes_compute_what_one_does(stage, flags, chain, toy, tmp_path, float64):
    """Loss terms, gradients and BatchNorm statistics of a step."""
    if stage == "student":
        flags = ["--pretrained", chain, "--teachers", chain / "inv_ft.pt", chain / "dist_ft.pt"]
    one = first_step(stage, toy, tmp_path / "one", *flags)
    program = STAGES[stage][0].__name__
    code = (f"import sys, torch, {program}; torch.set_default_dtype(torch.float64); "
            f"{program}.main(sys.argv[1:])")

    def in_two_processes(argv):
        succeeds(torchrun(sys.executable, "-c", code, *argv,
                          flags=("--standalone", "--nproc-per-node=2", "--no-python")))

    two = first_step(stage, toy, tmp_path / "two", *flags, main=in_two_processes)
    assert len(one) > 50
    assert_same_step(one, two)


def test_a_killed_process_ends_the_job_and_restarts_go_on(whole, toy, tmp_path):
    """In the second epoch; then, with --max-restarts, once more."""
    argv = stage_argv("inv", toy, tmp_path)
    begin = time.monotonic()
    status, error = end(torchrun("test_common.py", "step", 9, "pretrain_inv", *argv))
    assert status != 0 and "exitcode  : -9" in error and time.monotonic() - begin < 60
    left = load(tmp_path, "inv")
    assert (left["epoch"], left["finished"]) == (1, False)
    succeeds(torchrun("test_common.py", "step", 3, "pretrain_inv", *argv,
                      flags=("--standalone", "--nproc-per-node=2", "--max-restarts=1")))
    assert same(load(whole, "inv")["model"], load(tmp_path, "inv")["model"])
    assert [line.get("epoch") for line in read_log(tmp_path, "inv")] == [None, 1, 2]


def test_two_nodes_train_as_one_does(whole, toy, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    flags = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=two", endpoint)
    for node in [torchrun("pretrain_inv.py", *stage_argv("inv", toy, tmp_path), flags=flags)
                 for _ in range(2)]:
        succeeds(node)
    assert same(load(whole, "inv")["model"], load(tmp_path, "inv")["model"])


def test_restarts_of_several_nodes_cost_one_line(toy, tmp_path):
    """Torch gives processes that start again another prefix of the store than those of other nodes
    have."""
    env = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, GROUP_RANK=0,
               GROUP_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1,
               TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_RESTART_COUNT=0)
    done = subprocess.run(
        [sys.executable, "pretrain_inv.py", *stage_argv("inv", toy, tmp_path)], cwd=HERE, text=True,
        env=os.environ | {key: str(value) for key, value in env.items()}, capture_output=True,
        timeout=60)
    assert done.returncode == 2 and "--max-restarts" in done.stderr
    assert "\n" not in done.stderr.strip()


def test_two_processes_evaluate_to_the_same_results(chain, tmp_path):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    succeeds(torchrun("evaluate.py", tmp_path, *EVALUATE))
    one, two = ([{**r, "seconds": 0} for r in read_results(out)] for out in (chain, tmp_path))
    assert one == two


def test_a_batch_that_cannot_be_shared_is_refused(toy, tmp_path, capsys):
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(SystemExit) as refused:
            run_stage("inv", toy, tmp_path, "--batch", 5)
    finally:
        torch.distributed.destroy_process_group()
    assert refused.value.code == 2
    assert "--batch 5 cannot be shared among 2 processes" in capsys.readouterr().err
