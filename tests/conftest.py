"""What the tests share, beside the small chain of all stages and the helpers of test_common.py."""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_common import (  # noqa: fixtures, too; before torch, whose threads it settles
    CHECKPOINTS, STAGES, TINY, chain, load, read_log, stage_argv, toy)

import torch


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


def folder_flags(root):
    """Of a stage on videos of one's own, whose checkpoints go into out/ beside them."""
    return [*TINY, "--data", "folder", "--root", str(root), "--arch", "r3d_tiny",
            "--out", str(root / "out")]


def earlier_checkpoints(chain, out, stage):
    """Copy what the stages before this one have left."""
    first = "inv_ft" if stage == "ft" else stage
    for name in CHECKPOINTS[:CHECKPOINTS.index(first)]:
        shutil.copy(chain / f"{name}.pt", out)


def first_step(stage, root, out, *flags, main=None):
    """Run a stage of one step -> by name its loss terms, its gradients, to a factor, and what
    BatchNorm counts; main: in the place of the stage's."""
    out.mkdir(parents=True, exist_ok=True)
    one_step = ["--epochs", 1, "--batch", {"labeled_only": 8, "student": 16}.get(stage, 24)]
    argv = stage_argv(stage, root, out, *one_step, "--restart", *flags)
    (main or STAGES[stage][0].main)(argv)
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


def assert_same_step(one, other):
    """The same first_step() but for the order of sums, in float64."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = float(value.abs().max())
        close = torch.allclose(value, other[name], rtol=1e-6, atol=1e-9 * (scale + 1))
        assert scale > 0 and close, name
