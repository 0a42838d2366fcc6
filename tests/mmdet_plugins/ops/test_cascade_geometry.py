import pytest
import torch
from mmdet.models.dense_heads import StageCascadeRPNHead
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

from mmdet_plugins.ops.cascade_geometry import (
    adaptive_offsets,
    decode_deltas,
    grid_anchors,
    valid_flags,
)

SIZES = [(13, 21), (7, 11), (3, 6), (1, 3)]
STRIDES = [4, 8, 16, 32]
NUM = sum(h * w for h, w in SIZES)
STDS = (0.1, 0.1, 0.5, 0.5)


def stock_generator() -> AnchorGenerator:
    return AnchorGenerator(STRIDES, ratios=[1.0], scales=[8])


def random_anchors(batch: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    centre = torch.rand(batch, NUM, 2, generator=rng) * 90 - 3
    half = torch.rand(batch, NUM, 2, generator=rng) * 40
    return torch.cat([centre - half, centre + half], dim=2)


def stock_offsets(anchors: torch.Tensor, sizes=SIZES, strides=STRIDES) -> list[torch.Tensor]:
    head = StageCascadeRPNHead(
        8,
        feat_channels=8,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[1.0], strides=strides),
    )
    levels = [list(a.split([h * w for h, w in sizes])) for a in anchors]
    offsets = head.anchor_offset(levels, strides, sizes)
    # What AdaptiveConv.forward does with them.
    return [
        o.permute(0, 2, 1).reshape(len(anchors), 18, h, w)
        for o, (h, w) in zip(offsets, sizes, strict=True)
    ]


def test_one_anchor_by_hand():
    # An anchor of 12 x 24 px centred on (10, 6), at row 1, column 2 of a stride of 4: the centre
    # is (2.5, 1.5) cells; taps lie 1.5 and 3 cells from it, of which 1 is the convolution's own.
    anchors = torch.zeros(1, 12, 4)
    anchors[0, 6] = torch.tensor([4.0, -6, 16, 18])
    (offsets,) = adaptive_offsets(anchors, [(3, 4)], [4])
    y, x = offsets[0, :, 1, 2].view(3, 3, 2).unbind(-1)
    torch.testing.assert_close(x, torch.tensor([0.5 - 0.5, 0.5, 0.5 + 0.5]).expand(3, 3))
    torch.testing.assert_close(y, torch.tensor([[0.5 - 2], [0.5], [0.5 + 2]]).expand(3, 3))


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('layout', ['box', 'coordinate', 'expanded'])
def test_offsets_are_those_of_mmdet_bit_for_bit(batch, layout):
    anchors = random_anchors(batch)
    if layout == 'coordinate':
        anchors = anchors.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == 'expanded':
        anchors = anchors[:1].expand(batch, -1, -1)
    for ours, theirs in zip(
        adaptive_offsets(anchors, SIZES, STRIDES), stock_offsets(anchors), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()


def test_offsets_with_strides_that_are_no_powers_of_two():
    strides = [3, 7, 14, 28]
    anchors = random_anchors(2, seed=1)
    for ours, theirs in zip(
        adaptive_offsets(anchors, SIZES, strides),
        stock_offsets(anchors, strides=strides),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_grid_is_that_of_mmdet(dtype):
    ours = grid_anchors(SIZES, STRIDES, 8, dtype=dtype)
    theirs = torch.cat(stock_generator().grid_priors(SIZES, dtype=dtype, device='cpu'))
    assert torch.equal(ours, theirs)
    assert ours.dtype == dtype


def test_grid_is_made_once_and_may_train_after_inference():
    with torch.inference_mode():
        first = grid_anchors(SIZES, STRIDES, 5)
        adaptive_offsets(first[None], SIZES, STRIDES)
    again = grid_anchors([torch.Size(s) for s in SIZES], tuple(STRIDES), 5.0)
    assert again.data_ptr() == first.data_ptr()
    deltas = torch.zeros(1, NUM, 4, requires_grad=True)
    decode_deltas(again, deltas, STDS).sum().backward()  # raises for an inference tensor


def test_valid_flags_are_those_of_mmdet():
    shapes = [(52, 84), (33, 50), (5, 84), (200, 300)]
    ours = valid_flags(SIZES, STRIDES, shapes)
    for flags, shape in zip(ours, shapes, strict=True):
        theirs = stock_generator().valid_flags(SIZES, (*shape, 3), 'cpu')
        assert torch.equal(flags, torch.cat(theirs))


def test_decoding_by_hand():
    anchors = torch.tensor([[10.0, 20, 30, 60]])
    # Shift by a tenth of 20 and two tenths of 40; double the width, keep the height.
    deltas = torch.tensor([[[1.0, 2, 2 * torch.log(torch.tensor(2.0)), 0]]])
    boxes = decode_deltas(anchors, deltas, STDS)
    torch.testing.assert_close(boxes, torch.tensor([[[2.0, 28, 42, 68]]]))
    boxes = decode_deltas(anchors, deltas, STDS, max_shape_hw=torch.tensor([[50, 40]]))
    torch.testing.assert_close(boxes, torch.tensor([[[2.0, 28, 40, 50]]]))


@pytest.mark.parametrize('means', [0.0, (0.1, -0.2, 0.3, -0.4)])
@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_decoding_is_that_of_mmdet(means, shared, clip, grad):
    rng = torch.Generator().manual_seed(0)
    anchors = random_anchors(3)
    anchors = anchors[0] if shared else anchors
    deltas = torch.randn(3, NUM, 4, generator=rng) * 6  # beyond wh_ratio_clip now and then
    deltas.requires_grad_(grad)
    shapes = torch.tensor([[52, 84], [33, 50], [40, 70]]) if clip else None
    ours = decode_deltas(anchors, deltas, STDS, means, shapes)
    coder = DeltaXYWHBBoxCoder(means if means else (0.0,) * 4, STDS)
    weight = torch.randn(3, NUM, 4, generator=rng)
    theirs = []
    for i in range(3):
        theirs.append(
            coder.decode(
                anchors if shared else anchors[i],
                deltas[i],
                max_shape=shapes[i].tolist() if clip else None,
            )
        )
    assert torch.equal(ours, torch.stack(theirs))
    if grad:
        (a,) = torch.autograd.grad((ours * weight).sum(), deltas)
        (b,) = torch.autograd.grad((torch.stack(theirs) * weight).sum(), deltas)
        torch.testing.assert_close(a, b)


def test_decoding_has_its_gradient():
    rng = torch.Generator().manual_seed(0)
    low = torch.rand(2, 4, 2, generator=rng, dtype=torch.double) * 10
    anchors = torch.cat([low, low + 3], dim=2).requires_grad_()
    deltas = torch.randn(2, 4, 4, generator=rng, dtype=torch.double, requires_grad=True)
    shapes = torch.tensor([[9.0, 11], [7, 13]], dtype=torch.double)
    assert torch.autograd.gradcheck(
        lambda a, d: decode_deltas(a, d, 0.2, 0.1, shapes), (anchors, deltas)
    )


def test_decoding_inverts_mmdets_encoding():
    anchors, boxes = random_anchors(1, 0)[0], random_anchors(1, 1)[0]
    means = (0.1, -0.2, 0.3, -0.4)
    deltas = DeltaXYWHBBoxCoder(means, STDS).encode(anchors, boxes)
    small = (deltas * torch.tensor(STDS) + torch.tensor(means))[:, 2:].abs().amax(1) < 4
    decoded = decode_deltas(anchors, deltas[None], STDS, means)[0]
    torch.testing.assert_close(decoded[small], boxes[small], rtol=1e-4, atol=1e-3)


def test_a_batch_is_its_images():
    anchors = random_anchors(3)
    deltas = torch.randn(3, NUM, 4, generator=torch.Generator().manual_seed(0))
    shapes = torch.tensor([[52, 84], [33, 50], [40, 70]])
    whole = decode_deltas(anchors, deltas, STDS, max_shape_hw=shapes)
    offsets = adaptive_offsets(whole, SIZES, STRIDES)
    for i in range(3):
        one = decode_deltas(
            anchors[i : i + 1], deltas[i : i + 1], STDS, max_shape_hw=shapes[i : i + 1]
        )
        assert torch.equal(one[0], whole[i])
        for a, b in zip(adaptive_offsets(one, SIZES, STRIDES), offsets, strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_deltas_keep_float32_anchors(dtype):
    anchors = random_anchors(2)
    deltas = torch.randn(2, NUM, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    boxes = decode_deltas(anchors, deltas, STDS)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, decode_deltas(anchors, deltas.float(), STDS))


def test_no_priors():
    boxes = decode_deltas(torch.zeros(0, 4), torch.zeros(2, 0, 4), STDS)
    assert boxes.shape == (2, 0, 4)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match='one anchor per cell'):
        adaptive_offsets(torch.zeros(1, NUM - 1, 4), SIZES, STRIDES)
    with pytest.raises(ValueError, match='one stride per level'):
        grid_anchors(SIZES, STRIDES[:2], 8)


def test_shapes_are_static_off_the_cpu():
    anchors = grid_anchors(SIZES, STRIDES, 8, 'meta')
    boxes = decode_deltas(
        anchors,
        torch.empty(2, NUM, 4, device='meta'),
        STDS,
        max_shape_hw=torch.empty(2, 2, device='meta'),
    )
    assert [o.shape for o in adaptive_offsets(boxes, SIZES, STRIDES)] == [
        (2, 18, h, w) for h, w in SIZES
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_agrees_without_a_sync():
    anchors = random_anchors(2)
    deltas = torch.randn(2, NUM, 4, generator=torch.Generator().manual_seed(0))
    shapes = torch.tensor([[52, 84], [33, 50]])
    boxes = decode_deltas(anchors, deltas, STDS, max_shape_hw=shapes)
    expected = [boxes, *adaptive_offsets(boxes, SIZES, STRIDES)]
    grid_anchors(SIZES, STRIDES, 8, 'cuda')
    adaptive_offsets(anchors.cuda(), SIZES, STRIDES)
    inputs = anchors.cuda(), deltas.cuda(), shapes.cuda()
    torch.cuda.set_sync_debug_mode('error')
    try:
        grid_anchors(SIZES, STRIDES, 8, 'cuda')
        boxes = decode_deltas(*inputs[:2], STDS, max_shape_hw=inputs[2])
        results = [boxes, *adaptive_offsets(boxes, SIZES, STRIDES)]
    finally:
        torch.cuda.set_sync_debug_mode('default')
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)
