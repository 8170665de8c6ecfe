"The same twelve checks for every registered network, at its smallest configuration and with every switch of its record"
import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2i_mamba_nb.blocks.conv import activation_checkpointing, multiply_adds
from i2i_mamba_nb.core import networks
from i2i_mamba_nb.ssm import backends
from i2i_mamba_nb.ssm.mixers import SS2D, Mamba, set_backend

EXCEPTIONS = {
    ('critic', 'overfits one pair'): 'has no image to reproduce; it must tell one real from one blurred pair (loss <= 5 % of its start)',
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

def odd_sizes(record):
    "Two legal sizes, as small as may be: not square, odd multiples"
    m, s = record.inputs.multiple, -(-record.inputs.smallest//record.inputs.multiple)
    s += 1-s % 2
    return ((s*m, (s+2)*m), ((s+4)*m, s*m))

def images(record, config, b=2, size=None, seed=1):
    "Random images inside the record's range"
    h, w = size or odd_sizes(record)[0]
    x = torch.rand(b, record.inputs.channels(config), h, w, generator=torch.Generator().manual_seed(seed))
    return record.inputs.low+(record.inputs.high-record.inputs.low)*x

def smooth(b, c, size, seed):
    "Random fields with structure at every scale, in [-1, 1]"
    g = torch.Generator().manual_seed(seed)
    parts = [torch.nn.functional.interpolate(torch.randn(b, c, k, k, generator=g), size, mode='bilinear') for k in (2, 4, 8)]
    return torch.tanh(sum(parts))

def parameters(net): return sum(p.numel() for p in net.parameters())
def has_scan(net): return any(isinstance(m, SS2D | Mamba) for m in net.modules())

def step(net, x, adam):
    "One optimiser step on a loss that every output pixel enters with a weight of its own"
    out = net(x)
    weight = torch.linspace(-1, 2, out.numel()).view_as(out)
    adam.zero_grad(), ((out-weight)**2).mean().backward(), adam.step()

def test_there_is_something_to_check():
    assert {'i2i_mamba', 'patchgan'} <= set(RECORDS) and len(EXCEPTIONS) <= 3 and all(EXCEPTIONS.values())
    assert {'no_mamba', 'matched', 'released'} <= set(RECORDS['i2i_mamba'].ablations)

@every
def test_01_builds_from_its_record(record, config):
    net = build(record, config)
    assert isinstance(net, torch.nn.Module) and parameters(net) > 0 and all(p.isfinite().all() for p in net.parameters())
    assert net.config.items() >= config.items()

@every
def test_02_right_shape_and_dtype_on_two_odd_sizes(record, config):
    net = build(record, config)
    for size in odd_sizes(record):
        for dtype in (torch.float32, torch.float64):
            x = images(record, config, 3, size).to(dtype)
            out = net.to(dtype)(x)
            expected = tuple(n//8-2 for n in size) if record.kind == 'discriminator' else size
            assert out.shape == (3, 1, *expected) and out.dtype == dtype

@every
@pytest.mark.parametrize('training', [True, False])
def test_03_finite_on_zeros_ones_and_large_values(record, config, training):
    net, x = build(record, config).train(training), images(record, config)
    for extreme in (torch.zeros_like(x), torch.ones_like(x), 1e4*x, -torch.ones_like(x)):
        out = net(extreme)
        out.square().mean().backward()
        assert out.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())

@every
def test_04_every_parameter_learns(record, config):
    net, x = build(record, config), images(record, config)
    adam, alive = torch.optim.Adam(net.parameters(), 1e-3), set()
    for _ in range(3):
        step(net, x, adam)
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
            if p.grad.abs().max() > 0: alive.add(name)
    assert alive == {n for n, _ in net.named_parameters()}

def overfit(net, source, target, steps=300):
    "PSNR in dB (range 2) on one pair after at most `steps` steps, at test"
    adam = torch.optim.Adam(net.parameters(), 3e-3, (.5, .999))
    for k in range(steps):
        adam.zero_grad(), (net.train()(source)-target).abs().mean().backward(), adam.step()
        if k % 20 == 19:
            with torch.no_grad(): psnr = -10*((net.eval()(source)-target).square().mean()/4).log10()
            if psnr >= 30: break
    return float(psnr)

def separate(net, real, fake, steps=300):
    "Least-squares loss of a critic over its start"
    adam, losses = torch.optim.Adam(net.parameters(), 2e-3, (.5, .999)), []
    for _ in range(steps):
        loss = (net(real)-1).square().mean()+net(fake).square().mean()
        adam.zero_grad(), loss.backward(), adam.step()
        losses.append(loss.item())
        if loss <= .05*losses[0]: break
    return losses[-1]/losses[0]

@every
def test_05_overfits_one_pair(record, config):
    net, c = build(record, config), record.inputs.channels(config)
    if record.kind == 'discriminator':
        real = smooth(1, c, 32, 2)
        assert ('critic', 'overfits one pair') in EXCEPTIONS
        assert separate(net, real, torch.nn.functional.avg_pool2d(real, 5, 1, 2)) <= .05
    else:
        source = smooth(1, c, 24, 2)
        assert overfit(net, source, torch.tanh(source[:, :1]-2*source[:, -1:]**2)*.9) >= 30

@every
@pytest.mark.parametrize('at_test', ['batch_statistics', 'running'])
def test_06_deterministic_and_independent_of_the_batch(record, config, at_test):
    net, x = build(record, config | dict(norm_at_test=at_test)), images(record, config)
    for _ in range(2): net(3*x)
    net.eval()
    with torch.no_grad():
        both = net(x)
        assert torch.equal(both, net(x))
        torch.testing.assert_close(both, torch.cat([net(x[:1]), net(x[1:])]), atol=2e-5, rtol=1e-4)

@every
def test_07_safetensors_round_trip(record, config, tmp_path):
    net, x = build(record, config), images(record, config)
    step(net, x, torch.optim.Adam(net.parameters(), 1e-3))
    save_file(net.state_dict(), tmp_path/'w.safetensors')
    again = build(record, config, seed=9)
    again.load_state_dict(load_file(tmp_path/'w.safetensors'))
    with torch.no_grad(): assert torch.equal(again.eval()(x), net.eval()(x))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())

@every
def test_08_config_json_round_trip(record, config):
    net = build(record, config)
    again = build(record, json.loads(json.dumps(net.config)))
    assert again.config == net.config and list(again.state_dict()) == list(net.state_dict())
    x = images(record, config)
    with torch.no_grad(): assert torch.equal(again.eval()(x), net.eval()(x))

def outcome(net, x, backend):
    "Output and all gradients on one backend, in double precision where it has it"
    net = set_backend(copy.deepcopy(net), backend)
    out = net(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters())]

@every
@pytest.mark.parametrize('backend', [n for n, a in backends().items() if n not in ('triton', 'mamba_ssm')]+['auto'])
def test_09_backends_agree(record, config, backend):
    if backend != 'auto' and not backends()[backend].available: pytest.skip(backends()[backend].reason)
    net, x = build(record, config), images(record, config)
    if not has_scan(net):
        assert ('no scan', 'backends agree') in EXCEPTIONS and (record.kind == 'discriminator' or config['mixer'] != 'mamba')
        return
    dtype, tolerance = (torch.float32, 1e-3) if backend == 'cpu' else (torch.float64, 1e-9)
    expected = outcome(net.double(), x.double(), 'reference')
    for got, want in zip(outcome(net.to(dtype), x.to(dtype), backend), expected, strict=True):
        assert (got.double()-want).norm() <= tolerance*want.norm()+tolerance

@every
def test_10_bf16_and_recomputed_activations_agree(record, config):
    net, x = build(record, config), images(record, config)
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16): low = copy.deepcopy(net)(x)
        high = copy.deepcopy(net)(x)
    assert low.isfinite().all() and (low.float()-high).norm() <= .05*high.norm()
    results = []
    for on in (False, True):
        twin = activation_checkpointing(copy.deepcopy(net), on)
        twin(x).square().sum().backward()
        results.append([*(p.grad for p in twin.parameters()), *twin.buffers()])
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

@every
def test_11_illegal_input_is_refused_in_words(record, config):
    net, x, m = build(record, config), images(record, config), record.inputs.multiple
    wrong = {'channels': torch.cat([x, x[:, :1]], 1), 'batch axis': x[0], 'floating': x.long(), 'h, w': 'a string',
        'at least': x[..., :record.inputs.smallest-m]}
    if m > 1: wrong['divisible by'] = x[..., :-1]
    for said, bad in wrong.items():
        with pytest.raises(ValueError, match=said): net(bad)
    with pytest.raises(ValueError, match='Did you mean'): record.build(**config, base_chanels=3)
    with pytest.raises(ValueError, match='whole number of at least 1'): record.build(**config | dict(base_channels=0))

@per_record
def test_12_counts_equal_the_record(record):
    assert record.n_parameters and record.multiply_adds and {'smoke', 'laptop', 'paper'} <= set(record.presets)
    with torch.device('meta'):
        for config, count in record.n_parameters: assert parameters(record.build(**config)) == count
        for config, (h, w), count in record.multiply_adds:
            assert multiply_adds(record.build(**config), torch.empty(1, record.inputs.channels(config), h, w)) == count
        required = {k: v for k, v in record.smallest.items() if k.startswith('n_')}
        for preset in record.presets.values(): assert parameters(record.build(**required | preset)) > 0

@every
def test_12_torch_export_equals_eager(record, config):
    net, x = build(record, config).eval(), images(record, config)
    exported = torch.export.export(net, (x,)).module()
    with torch.no_grad(): torch.testing.assert_close(exported(x), net(x), atol=1e-6, rtol=1e-5)
