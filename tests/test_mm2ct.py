"MM2CT and its parts at sizes, numbers of modalities and settings that the chapters do not show"
import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import upfirdn
from torch import nn

from i2i_mamba_nb.blocks.conditioning import norm_groups
from i2i_mamba_nb.blocks.conv import BatchNorm, activation_checkpointing
from i2i_mamba_nb.blocks.diffusive import (
    AdaptiveGroupNorm,
    DiffusiveBlock,
    LatentMap,
    PixelAttention,
    PyramidConv,
    fir_down,
    fir_kernel,
    fir_numbers,
    fir_up,
    scaled,
)
from i2i_mamba_nb.blocks.fusion import (
    FUSIONS,
    ChannelSwapMamba,
    Concatenation,
    CrossMamba,
    CrossModalMamba,
    DynamicEnhancement,
    DynamicLocalConv,
    Fusion,
    JointStage,
    MambaBlock,
    by_others,
    difference_attention,
    heard,
    reading,
    swap_channels,
)
from i2i_mamba_nb.core import ConfigError, ShapeError, Spec, network
from i2i_mamba_nb.measure.complexity import multiply_adds
from i2i_mamba_nb.models.discriminators import TimeDownBlock
from i2i_mamba_nb.models.mm2ct import MM2CT, DiffusiveUNet, ResNetGenerator, maps_of, unet_plan
from i2i_mamba_nb.ssm.mixers import set_backend, trace

TINY = dict(base_channels=4, multipliers=(1, 2), n_blocks=1, width=4, depth=1)

def count(net): return sum(p.numel() for p in net.parameters())
def names(net): return {n: tuple(p.shape) for n, p in net.named_parameters()}
def beside(b=1, n=64): return torch.arange(b) % 4, torch.randn(b, n, generator=torch.Generator().manual_seed(3))

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

# counts

@pytest.mark.parametrize('config, expected', [({}, 7_825_153), (dict(n_sources=2), 7_825_153+49*64), (dict(n_targets=2), 7_825_153+49*64+1),
    (dict(n_blocks=9), 11_365_633), (dict(n_blocks=9, norm='batch'), 11_365_633+64+128+256+18*256+128+64)])
def test_resnet_counts(config, expected):
    with torch.device('meta'): assert count(ResNetGenerator(**config)) == expected

def test_resnet_layers_are_those_of_the_text():
    with torch.device('meta'): net = ResNetGenerator()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert [(type(m).__name__, m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.bias is not None) for m in convs] == [
        ('Conv2d', 1, 64, 7, 1, True), ('Conv2d', 64, 128, 3, 2, True), ('Conv2d', 128, 256, 3, 2, True),
        *[('Conv2d', 256, 256, 3, 1, True)]*12, ('ConvTranspose2d', 256, 128, 3, 2, True), ('ConvTranspose2d', 128, 64, 3, 2, True),
        ('Conv2d', 64, 1, 7, 1, True)]
    normed = [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert len(normed) == 5+12 and not any(m.affine or m.track_running_stats for m in normed)
    assert sum(isinstance(m, nn.ReflectionPad2d) for m in net.modules()) == 2+12 and isinstance(net.tail[-1], nn.Tanh)

def test_unet_counts():
    with torch.device('meta'):
        net = DiffusiveUNet()
        assert count(net) == 33_595_842
        assert count(DiffusiveUNet(outputs='targets')) == 33_595_842-577
        assert count(DiffusiveUNet(n_sources=3)) == 33_595_842+2*(9*64+9*64+577)
        assert count(DiffusiveUNet(n_latent=100)) == 33_595_842+36*64
        assert count(MM2CT(fusion='concatenation')) == 33_595_842+3
        assert count(MM2CT()) == 33_907_013

def test_unet_layers_are_those_of_the_text():
    with torch.device('meta'): net = DiffusiveUNet()
    blocks = [m for m in net.modules() if isinstance(m, DiffusiveBlock)]
    down = [b for b in net.encoder if b.resample == 'keep']
    assert [b.conv_1.out_channels for b in down] == [64, 64, 64, 64, 128, 128, 128, 128, 256, 256, 256, 256]
    assert [b.resample for b in blocks].count('down') == [b.resample for b in blocks].count('up') == 5 and len(net.decoder) == 18+5
    assert sum(b.attention is not None for b in net.encoder) == 2 and sum(b.attention is not None for b in net.decoder) == 1
    assert [b.attention is not None for b in net.middle] == [True, False] and len(net.pyramid) == 5
    assert all(b.norm_1.style.in_features == b.norm_2.style.in_features == 64 and b.time.in_features == 256 for b in blocks)
    assert all(torch.equal(torch.tensor(b.fir), fir_kernel()) for b in blocks)
    assert [layer.in_features for layer in net.latent.layers] == [64]*4 and net.time.first.in_features == 64

def test_multiply_adds_of_the_concatenation_are_syndiffs():
    with torch.device('meta'):
        t, z = torch.empty(1), torch.empty(1, 64)
        plain = multiply_adds(DiffusiveUNet(), torch.empty(1, 2, 128, 64), t, z)
        assert multiply_adds(MM2CT(fusion='concatenation'), torch.empty(1, 3, 128, 64), t, z) == plain+2*128*64

@pytest.mark.parametrize('first, levels, n_blocks', list(itertools.product((1, 2), (1, 2, 3, 6), (1, 2, 3))))
def test_plan_fits_together(first, levels, n_blocks):
    widths = [8*m for m in (first, 2, 3, 1, 4, 5)[:levels]]
    down, up = unet_plan(8, widths, n_blocks, (2,))
    kept, c = [8], 8
    for r in down:
        assert r.c_in == c
        c = r.c_out
        kept.append(c)
    for r in up:
        assert r.c_in == c+(kept.pop() if r.resample == 'keep' else 0)
        c = r.c_out
    assert not kept and c == widths[0] and len(down) == levels*n_blocks+levels-1 and len(up) == levels*(n_blocks+1)+levels-1

# FIR resampling

@pytest.mark.parametrize('taps', [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1), (2, 0, 1, 1)])
@pytest.mark.parametrize('size', [(2, 6), (8, 4), (10, 14)])
def test_fir_equals_scipy(taps, size):
    x, k = torch.randn(2, 3, *size, dtype=torch.double), fir_kernel(taps).double()
    row, pad = [v/sum(taps) for v in taps], len(taps)//2-1
    def both(up, down, gain, lead):
        y = x.numpy()
        for axis, n in ((2, size[0]), (3, size[1])):
            full = upfirdn([gain*v for v in row[::1 if up > 1 else -1]], y, up, 1, axis=axis)
            length = n*up//down
            index = [lead+down*i for i in range(length)]
            y = full.take(index, axis=axis)
        return torch.from_numpy(y)
    torch.testing.assert_close(fir_up(x, k), both(2, 1, 2., pad), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fir_down(x, k), both(1, 2, 1., len(taps)-1-pad), atol=1e-6, rtol=1e-6)

def test_fir_up_is_the_transpose_of_down():
    k = fir_kernel((1, 2, 4, 1)).double()
    x, y = torch.randn(1, 2, 8, 12).double(), torch.randn(1, 2, 4, 6).double()
    torch.testing.assert_close((fir_down(x, k)*y).sum()*4, (x*fir_up(y, k)).sum())

# diffusive blocks

@pytest.mark.parametrize('c', [1, 3, 4, 12, 14, 44, 64, 130])
def test_groups_divide(c): assert c % norm_groups(c) == 0 and 1 <= norm_groups(c) <= max(1, min(c//4, 32))

@pytest.mark.parametrize('b, c', [(1, 4), (3, 12), (2, 14)])
def test_adaptive_group_norm_is_per_image(b, c):
    norm, x, s = AdaptiveGroupNorm(c, 5), 3+2*torch.randn(b, c, 5, 7), torch.randn(b, 5)
    gamma, beta = norm.style(s)[:, :, None, None].chunk(2, 1)
    torch.testing.assert_close(norm(x, s), gamma*F.group_norm(x, norm_groups(c), eps=1e-6)+beta, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('taps', [(1, 3, 3, 1), (1, 2, 5, .5)])
def test_filters_follow_their_input_in_precision_and_hold_nothing(taps):
    for module, given in ((DiffusiveBlock(4, 4, 5, 3, resample='down', taps=taps), (torch.randn(1, 5), torch.randn(1, 3))),
            (DiffusiveBlock(4, 4, 5, 3, resample='up', taps=taps), (torch.randn(1, 5), torch.randn(1, 3))),
            (PyramidConv(4, 2, taps), ()), (TimeDownBlock(4, 2, 5, taps), (torch.randn(1, 5),))):
        assert not list(module.buffers())
        x = torch.randn(1, 4, 6, 10)
        single, double = module(x, *given), module.double()(x.double(), *(v.double() for v in given))
        assert double.dtype == torch.double
        torch.testing.assert_close(single, double.float(), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('taps', [(1, 3, 3, 1), (1, 2, 5, .5), (1/3, .7)])
def test_fir_numbers_are_the_rounded_outer_product(taps):
    row = torch.tensor(taps, dtype=torch.double)/sum(taps)
    for dtype in (torch.double, torch.float32, torch.bfloat16):
        kernel = torch.ones(1, dtype=dtype).new_tensor(fir_numbers(taps))
        torch.testing.assert_close(kernel, torch.outer(row, row).to(dtype), atol=0, rtol=1e-15 if dtype == torch.double else 0)
    assert all(type(v) is float for r in fir_numbers(taps) for v in r) and torch.equal(fir_kernel(taps), torch.tensor(fir_numbers(taps)))

def test_block_learns_time_and_style_and_keeps_its_input():
    block, x = DiffusiveBlock(8, 8, 5, 3), torch.randn(2, 8, 5, 7)
    kept = x.clone()
    e, s = torch.randn(2, 5).requires_grad_(), torch.randn(2, 3).requires_grad_()
    block(x, e, s).square().sum().backward()
    assert e.grad.abs().max() > 0 and s.grad.abs().max() > 0 and torch.equal(x, kept)
    with torch.no_grad():
        torch.testing.assert_close(block(x, e, s), block(x, e, s))
        assert torch.equal(x, kept)
        nn.init.zeros_(block.conv_2.weight)
        torch.testing.assert_close(block(x, e, s), x*math.sqrt(.5))

def test_latent_is_scale_free_and_finite():
    latent, z = LatentMap(6, 4, 2), torch.randn(3, 6)
    torch.testing.assert_close(latent(z), latent(7*z), atol=1e-6, rtol=1e-5)
    assert latent(torch.zeros(1, 6)).isfinite().all() and latent(1e4*z).isfinite().all()

def test_attention_by_hand_in_double():
    attend, x = PixelAttention(6).double(), torch.randn(2, 6, 3, 5).double()
    nn.init.normal_(attend.out.weight)
    tokens = attend.norm(x).flatten(2).mT
    weights = torch.softmax(attend.query(tokens) @ attend.key(tokens).mT/6**.5, -1)
    expected = (x+attend.out(weights @ attend.value(tokens)).mT.view_as(x))/2**.5
    torch.testing.assert_close(attend(x), expected)

@pytest.mark.parametrize('size', [(2, 4), (6, 10), (32, 48)])
def test_pyramid_halves(size): assert PyramidConv(3, 5)(torch.randn(1, 3, *size)).shape == (1, 5, size[0]//2, size[1]//2)

# fusion

@pytest.mark.parametrize('n, c', list(itertools.product((1, 2, 3, 4, 5), (1, 2, 5, 8))))
def test_swap_is_a_permutation_that_mixes(n, c):
    streams = [torch.arange(c).view(1, c, 1, 1)+100.*i for i in range(n)]
    out = swap_channels(*streams)
    assert sorted(float(v) for o in out for v in o.flatten()) == sorted(float(v) for o in streams for v in o.flatten())
    for i, o in enumerate(out):
        for k, v in enumerate(o.flatten().tolist()): assert v == 100*((i+k) % n)+k

def test_swap_alternates_for_two():
    a, b = torch.zeros(1, 6, 2, 2), torch.ones(1, 6, 2, 2)
    assert swap_channels(a, b)[0][0, :, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]

@pytest.mark.parametrize('n', [2, 3, 4])
@pytest.mark.parametrize('kind', [ChannelSwapMamba, CrossModalMamba, DynamicEnhancement])
@pytest.mark.parametrize('shared', [False, True])
def test_each_stream_reads_every_other(kind, n, shared):
    assert (reading(kind(8, n, shared=shared), n, 8, (3, 6)) > 1e-9).all()

@pytest.mark.parametrize('n', [2, 3])
def test_cross_mamba_reads_far_through_the_others_scan(n):
    block = CrossMamba(6, n).double()
    streams = list(torch.randn(n, 1, 6, 7, 9).double())
    for j in range(n):
        other = [s.clone() for s in streams]
        other[j][..., 0, 0] *= -1
        with torch.no_grad(): change = torch.stack(block(*other))-torch.stack(block(*streams))
        assert (change.abs().amax((1, 2))[:, -1, -1] > 0).all()

def test_gates_are_the_others():
    a, b, c = torch.randn(3, 2, 4)
    assert torch.equal(by_others([a])[0], a) and all(torch.equal(p, q) for p, q in zip(by_others([a, b]), (b, a), strict=True))
    torch.testing.assert_close(by_others([a, b, c])[1], (a+c)/2)

@pytest.mark.parametrize('n', [2, 3, 4])
def test_every_gate_learns(n):
    cross = CrossMamba(4, n)
    sum((o*torch.randn_like(o)).sum() for o in cross(*torch.randn(n, 1, 4, 3, 5))).backward()
    for p in cross.in_proj:
        scanned, gate = p.weight.grad.chunk(2)
        assert scanned.abs().max() > 0 and gate.abs().max() > 0

def test_closed_gates_silence_the_other_scan():
    "With T2's gate shut T1's scan is not read, and the other way round: which gate goes with which scan"
    cross = CrossMamba(4, 2).double()
    f1, f2 = torch.randn(2, 1, 4, 5, 6).double()
    with torch.no_grad():
        cross.in_proj[1].weight.chunk(2)[1].zero_()                 # SiLU(0) = 0: gate of stream 2 shut, so scan 1 is unread
        base = cross(f1, f2)
        v = cross.in_proj[0].weight.chunk(2)[0]
        v.neg_()                                                    # scan 1 changes, gate 1 does not
        same = cross(f1, f2)
        v2 = cross.in_proj[1].weight.chunk(2)[0]
        v2.neg_()
        moved = cross(f1, f2)
    assert all(torch.equal(a, b) for a, b in zip(base, same, strict=True))
    assert all(not torch.allclose(a, b) for a, b in zip(base, moved, strict=True))

@pytest.mark.parametrize('kind', [CrossModalMamba, ChannelSwapMamba])
def test_input_is_added_once(kind):
    block, streams = kind(6, 3), list(torch.randn(3, 2, 6, 5, 4))
    mixers = [block.mixer] if kind is CrossModalMamba else block.mixers
    for m in mixers:
        for p in m.out_proj.parameters(): nn.init.zeros_(p)
    assert all(torch.equal(a, b) for a, b in zip(block(*streams), streams, strict=True))

def test_cross_mamba_takes_scan_orders_and_can_be_traced():
    cross = CrossMamba(4, 2, directions=('raster', 'snake', 'hilbert'))
    streams = torch.randn(2, 1, 4, 4, 4)
    assert cross(*streams)[0].shape == (1, 4, 4, 4) and trace(cross, list(streams)).state.shape[:2] == (2, 3)

@pytest.mark.parametrize('theta, total', [(0., 1.), (.25, .75), (1., 0.), (2., -1.)])
def test_dynamic_local_conv_sums(theta, total):
    local = DynamicLocalConv(3)
    nn.init.constant_(local.theta, theta)
    torch.testing.assert_close(local.kernel().sum((2, 3)), total*local.conv.weight.sum((2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(local.kernel()[..., 0, :], local.conv.weight[..., 0, :])

def test_dynamic_local_conv_learns_theta_and_m():
    local = DynamicLocalConv(3)
    local(torch.randn(1, 3, 5, 7)).square().sum().backward()
    assert local.theta.grad.abs() > 0 and (local.m.grad.abs() > 0).all()

def test_difference_attention_weights_add_to_one_and_do_not_grow():
    x = list(torch.randn(2, 2, 3, 5, 7))
    F1, F2 = difference_attention(*x)
    torch.testing.assert_close(F1-x[0]+F2-x[1], x[0]+x[1])
    same = difference_attention(x[0], x[0], x[0], x[0])
    for got in same: torch.testing.assert_close(got, 2*x[0])

@pytest.mark.parametrize('n, fusion', list(itertools.product((1, 2, 3, 4), FUSIONS)))
def test_fusion_sizes(n, fusion):
    net = Fusion(n, 1, width=4, depth=1, fusion=fusion)
    for size in ((2, 3), (7, 5), (16, 9)):
        y = net(torch.randn(2, n, *size))
        assert y.shape == (2, 1, *size) and y.isfinite().all()

@pytest.mark.parametrize('n', [2, 3, 4])
@pytest.mark.parametrize('fusion', FUSIONS[:3])
def test_shared_weights_keep_the_result_for_cyclic_exchanges_only(n, fusion):
    "Two streams: both orders; more: the swap of channels knows the order but for its start. Concatenation never forgets it"
    net, x = Fusion(n, width=6, depth=1, shared=True, fusion=fusion).double(), torch.randn(1, n, 6, 5).double()
    with torch.no_grad(): base, outs = net(x), {o: net(x[:, list(o)]) for o in itertools.permutations(range(n))}
    for order, y in outs.items():
        cyclic = all((b-a) % n == 1 for a, b in itertools.pairwise(order))
        kept = cyclic and fusion == 'full' or order == tuple(range(n))
        gap = float((y-base).abs().max())
        assert (gap < 1e-12) if kept else (gap > 1e-5), (order, gap)

def test_own_weights_tell_the_first_from_the_second():
    for n in (2, 3):
        own, x = Fusion(n, width=6, depth=1).double(), torch.randn(1, n, 6, 5).double()
        for order in itertools.permutations(range(n)):
            assert torch.allclose(own(x[:, list(order)]), own(x)) == (order == tuple(range(n)))

@pytest.mark.parametrize('n', [2, 3, 4])
def test_difference_attention_goes_with_its_streams(n):
    x = list(torch.randn(n, 2, 3, 4, 5).double())
    base = difference_attention(*x)
    for order in itertools.permutations(range(n)):
        for k, got in zip(order, difference_attention(*(x[k] for k in order)), strict=True): torch.testing.assert_close(got, base[k])

@pytest.mark.parametrize('shared', [False, True])
def test_sources_keep_their_streams(shared):
    "Stream i belongs to source i: before the first exchange between streams its own image moves it, and no other does"
    net, seen = Fusion(3, width=4, depth=1, shared=shared).double(), []
    net.swaps[0].register_forward_hook(lambda m, given, out: seen.append(given))
    x = torch.randn(1, 3, 5, 6).double()
    with torch.no_grad(): net(x), [net(x.index_fill(1, torch.tensor([k]), .3)) for k in range(3)]
    base, *changed = seen
    moved = [[not torch.equal(a, b) for a, b in zip(streams, base, strict=True)] for streams in changed]
    assert moved == torch.eye(3).bool().tolist()

STREAMS = [ChannelSwapMamba(6, 2), CrossModalMamba(6, 2), CrossMamba(6, 2), DynamicEnhancement(6, 2), Concatenation(6, 2, 1),
    ChannelSwapMamba(6, 2, shared=True), CrossModalMamba(6, 2, shared=True), DynamicEnhancement(6, 2, shared=True)]

@pytest.mark.parametrize('block', STREAMS, ids=lambda b: type(b).__name__)
def test_a_wrong_number_or_shape_of_streams_is_refused_in_words(block):
    f = torch.randn(2, 6, 4, 5)
    for wrong in ((), (f,), (f,)*3, (f,)*4, (f, f[:1]), (f[:1], f), (f, f[..., :1]), (f[:, :, :1], f), (f[:, :5],)*2, (f[:, :1], f),
            (f[:0],)*2, (f[0], f[0]), (f[..., :0],)*2, (f, None)):
        with pytest.raises(ShapeError, match=r'2 maps of one shape \(b, 6, h, w\)'): block(*wrong)
    assert all(o.shape == f.shape for o in block(f, f))

@pytest.mark.parametrize('function', [swap_channels, difference_attention])
def test_exchanges_do_not_stretch_streams(function):
    f = torch.randn(2, 3, 4, 5)
    for wrong in ((), (f, f[:1]), (f, f[:, :1]), (f[..., :1], f), (f[:0], f[:0])):
        with pytest.raises(ShapeError, match='maps of one shape'): function(*wrong)

@pytest.mark.parametrize('shared', [False, True])
def test_every_stream_has_a_channel_for_every_other(shared):
    for build in (lambda: Fusion(5, width=4, shared=shared), lambda: ChannelSwapMamba(2, 3, shared=shared), lambda: MM2CT(3, width=2)):
        with pytest.raises(ConfigError, match='at least [35]'): build()
    assert Fusion(4, width=4, depth=1)(torch.randn(1, 4, 5, 6)).shape == (1, 1, 5, 6)

@pytest.mark.parametrize('shared', ['no', 'yes', 0, 1, None, b'x', np.int64(2), np.True_, torch.tensor(True), [True]])
def test_sharing_is_a_switch(shared):
    kinds = [ChannelSwapMamba, CrossModalMamba, CrossMamba, DynamicEnhancement, Fusion, MM2CT]
    for build in kinds:
        with pytest.raises(ConfigError, match=r'shared of \w+.*expected True or False.*Leave it out'): build(4, 2, shared=shared)
    for fusion in FUSIONS:
        with pytest.raises(ConfigError, match='shared of Fusion'): Fusion(2, fusion=fusion, shared=shared)
        with pytest.raises(ConfigError, match='shared of MM2CT'): network('mm2ct').build(**TINY, fusion=fusion, shared=shared)

def test_a_switch_is_written_as_it_was_read():
    for shared in (True, False): assert json.loads(json.dumps(MM2CT(**TINY, shared=shared).config))['shared'] is shared
    alone, each = (count(Fusion(2, width=4, depth=1, shared=s)) for s in (True, False))
    assert alone < each

@pytest.mark.parametrize('measure', [lambda b: reading(b, 2, 6), lambda b: heard(b, 2, 6, 8)])
def test_measuring_leaves_the_block_as_it_was(measure):
    block = CrossModalMamba(6, 2)
    kept = copy.deepcopy(block.state_dict())
    measure(block)
    assert all(p.dtype == torch.float32 for p in block.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in block.state_dict().items())
    assert block(*torch.randn(2, 1, 6, 4, 4))[0].dtype == torch.float32

@pytest.mark.parametrize('fusion', FUSIONS)
def test_the_condition_is_bounded_but_for_the_concatenation(fusion):
    y = Fusion(2, width=4, depth=1, fusion=fusion)(torch.full((1, 2, 6, 7), 1e4)+1e4*torch.randn(1, 2, 6, 7))
    assert (y.abs().max() <= 1) == (fusion != 'concatenation')

def test_recomputing_several_tensors_moves_running_averages_once():
    class Normed(JointStage):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm(3, at_test='running')
        def body(self, f, g): return [self.norm(f+g)]
    f, g, seen = 2+torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).requires_grad_(), []
    for on in (False, True):
        net = activation_checkpointing(nn.Sequential(Normed()), on)
        net[0](f, g)[0].square().sum().backward()
        seen.append((net[0].norm.running_mean.clone(), net[0].norm.running_var.clone(), int(net[0].norm.num_batches_tracked)))
    assert seen[0][2] == seen[1][2] == 1
    for a, b in zip(seen[0][:2], seen[1][:2], strict=True): torch.testing.assert_close(a, b)

# networks

@pytest.mark.parametrize('size', [(64, 64), (96, 160), (32, 224), (256, 32)])
@pytest.mark.parametrize('n, noise, k', [(1, 1, 1), (2, 1, 1), (3, 2, 2), (4, 1, 1), (1, 2, 2), (2, 0, 1), (1, 4, 8)])
def test_mm2ct_sizes_and_channels(size, n, noise, k):
    net = MM2CT(n, noise, k, **TINY | dict(directions=('raster',)))
    with torch.no_grad(): y = net(torch.randn(1, n+noise, *size), *beside())
    assert y.shape == (1, k, *size) and y.abs().max() < 1

@pytest.mark.parametrize('size', [(64, 64), (12, 20), (36, 28), (256, 64)])
def test_resnet_sizes(size):
    for n, k, norm in ((1, 1, 'instance'), (4, 2, 'batch')):
        net = ResNetGenerator(n, k, n_blocks=2, base_channels=3, norm=norm)
        assert net(torch.randn(2, n, *size)).shape == (2, k, *size)

@pytest.mark.parametrize('levels', [1, 2, 4, 6])
@pytest.mark.parametrize('outputs', ['as_inputs', 'targets'])
def test_unet_levels_and_odd_widths(levels, outputs):
    net = DiffusiveUNet(2, 1, 1, base_channels=3, multipliers=(1, 2, 1, 3, 1, 2)[:levels], n_blocks=1, outputs=outputs,
        attention_at=(1, 4)[:1+(levels > 2)], n_latent=5, n_style=7, n_layers=1, taps=(1, 1))
    y = net(torch.randn(2, 3, 32, 64), *beside(2, 5))
    assert y.shape == (2, 1, 32, 64) and net.tail.out_channels == (3 if outputs == 'as_inputs' else 1)

@pytest.mark.parametrize('multipliers', [[2], [2, 4], [2, 2], [3, 1, 2], [5, 3], [1], [1, 2]])
@pytest.mark.parametrize('n_blocks', [1, 2])
def test_the_first_level_may_have_another_width_than_the_head(multipliers, n_blocks):
    config = dict(base_channels=4, multipliers=multipliers, n_blocks=n_blocks)
    syndiff = network('syndiff').build(**config)
    for net, x in ((DiffusiveUNet(**config), torch.randn(2, 2, 32, 64)), (syndiff, torch.randn(2, 2, 32, 64)),
            (MM2CT(**config, width=4, depth=1), torch.randn(2, 3, 32, 64))):
        unet = getattr(net, 'unet', net)
        assert net(x, *beside(2)).shape == (2, 1, 32, 64) and net(x, *beside(2)).isfinite().all()
        assert unet.head.out_channels == 4 and unet.encoder[0].conv_1.in_channels == 4
        assert unet.encoder[0].conv_1.out_channels == unet.norm.num_channels == 4*multipliers[0]
        assert [(p.conv.in_channels, p.conv.out_channels) for p in unet.pyramid] == [
            (a, 4*b) for a, b in zip([2, *(4*m for m in multipliers)], multipliers[:-1], strict=False)]

@pytest.mark.parametrize('c', [3, 8, 64])
def test_time_code_is_syndiffs(c):
    "Frequencies 10000^(-k/(K-1)), K = c/2: the slowest is 1/10000 itself"
    net = DiffusiveUNet(base_channels=c, multipliers=(1,), n_blocks=1)
    K, t, seen = (c+1)//2, torch.tensor([0., 1., 3., 999.]), []
    net.time.first.register_forward_hook(lambda m, given, out: seen.append(given[0]))
    net.time(t)
    angles = [[float(v)*10_000**(-k/(K-1)) for k in range(K)] for v in t]
    by_hand = torch.tensor([[f(a) for f in (math.sin, math.cos) for a in row] for row in angles])
    torch.testing.assert_close(seen[0], by_hand, atol=2e-4, rtol=1e-4)

@pytest.mark.parametrize('levels, expected', [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 16)])
def test_attention_is_at_16_or_at_the_deepest(levels, expected):
    net = DiffusiveUNet(base_channels=4, multipliers=[1]*levels, n_blocks=1)
    assert net.config['attention_at'] == [expected]
    down, up = unet_plan(4, [4]*levels, 1, (expected,))
    for part, rows in ((net.encoder, down), (net.decoder, up)):
        assert [b.attention is not None for b in part] == [r.attention for r in rows] and any(r.attention for r in rows)
    assert not any(b.attention for b in DiffusiveUNet(base_channels=4, multipliers=[1]*levels, n_blocks=1, attention_at=[]).encoder)

@pytest.mark.parametrize('preset, expected', [('smoke', [2]), ('laptop', [4]), ('paper', [16])])
def test_presets_have_attention_on_the_way(preset, expected):
    record = network('mm2ct')
    with torch.device('meta'): unet = record.build(**record.presets[preset]).unet
    assert unet.config['attention_at'] == expected and any(b.attention for b in unet.encoder) and any(b.attention for b in unet.decoder)

@pytest.mark.parametrize('change, said', [(dict(attention_at=(3,)), 'some of'), (dict(attention_at=(64,)), 'some of'),
    (dict(attention_at=('16',)), 'some of'), (dict(attention_at=(True,)), 'some of'), (dict(attention_at=[1, 4]), 'some of'),
    (dict(attention_at=2), 'a list'), (dict(start=-1), 'at least 0'), (dict(start=math.nan), 'at least 0'), (dict(start='0'), 'at least 0'),
    (dict(multipliers=2), 'a list'), (dict(multipliers='12'), 'a list'), (dict(taps=(1, math.nan)), 'finite'),
    (dict(taps=(1, math.inf)), 'finite'), (dict(taps=3), 'a list'),
    (dict(taps=()), 'even number'), (dict(taps=(0, 0)), 'not 0'), (dict(taps=(.1, .2, -.3, 0)), 'not 0'), (dict(taps=(1, '1')), 'finite')])
def test_wrong_unets_are_refused_in_words(change, said):
    with pytest.raises(ConfigError, match=said): DiffusiveUNet(**dict(base_channels=4, multipliers=(1, 2), n_blocks=1) | change)

@pytest.mark.parametrize('scale', [-1, -1e-9, math.inf, math.nan, None, True])
def test_wrong_scales_are_refused_in_words(scale):
    layer = nn.Linear(2, 2)
    for build in (lambda: scaled(layer, scale), lambda: PixelAttention(4, scale), lambda: DiffusiveBlock(4, 4, 2, 2, start=scale)):
        with pytest.raises(ConfigError, match='at least 0'): build()

def test_idle_outputs_do_not_touch_the_kept():
    net = DiffusiveUNet(1, 1, 1, base_channels=4, multipliers=(1, 1), n_blocks=1)
    x, (t, z) = torch.randn(1, 2, 32, 32), beside()
    before = net(x, t, z)
    with torch.no_grad(): net.tail.weight[1:].fill_(9.)
    assert torch.equal(net(x, t, z), before)

def test_unet_forward_by_hand():
    "The way through, kept maps and pyramid, written out for three levels of one block each"
    net = DiffusiveUNet(1, 1, 1, base_channels=4, multipliers=(1, 2, 3), n_blocks=1).double()
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear): nn.init.normal_(m.weight, 0, .3)
    x, (t, z) = torch.randn(2, 2, 32, 64).double(), beside(2)
    e, s, join = net.time(t), net.latent(z.double()), lambda *maps: torch.cat(maps, 1)
    a, d, m = ([lambda h, f=f: f(h, e, s) for f in part] for part in (net.encoder, net.decoder, net.middle))
    h0 = net.head(x)
    h1 = a[0](h0)
    p1 = h2 = (net.pyramid[0](x)+a[1](h1))/2**.5
    h3 = a[2](h2)
    h4 = (net.pyramid[1](p1)+a[3](h3))/2**.5
    h5 = a[4](h4)
    h = d[2](d[1](join(d[0](join(m[1](m[0](h5)), h5)), h4)))
    h = d[5](d[4](join(d[3](join(h, h3)), h2)))
    h = d[7](join(d[6](join(h, h1)), h0))
    assert [b.resample for b in net.decoder] == ['keep', 'keep', 'up', 'keep', 'keep', 'up', 'keep', 'keep']
    torch.testing.assert_close(net(x, t, z.double()), torch.tanh(net.tail(F.silu(net.norm(h))))[:, :1])

def test_everything_given_moves_the_output():
    net = MM2CT(3, 2, 1, **TINY).double()
    x, (t, z) = torch.randn(1, 5, 32, 32).double(), beside()
    z = z.double()
    base = net(x, t, z)
    for k in range(5): assert (net(x.index_fill(1, torch.tensor([k]), .3), t, z)-base).abs().max() > 0
    assert (net(x, t+1, z)-base).abs().max() > 0 and (net(x, t, -z)-base).abs().max() > 0

def test_fuse_once_denoise_often():
    net, x = MM2CT(2, **TINY), torch.randn(2, 3, 32, 32)
    condition = net.fuse(x[:, :2])
    for step in (3, 2, 1, 0):
        t, z = torch.full((2,), step), torch.randn(2, 64)
        torch.testing.assert_close(net.denoise(condition, x[:, 2:], t, z), net(x, t, z))

def test_switches_change_names_and_output():
    "At every preset's size each switch has parameter names of its own, not shapes alone"
    record = network('mm2ct')
    x, (t, z) = torch.randn(1, 3, 32, 32), beside(1, 8)
    built = {}
    for name, switch in {'smallest': {}, **record.ablations}.items():
        torch.manual_seed(0)
        built[name] = record.build(**record.smallest | switch)
    for a, b in itertools.combinations(built, 2):
        assert set(names(built[a])) != set(names(built[b]))
        assert not torch.allclose(built[a](x, t, z), built[b](x, t, z), atol=1e-12)
    with torch.device('meta'):
        for config in record.presets.values():
            seen = [frozenset(names(record.build(**config | switch))) for switch in ({}, *record.ablations.values())]
            assert len(set(seen)) == 4

def test_stand_ins_are_concatenation_and_a_convolution_1():
    with torch.device('meta'):
        full, no_cross, plain, both = (MM2CT(fusion=f) for f in ('full', 'no_cross', 'no_enhancement', 'concatenation'))
    assert [m.mix.weight.shape for m in no_cross.fusion.cross] == [(64, 64, 1, 1)]
    assert [m.mix.weight.shape for m in plain.fusion.merge] == [(32, 64, 1, 1)]
    assert {n for n, _ in both.fusion.named_parameters()} == {'mix.weight', 'mix.bias'} and both.fusion.mix.weight.shape == (1, 2, 1, 1)
    assert not any('local' in n for n in names(plain)) and any('local' in n for n in names(full))
    assert not any(isinstance(m, CrossMamba) for m in no_cross.modules())
    kinds = [type(m) for m in full.modules()]
    assert kinds.count(MambaBlock) == 2*2+2 and kinds.count(ChannelSwapMamba) == kinds.count(CrossMamba) == 2

@pytest.mark.parametrize('spec', [Spec(s, n, k, steps, latent) for s, n, k, steps, latent in
    [(1, 0, 1, 0, 0), (4, 0, 1, 0, 0), (1, 1, 2, 0, 0), (1, 1, 2, 4, 0), (2, 1, 1, 4, 64), (1, 4, 8, 1000, 0), (2, 1, 1, 4, 32)]])
def test_fits_every_recipe(spec):
    record = network('mm2ct')
    config = record.smallest | record.fits(spec)
    net = record.build(**config)
    t, z = torch.tensor([min(999, spec.steps)]), torch.randn(1, spec.latent or 64)
    assert net(torch.randn(1, spec.sources+spec.noise, 32, 32), t, z).shape == (1, spec.targets, 32, 32)

@pytest.mark.parametrize('change, said', [(dict(fusion='no_cros'), "'no_cross'"),
    (dict(n_noise=-1), 'at least 0'), (dict(n_noise=1.5), 'at least 0'),
    (dict(multipliers=[]), 'one to six'), (dict(multipliers=[1]*7), 'one to six'), (dict(multipliers=[1, 0]), 'at least 1'),
    (dict(width=0), 'at least 1'), (dict(depth=0), 'at least 1'), (dict(n_condition=0), 'at least 1'), (dict(n_sources=0), 'at least 1'),
    (dict(n_targets=True), 'at least 1'), (dict(fusion='concatenation', directions=['rastr']), 'raster'),
    (dict(multipliers=2), 'a list'), (dict(start=-1), 'at least 0'), (dict(directions=[]), 'at least one'),
    (dict(fuson='full'), "'fusion'")])
def test_wrong_settings_are_refused_in_words(change, said):
    with pytest.raises(ConfigError, match=said): network('mm2ct').build(**TINY | change)

@pytest.mark.parametrize('change, said', [(dict(norm='instanse'), "'instance'"),
    (dict(n_blocks=0), 'at least 1'), (dict(norm_at_test='runing'), "'running'")])
def test_wrong_resnets_are_refused_in_words(change, said):
    with pytest.raises(ConfigError, match=said): ResNetGenerator(**change)

def test_wrong_inputs_are_refused_in_words():
    net, (t, z) = MM2CT(2, **TINY), beside()
    for x, said in [(torch.zeros(1, 2, 32, 32), '3 channels'), (torch.zeros(1, 3, 48, 32), 'divisible by 32'),
            (torch.zeros(3, 32, 32), 'batch axis')]:
        with pytest.raises(ShapeError, match=said): net(x, t, z)
    x = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ShapeError, match='time for MM2CT'): net(x, t, z.expand(2, -1))
    with pytest.raises(ShapeError, match='latent for MM2CT'): net(x, t.expand(2), z)

@pytest.mark.parametrize('fusion', ['full', 'concatenation'])
def test_empty_batches_are_refused_in_words(fusion):
    t, z = torch.zeros(0), torch.zeros(0, 64)
    for net, channels, more in [(MM2CT(2, **TINY, fusion=fusion), 3, (t, z)), (DiffusiveUNet(base_channels=4, multipliers=(1,)), 2, (t, z)),
            (Fusion(2, width=4, fusion=fusion), 2, ()), (ResNetGenerator(base_channels=4, n_blocks=1), 1, ())]:
        said = f'images for {type(net).__name__}.*(\n.*)*empty batch'
        with pytest.raises(ShapeError, match=said): net(torch.zeros(0, channels, 32, 32), *more)

def test_backends_agree_on_the_whole_network():
    net, x, (t, z) = MM2CT(2, **TINY).double(), torch.randn(1, 3, 32, 32).double(), beside()
    with torch.no_grad():
        outs = [set_backend(net, b)(x, t, z.double()) for b in ('reference', 'chunked', 'auto')]
    for o in outs[1:]: torch.testing.assert_close(o, outs[0], atol=1e-12, rtol=1e-9)

def test_recomputed_activations_give_the_same_gradients():
    x, (t, z), grads = torch.randn(2, 3, 32, 32), beside(2), []
    for on in (False, True):
        torch.manual_seed(0)
        net = activation_checkpointing(MM2CT(2, **TINY), on)
        net(x, t, z).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True): torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)

def test_recomputing_stores_less():
    stored = []
    for on in (False, True):
        total = []
        net = activation_checkpointing(MM2CT(2, **TINY), on)
        with torch.autograd.graph.saved_tensors_hooks(lambda v, total=total: total.append(v.numel()) or v, lambda v: v):
            net(torch.randn(1, 3, 32, 32), *beside())
        stored.append(sum(total))
    assert stored[1] < .6*stored[0]

def test_deterministic_and_untouched_by_a_pass_without_gradient():
    net, x, (t, z) = MM2CT(2, **TINY).eval(), torch.randn(1, 3, 32, 64), beside()
    kept = x.clone()
    with torch.no_grad(): first, again = net(x, t, z), net(x, t, z)
    assert torch.equal(first, again) and torch.equal(x, kept)
    torch.testing.assert_close(net(x, t, z), first, atol=1e-6, rtol=1e-5)

def test_maps_come_in_order():
    net = MM2CT(2, **TINY)
    maps = maps_of(net, torch.randn(1, 3, 32, 32), *beside())
    encoder, decoder = ([f'{part}_{k}' for k in range(n)] for part, n in (('encoder', 3), ('decoder', 5)))
    assert list(maps) == ['condition', 'head', *encoder, 'middle_0', 'middle_1', *decoder, 'out']
    assert not any(m._forward_hooks for m in net.modules())
