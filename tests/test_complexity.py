"measure.complexity: blocks of each network counted by hand, one count on every device and backend, bytes kept, records, discriminators"
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from i2i_mamba_nb.blocks.cmmamba import PaperStage, ReleasedStage
from i2i_mamba_nb.blocks.conditioning import TransformerBlock
from i2i_mamba_nb.blocks.conv import ResidualBlock, ResidualCNN, activation_checkpointing
from i2i_mamba_nb.blocks.diffusive import DiffusiveBlock
from i2i_mamba_nb.blocks.evss import EVSSBlock
from i2i_mamba_nb.blocks.fusion import ChannelSwapMamba
from i2i_mamba_nb.blocks.multiscale import MFEB
from i2i_mamba_nb.core import ConfigError, Inputs, Network, network, networks
from i2i_mamba_nb.measure import complexity
from i2i_mamba_nb.measure.complexity import (
    activation_bytes, cost, cost_table, costs, formulas, multiply_adds, multiply_adds_of_parts, parameters, scan_flops, seconds,
    seconds_of
)
from i2i_mamba_nb.models.autoencoder import LatentBlock
from i2i_mamba_nb.models.baselines import DoubleConv
from i2i_mamba_nb.models.cola_diff import GridAttention, TimeResidual
from i2i_mamba_nb.models.discriminators import MultiScalePatchGAN, SynDiffPatchGAN, TimePatchGAN
from i2i_mamba_nb.models.mm2ct import ResNetBlock
from i2i_mamba_nb.ssm import backends, selective_scan
from i2i_mamba_nb.ssm.mixers import ES2D, SS2D, BiMamba, Mamba, set_backend

ROOT = Path(__file__).resolve().parent.parent
B, H, W = 2, 10, 14
L = H*W
class Around(nn.Module):
    "A function as a module, with what is inside"
    def __init__(self, f, *inside): super().__init__(); self.f, self.inside = f, nn.ModuleList(inside)
    def forward(self, *x): return self.f(*x)

BACKENDS = [n for n, a in backends().items() if a.available and n not in ('triton', 'mamba_ssm')]

# ---------------------------------------------------------------- one block of each network, by hand
def ss2d(c, length, paths=4, n=16):
    "Multiply-adds of SS2D on one image: c channels, rank c/16 rounded up"
    d, r = 2*c, -(-c//16)
    return length*(c*2*d+9*d+paths*d*(r+2*n)+paths*r*d+d*c)+paths*scan_flops(1, length, d, n)//2

def evss(c, length, n=16):
    "EVSS on one image of even height and width: every phase projects its own quarter"
    d, r, few = 2*c, -(-c//16), max(1, c//8)
    far = length*(c*2*d+9*d+d*(r+2*n)+r*d+d*c)+4*scan_flops(1, length//4, d, n)//2
    return far+length*(9*c+c*c)+2*c*few+8*c*c*length

def released(c, length, n=16):
    "A Mamba stage of the released network on one image: causal convolution of 4 on padded length, compression, residual block"
    d, r = 2*c, -(-c//16)
    mamba = length*(c*2*d+d*(r+2*n)+r*d+d*c)+4*d*(length+3)+scan_flops(1, length, d, n)//2
    return mamba+length*(2*c*c+9*2*c*c+9*c*c+18*c*c)

def tokens(block): return Around(lambda x: block(x.flatten(2).mT), block)

C = 12
HAND = {
    'I2I-Mamba, paper': (lambda: PaperStage(C), [C], ss2d(C, L)+L*(C*C+18*C*C+18*C*C)),
    'I2I-Mamba, released': (lambda: ReleasedStage(C), [C], released(C, L)),
    'HMF-MambaINR, MFEB': (lambda: MFEB(C), [3*C], L*(3*C*C+4*9*C*C)+4*2*C*C),
    'CRAViM, EVSS': (lambda: EVSSBlock(C), [C], evss(C, L)),
    'MM2CT, channel swap': (lambda: ChannelSwapMamba(C), [C, C], 2*ss2d(C, L)),
    'MM2CT and SynDiff, residual block': (lambda: DiffusiveBlock(8, C, 5, 7), [8, 5j, 7j], 7*16+7*24+5*C+L*(9*8*C+9*C*C+8*C)),
    'the same, halving': (lambda: DiffusiveBlock(8, C, 5, 7, resample='down'), [8, 5j, 7j],
        7*16+7*24+5*C+L//4*(2*16*8+9*8*C+9*C*C+8*C)),
    'CoLa-Diff, residual block': (lambda: TimeResidual(8, C, 5), [8, 5j], 5*C+L*(9*8*C+9*C*C+8*C)),
    'CoLa-Diff, attention': (lambda: GridAttention(8), [8], L*4*64+2*L*L*8),
    'CoLa-Diff, transformer': (lambda: tokens(TransformerBlock(8)), [8], L*(4*64+8*64)+2*L*L*8),
    'autoencoder, residual block': (lambda: LatentBlock(8, C), [8], L*(9*8*C+9*C*C+8*C)),
    'ResNet, residual block': (lambda: ResNetBlock(C), [C], L*18*C*C),
    'U-Net, level': (lambda: DoubleConv(8, C), [8], L*(9*8*C+9*C*C)),
}

def given(sizes, device, b=B):
    "Images of so many channels; an imaginary number stands for a vector"
    return [torch.zeros(b, int(k.imag), device=device) if isinstance(k, complex) else torch.zeros(b, k, H, W, device=device) for k in sizes]

@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('name', HAND)
def test_one_block_by_hand(name, device):
    build, sizes, count = HAND[name]
    block = build().to(device)
    for training in (True, False):
        assert multiply_adds(block.train(training), *given(sizes, device)) == B*count
    assert multiply_adds(block, *given(sizes, device, b=1)) == count

@pytest.mark.parametrize('k', [1, 2, 3])
def test_multi_scale_critic_by_hand(k):
    sizes, c, work = [(80, 112)], 4, 0
    for _ in range(k-1): sizes.append(tuple(-(-n//2) for n in sizes[-1]))
    for h, w in sizes:
        for i, (a, b) in enumerate([(1, c), (c, 2*c), (2*c, 4*c), (4*c, 8*c)], 1): work += 16*a*b*(h >> i)*(w >> i)
        work += 8*c*(h >> 4)*(w >> 4)
    assert multiply_adds(MultiScalePatchGAN(base_channels=c, n_scales=k), torch.zeros(1, 1, 80, 112)) == work

# ---------------------------------------------------------------- one count everywhere
@pytest.mark.parametrize('mixer', [Mamba, BiMamba, SS2D, ES2D])
@pytest.mark.parametrize('backend', BACKENDS)
def test_a_mixer_counts_the_same_on_every_backend_and_device(mixer, backend):
    net = set_backend(mixer(8), backend)
    x = torch.zeros(2, 35, 8) if mixer in (Mamba, BiMamba) else torch.zeros(2, 8, 6, 10)
    counted = multiply_adds(net, x)
    assert {m.backend for m in net.modules() if hasattr(m, 'backend')} == {backend}
    assert counted == multiply_adds(mixer(8).to('meta'), x.to('meta')) == multiply_adds(mixer(8).double(), x.double())
    assert counted > scan_flops(2, 35, 16, 16)//2

def test_backend_is_put_back_after_a_failure():
    net = set_backend(SS2D(8), 'reference')
    with pytest.raises(RuntimeError): multiply_adds(net, torch.zeros(1, 7, 4, 4))
    assert net.backend == 'reference' and torch.backends.mha.get_fastpath_enabled()

@pytest.mark.parametrize('shape', [(1, 2, 3, 1), (2, 3, 7, 5), (3, 5, 64, 16)])
def test_scan_by_its_formula(shape):
    b, d, length, n = shape
    u, A, w = torch.zeros(b, d, length), torch.zeros(d, n), torch.zeros(b, n, length)
    assert multiply_adds(lambda u: selective_scan(u, u, A, w, w, D=torch.ones(d), z=u), u) == b*length*d*(9*n+2)//2
    assert scan_flops(b, length, d, n) == 9*b*length*d*n+2*b*length*d

def test_scans_are_known_by_name():
    names = {str(k) for k in formulas()}
    assert {'i2i_mamba_nb.scan', 'i2i_mamba_nb.ordered_scan'} <= names, 'an operator was renamed: the counter would miss it'

@pytest.mark.parametrize('name', networks())
def test_meta_fake_and_real_tensors_agree_for_every_network(name):
    record = network(name)
    config, (m, smallest) = record.smallest, record.inputs.sides(record.smallest)
    size = tuple(m*(-(-smallest//m)+k) for k in (1, 0))
    more = [f(config, 1, size, torch.Generator().manual_seed(0)) for f in record.inputs.further.values()]
    x, net = torch.zeros(1, record.inputs.channels(config), *size), record.build(**config)
    fake, real = cost(record, config, size), multiply_adds(net, x, *more)
    assert fake.parameters == parameters(net) and fake.multiply_adds == real and fake.size == size and fake.kind == record.kind
    assert abs(fake.activations/activation_bytes(net, x, *more)-1) < .01
    assert multiply_adds(net.to('meta'), x.to('meta'), *(v.to('meta') for v in more)) == real

@pytest.fixture(scope='module')
def everything(): return costs()

@pytest.mark.parametrize('name', networks())
def test_the_table_equals_the_records(name, everything):
    "At the size that the record names for the configuration that says least"
    record = network(name)
    config, size, count = min(record.multiply_adds, key=lambda e: len(e[0]))
    found, counts = everything[name], {json.dumps(c, sort_keys=True): n for c, n in record.n_parameters}
    assert found.size == size and found.multiply_adds == count
    assert found.parameters == counts[json.dumps(config, sort_keys=True)]

def test_one_table_for_all(everything):
    assert set(everything) == set(networks()) and all(c.multiply_adds > 0 and c.activations > 0 for c in everything.values())
    assert {n for n, c in everything.items() if c.kind == 'discriminator'} == set(networks('discriminator')) < set(everything)
    table = cost_table(everything)
    assert list(table.index) == list(everything) and table.loc['cravim', 'parameters'] == '11,765,711'
    assert set(table['forward, s']) == {'not measured'}
    assert cost_table(everything, dict(cravim=1.234)).loc[['cravim', 'unet'], 'forward, s'].tolist() == ['1.23', 'not measured']
    assert seconds_of(network('syndiff'), network('syndiff').smallest, (32, 64), repeats=1) > 0

def test_a_record_without_sizes_is_refused():
    bare = Network(name='bare', paper='', build=lambda: nn.Conv2d(1, 1, 1), smallest={}, inputs=Inputs(channels=lambda config: 1))
    with pytest.raises(ConfigError, match='record of bare: given no multiply_adds'): cost(bare)
    assert cost(bare, {}, (16, 24))[2:4] == (2, 16*24)

def test_parts_add_up():
    net, x = network('i2i_mamba').build(base_channels=4, n_stages=3).to('meta'), torch.zeros(1, 2, 32, 48, device='meta')
    parts = multiply_adds_of_parts(net, x)
    assert sum(parts.values()) == multiply_adds(net, x) and parts['encoder_1'] == 49*2*4*32*48
    assert list(parts) == [n for n, _ in net.named_children()]

def of(record, config=None, device='meta'):
    "A network of a record, and inputs for it"
    config = record.smallest if config is None else config
    m, smallest = record.inputs.sides(config)
    size = (m*-(-smallest//m),)*2
    more = [f(config, 2, size, torch.Generator().manual_seed(0)).to(device) for f in record.inputs.further.values()]
    return record.build(**config).to(device), [torch.ones(2, record.inputs.channels(config), *size, device=device), *more]

@pytest.mark.parametrize('name', networks())
def test_parts_of_every_network_add_up_to_the_whole(name):
    for config in (network(name).smallest, *(network(name).smallest | c for c in network(name).ablations.values())):
        net, given_ = of(network(name), config)
        parts = multiply_adds_of_parts(net, *given_)
        assert sum(parts.values()) == multiply_adds(net, *given_), (config, parts)
        assert set(parts) <= {n for n, _ in net.named_children()} | {''} and parts.get('', 0) < .1*sum(parts.values()), parts

def test_a_part_that_is_not_called_itself_has_what_is_below_it():
    net, x = of(network('unet'))
    assert set(multiply_adds_of_parts(net, *x)) == {'down', 'up', 'join', 'out'}
    net, x = of(network('multiscale_patchgan'))
    assert set(multiply_adds_of_parts(net, *x)) == {'scales'}
    class Bare(nn.Module):
        def __init__(self): super().__init__(); self.a, self.weight = nn.ModuleDict(dict(b=nn.Linear(3, 5))), nn.Parameter(torch.ones(5, 7))
        def forward(self, x): return self.a['b'](x) @ self.weight
    assert multiply_adds_of_parts(Bare(), torch.zeros(2, 3)) == {'a': 2*15, '': 2*35}

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', networks())
def test_measuring_leaves_the_network_as_it_was(name, training):
    net, given_ = of(network(name), device='cpu')
    net.train(training)
    before = {k: (v, v.clone()) for k, v in (*net.named_buffers(), *net.named_parameters())}
    for measure in (multiply_adds, multiply_adds_of_parts, activation_bytes, lambda *a: seconds(*a, repeats=1)): measure(net, *given_)
    for k, v in (*net.named_buffers(), *net.named_parameters()): assert v is before[k][0] and torch.equal(v, before[k][1]), k
    assert net.training is training and all(p.grad is None for p in net.parameters())

def test_averages_are_put_back_after_a_failure():
    class Fails(nn.Module):
        def __init__(self): super().__init__(); self.norm = nn.BatchNorm2d(2)
        def forward(self, x): self.norm(x); raise RuntimeError
    net = Fails()
    for measure in (multiply_adds, activation_bytes, seconds):
        with pytest.raises(RuntimeError): measure(net, torch.ones(1, 2, 4, 4))
    assert not net.norm.running_mean.any() and not net.norm.num_batches_tracked

# ---------------------------------------------------------------- attention and vectors
@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('training', [True, False])
def test_fused_attention_is_counted(device, training):
    q, k = torch.zeros(2, 3, 5, 7, device=device), torch.zeros(2, 3, 11, 7, device=device)
    assert multiply_adds(nn.functional.scaled_dot_product_attention, q, k, k) == 2*2*3*5*11*7
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True, device=device).train(training), torch.zeros(3, 5, 8, device=device)
    assert multiply_adds(lambda x: attention(x, x, x, need_weights=False), x) == 3*(5*4*64+2*5*5*8)

@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_products_with_vectors_are_counted(device):
    A, v, u = (torch.zeros(*s, device=device) for s in ((5, 7), (7,), (5,)))
    assert multiply_adds(lambda: A @ v) == multiply_adds(lambda: torch.addmv(u, A, v)) == 35 and multiply_adds(lambda: v @ v) == 7

# ---------------------------------------------------------------- bytes kept
def test_kept_by_a_residual_block_by_hand():
    f = torch.zeros(2, 3, 5, 7, requires_grad=True)
    image, padded = 2*3*5*7, 2*3*7*9
    assert activation_bytes(ResidualBlock(3), f) == 4*(4*image+2*padded+2*2*3)
    assert activation_bytes(ResidualBlock(3).double(), f.detach().double().requires_grad_()) == 8*(4*image+2*padded+2*2*3)

def test_kept_by_a_convolution_is_its_input_and_once():
    x = torch.zeros(1, 4, 6, 10, requires_grad=True)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert activation_bytes(conv, x) == 4*4*60 == activation_bytes(Around(lambda x: conv(x)+conv(x), conv), x)
    assert activation_bytes(nn.Sequential(nn.Flatten(), nn.ReLU()), x) == 4*4*60

def test_recomputing_keeps_inputs_only():
    net, x = nn.Sequential(*[ResidualCNN(4) for _ in range(3)]), torch.zeros(1, 4, 8, 12, requires_grad=True)
    with_all = activation_bytes(net, x)
    assert activation_bytes(activation_checkpointing(net), x) == 3*4*4*96 < with_all/4
    assert activation_bytes(activation_checkpointing(net, False), x) == with_all

def test_works_where_gradients_are_off():
    x = torch.zeros(1, 4, 6, 10, requires_grad=True)
    with torch.no_grad(): assert activation_bytes(nn.Conv2d(4, 4, 1), x) == 4*240

# ---------------------------------------------------------------- time
def test_seconds_is_the_median_without_the_first(monkeypatch):
    ticks, calls = iter([0., 100., 100., 101., 101., 104., 104., 106.]), []
    monkeypatch.setattr(complexity.time, 'perf_counter', lambda: next(ticks))
    assert seconds(lambda x: calls.append(torch.is_grad_enabled()), None, repeats=3) == 2. and calls == [False]*4

# ---------------------------------------------------------------- discriminators of this part
COUNTS = dict(syndiff_patchgan=2_762_689, time_patchgan=27_736_705, multiscale_patchgan=8_265_027, patchgan=2_765_633)

@pytest.mark.parametrize('name', COUNTS)
def test_exact_counts_of_critics(name):
    record = network(name)
    config = dict(n_channels=3) if name == 'patchgan' else {}
    with torch.device('meta'): assert parameters(record.build(**config)) == COUNTS[name]

def shapes_of(net):
    "Channels in and out, kernel, stride, offset of every convolution"
    found = (m for m in net.modules() if isinstance(m, nn.Conv2d))
    return [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.bias is not None) for m in found]

def test_layers_of_syndiffs_patch_critic():
    with torch.device('meta'): net = SynDiffPatchGAN()
    assert shapes_of(net) == [(1, 64, 4, 2, True), (64, 128, 4, 2, True), (128, 256, 4, 2, True), (256, 512, 4, 1, True),
        (512, 1, 4, 1, True)]
    norms = [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert [(m.num_features, m.affine, m.track_running_stats) for m in norms] == [(n, False, False) for n in (128, 256, 512)]
    assert [m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)] == [.2]*4

def test_layers_of_the_multi_scale_critic():
    with torch.device('meta'): net = MultiScalePatchGAN()
    each = [(1, 64, 4, 2, True), (64, 128, 4, 2, True), (128, 256, 4, 2, True), (256, 512, 4, 2, True), (512, 1, 1, 1, True)]
    assert shapes_of(net) == 3*each and len([m for m in net.modules() if isinstance(m, nn.ReflectionPad2d)]) == 12
    assert not any('Norm' in type(m).__name__ for m in net.modules())

def test_layers_of_the_time_conditional_critic():
    with torch.device('meta'): net = TimePatchGAN()
    widths = [128, 256, 512, 512, 512, 512, 512]
    pairs = zip(widths[:-1], widths[1:], strict=True)
    blocks = [x for a, b in pairs for x in ((a, b, 3, 1, True), (b, b, 3, 1, True), (a, b, 1, 1, False))]
    assert shapes_of(net) == [(2, 128, 1, 1, True), *blocks, (513, 512, 3, 1, True)]
    linear = [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]
    assert linear == [(256, 256)]*2+[(256, b) for b in widths[1:]]+[(512, 1)]

def test_time_critic_by_its_formulas():
    "Written out with plain operations: time code, blocks, spread, sum over pixels"
    torch.manual_seed(0)
    net = TimePatchGAN(2, base_channels=2, n_time=8, n_levels=3).double()
    for p in net.parameters(): nn.init.normal_(p, 0, .3)
    x, t = torch.randn(4, 2, 64, 72, dtype=torch.double), torch.tensor([0, 1, 2, 3])
    lrelu = lambda v: torch.where(v > 0, v, .2*v)
    angle = t.double()[:, None]*1e4**(-torch.arange(4).double()/3)
    e = lrelu(net.embed[2](lrelu(net.embed[0](torch.cat([angle.sin(), angle.cos()], 1)))))
    row = torch.tensor([1., 3, 3, 1], dtype=torch.double)/8
    kernel = torch.outer(row, row)[None, None]
    fir = lambda v: nn.functional.conv2d(v.flatten(0, 1)[:, None], kernel, stride=2, padding=1).unflatten(0, v.shape[:2])[:, :, 0]
    h = net.head(x)
    for block in net.blocks:
        inner = block.conv_1(lrelu(h))+block.time(e)[..., None, None]
        h = (block.conv_2(fir(lrelu(inner)))+block.skip(fir(h)))/2**.5
    spread = ((h-h.mean(0)).square().mean(0)+1e-8).sqrt().mean()
    last = lrelu(net.last(torch.cat([h, spread.expand(4, 1, *h.shape[2:])], 1))).sum((2, 3))
    torch.testing.assert_close(net(x, t), net.verdict(last), atol=1e-6, rtol=1e-5)

@pytest.mark.parametrize('size', [(64, 64), (65, 131), (96, 70), (127, 64)])
@pytest.mark.parametrize('b', [1, 2, 5])
def test_time_critic_on_odd_sizes_and_batches(size, b):
    net = TimePatchGAN(4, base_channels=2, n_time=4)
    assert net(torch.randn(b, 4, *size), torch.arange(b)).shape == (b, 1)
    with pytest.raises(ValueError, match='at least 64'): net(torch.randn(b, 4, 63, 64), torch.arange(b))

@pytest.mark.parametrize('size', [(64, 64), (65, 131), (96, 70), (255, 64)])
def test_multi_scale_shapes_on_odd_sizes(size):
    record, net = network('multiscale_patchgan'), MultiScalePatchGAN(2, base_channels=2)
    assert [tuple(v.shape[1:]) for v in net(torch.randn(1, 2, *size))] == record.inputs.shape({}, size)

@pytest.mark.parametrize('value', [1., -3.])
def test_scales_average_the_pixels_that_are_there(value):
    "A constant image stays constant at its border, so every scale sees what it would see of a smaller constant image"
    net = MultiScalePatchGAN(base_channels=2)
    for p in net.parameters(): nn.init.normal_(p, 0, .5)
    for k, verdict in enumerate(net(torch.full((1, 1, 128, 96), value))):
        torch.testing.assert_close(verdict, net.scales[k](torch.full((1, 1, 128 >> k, 96 >> k), value)))

@pytest.mark.parametrize('bad', [[-1, 0], [float('nan'), 0.], [0., float('inf')]], ids=str)
def test_times_that_are_none_are_refused(bad):
    net = TimePatchGAN(2, base_channels=2, n_time=4)
    with pytest.raises(ValueError, match='from 0'): net(torch.randn(2, 2, 64, 64), torch.tensor(bad))

@pytest.mark.parametrize('bad', [dict(n_scales=4), dict(n_scales=5, n_layers=2, n_channels=1, base_channels=2, extra=1), dict(n_layers=5)])
def test_more_scales_or_layers_than_64_pixels_hold_are_refused(bad):
    if bad.pop('extra', 0):
        assert len(MultiScalePatchGAN(**bad)(torch.randn(1, 1, 64, 64))) == bad.get('n_scales', 3)
        return
    with pytest.raises(ConfigError, match='128 pixels'): MultiScalePatchGAN(**bad)

def test_sixty_one_pixels_are_the_least_of_three_scales():
    net = MultiScalePatchGAN(base_channels=2)
    net.smallest = 1
    assert net(torch.zeros(1, 1, 61, 61))[2].shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError): net(torch.zeros(1, 1, 60, 60))

@pytest.mark.parametrize('bad', [dict(n_time=7), dict(n_levels=0), dict(group=-1), dict(taps=(1, 2, 1)), dict(n_channels=0),
    dict(taps='1331'), dict(taps=1331), dict(group='4'), dict(group=True), dict(n_levels=7), dict(n_time='256')], ids=str)
def test_impossible_time_critics_are_refused(bad):
    with pytest.raises(ConfigError): TimePatchGAN(**bad)

def test_critics_configs_are_json():
    for name in networks('discriminator'):
        record = network(name)
        net = record.build(**record.smallest)
        assert json.loads(json.dumps(net.config)) == net.config

# ---------------------------------------------------------------- bench/models.py
@pytest.mark.parametrize('rows', ['resnet6,syndiff', 'cola_diff'])
def test_the_bench_of_all_models_runs_and_writes_its_fields(rows, tmp_path):
    path = tmp_path/'models.json'
    options = ['--smoke', '--repeats', '1', '--threads', '1', '--rows', rows, '--output', str(path)]
    words = [sys.executable, str(ROOT/'bench'/'models.py'), *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert {'machine', 'threads', 'versions', 'bars_reached', 'bars_missed', 'busy', 'what'} <= set(found)
    assert list(found['rows']) == rows.split(',')
    for name, row in found['rows'].items():
        assert row['multiply_adds'] == cost(network(name), row['config'], row['size']).multiply_adds > 0
        assert set(row['ms']) == set(row['peak_bytes']) == {'forward', 'step'} and row['bars']
        assert all(v['median'] > 0 for v in row['ms'].values())
    assert str(tmp_path) not in path.read_text() and rows.split(',')[0] in done.stdout

def test_the_bench_asks_for_what_the_networks_promise():
    sys.path.insert(0, str(ROOT/'bench'))
    try: import models
    finally: sys.path.remove(str(ROOT/'bench'))
    assert models.FORWARD == dict(hmf_mambainr=2., cravim=2., mm2ct=3., cola_diff=1.5) and models.STEP == 4.
    assert set(models.FORWARD) <= set(networks('generator')) and models.entry('cola_diff', False)[1] == (64, 64)
    for seconds_, ratio, reached in ((2., 4., [True, True]), (2.01, 3., [False, True]), (1., 4.01, [True, False])):
        ms = dict(forward=dict(median=1e3*seconds_), step=dict(median=0.))
        kept = dict(forward=dict(median=700.), step=dict(median=700.*ratio))
        assert [b['reached'] for b in models.demands('cravim', cost(network('cravim')), ms, kept, True)] == reached
    assert [b['what'] for b in models.demands('hmf_mambainr', cost(network('hmf_mambainr')), ms, kept, False)][2:] == [
        'parameters / those of i2i_mamba', 'multiply_adds / those of i2i_mamba']

# ---------------------------------------------------------------- i2i-mamba doctor --models
def test_doctor_lists_models_and_names_what_is_not_as_recorded(monkeypatch, capsys):
    from i2i_mamba_nb import core
    from i2i_mamba_nb.app import cli
    shown = {n: network(n) for n in ('patchgan', 'resnet6', 'i2i_mamba')}
    monkeypatch.setattr(core, 'networks', lambda kind=None: shown)
    assert cli.main(['doctor', '--models']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [w.split()[0] for w in lines] == list(shown) and all(' as recorded' in w for w in lines)
    assert '7,825,153' in lines[1] and '75.19 GMAC' in lines[2] and 'weights simulated_t1_t2_to_pd' in lines[2]
    r, mamba = shown['resnet6'], shown['i2i_mamba']
    wrong = dict(parameters=replace(r, n_parameters=(({}, 1),)), adds=replace(r, multiply_adds=(({}, (256, 256), 2),)),
        unbuilt=replace(r, n_parameters=((dict(n_bloks=1), 1),)), bare=replace(r, n_parameters=()))
    said = dict(parameters='7,825,153 parameters with {}, recorded 1', adds='multiply-adds with {}, recorded 2',
        unbuilt='cannot be built', bare='nothing recorded')
    for name, record in wrong.items():
        shown.clear(), shown.update({name: record, 'i2i_mamba': mamba})
        assert cli.main(['doctor', '--models']) == 2
        seen = capsys.readouterr()
        assert said[name] in seen.out and 'not what its record says' in seen.err

# ---------------------------------------------------------------- README
def test_the_readmes_table_of_five_systems_has_the_records_counts():
    rows = [w for w in (ROOT/'README.md').read_text(encoding='utf-8').splitlines() if w.startswith('| ') and '/5_models/' in w]
    table = {w.split('|')[1].strip(): w for w in rows}
    names = dict(zip(('I2I-Mamba', 'HMF-MambaINR', 'CRAViM', 'MM2CT', 'CoLa-Diff'),
        ('i2i_mamba', 'hmf_mambainr', 'cravim', 'mm2ct', 'cola_diff'), strict=True))
    for title, name in names.items():
        counts = [n for config, n in network(name).n_parameters if config == {}]
        assert counts and f'{counts[0]:,}' in table[title], title
        assert all((ROOT/p).exists() for p in re.findall(r'\]\((nbs/[^)]+)\)', table[title]))
        assert 'not built' not in table[title].split('|')[3]
    encoder = next(n for config, n in network('autoencoder').n_parameters if config == {})
    assert '18,766,849' in table['I2I-Mamba'] and f'{encoder:,}' in table['CoLa-Diff']
