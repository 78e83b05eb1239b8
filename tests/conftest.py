"""What these tests share, beside the chain and the helpers of test_common.py."""

import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_common import (  # noqa: fixtures, too; before torch, whose threads it settles
    CHECKPOINTS, STAGES, chain, load, read_log, run_stage, same, stage_argv, toy)

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import common as tb


def pytest_configure(config):
    """Only pytest shows this warning, of Python 3.12 and later: a stage would log it."""
    config.addinivalue_line("filterwarnings",
                            "ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="session")
def real_data():
    """A folder of real videos (videos/), lists (splits/) and a part of UCF101 (ucf101/)."""
    if "TIMEBALANCE_TEST_DATA" not in os.environ:
        pytest.skip("TIMEBALANCE_TEST_DATA is not set")
    return Path(os.environ["TIMEBALANCE_TEST_DATA"])


@pytest.fixture(scope="session")
def real_clips(real_data):
    return sorted(path for path in (real_data / "videos").iterdir()
                  if path.suffix in (".avi", ".mp4"))


@pytest.fixture
def float64():
    """In float32 the order of a sum can turn a ReLU on or off."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def complaint(capsys):
    """A function that calls another, which ends in an error -> its one line on stderr."""
    def call(function, *args, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            function(*args)
        error = capsys.readouterr().err.strip()
        assert end.value.code == status and "\n" not in error, error
        return error

    return call


def contents(folder):
    """{path inside it: content} of all files in a folder and below."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def earlier_checkpoints(chain, out, stage):
    """Copy what the stages before this one have left."""
    first = "inv_ft" if stage == "ft" else stage
    for name in CHECKPOINTS[:CHECKPOINTS.index(first)]:
        shutil.copy(chain / f"{name}.pt", out)


def first_step(stage, root, out, *flags):
    """Run a stage of one step -> by name its loss terms, its gradients, to a factor, and what
    BatchNorm counts."""
    one_step = ["--epochs", 1, "--batch", {"labeled_only": 8, "student": 16}.get(stage, 24)]
    run_stage(stage, root, out, *one_step, "--restart", *flags)
    saved = load(out, stage)
    found = {}
    for key, value in read_log(out, stage)[-1].items():
        if key == "loss" or key.startswith("l_"):
            found[key] = torch.tensor(value, dtype=torch.float64)
    for i, moments in saved["optimizer"]["state"].items():
        found[f"gradient {i}"] = moments["exp_avg"]  # of Adam, after one step
    for name, buffer in {**saved["model"], **saved.get("head", {})}.items():
        if "running" in name or "batches" in name:
            found[f"{len(found)} {name}"] = buffer
    return found


# ---- Videos --------------------------------------------------------------------------------------

def moving_frames(count, height=48, width=64, seed=0):
    """Frames of which no two are alike: a gradient that moves, and a number in binary."""
    y, x = np.mgrid[:height, :width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for t in range(count):
        frames[t, ..., 0] = (x * 3 + 7 * t + seed) % 256
        frames[t, ..., 1] = (y * 4 + 5 * t) % 256
        frames[t, ..., 2] = (x + y + 11 * t) % 256
        for bit in range(8):
            frames[t, :12, bit * 8:bit * 8 + 6] = 255 * (t >> bit & 1)
    return frames


def write_video(path, frames, codec="mpeg4", pix_fmt="yuv420p", options=None, pts=None, extra=(),
                before=(), marks=()):
    """Encode RGB frames. before, extra: more streams, as (codec, frames), in front or behind.
    marks: the streams' dispositions."""
    flags = {"movflags": "+faststart"} if str(path).endswith("mp4") else {}
    with av.open(str(path), "w", options=flags) as container:
        def add(codec, frames):
            if codec == "aac":
                return container.add_stream(codec, rate=48000)
            stream = container.add_stream(codec, rate=25,
                                          options={"threads": "1", **(options or {})})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pix_fmt
            return stream

        contents = [*before, (codec, frames), *extra]
        streams = [add(*content) for content in contents]  # all of them before the first packet
        for stream, mark in zip(streams, marks):
            stream.disposition = mark.value
        for stream, (_, content) in zip(streams, contents):
            if stream.type == "audio":
                for k in range(40):
                    silence = np.zeros((1, 1024), np.float32)
                    frame = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
                    frame.sample_rate = 48000
                    frame.pts = 1024 * k
                    container.mux(stream.encode(frame))
            else:
                for t, array in enumerate(content):
                    frame = av.VideoFrame.from_ndarray(array, "rgb24")
                    if pts is not None:
                        frame.pts = pts[t]
                        frame.time_base = Fraction(1, 25)
                    container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def full_decode(path):
    """All frames, by PyAV's plainest means."""
    with av.open(str(path), **tb.OPEN) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def smooth_clips(count):
    """Clips of several sizes in which neighbouring pixels are alike, as in pictures."""
    torch.manual_seed(0)
    clips = []
    for k in range(count):
        coarse = torch.randint(256, (4, 3, 5, 7 - k % 2)).float()
        clip = F.interpolate(coarse, scale_factor=8, mode="bilinear")
        clips.append(clip.permute(0, 2, 3, 1).to(torch.uint8))
    return clips


# ---- Checkpoints, and runs that are killed -------------------------------------------------------

def assert_same_run(a, b, name):
    """The same checkpoint, and the same numbers of each epoch in the log, none of them twice."""
    x = load(a, name)
    y = load(b, name)
    assert x.keys() == y.keys()
    for key in x.keys() - {"args", "log"}:
        assert same(x[key], y[key]), key
    timed = {"seconds", "clips_per_s", "waiting_share"}
    logs = [[{k: v for k, v in line.items() if k not in timed} for line in read_log(folder, name)]
            for folder in (a, b)]
    assert logs[0][1:] == logs[1][1:]  # the first line is the command


def die(moment, count, program, *argv):
    """Run a program that SIGKILL ends at the count-th "step" of the optimiser or "write" of a file.
    Of torchrun's processes the second one dies, and not after a restart."""
    chosen = os.environ.get("RANK", "1") == "1"
    chosen = chosen and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    counter = itertools.count(1)
    replace = os.replace

    def kill(*_):
        if next(counter) == int(count) and chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "step":
        register_optimizer_step_post_hook(kill)
    else:  # the new file is complete, and the old one is still in its place
        os.replace = lambda *names: kill() or replace(*names)
    importlib.import_module(program).main(argv)


def run_and_kill(moment, count, stage, *argv):
    """Run a stage in a process that is killed, see die() -> its exit status."""
    process = multiprocessing.get_context("fork").Process(
        target=die, args=(moment, count, STAGES[stage][0].__name__, *stage_argv(stage, *argv)))
    process.start()
    process.join()
    return process.exitcode


if __name__ == "__main__":  # so that torchrun can run it: tests/conftest.py step 9 PROGRAM ...
    die(*sys.argv[1:])
