"""BatchNorm over the clips of all processes, and activation checkpointing: results, memory, graphs.

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


def input_and_norm(shape=(6, 8, 4, 5, 7), dtype=torch.float64):
    torch.manual_seed(0)
    kind = torch.nn.BatchNorm3d if len(shape) == 5 else torch.nn.BatchNorm1d
    norm = torch.nn.Sequential(kind(shape[1])).double()
    torch.nn.init.uniform_(norm[0].weight)
    torch.nn.init.normal_(norm[0].bias)
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    return x.to(dtype), torch.randn(shape, dtype=torch.float64).to(dtype), norm.to(
        torch.float64 if dtype == torch.float64 else torch.float32)


def results(norm, x, dy):
    """Output, gradients and buffers of two steps in training."""
    norm = copy.deepcopy(norm)
    for _ in range(2):
        norm.zero_grad()
        x = x.detach().requires_grad_()
        y = norm(x)
        y.backward(dy)
    return [y.detach(), x.grad, norm[0].weight.grad, norm[0].bias.grad, *norm.buffers()]


def converted(norm):
    norm = copy.deepcopy(norm)
    tb.BatchNorm.convert(norm)
    assert type(norm[0]) is tb.BatchNorm
    return norm


class TestBatchNorm:
    @pytest.mark.parametrize("shape", [(6, 8, 4, 5, 7), (12, 8)])
    @pytest.mark.parametrize("largest", [2**31 - 1, 100], ids=["whole", "in pieces"])
    @pytest.mark.parametrize("plain", [True, False], ids=["plain", "kernels"])
    def test_alone_it_is_torch_s(self, plain, largest, shape, request, monkeypatch):
        """In float64, to the last digits; on a GPU one process takes the kernels."""
        x, dy, norm = input_and_norm(shape)
        expected = results(norm, x, dy)
        if not plain:
            request.getfixturevalue("kernels")
        monkeypatch.setattr(tb, "LARGEST", largest)
        for found, wanted in zip(results(converted(norm), x, dy), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("largest", [2**31 - 1, 100], ids=["whole", "in pieces"])
    @pytest.mark.parametrize("plain", [True, False], ids=["plain", "kernels"])
    def test_two_processes_normalise_as_one(self, plain, largest, one_of_two, request, monkeypatch):
        """Torch's on the rows of both; gradients of parameters are each process's share."""
        x, dy, norm = input_and_norm()
        whole = results(norm, torch.cat([x, x]), torch.cat([dy, dy]))
        expected = [whole[0][:6], whole[1][:6], whole[2] / 2, whole[3] / 2, *whole[4:]]
        if not plain:
            request.getfixturevalue("kernels")
        monkeypatch.setattr(tb, "LARGEST", largest)
        for found, wanted in zip(results(converted(norm), x, dy), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_short_types_are_summed_in_float32(self, dtype, one_of_two):
        x, dy, norm = input_and_norm((60, 8, 4, 5, 7), dtype)
        found = results(converted(norm), x, dy)
        expected = results(norm.double(), x.double(), dy.double())
        assert found[0].dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        for a, b in zip(found[:2], expected[:2]):
            assert (a - b).abs().max() < tolerance * b.abs().max()
        assert torch.allclose(found[4].double(), expected[4], rtol=1e-5)  # running mean
        wanted = (expected[5] - 0.81) * (60 * 140 - 1) / (60 * 140) * 16800 / 16799 + 0.81
        assert torch.allclose(found[5].double(), wanted, rtol=1e-5)  # twice as many rows

    def test_a_large_mean_leaves_the_variance(self, kernels):
        """The statistics are summed in float64: in float32 nothing would be left of it."""
        x = torch.randn(1000, 4) + 3000
        norm = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
        assert torch.allclose(converted(norm)(x).std(0), torch.ones(4), atol=0.01)

    def test_eval_mode_is_torch_s(self, one_of_two):
        x, _, norm = input_and_norm()
        norm.eval()
        assert torch.equal(converted(norm)(x), norm(x))

    @pytest.mark.parametrize("plain", [True, False], ids=["plain", "kernels"])
    def test_it_never_stops_the_host(self, plain, one_of_two, request):
        x, dy, norm = input_and_norm(dtype=torch.bfloat16)
        if not plain:
            request.getfixturevalue("kernels")
        with Operations() as operations:
            results(converted(norm), x, dy)
        names = {name for name, _ in operations.seen}
        assert len(names) > 10
        for stop in ("_local_scalar_dense", "nonzero", "masked_select", "unique"):
            assert not any(stop in name for name in names), stop

    @pytest.mark.parametrize("processes", [1, 2])
    def test_compiled_code_has_one_graph(self, processes, request):
        if processes == 2:
            request.getfixturevalue("one_of_two")
        x, dy, norm = input_and_norm()
        graphs = []
        torch.compiler.reset()
        compiled = torch.compile(converted(norm), fullgraph=True,
                                 backend=lambda graph, _: graphs.append(graph) or graph)
        compiled(x.requires_grad_()).backward(dy)
        assert len(graphs) == 1

    @pytest.mark.parametrize("processes", [1, 2])
    @pytest.mark.parametrize("arch", ["r3d_18", "slow_r50", "r3d_tiny"])
    def test_autograd_copies_no_activation(self, arch, processes, request):
        """An in-place operation on a view would put a CopySlices into the graph."""
        if processes == 2:
            request.getfixturevalue("one_of_two")
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


class Operations(TorchDispatchMode):
    """Notes the name of each operation, and the tensors that go in and come out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves([args, out]) if isinstance(t, torch.Tensor)]
        self.seen.append((str(function), [(t.numel(), t.dtype) for t in tensors]))
        return out


class Memory(TorchDispatchMode):
    """The most bytes of tensors alive at once. Autograd keeps tensors out of Python's sight, so a
    storage counts until it is freed, whoever held it."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
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


def fake_step(arch, videos, mode):
    """A forward and backward pass of stage 1b at 16 x 224 x 224 with --checkpointing, in bf16, by
    shapes alone, under a dispatch mode -> bytes of the weights."""
    with FakeTensorMode():
        net = tb.Embedder(tb.build_model(arch, 101)).train()
        tb.BatchNorm.convert(net)
        net.backbone.checkpointing = True
        clips = torch.randn(10 * videos, 3, 16, 224, 224, dtype=torch.bfloat16)
        clips = clips.to(memory_format=torch.channels_last_3d)
        with mode, torch.autocast("cpu", torch.bfloat16):
            if isinstance(mode, Memory):
                mode.count(clips.untyped_storage())
            net(clips, num_long=2 * videos, slices=4).sum().backward()
    return sum(p.nbytes for p in net.parameters())


@pytest.fixture
def pooling_in_bf16(monkeypatch):
    """On a CPU, and there alone, autocast pools in float32."""
    outside = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(torch.nn.MaxPool3d, "forward", outside(torch.nn.MaxPool3d.forward))


@pytest.mark.usefixtures("pooling_in_bf16")
class TestMemory:
    @pytest.mark.parametrize("arch, gib", [("r3d_18", 63), ("slow_r50", 61)])
    def test_32_videos_fit_a_gpu_of_80_gb(self, arch, gib):
        memory = Memory()
        weights = fake_step(arch, 32, memory)
        found = (memory.peak + 3 * weights) / 2**30  # Adam keeps two numbers a weight
        assert gib - 2 < found < gib + 2

    @pytest.mark.parametrize("arch", ["r3d_18", "slow_r50"])
    def test_large_activations_are_normalised_in_pieces_and_not_in_float32(self, arch, one_of_two):
        """Above 2^31 elements torch's kernels copy their input in float32. Here the plain ones are
        seen, by shapes; the pieces are the same for a GPU's."""
        operations = Operations()
        fake_step(arch, 32, operations)
        assert max(n for _, tensors in operations.seen for n, _ in tensors) > 2**31
        smallest_activation = 320 * 512 * 4 * 7 * 7
        for name, tensors in operations.seen:
            if "batch_norm" in name or "vector_norm" in name:
                assert max(n for n, _ in tensors) < 2**31, name
            large = [n for n, dtype in tensors if dtype in (torch.float32, torch.float64)
                     and n >= smallest_activation]
            assert not large, (name, tensors)


def two_steps(arch, checkpointing):
    """Losses, gradients, weights and buffers of two steps of stage 1b; the state dict's keys."""
    torch.manual_seed(0)
    model = tb.SlowR50(5) if arch == "slow_r50" else tb.R3D(5, width=8, depth=2)
    net = tb.Embedder(model).to(memory_format=torch.channels_last_3d).train()
    tb.BatchNorm.convert(net)
    for module in net.modules():
        if isinstance(module, tb.Bottleneck):  # which begins as the identity: no gradient inside
            torch.nn.init.ones_(module.branch2.norm_c.weight)
    net.backbone.checkpointing = checkpointing
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-3)
    noted = {}
    for step in (1, 2):
        clips = torch.randn(6, 3, 4 if arch == "slow_r50" else 16, 16, 16)
        rows = net(clips.to(memory_format=torch.channels_last_3d), num_long=2, slices=4)
        loss = tb.distinctive_loss(rows[:4].unflatten(0, (2, 2)), rows[4:8].unflatten(0, (2, 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        noted[f"loss {step}"] = loss.detach()
        for name, p in net.named_parameters():
            if p.requires_grad:
                noted[f"gradient {step} {name}"] = p.grad.clone()
        for name, value in net.state_dict().items():
            noted[f"state {step} {name}"] = value.clone()
    return noted, list(net.state_dict())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("arch", ["r3d", "slow_r50"])
def test_checkpointing_changes_no_bit(arch, processes, request):
    if processes == 2:
        request.getfixturevalue("one_of_two")
    plain, keys = two_steps(arch, checkpointing=False)
    other, other_keys = two_steps(arch, checkpointing=True)
    assert keys == other_keys and plain.keys() == other.keys()
    for name, value in plain.items():
        assert value.isfinite().all() and torch.equal(value, other[name]), name
    batches = [v for k, v in other.items() if k.startswith("state 2") and "batches" in k]
    assert batches and all(v == 2 for v in batches)  # BatchNorm counted each batch once
