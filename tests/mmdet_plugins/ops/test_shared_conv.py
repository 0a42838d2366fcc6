import pytest
import torch
import torch.nn.functional as F

from mmdet_plugins.ops import shared_conv
from mmdet_plugins.ops.shared_conv import is_faster, shared_conv3x3

SHAPES = [
    [(1, 7, 9), (1, 4, 4), (1, 1, 1)],
    [(3, 5, 8), (3, 2, 3)],
    [(2, 6, 1)],
    [(0, 4, 6), (0, 3, 3)],
]


def draw(shapes, dtype, channels=4, outputs=5):
    torch.manual_seed(0)
    maps = [torch.randn(n, channels, h, w, dtype=dtype).requires_grad_() for n, h, w in shapes]
    return maps, torch.randn(outputs, channels, 3, 3, dtype=dtype).requires_grad_()


def gradients(outs, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(
        outs, inputs, [torch.randn(out.shape, dtype=out.dtype) for out in outs]
    )


@pytest.mark.parametrize('chunk', [None, 1, 400])
@pytest.mark.parametrize('shapes', SHAPES)
def test_values_and_gradients_are_those_of_a_convolution_each(shapes, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(shared_conv, '_TILE_FLOATS', chunk)
    maps, weight = draw(shapes, torch.double)
    found = shared_conv3x3(maps, weight)
    wanted = [F.conv2d(x, weight, padding=1) for x in maps]
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(
        gradients(found, [weight, *maps]), gradients(wanted, [weight, *maps]), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_float32_rounds_as_a_direct_convolution_does():
    """Errors against float64: root mean squares, at most four times those of a convolution."""
    maps, weight = draw([(1, 40, 40), (1, 12, 12)], torch.float, 256, 256)

    def run(convolve, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (weight, *maps)]
        outs = convolve(leaves[1:], leaves[0])
        torch.manual_seed(1)
        grads = [torch.randn(out.shape) for out in outs]
        return [*outs, *torch.autograd.grad(outs, leaves, [g.to(dtype) for g in grads])]

    def each(maps, weight):
        return [F.conv2d(x, weight, padding=1) for x in maps]

    exact = run(each, torch.double)
    for mine, direct, true in zip(
        run(shared_conv3x3, torch.float), run(each, torch.float), exact, strict=True
    ):
        error, usual = ((out - true).square().mean().sqrt() for out in (mine, direct))
        assert error <= 4 * usual


def test_some_inputs_need_no_gradient():
    maps, weight = draw([(1, 5, 5), (1, 4, 4)], torch.double)
    fixed = [maps[0].detach(), maps[1]]
    found = gradients(shared_conv3x3(fixed, weight), [maps[1]])[0]
    wanted = gradients([F.conv2d(x, weight, padding=1) for x in fixed], [maps[1]])[0]
    torch.testing.assert_close(found, wanted)
    found = gradients(shared_conv3x3([x.detach() for x in maps], weight), [weight])[0]
    wanted = gradients([F.conv2d(x.detach(), weight, padding=1) for x in maps], [weight])[0]
    torch.testing.assert_close(found, wanted)


def test_an_unused_output_has_no_part_in_the_gradient():
    maps, weight = draw([(1, 5, 5), (1, 4, 4)], torch.double)
    found = gradients(shared_conv3x3(maps, weight)[:1], [weight, maps[0]])
    wanted = gradients([F.conv2d(maps[0], weight, padding=1)], [weight, maps[0]])
    torch.testing.assert_close(found, wanted)


def test_only_where_it_is_faster_and_nothing_watches():
    maps, weight = draw([(1, 4, 4)], torch.float, 256, 256)
    assert is_faster(maps, weight)
    assert not is_faster([x.double() for x in maps], weight.double())
    assert not is_faster(maps, weight[:64])
    with torch.autocast('cpu'):
        assert not is_faster(maps, weight)
    seen = []
    weight = weight.detach()
    torch.jit.trace(
        lambda x: (seen.append(is_faster([x], weight)), x + 1)[1],
        maps[0].detach(),
        check_trace=False,
    )
    assert seen and not any(seen)


def test_other_kernels_are_refused():
    maps, weight = draw([(1, 4, 4)], torch.float)
    with pytest.raises(ValueError, match=r'a weight \(5, 4, 1, 1\) is not of 3x3 kernels'):
        shared_conv3x3(maps, weight[..., :1, :1])
    with pytest.raises(ValueError, match=r'for maps of \[3\] channels'):
        shared_conv3x3([maps[0][:, :3]], weight)
