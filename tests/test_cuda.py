"""On a GPU: networks and steps are the CPU's, and no step waits. Where there is none, a
rehearsal on the CPU, so that these tests stay fit to run."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook

import common as tb
import evaluate
from conftest import earlier_checkpoints, first_step
from test_common import (
    EVALUATE, EVALUATED, STAGES, read_results, run_stage, smooth_clips, stage_argv)
from test_processes import end, succeeds, torchrun

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
                                 [tb.draw(0, k) for k in range(60)]).cpu().int()
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


@pytest.mark.parametrize("largest", [2**31 - 1, 5000], ids=["whole", "in pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batchnorm_is_torch_s_in_float64(dtype, largest, monkeypatch):
    torch.manual_seed(0)
    x = (2 * torch.randn(6, 8, 4, 15, 17) + 1).to(dtype)
    dy = torch.randn(x.shape).to(dtype)
    monkeypatch.setattr(tb, "LARGEST", largest)
    found = []
    for norm, device, kind in [(torch.nn.BatchNorm3d(8), "cpu", torch.float64),
                               (tb.BatchNorm(8), GPU, dtype)]:
        norm.to(device, torch.float64 if kind == torch.float64 else torch.float32)
        leaf = x.to(device, kind, memory_format=torch.channels_last_3d).requires_grad_()
        y = norm(leaf)
        y.backward(dy.to(device, kind))
        found.append([t.detach().double().cpu() for t in (
            y, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(*found):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


@needs_gpu
def test_batchnorm_of_more_than_2_to_the_31_elements():
    """As in a step of over 167 clips of 16 x 224 x 224: no copy in float32, and the same rows."""
    x = torch.randn(1, 64, 16, 112, 112, device=GPU, dtype=torch.bfloat16)
    x = x.repeat(176, 1, 1, 1, 1).to(memory_format=torch.channels_last_3d).requires_grad_()
    assert x.numel() > 2**31
    norm = tb.BatchNorm(64).to(GPU)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = norm(x)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * 2 * x.numel()
    assert torch.equal(y[0], y[-1])  # all clips are the same
    assert abs(float(y[-1].float().std()) - 1) < 0.01
    y.backward(y.detach())
    assert torch.allclose(x.grad[0], x.grad[-1], atol=1e-3)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA")
@pytest.mark.parametrize("arch", ["r3d_18", "slow_r50"])
def test_no_forward_pass_leaves_the_gpu(arch, monkeypatch):
    """By shapes, types and devices alone, so without a GPU, too: two devices do not mix."""
    # Autocast asks for the hardware.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    rngs = [tb.draw(0, k) for k in range(40)]  # so many that each change has its takers
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
    launch = functools.partial(
        torchrun, flags=("--standalone", f"--nproc-per-node={processes}"))
    for stage in ("inv", "dist", "ft", "student"):
        program = STAGES[stage][0].__name__
        argv = stage_argv(stage, toy, tmp_path, *ON_GPU)
        if processes == 2:
            status, _ = end(launch("test_common.py", "step", 3, program, *argv))
            assert status != 0
        succeeds(launch(f"{program}.py", *argv))
    evaluate.main([str(tmp_path), *EVALUATE, *ON_GPU])
    names = [result["checkpoint"] for result in read_results(tmp_path)]
    assert sorted(names) == sorted(EVALUATED[1:])  # no baseline here
