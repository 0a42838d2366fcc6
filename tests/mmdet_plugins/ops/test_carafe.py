import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_plugins.ops import carafe as module
from mmdet_plugins.ops.carafe import carafe

# N, C, h, w, k, G, s
CASES = [
    (2, 6, 5, 7, 5, 1, 2),
    (1, 8, 3, 9, 3, 4, 3),
    (2, 4, 1, 1, 5, 2, 1),
    (1, 4, 6, 5, 1, 1, 2),
    (1, 3, 9, 2, 13, 3, 2),
    (1, 2, 4, 21, 5, 1, 2),
]


def make_inputs(n, c, h, w, k, groups, s, dtype=torch.double):
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(n, c, h, w, generator=rng, dtype=dtype)
    masks = torch.randn(n, groups * k * k, s * h, s * w, generator=rng, dtype=dtype)
    return features, masks


def literal(features, masks, k, groups, s):
    """Pixel by pixel and tap by tap."""
    n, c, h, w = features.shape
    out = features.new_zeros(n, c, s * h, s * w)
    for i in range(n):
        for y in range(s * h):
            for x in range(s * w):
                for dy in range(k):
                    for dx in range(k):
                        row, col = y // s + dy - k // 2, x // s + dx - k // 2
                        if not (0 <= row < h and 0 <= col < w):
                            continue
                        for g in range(groups):
                            part = slice(g * c // groups, (g + 1) * c // groups)
                            weight = masks[i, (g * k + dy) * k + dx, y, x]
                            out[i, part, y, x] += weight * features[i, part, row, col]
    return out


def unfolded(features, masks, k, groups, s):
    """The usual fallback, for its gradients."""
    n, c, h, w = features.shape
    patches = F.unfold(features, k, padding=k // 2).view(n, groups, c // groups, k * k, h, w)
    patches = patches.repeat_interleave(s, -1).repeat_interleave(s, -2)
    out = (patches * masks.view(n, groups, 1, k * k, h * s, w * s)).sum(3)
    return out.view(n, c, h * s, w * s)


def test_taps_by_hand():
    # One channel, one row of three cells, k = 3, x2. Only two taps are not zero: the cell itself,
    # and its right neighbour for output pixels of odd column.
    features = torch.tensor([[[[1.0, 2, 4]]]])
    masks = torch.zeros(1, 9, 2, 6)
    masks[0, 4] = 10
    masks[0, 5, :, 1::2] = 1
    out = carafe(features, masks, 3, 1, 2)
    assert out.tolist() == [[[[10, 12, 20, 24, 40, 40]] * 2]]


@pytest.mark.parametrize('case', CASES)
def test_equal_to_the_definition(case):
    features, masks = make_inputs(*case)
    torch.testing.assert_close(
        carafe(features, masks, *case[4:]), literal(features, masks, *case[4:])
    )


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('strip', [1, 1 << 9, 1 << 18])
def test_gradients_whatever_the_chunk(monkeypatch, case, strip):
    monkeypatch.setattr(module, '_STRIP', strip)  # one row of cells, a few, all
    inputs = [t.requires_grad_() for t in make_inputs(*case)]
    ours, theirs = carafe(*inputs, *case[4:]), unfolded(*inputs, *case[4:])
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, weight),
        torch.autograd.grad(theirs, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make_inputs(1, 2, 2, 3, 3, 2, 2)]
    assert torch.autograd.gradcheck(lambda f, m: carafe(f, m, 3, 2, 2), inputs)


@pytest.mark.parametrize('which', [0, 1])
def test_one_gradient_alone(which):
    inputs = make_inputs(*CASES[0])
    both = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(carafe(*both, *CASES[0][4:]).square().sum(), both)[which]
    one = [t.clone().requires_grad_(i == which) for i, t in enumerate(inputs)]
    (grad,) = torch.autograd.grad(carafe(*one, *CASES[0][4:]).square().sum(), one[which])
    assert torch.equal(grad, expected)


def test_a_batch_is_its_images():
    features, masks = make_inputs(*CASES[0])
    whole = carafe(features, masks, *CASES[0][4:])
    for i in range(2):
        assert torch.equal(
            carafe(features[i : i + 1], masks[i : i + 1], *CASES[0][4:])[0], whole[i]
        )


def test_memory_format_is_kept():
    features, masks = make_inputs(2, 6, 5, 7, 5, 1, 2)
    plain = carafe(features, masks, 5, 1, 2)
    last = carafe(features.to(memory_format=torch.channels_last), masks, 5, 1, 2)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    features, masks = make_inputs(*CASES[0], dtype=torch.float32)
    features, masks = features.to(dtype).requires_grad_(), masks.softmax(1).to(dtype)
    out = carafe(features, masks, *CASES[0][4:])
    full = features.detach().float().requires_grad_()
    expected = carafe(full, masks.float(), *CASES[0][4:])
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    (grad,) = torch.autograd.grad(out.sum(), features)
    (wide,) = torch.autograd.grad(expected.sum(), full)
    assert torch.equal(grad, wide.to(dtype))


def test_autocast_does_not_reach_inside():
    features, masks = make_inputs(*CASES[0], dtype=torch.float32)
    features.requires_grad_()
    expected = carafe(features, masks, *CASES[0][4:])
    (grad,) = torch.autograd.grad(expected.square().sum(), features)
    with torch.autocast('cpu', torch.bfloat16):
        out = carafe(features, masks, *CASES[0][4:])
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out.square().sum(), features)[0], grad)
        mixed = carafe(features.bfloat16(), masks, *CASES[0][4:])
    assert mixed.dtype == torch.bfloat16


def test_a_bad_value_stays_within_its_reach():
    features, masks = make_inputs(1, 2, 6, 30, 5, 1, 2)
    features[0, 0, 3, 12] = torch.nan
    out = carafe(features, masks, 5, 1, 2)[0]
    reach = torch.zeros(12, 60, dtype=torch.bool)
    reach[2:12, 20:30] = True
    assert torch.equal(out[0].isnan(), reach)
    assert not out[1].isnan().any()


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_nothing_is_larger_than_the_output():
    features, masks = make_inputs(1, 64, 40, 60, 5, 1, 2, dtype=torch.float32)
    features.requires_grad_()
    masks.requires_grad_()
    with _Largest() as largest:
        out = carafe(features, masks, 5, 1, 2)
        out.sum().backward()
    assert largest.bytes <= out.numel() * 4


@pytest.mark.parametrize(
    'k, groups, s, words',
    [
        (4, 1, 2, 'odd kernel size'),
        (5, 4, 2, 'do not split'),
        (5, 1, 3, 'masks are'),
        (3, 1, 2, 'masks are'),
    ],
)
def test_sizes_that_do_not_fit_are_named(k, groups, s, words):
    features, masks = make_inputs(2, 6, 5, 7, 5, 1, 2)
    with pytest.raises(ValueError, match=words):
        carafe(features, masks, k, groups, s)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('case', [(2, 64, 13, 21, 5, 1, 2), (1, 64, 9, 30, 3, 2, 2)])
def test_equal_to_mmcv_on_cuda_without_a_sync(case):
    from mmcv.ops import carafe as mmcv_carafe

    inputs = [t.cuda().requires_grad_() for t in make_inputs(*case, dtype=torch.float32)]
    theirs = mmcv_carafe(*inputs, *case[4:])
    weight = torch.randn_like(theirs)
    expected = [theirs, *torch.autograd.grad(theirs, inputs, weight)]
    carafe(*inputs, *case[4:])
    torch.cuda.set_sync_debug_mode('error')
    try:
        ours = carafe(*inputs, *case[4:])
        results = [ours, *torch.autograd.grad(ours, inputs, weight)]
    finally:
        torch.cuda.set_sync_debug_mode('default')
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
