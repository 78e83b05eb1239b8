"""Several processes, under torchrun: they compute what one does; the job goes on if one dies."""

import argparse
import math
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import common as tb
import evaluate
import pretrain_inv
from conftest import die
from test_common import (
    EVALUATE, HERE, STAGES, load, read_log, read_results, run_stage, same, stage_argv)


def run_in_two(main, *argv, nodes=1, max_restarts=0):
    """Call main(*argv) in two processes, on one node or on two -> the nodes' exit statuses.

    As torchrun does it, but the processes are forks, which import nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launch = elastic_launch(LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=2 // nodes, max_restarts=max_restarts,
        run_id="tests", rdzv_backend="c10d", rdzv_endpoint=endpoint, start_method="fork"), main)
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=launch, args=argv) for _ in range(nodes)]
    for node in running:
        node.start()
    for node in running:
        node.join(60)
        node.kill()  # if it hangs
    return [node.exitcode for node in running]


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The folder of stage 1 in two processes, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node=2", "pretrain_inv.py", *stage_argv("inv", toy, out)],
                   cwd=HERE, check=True, timeout=150)
    return out


def test_the_similarities_are_those_of_the_network_that_is_saved(whole, toy):
    """On CPUs each process had BatchNorm statistics of its own."""
    saved = load(whole, "inv")
    embedder = tb.Embedder(tb.build_model("r3d_tiny", 8))
    embedder.backbone.load_state_dict(saved["model"])
    embedder.head.load_state_dict(saved["head"])
    videos = tb.read_videos("toy", toy, True)
    rows = tb.compare_clips(embedder, videos, argparse.Namespace(**saved["args"]),
                            torch.device("cpu"))
    assert saved["similarity_names"] == videos.names
    assert torch.allclose(torch.stack(list(rows.values())), saved["similarity"], atol=1e-5)


@pytest.mark.parametrize("stage, flags, term", [
    ("inv", [], "loss"), ("dist", ["--invariant-weight", 1, "--name", "dist"], "l_i")])
def test_negatives_are_of_all_processes(stage, flags, term, toy, tmp_path):
    """At so high a temperature the loss is at chance: of four videos ln 7, of two ln 3."""
    argv = stage_argv(stage, toy, tmp_path, "--epochs", 1, "--temperature", 1000, *flags)
    assert run_in_two(STAGES[stage][0].main, argv) == [0]
    assert read_log(tmp_path, stage)[1][term] == pytest.approx(math.log(7), abs=0.01)


def gradients(net, videos):
    """Of Eq. 1 on two clips of each video."""
    tb.invariant_loss(tb.all_gather(net(videos).unflatten(1, (2, -1)))).backward()
    return [p.grad for p in net.parameters()]


def write_gradients(rank, net, videos, folder):
    """One of two processes, which has its half of the videos."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                   world_size=2)
    net = nn.parallel.DistributedDataParallel(net)
    torch.save(gradients(net, videos.chunk(2)[rank]), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path, float64):
    """Without BatchNorm, whose statistics are each process's own on CPUs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16))
    videos = torch.randn(6, 20)
    multiprocessing.start_processes(write_gradients, (net, videos, tmp_path), 2,
                                    start_method="fork")
    one = gradients(net, videos)
    for rank in range(2):
        for a, b in zip(one, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert a.any() and torch.allclose(a, b, rtol=1e-6, atol=1e-12)


def test_a_killed_process_ends_the_job_and_restarts_go_on(whole, toy, tmp_path):
    """In the second epoch; then, with --max-restarts, once more."""
    argv = stage_argv("inv", toy, tmp_path, "--save-every", 2)
    assert run_in_two(die, "step", 9, "pretrain_inv", *argv) == [1]
    left = load(tmp_path, "inv")
    assert (left["epoch"], left["step"], left["finished"]) == (1, 2, False)
    assert run_in_two(die, "step", 3, "pretrain_inv", *argv, max_restarts=1) == [0]
    assert same(load(whole, "inv")["model"], load(tmp_path, "inv")["model"])
    assert [line.get("epoch") for line in read_log(tmp_path, "inv")] == [None, 1, 2]


def test_two_nodes_train_as_one_does(whole, toy, tmp_path):
    assert run_in_two(pretrain_inv.main, stage_argv("inv", toy, tmp_path), nodes=2) == [0, 0]
    assert same(load(whole, "inv")["model"], load(tmp_path, "inv")["model"])


def test_two_processes_evaluate_to_the_same_results(chain, tmp_path):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    assert run_in_two(evaluate.main, [str(tmp_path), *EVALUATE]) == [0]
    one, two = ([{**r, "seconds": 0} for r in read_results(out)] for out in (chain, tmp_path))
    assert one == two
    lines = [(out / "predictions.csv").read_text().splitlines() for out in (chain, tmp_path)]
    one, two = (sorted(line.rsplit(",", 1)[0] for line in each) for each in lines)
    assert one == two  # but for the order and the last digits of probabilities


def test_two_processes_print_the_classes_of_all_videos(chain, toy, tmp_path, capfd):
    argv = ["--videos", str(toy / "UCF-101"), "--checkpoint", str(chain), "--output", str(tmp_path)]
    assert run_in_two(evaluate.main, [*argv, *EVALUATE]) == [0]
    lines = capfd.readouterr().out.splitlines()
    assert len({line.split(": ")[0] for line in lines if line.startswith(str(toy))}) == 24 + 8


def test_a_batch_that_cannot_be_shared_is_refused(toy, tmp_path, monkeypatch, complaint):
    monkeypatch.setattr(tb, "world_size", lambda: 2)
    error = complaint(run_stage, "inv", toy, tmp_path, "--batch", 5)
    assert "--batch 5 cannot be shared among 2 processes" in error
