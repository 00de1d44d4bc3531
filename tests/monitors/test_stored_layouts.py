"""Weights kept in parts or few bits are the weights that their layers multiply by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stored import assert_weights, left_out, random, write
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dynarank.monitors.file_spectra import file_spectra

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Rows and columns that share a scale, of a weight of 300 x 200: blocks of 128 are ragged in both.
BLOCKS = {
    "tensor": (300, 200),
    "row": (1, 200),
    "column": (300, 1),
    "block": (128, 128),
    "group": (1, 32),
    "rows": (128, 200),
}


def quantized(weight: Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers and the scales of blocks, by a loop over them."""
    top = 100.0 if dtype == torch.int8 else torch.finfo(dtype).max / 2
    numbers = torch.zeros(weight.shape, dtype=dtype)
    scales = torch.zeros(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = weight[part].abs().max() / top
            numbers[part] = (weight[part] / scales[i, j]).to(dtype)
    return numbers, scales


def dequantized(numbers: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    whole = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return numbers.float() * whole[: numbers.shape[0], : numbers.shape[1]]


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize("dtype", [*FP8, torch.int8], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_eight_bit_weights_have_their_scales(
    kind: str, dtype: torch.dtype, suffix: str, tmp_path: Path
) -> None:
    numbers, scales = quantized(random(300, 200), BLOCKS[kind], dtype)
    write(tmp_path, {"l.weight": numbers, f"l.{suffix}": scales, "l.bias": torch.ones(300)})
    assert_weights(tmp_path, {"l": dequantized(numbers, scales, BLOCKS[kind])})


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_scales_of_other_shapes_and_dtypes(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    numbers = random(64, 48).to(torch.float8_e4m3fn)
    scales = torch.exp2(torch.randint(-4, 4, shape).float()).to(dtype)
    write(tmp_path, {"l.weight": numbers, "l.weight_scale": scales})
    by = scales.float().reshape(-1, 1)
    assert_weights(tmp_path, {"l": numbers.float() * by})


def test_a_block_that_the_config_tells(tmp_path: Path) -> None:
    """Two scales for 100 rows may be blocks of 64 or of 96: only the config knows."""
    numbers, scales = quantized(random(100, 100), (96, 96), torch.float8_e4m3fn)
    config = {"quantization_config": {"weight_block_size": [96, 96]}}
    write(tmp_path, {"l.weight": numbers, "l.weight_scale_inv": scales}, config=config)
    assert_weights(tmp_path, {"l": dequantized(numbers, scales, (96, 96))})


def test_a_scaled_convolution(tmp_path: Path) -> None:
    weight, scale = random(16, 8, 3, 3).to(torch.float8_e4m3fn), random(16)
    write(tmp_path, {"c.weight": weight, "c.weight_scale": scale})
    assert_weights(tmp_path, {"c": weight.float() * scale.view(-1, 1, 1, 1)})


def test_int8_of_bitsandbytes(tmp_path: Path) -> None:
    weight = random(32, 24)
    largest = weight.abs().amax(1)
    numbers = (weight / largest[:, None] * 127).round().to(torch.int8)
    write(tmp_path, {"l.weight": numbers, "l.SCB": largest, "l.weight_format": torch.tensor(0)})
    assert_weights(tmp_path, {"l": numbers.float() * largest[:, None] / 127})


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "mlp.experts.down_proj", "moe.w1.weight"])
def test_stacks_of_experts_are_read_one_by_one(name: str, tmp_path: Path) -> None:
    experts = torch.stack([torch.outer(random(16, seed=i), random(24)) for i in range(6)])
    write(tmp_path, {name: experts, f"{name}_bias": torch.ones(6, 16)})
    path = name.removesuffix(".weight")
    assert_weights(tmp_path, {f"{path}[{i}]": expert for i, expert in enumerate(experts)})
    for spectrum in file_spectra(tmp_path):
        assert spectrum.values is not None
        assert spectrum.values[1] < 1e-6 * spectrum.values[0]


@pytest.mark.parametrize("shape", [(), (4,), (4, 1, 1), (4, 2, 2)], ids=str)
def test_stacks_of_experts_in_fp8(shape: tuple[int, ...], tmp_path: Path) -> None:
    numbers = torch.stack([random(200, 150, seed=i) for i in range(4)]).to(torch.float8_e4m3fn)
    scales = torch.rand(shape) + 0.5
    write(tmp_path, {"experts.up_proj": numbers, "experts.up_proj_scale": scales})
    by = scales.reshape(*shape[:1], *shape[1:] or (1, 1)) if shape else scales.view(1, 1, 1)
    whole = by.expand(4, -1, -1).repeat_interleave(200 if by.shape[-2] == 1 else 128, 1)
    whole = whole.repeat_interleave(150 if by.shape[-1] == 1 else 128, 2)[:, :200, :150]
    true = numbers.float() * whole
    assert_weights(tmp_path, {f"experts.up_proj[{i}]": true[i] for i in range(4)})


def test_stacks_in_a_matrix_need_the_config(tmp_path: Path) -> None:
    weight = random(24, 10)
    write(tmp_path, {"ffn.experts.mlp.w1": weight, "l.weight": random(4, 4)})
    assert [one.name for one in left_out(tmp_path)] == ["ffn.experts.mlp.w1"]
    write(tmp_path, {"ffn.experts.mlp.w1": weight}, config={"ffn_config": {"moe_num_experts": 3}})
    rows = {f"ffn.experts.mlp.w1[{i}]": part for i, part in enumerate(weight.chunk(3))}
    assert_weights(tmp_path, rows)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed(*shape: int) -> tuple[Tensor, Tensor]:
    """Bytes of two fp4 numbers each, and the numbers."""
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0))
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low + 16 * high).to(torch.uint8), E2M1[codes]


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    data, numbers = packed(3, 20, 2, 32)
    exponents = torch.randint(120, 130, (3, 20, 2), dtype=torch.uint8)
    write(tmp_path, {"experts.up_blocks": data, "experts.up_scales": exponents})
    true = (numbers * torch.exp2(exponents.float() - 127)[..., None]).flatten(2)
    assert_weights(tmp_path, {f"experts.up[{i}]": expert for i, expert in enumerate(true)})


@pytest.mark.parametrize("spelling", ["modelopt", "compressed-tensors"])
def test_nvfp4(spelling: str, tmp_path: Path) -> None:
    data, numbers = packed(24, 64)
    scales = (torch.rand(24, 4) + 0.1).to(torch.float8_e4m3fn)
    if spelling == "modelopt":
        names, second = ("l.weight", "l.weight_scale_2"), torch.tensor(0.25)
    else:
        names, second = ("l.weight_packed", "l.weight_global_scale"), torch.tensor([4.0])
    write(tmp_path, {names[0]: data, "l.weight_scale": scales, names[1]: second})
    assert_weights(tmp_path, {"l": numbers * scales.float().repeat_interleave(16, 1) / 4})


def layers() -> dict[str, Callable[[], nn.Module]]:
    return {
        "linear": lambda: nn.Linear(12, 8),
        "conv1d": lambda: nn.Conv1d(6, 8, 3),
        "conv2d": lambda: nn.Conv2d(6, 8, 3, bias=False),
        "conv3d": lambda: nn.Conv3d(4, 6, 2),
        "embedding": lambda: nn.Embedding(20, 6),
        "transposed": lambda: nn.ConvTranspose2d(6, 8, 3),
    }


def canonical(layer: nn.Module) -> Tensor:
    weight = layer.weight.detach()  # type: ignore[union-attr, operator]
    return weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("spelling", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("kind", layers())
def test_weight_norm(
    kind: str, spelling: Callable[..., nn.Module], dim: int | None, tmp_path: Path
) -> None:
    model = nn.Sequential(spelling(layers()[kind](), dim=dim))
    for name, parameter in model.named_parameters():
        if name.endswith(("_g", "original0")) and parameter.ndim:
            with torch.no_grad():
                parameter.mul_(torch.logspace(0, -2, parameter.numel()).view_as(parameter))
    with torch.no_grad():
        model.eval()(torch.zeros(1, dtype=torch.long) if kind == "embedding" else example(kind))
    write(tmp_path, model.state_dict())
    assert_weights(tmp_path, {"0": canonical(model[0])})


def example(kind: str) -> Tensor:
    return {"linear": torch.zeros(1, 12), "conv1d": torch.zeros(1, 6, 9),
            "conv3d": torch.zeros(1, 4, 5, 5, 5)}.get(kind, torch.zeros(1, 6, 9, 9))  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("spelling", [parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("kind", layers())
def test_spectral_norm(kind: str, spelling: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = nn.Sequential(spelling(layers()[kind]())).eval()
    with torch.no_grad():
        model(torch.zeros(1, dtype=torch.long) if kind == "embedding" else example(kind))
    write(tmp_path, model.state_dict())
    assert_weights(tmp_path, {"0": canonical(model[0])}, 1e-5)


def test_pruned_weights(tmp_path: Path) -> None:
    model = nn.Sequential(prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5))
    write(tmp_path, model.state_dict())
    assert_weights(tmp_path, {"0": model[0].weight})  # type: ignore[dict-item]


def test_a_parametrization_that_the_file_does_not_tell(tmp_path: Path) -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 8))
    write(tmp_path, model.state_dict())
    assert_weights(tmp_path, {"1": model[1].weight})  # type: ignore[dict-item]
    (one,) = left_out(tmp_path)
    assert one.name == "0.parametrizations.weight.original"
    assert "a parametrization that the file does not tell" in one.reason


GPTQ = {
    "l.qweight": torch.ones(8, 16, dtype=torch.int32),
    "l.qzeros": torch.ones(2, 2, dtype=torch.int32),
    "l.scales": torch.ones(2, 16),
    "l.g_idx": torch.zeros(64, dtype=torch.int32),
}
UNKNOWN = {
    "GPTQ or AWQ": GPTQ,
    "compressed-tensors": {"l.weight_packed": torch.ones(8, 4, dtype=torch.int32),
                           "l.weight_scale": torch.ones(8, 1), "l.weight_shape": torch.ones(2)},
    "bitsandbytes": {"l.weight": torch.ones(64, 1, dtype=torch.uint8),
                     "l.weight.absmax": torch.ones(2), "l.weight.quant_map": torch.ones(16)},
    "int8 without scales": {"l.weight": torch.ones(8, 8, dtype=torch.int8)},
    "uint8 without scales": {"l.weight": torch.ones(8, 8, dtype=torch.uint8)},
    "complex64": {"l.weight": torch.ones(8, 8, dtype=torch.complex64)},
    "bool": {"l.weight": torch.ones(8, 8, dtype=torch.bool)},
    "int16": {"l.weight": torch.ones(8, 8, dtype=torch.int16)},
    "do not fit": {"l.weight": torch.ones(60, 60).to(torch.float8_e4m3fn),
                   "l.weight_scale": torch.ones(7, 7)},
    "zero point": {"l.weight": torch.ones(8, 8, dtype=torch.int8), "l.weight_scale": torch.ones(8),
                   "l.weight_zero_point": torch.ones(8, dtype=torch.int8)},
    "float8_e8m0": {"l.weight": torch.ones(8, 8).to(torch.float8_e8m0fnu)},
}  # fmt: skip


SCALES = ["fc.w_scale", "fc.qscale", "fc_scale", "fc.weight_quantizer.scale", "fc.weight_amax"]


@pytest.mark.parametrize("name", SCALES)
def test_8_bit_floats_beside_what_may_be_their_scale_are_left_out(
    name: str, tmp_path: Path
) -> None:
    weight = {"fc.weight": random(6, 5).to(torch.float8_e4m3fn), "fc.bias": torch.ones(6)}
    write(tmp_path, {**weight, name: torch.ones(6, 1), "l.weight": random(6, 5)})
    assert_weights(tmp_path, {"l": random(6, 5)})
    (one,) = left_out(tmp_path)
    assert one.name == "fc.weight" and name in one.reason and "may be its scale" in one.reason


def test_8_bit_floats_without_scales_are_themselves(tmp_path: Path) -> None:
    small = random(6, 5).to(torch.float8_e4m3fn)
    beside = {"fc.bias": torch.ones(6), "fc.input_scale": torch.ones(1), "fc2.bias": torch.ones(2)}
    write(tmp_path, {"fc.weight": small, **beside})
    assert_weights(tmp_path, {"fc": small.float()})
    write(tmp_path, {"fc.weight": small, "l.weight": small, "l.weight_scale": torch.ones(6)})
    assert_weights(tmp_path, {"l": small.float()})
    assert ["without a scale" in one.reason for one in left_out(tmp_path)] == [True]


UNCLEAR = {"ffn.wi": (8, 6, 32), "layers.experts.w1": (2, 3, 6, 5), "attn.q.kernel": (4, 8, 20)}


@pytest.mark.parametrize("name", UNCLEAR)
def test_stacks_that_nothing_tells_are_left_out(name: str, tmp_path: Path) -> None:
    write(tmp_path, {name: random(*UNCLEAR[name]), "l.weight": random(6, 5)})
    assert_weights(tmp_path, {"l": random(6, 5)})
    assert "a stack of matrices or a convolution" in left_out(tmp_path)[0].reason


@pytest.mark.parametrize("bias", [(8, 6), (8, 5), (8,)], ids=str)
def test_the_bias_tells_a_stack_from_a_convolution(bias: tuple[int, ...], tmp_path: Path) -> None:
    """Whatever the name and the config say."""
    weight = random(8, 6, 5)
    write(
        tmp_path,
        {"moe.up.weight": weight, "moe.up.bias": torch.ones(bias)},
        config={"num_experts": 8},
    )
    stack = {f"moe.up[{i}]": weight[i] for i in range(8)}
    assert_weights(tmp_path, {"moe.up": weight} if len(bias) == 1 else stack)


def test_a_convolution_of_one_expert_is_no_stack(tmp_path: Path) -> None:
    write(tmp_path, {"experts.0.up.weight": random(8, 6, 5)})
    assert_weights(tmp_path, {"experts.0.up": random(8, 6, 5)})


@pytest.mark.parametrize("reason", UNKNOWN)
def test_what_is_not_known_is_left_out_with_the_reason(reason: str, tmp_path: Path) -> None:
    write(tmp_path, {**UNKNOWN[reason], "plain.weight": random(6, 5)})
    assert_weights(tmp_path, {"plain": random(6, 5)})
    (one,) = left_out(tmp_path)
    assert reason in one.reason and one.name in UNKNOWN[reason]


@pytest.mark.parametrize("reason", UNKNOWN)
def test_a_file_of_nothing_else_says_what_is_there(reason: str, tmp_path: Path) -> None:
    write(tmp_path, UNKNOWN[reason])
    with pytest.raises(ValueError, match=rf"no weight whose spectrum is known: l\.\w+ .*{reason}"):
        list(file_spectra(tmp_path))
