"The same twelve checks for every registered network, at its smallest configuration and with every switch of its record"
import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2i_mamba_nb.blocks.conv import activation_checkpointing
from i2i_mamba_nb.core import ShapeError, networks
from i2i_mamba_nb.measure.complexity import multiply_adds
from i2i_mamba_nb.ssm import backends
from i2i_mamba_nb.ssm.mixers import SS2D, BiMamba, Mamba, set_backend

EXCEPTIONS = {
    ('critic', 'overfits one pair'): 'has no image to reproduce; it must tell one real from one blurred pair (loss <= 5 % of its start)',
    ('offset', 'every parameter learns'): 'in front of a normalisation or a softmax has no effect, yet the papers\' counts have it; tested',
    ('no scan', 'backends agree'): 'has no scan on which backends could differ; that there is none is checked instead',
}
RECORDS = networks()
CASES = [pytest.param(r, {**r.smallest, **switch}, id=f'{r.name}-{name}')
    for r in RECORDS.values() for name, switch in {'smallest': {}, **r.ablations}.items()]
every = pytest.mark.parametrize('record, config', CASES)
per_record = pytest.mark.parametrize('record', RECORDS.values(), ids=RECORDS)

def build(record, config, seed=0):
    torch.manual_seed(seed)
    return record.build(**config)

def odd_sizes(record, config):
    "Two legal sizes, as small as may be: not square, odd multiples"
    m, smallest = record.inputs.sides(config)
    s = -(-smallest//m)
    s += 1-s % 2
    return ((s*m, (s+2)*m), ((s+4)*m, s*m))

def images(record, config, b=2, size=None, seed=1):
    "Random images inside the record's range"
    h, w = size or odd_sizes(record, config)[0]
    x = torch.rand(b, record.inputs.channels(config), h, w, generator=torch.Generator().manual_seed(seed))
    return record.inputs.low+(record.inputs.high-record.inputs.low)*x

def further(record, config, b=2, size=None, seed=1):
    "Examples of what the network takes beside images"
    rng = torch.Generator().manual_seed(seed)
    return [f(config, b, size or odd_sizes(record, config)[0], rng) for f in record.inputs.further.values()]

def inputs(record, config, b=2, size=None, seed=1):
    "Everything the network takes"
    return [images(record, config, b, size, seed), *further(record, config, b, size, seed)]

def tensors(out):
    "Outputs as a list: a network may give several maps"
    return list(out) if isinstance(out, (tuple, list)) else [out]

def flat(out): "All outputs, one row per image"; return torch.cat([o.flatten(1) for o in tensors(out)], 1)
def to(dtype, given): "Floating tensors in another precision"; return [v.to(dtype) if v.is_floating_point() else v for v in given]
def shapes(record, config, size):
    "Expected output shapes"
    given = record.inputs.shape(config, size)
    return given if isinstance(given, list) else [given]

def smooth(b, c, size, seed):
    "Random fields with structure at every scale, in [-1, 1]"
    g = torch.Generator().manual_seed(seed)
    parts = [torch.nn.functional.interpolate(torch.randn(b, c, k, k, generator=g), size, mode='bilinear') for k in (2, 4, 8)]
    return torch.tanh(sum(parts))

def parameters(net): return sum(p.numel() for p in net.parameters())
def has_scan(net): return any(isinstance(m, BiMamba | SS2D | Mamba) for m in net.modules())

def step(net, given, adam):
    "One optimiser step on a loss that every output value enters with a weight of its own"
    out = flat(net(*given))
    weight = torch.linspace(-1, 2, out.numel()).view_as(out)
    adam.zero_grad(), ((out-weight)**2).mean().backward(), adam.step()

def test_there_is_something_to_check():
    assert {'i2i_mamba', 'patchgan'} <= set(RECORDS) and len(EXCEPTIONS) <= 3 and all(EXCEPTIONS.values())
    assert {'no_mamba', 'matched', 'released'} <= set(RECORDS['i2i_mamba'].ablations)

SWITCHES = [pytest.param(r, s, id=f'{r.name}-{n}') for r in RECORDS.values() for n, s in r.ablations.items()]

@pytest.mark.parametrize('record, switch', SWITCHES)
def test_every_switch_changes_weights_and_output(record, switch):
    configs = record.smallest, {**record.smallest, **switch}
    nets = [build(record, c) for c in configs]
    names = [{n: tuple(v.shape) for n, v in net.state_dict().items()} for net in nets]
    assert names[0] != names[1], 'the same weights with and without'
    with torch.no_grad(): a, b = (flat(net.train()(*inputs(record, c))) for net, c in zip(nets, configs, strict=True))
    assert a.shape != b.shape or (a-b).abs().max() > 1e-3*a.abs().max()

@every
def test_01_builds_from_its_record(record, config):
    net = build(record, config)
    assert isinstance(net, torch.nn.Module) and parameters(net) > 0 and all(p.isfinite().all() for p in net.parameters())
    assert net.config.items() >= config.items() and 'base_channels' in net.config

@every
def test_02_right_shape_and_dtype_on_two_odd_sizes(record, config):
    net = build(record, config)
    for size in odd_sizes(record, config):
        for dtype in (torch.float32, torch.float64):
            out = tensors(net.to(dtype)(*to(dtype, inputs(record, config, 3, size))))
            assert [tuple(o.shape) for o in out] == [(3, *s) for s in shapes(record, config, size)]
            assert {o.dtype for o in out} == {dtype}

@every
@pytest.mark.parametrize('training', [True, False])
def test_03_finite_on_zeros_ones_and_large_values(record, config, training):
    net, (x, *more) = build(record, config).train(training), inputs(record, config)
    for extreme in (torch.zeros_like(x), torch.ones_like(x), 1e4*x, -torch.ones_like(x)):
        out = flat(net(extreme, *more))
        out.square().mean().backward()
        assert out.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())

def unheard(net, given, name):
    "Whether an offset changes nothing that comes out: a normalisation or a softmax behind it takes it away"
    with torch.no_grad():
        before = flat(net(*given))
        net.get_parameter(name).add_(.1)
        return (flat(net(*given))-before).abs().max() <= 1e-9*before.abs().max()

@every
def test_04_every_parameter_learns(record, config):
    net, given = build(record, config).double(), to(torch.float64, inputs(record, config))
    adam, alive = torch.optim.Adam(net.parameters(), 1e-3), set()
    for _ in range(3):
        step(net, given, adam)
        most = max(p.grad.abs().max() for p in net.parameters())
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
            if p.grad.abs().max() > 1e-10*most: alive.add(name)
    for name in {n for n, _ in net.named_parameters()}-alive:
        assert ('offset', 'every parameter learns') in EXCEPTIONS and name.endswith('bias'), name
        assert unheard(net, given, name), name

def overfit(net, given, target, steps=300):
    "PSNR in dB (range 2) on one pair after at most `steps` steps, at test"
    adam = torch.optim.Adam(net.parameters(), 3e-3, (.5, .999))
    for k in range(steps):
        adam.zero_grad(), (net.train()(*given)-target).abs().mean().backward(), adam.step()
        if k % 20 == 19:
            with torch.no_grad(): psnr = -10*((net.eval()(*given)-target).square().mean()/4).log10()
            if psnr >= 30: break
    return float(psnr)

def separate(net, real, fake, more, steps=300):
    "Least-squares loss of a critic over its start"
    adam, losses = torch.optim.Adam(net.parameters(), 2e-3, (.5, .999)), []
    for _ in range(steps):
        loss = (flat(net(real, *more))-1).square().mean()+flat(net(fake, *more)).square().mean()
        adam.zero_grad(), loss.backward(), adam.step()
        losses.append(loss.item())
        if loss <= .05*losses[0]: break
    return losses[-1]/losses[0]

@every
def test_04_gradients_are_slopes(record, config):
    "Along its own gradient the output rises as steeply as the gradient says: nothing on the way is detached"
    net, (x, *more) = build(record, config).double().eval(), [v.double() if v.ndim > 1 else v for v in inputs(record, config)]
    def height(x):
        out = net(x, *more)
        maps = out if isinstance(out, tuple | list) else [out]
        return sum((m*torch.linspace(-1, 1, m.numel(), dtype=m.dtype).view_as(m)).sum() for m in maps)
    gradient, = torch.autograd.grad(height(x.requires_grad_()), x)
    steep = gradient.norm()
    step = 1e-7*gradient/steep
    with torch.no_grad(): slope = (height(x+step)-height(x-step))/2e-7
    torch.testing.assert_close(slope, steep, rtol=1e-3, atol=0)

@every
def test_05_overfits_one_pair(record, config):
    net, c, (m, smallest) = build(record, config), record.inputs.channels(config), record.inputs.sides(config)
    side = -(-max(24, smallest)//m)*m
    if record.kind == 'discriminator':
        side = max(side, 32)
        real, more = smooth(1, c, side, 2), further(record, config, 1, (side, side))
        assert ('critic', 'overfits one pair') in EXCEPTIONS
        assert separate(net, real, torch.nn.functional.avg_pool2d(real, 5, 1, 2), more) <= .05
    else:
        source, more = smooth(1, c, side, 2), further(record, config, 1, (side, side))
        target = torch.tanh(source[:, :1]-2*source[:, -1:]**2)*.9 if record.kind == 'generator' else .9*source
        (k, h, w), = shapes(record, config, (side, side))
        target = torch.nn.functional.adaptive_avg_pool2d(target, (h, w))
        if k != target.shape[1]: target = torch.cat([target*s for s in torch.linspace(1, -1, k)], 1)
        assert overfit(net, [source, *more], target) >= 30

@every
@pytest.mark.parametrize('at_test', ['batch_statistics', 'running'])
def test_06_deterministic_and_independent_of_the_batch(record, config, at_test):
    given, batched = inputs(record, config), 'norm_at_test' in build(record, config).config
    if not batched and at_test == 'running': pytest.skip('has no statistics of a batch')
    net = build(record, config | (dict(norm_at_test=at_test) if batched else {}))
    for _ in range(2): net(3*given[0], *given[1:])
    net.eval()
    with torch.no_grad():
        both = flat(net(*given))
        assert torch.equal(both, flat(net(*given)))
        each = torch.cat([flat(net(*(v[k:k+1] for v in given))) for k in range(2)])
    torch.testing.assert_close(both, each, atol=2e-5, rtol=1e-4)

@every
def test_07_safetensors_round_trip(record, config, tmp_path):
    net, given = build(record, config), inputs(record, config)
    step(net, given, torch.optim.Adam(net.parameters(), 1e-3))
    save_file(net.state_dict(), tmp_path/'w.safetensors')
    again = build(record, config, seed=9)
    again.load_state_dict(load_file(tmp_path/'w.safetensors'))
    with torch.no_grad(): assert torch.equal(flat(again.eval()(*given)), flat(net.eval()(*given)))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())

@every
def test_07_built_on_meta_and_loaded_gives_the_same_bits(record, config):
    net, given = build(record, config), inputs(record, config)
    step(net, given, torch.optim.Adam(net.parameters(), 1e-3))
    with torch.device('meta'): again = record.build(**config)
    again.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    assert [n for n, v in (*again.named_parameters(), *again.named_buffers()) if v.is_meta] == []
    with torch.no_grad(): assert torch.equal(flat(again.eval()(*given)), flat(net.eval()(*given)))

@every
def test_08_config_json_round_trip(record, config):
    net = build(record, config)
    again = build(record, json.loads(json.dumps(net.config)))
    assert again.config == net.config and list(again.state_dict()) == list(net.state_dict())
    given = inputs(record, config)
    with torch.no_grad(): assert torch.equal(flat(again.eval()(*given)), flat(net.eval()(*given)))

def outcome(net, given, backend):
    "Output and all gradients on one backend"
    net = set_backend(copy.deepcopy(net), backend)
    out = flat(net(*given))
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters())]

@every
@pytest.mark.parametrize('backend', [n for n, a in backends().items() if n not in ('triton', 'mamba_ssm')]+['auto'])
def test_09_backends_agree(record, config, backend):
    if backend != 'auto' and not backends()[backend].available: pytest.skip(backends()[backend].reason)
    net, given = build(record, config), inputs(record, config)
    assert has_scan(net) == record.scans(config)
    if not has_scan(net):
        assert ('no scan', 'backends agree') in EXCEPTIONS
        return
    dtype, tolerance = (torch.float32, 1e-3) if backend == 'cpu' else (torch.float64, 1e-9)
    expected = outcome(net.double(), to(torch.float64, given), 'reference')
    for got, want in zip(outcome(net.to(dtype), to(dtype, given), backend), expected, strict=True):
        assert (got.double()-want).norm() <= tolerance*want.norm()+tolerance

@every
def test_10_bf16_and_recomputed_activations_agree(record, config):
    net, given = build(record, config), inputs(record, config)
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16): low = flat(copy.deepcopy(net)(*given))
        high = flat(copy.deepcopy(net)(*given))
    assert low.isfinite().all() and (low.float()-high).norm() <= .05*high.norm()
    results = []
    for on in (False, True):
        twin = activation_checkpointing(copy.deepcopy(net), on)
        flat(twin(*given)).square().sum().backward()
        results.append([*(p.grad for p in twin.parameters()), *twin.buffers()])
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

@every
def test_11_images_of_another_kind_are_refused_in_words(record, config):
    net, (x, *more) = build(record, config), inputs(record, config)
    for said, bad in {'given torch.float64, expected torch.float32': x.double(), 'given device meta, expected cpu': x.to('meta')}.items():
        with pytest.raises(ShapeError, match=said): net(bad, *more)
    for k, v in enumerate(more):
        if v.ndim > 1:
            with pytest.raises(ShapeError, match='expected torch.float32'): net(x, *more[:k], v.double(), *more[k+1:])
        else:
            for bad in (v*float('nan'), -1.-v, v > 0):
                with pytest.raises(ShapeError, match='numbers from 0'): net(x, *more[:k], bad, *more[k+1:])

@every
def test_11_illegal_input_is_refused_in_words(record, config):
    net, (x, *more), (m, smallest) = build(record, config), inputs(record, config), record.inputs.sides(config)
    wrong = {'channels': torch.cat([x, x[:, :1]], 1), 'batch axis': x[0], 'floating': x.long(), 'h, w': 'a string',
        'at least': x[..., :smallest-m], 'at least one image': x[:0]}
    if m > 1: wrong['divisible by'] = x[..., :-1]
    for said, bad in wrong.items():
        with pytest.raises(ValueError, match=said): net(bad, *more)
    for k in range(len(more)):
        for bad in (torch.cat([more[k], more[k]]), None):
            with pytest.raises(ValueError, match=f'{list(record.inputs.further)[k]} for'): net(x, *more[:k], bad, *more[k+1:])
    with pytest.raises(ValueError, match='Did you mean'): record.build(**config, base_chanels=3)
    with pytest.raises(ValueError, match='whole number of at least 1'): record.build(**config | dict(base_channels=0))

@per_record
def test_12_counts_equal_the_record(record):
    assert record.n_parameters and record.multiply_adds and {'smoke', 'laptop', 'paper'} <= set(record.presets)
    with torch.device('meta'):
        for config, count in record.n_parameters: assert parameters(record.build(**config)) == count
        for config, size, count in record.multiply_adds:
            given = [v.to('meta') for v in further(record, config, 1, size)]
            assert multiply_adds(record.build(**config), torch.empty(1, record.inputs.channels(config), *size), *given) == count
        required = {k: v for k, v in record.smallest.items() if k.startswith('n_')}
        for preset in record.presets.values(): assert parameters(record.build(**required | preset)) > 0

@every
def test_12_torch_export_equals_eager(record, config):
    net, given = build(record, config).eval(), inputs(record, config)
    exported = torch.export.export(net, tuple(given)).module()
    with torch.no_grad(): torch.testing.assert_close(flat(exported(*given)), flat(net(*given)), atol=1e-6, rtol=1e-5)
