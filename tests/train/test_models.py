import math
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynarank import LowRank, Rank
from dynarank.cost.flops import trace
from dynarank.train.batches import Batches
from dynarank.train.data import load_digits_data
from dynarank.train.init import published_init_
from dynarank.train.models import MODELS, DigitsNet, MultilayerPerceptron, ResNet8, ResNet20
from dynarank.train.wide_resnet import WideResNet


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The layers that the recipes' glob selects."""
    layers = {path: module for path, module in model.named_modules() if fnmatch(path, "*conv*")}
    assert all(isinstance(layer, nn.Conv2d) for layer in layers.values())
    return layers  # type: ignore[return-value]


def low_rank_count(model: nn.Module) -> int:
    """Parameters with each selected convolution as k x k to half the channels, then 1 x 1."""
    total = count(model)
    for layer in convs(model).values():
        rank = layer.out_channels // 2
        down = rank * layer.in_channels * math.prod(layer.kernel_size)
        total += down + layer.out_channels * rank - layer.weight.numel()
    return total


def test_resnet20_has_the_published_numbers() -> None:
    model = ResNet20()
    assert count(model) == 272_762
    assert low_rank_count(model) == 155_170
    statistics = (b.numel() for name, b in model.named_buffers() if "running" in name)
    assert sum(statistics) == 1_600


def test_resnet20_glob_selects_the_19_factorized_convolutions() -> None:
    model = ResNet20()
    layers = convs(model)
    blocks = [f"stages.{s}.{b}.conv{i}" for s in range(3) for b in range(3) for i in (1, 2)]
    assert list(layers) == ["conv", *blocks]
    assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) for c in layers.values())
    assert all(c.bias is None for c in layers.values())
    assert [c.out_channels for c in layers.values()] == [16] * 7 + [32] * 6 + [64] * 6
    strided = [path for path, layer in layers.items() if layer.stride == (2, 2)]
    assert strided == ["stages.1.0.conv1", "stages.2.0.conv1"]
    rest = {p for p, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert rest - set(layers) == {f"stages.{s}.0.shortcut.0" for s in range(3)} | {"head"}


def test_resnet20_shortcuts_norms_and_head() -> None:
    model = ResNet20()
    for stage, stride in zip(range(3), (1, 2, 2), strict=True):
        shortcut = model.get_submodule(f"stages.{stage}.0.shortcut.0")
        assert isinstance(shortcut, nn.Conv2d) and shortcut.bias is None
        assert shortcut.kernel_size == (1, 1) and shortcut.stride == (stride, stride)
        assert isinstance(model.get_submodule(f"stages.{stage}.0.shortcut.1"), nn.BatchNorm2d)
        for block in (1, 2):
            assert isinstance(model.get_submodule(f"stages.{stage}.{block}.shortcut"), nn.Identity)
    norms = {p: m for p, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 22
    assert all(n.eps == 1e-3 and n.momentum == 0.01 for n in norms.values())
    zero = {path for path, norm in norms.items() if not norm.weight.any()}
    assert zero == {f"stages.{s}.{b}.bn2" for s in range(3) for b in range(3)}
    assert all(norm.weight.eq(1).all() for path, norm in norms.items() if path not in zero)
    assert model.head.weight.shape == (10, 64) and not model.head.bias.any()


def test_resnet20_is_post_activation() -> None:
    """Recompute a forward pass from the parts, in evaluation mode, in fp64."""
    torch.manual_seed(0)
    model = ResNet20().double().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = F.relu(model.bn(model.conv(images)))
    for stage in model.stages:
        for b in stage:
            x = F.relu(b.bn2(b.conv2(F.relu(b.bn1(b.conv1(x))))) + b.shortcut(x))
    assert x.shape == (2, 64, 8, 8)
    wanted = model.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
    torch.testing.assert_close(model(images), wanted, rtol=1e-12, atol=1e-12)


def test_glorot_uniform_with_independent_draws() -> None:
    torch.manual_seed(0)
    model = ResNet20()
    for layer in [*convs(model).values(), model.stages[1][0].shortcut[0], model.head]:
        fan_out, fan_in = layer.weight.shape[:2]
        bound = math.sqrt(6 / ((fan_in + fan_out) * math.prod(layer.weight.shape[2:])))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert abs(layer.weight.std() / (bound / math.sqrt(3)) - 1) < 0.1
    kernels = [layer.weight for layer in convs(model).values()]
    for i, kernel in enumerate(kernels):
        assert not any(torch.equal(kernel, other) for other in kernels[:i])


def test_resnet8_and_the_perceptron() -> None:
    small = ResNet8()
    assert list(convs(small)) == [f"stages.{s}.0.conv{i}" for s in range(3) for i in (1, 2)]
    assert [c.out_channels for c in convs(small).values()] == [32, 32, 64, 64, 128, 128]
    assert small(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert ResNet8(channels=3)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    plain = MultilayerPerceptron(inputs=12, width=8, depth=3, classes=5, dropout=0.4)
    assert count(plain) == 12 * 8 + 8 + 2 * (8 * 8 + 8) + 8 * 5 + 5
    assert plain.dropout.p == 0.4 and not plain.hidden[0].bias.any()
    images = torch.randn(2, 3, 2, 2)
    assert plain(images).shape == (2, 5)
    x = images.flatten(1)
    for layer in plain.eval().hidden:
        x = F.relu(layer(x))
    torch.testing.assert_close(plain(images), plain.head(x))


def test_wrn_28_10_has_the_published_numbers() -> None:
    """At 100 classes; 24 of 25 3x3 convolutions at half their output channels."""
    with torch.device("meta"):
        model = MODELS["wrn-28-10"](classes=100)
    assert count(model) == 36_539_124
    assert sum(b.numel() for name, b in model.named_buffers() if "running" in name) == 20_192
    assert low_rank_count(model) == 20_590_236
    use = trace(model, torch.empty(1, 3, 32, 32, device="meta"))
    assert (
        use.parameters({path: LowRank(Rank(0.5, of="out")) for path in convs(model)})[0]
        == 20_590_236
    )


def test_wrn_28_10_glob_selects_what_the_published_code_factorizes() -> None:
    with torch.device("meta"):
        model = MODELS["wrn-28-10"]()
    layers = convs(model)
    assert [c.out_channels for c in layers.values()] == [16] + [160] * 7 + [320] * 8 + [640] * 8
    rest = {p for p, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    shortcuts = {f"stages.{s}.0.shortcut.0" for s in range(3)}
    assert rest - set(layers) == shortcuts | {"head", "stages.0.0.widen"}
    assert model.stages[0][0].widen.in_channels == 16
    strided = [path for path, layer in layers.items() if layer.stride == (2, 2)]
    assert strided == ["stages.1.0.conv1", "stages.2.0.conv1"]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(n.eps, n.momentum) for n in norms} == {(1e-5, 0.01)}
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_wide_resnets_of_other_sizes() -> None:
    with torch.device("meta"):
        model = MODELS["wrn-16-4"](classes=7)
        assert [len(stage) for stage in model.stages] == [2, 2, 2] and len(convs(model)) == 12
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"6 n \+ 4 layers .* got 18"):
        WideResNet(18, 1)
    small = WideResNet(10, 1)
    small(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_digits_net() -> None:
    model = DigitsNet()
    assert count(model) == 241_898 and list(convs(model)) == ["conv1", "conv2", "conv3"]
    assert low_rank_count(model) == 140_522
    assert model(torch.randn(4, 1, 8, 8)).shape == (4, 10)


@pytest.mark.parametrize("name", ["digits-net", "resnet20"])
def test_registry_and_classes(name: str) -> None:
    model = MODELS[name](classes=7)
    shape = (4, 1, 8, 8) if name == "digits-net" else (4, 3, 32, 32)
    loss = model(torch.randn(shape)).sum()
    loss.backward()
    assert model.head.out_features == 7
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["digits-net", "resnet20"])
def test_channels_last_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    shape = (4, 1, 8, 8) if name == "digits-net" else (4, 3, 32, 32)
    images = torch.randn(shape, dtype=torch.float64)
    wanted = model(images)
    model = model.to(memory_format=torch.channels_last)
    found = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_published_init_starts_same_shapes_alike() -> None:
    torch.manual_seed(0)
    model, other = ResNet20(), ResNet20()
    state = torch.get_rng_state()
    parameters = dict(model.named_parameters())
    objects = {name: id(p) for name, p in parameters.items()}
    published_init_(parameters.values(), seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert objects == {name: id(p) for name, p in model.named_parameters()}
    groups: dict[torch.Size, list[torch.Tensor]] = {}
    for parameter in parameters.values():
        if parameter.ndim >= 2:
            groups.setdefault(parameter.shape, []).append(parameter)
    assert sorted(len(group) for group in groups.values()) == [1] * 7 + [5, 5, 6]
    assert all(torch.equal(p, group[0]) for group in groups.values() for p in group)
    published_init_(other.parameters(), seed=3)
    assert torch.equal(other.conv.weight, model.conv.weight)
    published_init_(other.parameters(), seed=4)
    assert not torch.equal(other.conv.weight, model.conv.weight)


def test_published_init_is_glorot_and_leaves_vectors() -> None:
    model = ResNet20()
    vectors = {n: p.clone() for n, p in model.named_parameters() if p.ndim < 2}
    published_init_(model.parameters(), seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(parameter, vectors[name])
            continue
        assert parameter.requires_grad and parameter.is_leaf
        fans = (parameter.shape[0] + parameter.shape[1]) * math.prod(parameter.shape[2:])
        bound = math.sqrt(6 / fans)
        assert 0.9 * bound < parameter.abs().max() <= bound * (1 + 1e-6)
        assert abs(parameter.std() / (bound / math.sqrt(3)) - 1) < 0.1
        assert parameter.min() < -0.9 * bound and parameter.max() > 0.9 * bound


def test_digits_net_learns() -> None:
    """Six epochs at a constant rate; twenty with a decay reach .98 (seeds 0 to 2)."""
    data = load_digits_data()
    torch.manual_seed(0)
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = Batches(data.train_images, data.train_labels, 64, seed=0)
    for epoch in range(6):
        for images, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(data.test_images).argmax(1)
    assert (found == data.test_labels).float().mean() >= 0.95
