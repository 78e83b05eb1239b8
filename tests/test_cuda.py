"""On a GPU: networks and steps are the CPU's, and no step waits. Where there is none, a
rehearsal on the CPU, so that these tests stay fit to run."""

import argparse
import contextlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook

import common as tb
import evaluate
from conftest import earlier_checkpoints, first_step, smooth_clips
from test_common import EVALUATE, EVALUATED, HERE, STAGES, read_results, run_stage, stage_argv

GPU = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = ["--device", GPU]
needs_gpu = pytest.mark.skipif(GPU == "cpu", reason="no GPU")


@pytest.fixture(scope="module", autouse=True)
def exact_convolutions():
    """Without the tensor cores' shorter mantissa."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


def test_augmentation_is_the_cpu_s():
    clips = smooth_clips(60)
    cpu, gpu = (tb.augment_clips([clip.to(device) for clip in clips], 24,
                                 [tb.rng(0, k) for k in range(60)]).cpu().int()
                for device in ("cpu", GPU))
    difference = (cpu - gpu).abs()
    assert difference.float().mean() < 0.5 and difference.max() <= 8


@pytest.mark.parametrize("flags", [
    [], ["--checkpointing"], pytest.param(["--compile"], marks=needs_gpu)])
@pytest.mark.parametrize("stage", ["inv", "dist", "labeled_only", "student"])
def test_a_step_is_the_cpu_s(stage, flags, chain, toy, tmp_path):
    earlier_checkpoints(chain, tmp_path, stage)
    # In float32 a ReLU of a smaller network may flip; the student's teachers saw the usual size.
    size = [] if stage == "student" else ["--size", 32]
    cpu = first_step(stage, toy, tmp_path, *size)
    gpu = first_step(stage, toy, tmp_path, *size, *flags, *ON_GPU)
    assert cpu.keys() == gpu.keys()
    for name, value in gpu.items():
        assert value.isfinite().all()
        if "gradient" not in name:
            assert torch.allclose(cpu[name], value, rtol=0.02, atol=0.02), name


@pytest.mark.parametrize("stage, epochs, count", [
    ("inv", 1, 6), ("dist", 1, 6), ("labeled_only", 4, 8), ("student", 2, 8)])
def test_a_step_never_waits_for_the_gpu(stage, epochs, count, chain, toy, tmp_path, monkeypatch):
    """From the augmentation to the optimiser what stops the host raises. Less than ten steps: of so
    few none has frozen weights, so each ends in the optimiser."""
    earlier_checkpoints(chain, tmp_path, stage)
    steps = []

    def set_mode(mode):
        if GPU == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    def watched(*args, **settings):
        set_mode("error" if steps else "default")  # not the first
        return tb.augment_clips(*args, **settings)

    def unwatched(*_):
        set_mode("default")
        steps.append(1)

    monkeypatch.setattr(STAGES[stage][0], "augment_clips", watched)
    hook = register_optimizer_step_post_hook(unwatched)
    try:
        run_stage(stage, toy, tmp_path, "--epochs", epochs, *ON_GPU)
    finally:
        hook.remove()
        set_mode("default")
    assert len(steps) == count


@pytest.mark.parametrize("clips, fits", [(167, True), (168, False)])
def test_more_clips_than_torch_s_kernels_count_are_refused(clips, fits):
    """Of 16 x 224 x 224, on a GPU; before training, so without one, too."""
    args = argparse.Namespace(frames=16, size=224, checkpointing=False, compile=False)
    net = tb.build_model("r3d_tiny", 2)
    with contextlib.nullcontext() if fits else pytest.raises(tb.UserError, match="168 clips"):
        assert tb.distribute(net, clips, args, torch.device("cuda")) is net


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA")
@pytest.mark.parametrize("arch", ["r3d_18", "slow_r50"])
def test_no_forward_pass_leaves_the_gpu(arch, monkeypatch):
    """By shapes, types and devices alone, so without a GPU, too: two devices do not mix."""
    # Autocast asks for the hardware.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    rngs = [tb.rng(0, k) for k in range(40)]  # so many that each change has its takers
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda:0"):
            net = tb.Embedder(tb.build_model(arch, 5)).eval()
            videos = [torch.empty(16, 180, 320, 3, dtype=torch.uint8) for _ in rngs]
        clips = tb.augment_clips(videos, 112, rngs)
        with torch.autocast("cuda", torch.bfloat16):
            x = tb.to_input(clips, net.backbone)
            z = net(x, num_long=8, slices=4)
            logits = net.backbone(x[:8])
        assert x.dtype == logits.dtype == torch.bfloat16
        z = z[:32].unflatten(0, (8, 4))
        p = logits.float().softmax(1)
        c = tb.temporal_similarity(z)
        p_teacher = tb.combine_teachers(p, p, tb.similarity_score(c, c))
        losses = [tb.invariant_loss(z), tb.distinctive_loss(z, z),
                  tb.unpooled_distinctive_loss(z, z), tb.distillation_loss(p, p_teacher)]
    assert all(loss.is_cuda and loss.dtype == torch.float32 for loss in losses)


@needs_gpu
def test_chain_goes_on_under_nccl(toy, tmp_path):
    """With two GPUs each stage is killed first."""
    processes = min(2, torch.cuda.device_count())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
              f"--nproc-per-node={processes}"]
    for stage in ("inv", "dist", "ft", "student"):
        program = STAGES[stage][0].__name__
        argv = stage_argv(stage, toy, tmp_path, *ON_GPU)
        if processes == 2:
            killed = [*launch, "tests/conftest.py", "step", "3", program, *argv]
            assert subprocess.run(killed, cwd=HERE, timeout=150).returncode
        subprocess.run([*launch, f"{program}.py", *argv], cwd=HERE, check=True, timeout=150)
    evaluate.main([str(tmp_path), *EVALUATE, *ON_GPU])
    names = [result["checkpoint"] for result in read_results(tmp_path)]
    assert sorted(names) == sorted(EVALUATED[1:])  # no baseline here
