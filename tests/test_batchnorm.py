"""BatchNorm over the clips of all processes: results, memory, graphs.

What needs several processes runs in one that takes itself for one of two, whose twin has the same
clips; what needs a GPU's kernels runs on plain ones of the same meaning."""

import copy
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common as tb


@pytest.fixture
def one_of_two(monkeypatch):
    """This process takes itself for one of two; its twin has the same rows."""
    monkeypatch.setattr(tb, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(2))


@pytest.fixture
def kernels(monkeypatch):
    """The kernels of nn.SyncBatchNorm, in plain operations."""
    def stats(x, eps):
        var, mean = torch.var_mean(x, 0, correction=0)
        return mean, (var + eps).rsqrt()

    def elemt(x, weight, bias, mean, inverse_std, eps, out):
        out.copy_((x - mean) * inverse_std * weight + bias)

    def reduce(dy, x, mean, inverse_std, weight, *_):
        dweight = (dy * (x - mean) * inverse_std).sum(0)
        return dy.sum(0), (dy * (x - mean)).sum(0), dweight, dy.sum(0)

    def backward_elemt(dy, x, mean, inverse_std, weight, sum_dy, sum_dy_xmu, count):
        mean_dy = sum_dy / count.sum()
        mean_dy_xmu = sum_dy_xmu / count.sum()
        return (dy - mean_dy - (x - mean) * inverse_std**2 * mean_dy_xmu) * inverse_std * weight

    for name, function in [("stats", stats), ("elemt", elemt), ("backward_reduce", reduce),
                           ("backward_elemt", backward_elemt)]:
        monkeypatch.setattr(torch, f"batch_norm_{name}", function)
    monkeypatch.setattr(tb, "has_kernels", lambda x: True)


def input_and_norm(shape=(6, 8, 4, 5, 7)):
    torch.manual_seed(0)
    kind = torch.nn.BatchNorm3d if len(shape) == 5 else torch.nn.BatchNorm1d
    norm = torch.nn.Sequential(kind(shape[1])).double()
    torch.nn.init.uniform_(norm[0].weight)
    torch.nn.init.normal_(norm[0].bias)
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    return x, torch.randn(shape, dtype=torch.float64), norm


def results(norm, x, dy):
    """Output, gradients and buffers of two steps in training, on lists of the processes' rows."""
    norm = copy.deepcopy(norm)
    for _ in range(2):
        norm.zero_grad()
        leaf = torch.cat(x).requires_grad_()
        y = norm(leaf)
        y.backward(torch.cat(dy))
    return [y.detach(), leaf.grad, norm[0].weight.grad, norm[0].bias.grad, *norm.buffers()]


def converted(norm):
    norm = copy.deepcopy(norm)
    tb.BatchNorm.convert(norm)
    assert type(norm[0]) is tb.BatchNorm
    return norm


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request, monkeypatch):
    if request.param == "in pieces":
        monkeypatch.setattr(tb, "LARGEST", 100)


@pytest.fixture(params=["plain", "kernels"])
def operations(request):
    if request.param == "kernels":
        request.getfixturevalue("kernels")


@pytest.fixture(params=["alone", "two"])
def processes(request):
    if request.param == "two":
        request.getfixturevalue("one_of_two")
    return {"alone": 1, "two": 2}[request.param]


@pytest.mark.usefixtures("pieces", "operations")
@pytest.mark.parametrize("shape", [(6, 8, 4, 5, 7), (12, 8)])
def test_it_is_torch_s_on_the_rows_of_all_processes(shape, processes):
    """In float64, to the last digits. Gradients of parameters are each process's share."""
    x, dy, norm = input_and_norm(shape)
    y, dx, *gradients, mean, var, count = results(norm, *([t] * processes for t in (x, dy)))
    expected = [y[:len(x)], dx[:len(x)], *(g / processes for g in gradients), mean, var, count]
    for found, wanted in zip(results(converted(norm), [x], [dy]), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)


def test_a_large_mean_leaves_the_variance(kernels):
    """The statistics are summed in float64: in float32 nothing would be left of it."""
    x = torch.randn(1000, 4) + 3000
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    assert torch.allclose(converted(norm)(x).std(0), torch.ones(4), atol=0.01)


def test_eval_mode_is_torch_s(one_of_two):
    x, _, norm = input_and_norm()
    norm.eval()
    assert torch.equal(converted(norm)(x), norm(x))


@pytest.mark.parametrize("arch", ["r3d_18", "slow_r50"])
def test_autograd_copies_no_activation(arch, processes):
    """An in-place operation on a view would put a CopySlices into the graph."""
    net = tb.Embedder(tb.build_model(arch, 2)).train()
    tb.BatchNorm.convert(net)
    clips = torch.randn(2, 3, 8, 16, 16).to(memory_format=torch.channels_last_3d)
    nodes = [net(clips).sum().grad_fn]
    names = []
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            nodes += [other for other, _ in node.next_functions]
    assert sum("Norm" in name for name in names) > 8
    assert not [name for name in names if "CopySlices" in name]


# ---- Memory, by shapes alone ---------------------------------------------------------------------

class Watch(TorchDispatchMode):
    """Notes each operation with its tensors, and the most bytes of tensors alive at once. Autograd
    keeps tensors out of Python's sight, so a storage counts until it is freed, whoever held it."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.alive = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves([args, out]) if isinstance(t, torch.Tensor)]
        self.operations.append((str(function), [(t.numel(), t.dtype) for t in tensors]))
        for tensor in tensors:
            self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        def freed(_, key=id(storage), size=storage.nbytes()):
            del self.alive[key]
            self.now -= size

        if id(storage) not in self.alive:
            self.alive[id(storage)] = weakref.ref(storage, freed)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("arch, gib", [("r3d_18", 63), ("slow_r50", 61)])
def test_32_videos_fit_a_gpu_of_80_gb_without_copies_in_float32(arch, gib, processes, monkeypatch):
    """A step of stage 1b at 16 x 224 x 224 with --checkpointing, in bf16, by shapes alone. Above
    2^31 elements torch's kernels copy their input in float32: two processes normalise in pieces, as
    a GPU does."""
    # On a CPU, and there alone, autocast pools in float32.
    outside = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(torch.nn.MaxPool3d, "forward", outside(torch.nn.MaxPool3d.forward))
    with FakeTensorMode():
        net = tb.Embedder(tb.build_model(arch, 101)).train()
        tb.BatchNorm.convert(net)
        net.backbone.checkpointing = True
        clips = torch.randn(320, 3, 16, 224, 224, dtype=torch.bfloat16)
        clips = clips.to(memory_format=torch.channels_last_3d)
        with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
            net(clips, num_long=64, slices=4).sum().backward()
    weights = sum(p.nbytes for p in net.parameters())
    found = (watch.peak + 2 * weights) / 2**30  # Adam keeps two numbers a weight
    if processes == 1:
        assert gib - 2 < found < gib + 2
        return
    assert max(n for _, tensors in watch.operations for n, _ in tensors) > 2**31
    smallest_activation = 320 * 512 * 4 * 7 * 7
    for name, tensors in watch.operations:
        if "batch_norm" in name or "vector_norm" in name:
            assert max(n for n, _ in tensors) < 2**31, name
        large = [n for n, dtype in tensors if dtype in (torch.float32, torch.float64)
                 and n >= smallest_activation]
        assert not large, (name, tensors)
