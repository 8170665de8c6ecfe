"The KL autoencoder: layer for layer against diffusers, sizes, posterior, scale factor, reconstruction bound"
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from i2i_mamba_nb.blocks.conv import activation_checkpointing, brain_slice
from i2i_mamba_nb.core import ConfigError, ShapeError, network, torch_rng
from i2i_mamba_nb.measure.complexity import multiply_adds
from i2i_mamba_nb.measure.metrics import psnr, ssim
from i2i_mamba_nb.models.autoencoder import (
    Autoencoder,
    LatentAttention,
    LatentBlock,
    Posterior,
    group_norm,
    latent_statistics,
    reconstruction_bound,
    sample,
)

SMALL = dict(base_channels=8, n_blocks=1)

def build(seed=0, **config):
    torch.manual_seed(seed)
    return Autoencoder(**SMALL | config)

def images(b, c, h, w, seed=0): return torch.rand(b, c, h, w, generator=torch_rng(seed, 'images'))*2-1
def decibels(x, y): return psnr(x, y, data_range=2)
def count(net): return sum(p.numel() for p in net.parameters())

def in_diffusers(name):
    "Name of one of our parameters in diffusers' AutoencoderKL; q, k and v are one array here"
    side, *rest = name.split('.')
    if side in ('quant_conv', 'post_quant_conv'): return [name]
    part, *rest = rest
    if part in ('conv_in', 'conv_out'): return ['.'.join([side, part, *rest])]
    if part == 'norm': return ['.'.join([side, 'conv_norm_out', *rest])]
    if part == 'middle':
        where, *rest = rest
        if where == 'attention':
            home = f'{side}.mid_block.attentions.0'
            names = {'norm': ['group_norm'], 'qkv': ['to_q', 'to_k', 'to_v'], 'out': ['to_out.0']}[rest[0]]
            return [f'{home}.{n}.{rest[1]}' for n in names]
        return ['.'.join([f'{side}.mid_block.resnets.{int(where[-1])-1}', *rest]).replace('shortcut', 'conv_shortcut')]
    k, (i, *rest) = int(part[-1])-1, rest
    home = f'{side}.{"down" if side == "encoder" else "up"}_blocks.{k}'
    if rest[0] in '01': return [f'{home}.{"down" if side == "encoder" else "up"}samplers.0.conv.{rest[1]}']
    return ['.'.join([home, 'resnets', i, *rest]).replace('shortcut', 'conv_shortcut')]

CONFIGS = [{}, dict(f=8, n_blocks=2), dict(f=2, n_channels=3), dict(latent_channels=3, base_channels=32, n_blocks=2),
    dict(base_channels=64), dict(base_channels=96, f=2)]

def test_groups():
    groups = {c: group_norm(c).num_groups for c in (3, 4, 8, 12, 16, 32, 48, 64, 96, 128, 256, 512)}
    assert groups == {3: 1, 4: 1, 8: 2, 12: 3, 16: 4, 32: 32, 48: 12, 64: 32, 96: 32, 128: 32, 256: 32, 512: 32}
    with torch.device('meta'): assert {m.num_groups for m in Autoencoder().modules() if isinstance(m, torch.nn.GroupNorm)} == {32}
    assert group_norm(64).eps == 1e-6

@pytest.mark.parametrize('config', CONFIGS, ids=str)
def test_equals_diffusers_layer_for_layer(config):
    AutoencoderKL = pytest.importorskip('diffusers').AutoencoderKL
    ours = build(**config).eval()
    c, widths = ours.config, [block[0].conv1.out_channels for n, block in ours.encoder.named_children() if n.startswith('level')]
    whole = all(w % 32 == 0 for w in widths)         # then diffusers' own 32 groups stay as they are
    kinds = dict(down_block_types=['DownEncoderBlock2D']*len(widths), up_block_types=['UpDecoderBlock2D']*len(widths))
    theirs = AutoencoderKL(in_channels=c['n_channels'], out_channels=c['n_channels'], layers_per_block=c['n_blocks'],
        block_out_channels=widths, latent_channels=c['latent_channels'], **kinds, norm_num_groups=32 if whole else 1).eval()
    state = {}
    for name, p in ours.state_dict().items():
        names = in_diffusers(name)
        for n, part in zip(names, p.chunk(len(names)), strict=True):
            state[n] = part.flatten(1) if 'to_' in n and p.ndim == 4 else part
    for module in theirs.modules():
        if isinstance(module, torch.nn.GroupNorm) and not whole: module.num_groups = group_norm(module.num_channels).num_groups
    assert all(m.num_groups == 32 for m in ours.modules() if isinstance(m, torch.nn.GroupNorm)) == whole
    theirs.load_state_dict(state)
    x = images(2, c['n_channels'], 24, 40)
    with torch.no_grad():
        p = theirs.encode(x).latent_dist
        torch.testing.assert_close(ours.encode(x).mean, p.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.encode(x).logvar, p.logvar, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours(x), theirs.decode(p.mean).sample, atol=1e-4, rtol=1e-4)

def test_exact_counts():
    with torch.device('meta'):
        assert count(Autoencoder(3, latent_channels=3, base_channels=128)) == 55_312_063
        assert count(Autoencoder()) == 13_857_189
        net = Autoencoder()
        block = lambda a, b: 9*a*b+b+9*b*b+b+2*a+2*b+(a*b+b if a != b else 0)
        attention = 4*(256*256+256)+2*256
        middle = 2*block(256, 256)+attention
        down = lambda c: 9*c*c+c
        encoder = 9*64+64+2*block(64, 64)+down(64)+block(64, 128)+block(128, 128)+down(128)
        assert count(net.encoder) == encoder+block(128, 256)+block(256, 256)+middle+512+9*256*8+8
        decoder = 9*4*256+256+middle+3*block(256, 256)+down(256)+block(256, 128)+2*block(128, 128)+down(128)
        assert count(net.decoder) == decoder+block(128, 64)+2*block(64, 64)+128+9*64+1
        assert count(net) == count(net.encoder)+count(net.decoder)+8*8+8+4*4+4

def test_multiply_adds_by_hand():
    with torch.device('meta'):
        net, x = Autoencoder(), torch.empty(1, 1, 256, 256)
        block = lambda a, b, n: (9*a*b+9*b*b+(a*b if a != b else 0))*n
        full, half, low = 256**2, 128**2, 64**2
        middle = 2*block(256, 256, low)+4*256*256*low+2*256*low*low
        encode = 9*64*full+2*block(64, 64, full)+9*64*64*half+block(64, 128, half)+block(128, 128, half)+9*128*128*low
        encode += block(128, 256, low)+block(256, 256, low)+middle+9*256*8*low+64*low
        assert multiply_adds(net.encode, x) == encode
        decode = 16*low+9*4*256*low+middle+3*block(256, 256, low)+9*256*256*half+block(256, 128, half)+2*block(128, 128, half)
        decode += 9*128*128*full+block(128, 64, full)+2*block(64, 64, full)+9*64*full
        assert multiply_adds(net.decode, torch.empty(1, 4, 64, 64)) == decode
        assert multiply_adds(net, x) == encode+decode

@pytest.mark.parametrize('f', [2, 4, 8])
def test_sizes(f):
    net = build(f=f, n_channels=2, latent_channels=3)
    for h, w in [(16, 16), (24, 40), (72, 56), (64, 104), (200, 136)]:
        x = images(1, 2, h, w)
        with torch.no_grad(): mean, logvar = net.encode(x)
        assert mean.shape == logvar.shape == (1, 3, h//f, w//f)
        with torch.no_grad(): assert net.decode(mean).shape == net(x).shape == x.shape

@pytest.mark.parametrize('n_channels, latent_channels', [(1, 1), (1, 8), (2, 4), (4, 1), (4, 8)])
def test_channels(n_channels, latent_channels):
    net = build(n_channels=n_channels, latent_channels=latent_channels)
    assert net(images(2, n_channels, 16, 24)).shape == (2, n_channels, 16, 24)
    assert net.encode(images(2, n_channels, 16, 24)).mean.shape == (2, latent_channels, 4, 6)

def test_any_base_width_builds():
    for c in (1, 3, 4, 6, 7, 12, 20): assert Autoencoder(base_channels=c, n_blocks=1)(images(1, 1, 16, 16)).isfinite().all()

def test_forward_is_the_decoded_mean_and_deterministic():
    net, x = build().train(), images(2, 1, 24, 16)
    assert torch.equal(net(x), net.decode(net.encode(x).mean)) and torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net.train()(x))

def test_halving_and_doubling_are_where_they_should_be():
    net, x = build(), images(1, 1, 32, 48)
    shapes = {}
    for n, part in net.encoder.named_children(): shapes[n] = tuple((x := part(x)).shape[1:])
    assert shapes['level_1'] == (8, 16, 24) and shapes['level_2'] == (16, 8, 12) and shapes['level_3'] == (32, 8, 12)
    levels = [len(net.get_submodule(f'{side}.level_{k}')) for side in ('encoder', 'decoder') for k in (1, 2, 3)]
    assert levels == [2, 2, 1, 3, 3, 2]

def test_attention_equals_its_formula_and_sees_everything():
    torch.manual_seed(0)
    attend, f = LatentAttention(8).double(), torch.randn(2, 8, 5, 7, dtype=torch.double, requires_grad=True)
    q, k, v = attend.qkv(attend.norm(f)).flatten(2).chunk(3, 1)
    torch.testing.assert_close(attend(f), f+attend.out((v@((k.mT@q)/8**.5).softmax(1)).view_as(f)))
    attend(f)[0, :, 0, 0].sum().backward()
    assert (f.grad[0].abs().sum(0) > 0).all() and (f.grad[1] == 0).all()
    assert LatentBlock(8, 8).shortcut(f) is f and count(LatentBlock(8, 12).shortcut) == 8*12+12

def test_sample_has_the_posterior_moments():
    p = Posterior(*(torch.tensor(v).view(1, 2, 1, 1).expand(1, 2, 200, 200) for v in ([1., -2.], [0., -4.])))
    z = sample(p, torch_rng(0))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.tensor([1., -2.]), atol=.02, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.tensor([1., math.exp(-2)]), atol=.01, rtol=0)
    assert torch.equal(z, sample(p, torch_rng(0))) and not torch.equal(z, sample(p, torch_rng(1)))

def test_gradients_reach_mean_and_variance():
    net, x = build(), images(2, 1, 16, 16)
    p = net.encode(x)
    (net.decode(sample(p, torch_rng(0)))-x).square().mean().backward()
    rows = net.quant_conv.weight.grad.flatten(1).abs().sum(1)
    assert (rows > 0).all() and len(rows) == 8
    free = [v.double().detach().requires_grad_() for v in p]
    assert torch.autograd.gradcheck(lambda m, v: sample(Posterior(m, v), torch_rng(0)), free)
    assert kl_divergence(Normal(p.mean, (.5*p.logvar).exp()), Normal(0., 1.)).isfinite().all()

def test_logvar_is_bounded():
    net, x = build(), images(1, 1, 16, 16)
    with torch.no_grad():
        for level in (1e6, -1e6):
            net.quant_conv.bias[4:] = level
            p = net.encode(x)
            assert ((p.logvar == 20) if level > 0 else (p.logvar == -30)).all() and sample(p, torch_rng(0)).isfinite().all()

def test_scale_factor_is_one_over_the_spread():
    net, x = build(), images(7, 1, 16, 24)
    with torch.no_grad(): z = net.encode(x).mean
    found = latent_statistics(net, x.split(2), seed=None)
    assert found.scale == pytest.approx(1/float(z.std(correction=0)), rel=1e-5) and found.n_images == 7
    assert found.std == pytest.approx(1/found.scale)
    torch.testing.assert_close(torch.tensor(found.channel_mean), z.mean((0, 2, 3)), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(found.channel_std), z.std((0, 2, 3), correction=0), atol=1e-6, rtol=1e-4)
    assert (found.scale*z).std(correction=0) == pytest.approx(1, rel=1e-5)

def test_scale_factor_of_draws():
    net, x = build(), images(6, 1, 32, 32)
    torch.nn.init.constant_(net.quant_conv.bias[4:], 2.)
    with torch.no_grad(): p = net.encode(x)
    expected = (p.mean.var(correction=0)+p.logvar.exp().mean()).sqrt()
    found = latent_statistics(net, x.split(3))
    assert found.std == pytest.approx(float(expected), rel=.05) and found == latent_statistics(net, x.split(3))
    assert found != latent_statistics(net, x.split(3), seed=1) and found.std > latent_statistics(net, x.split(3), seed=None).std

def test_scale_factor_of_batches_of_different_sizes_and_generators():
    net = build()
    parts = [images(2, 1, 16, 16), images(3, 1, 24, 16, seed=1)]
    with torch.no_grad(): z = torch.cat([net.encode(x).mean.transpose(0, 1).flatten(1) for x in parts], 1)
    found = latent_statistics(net, (x for x in parts), seed=None)
    assert found.std == pytest.approx(float(z.std(correction=0)), rel=1e-5) and found.n_images == 5

def test_scale_factor_refuses_what_has_none():
    net = build()
    with pytest.raises(ConfigError, match='no images'): latent_statistics(net, [])
    torch.nn.init.zeros_(net.quant_conv.weight), torch.nn.init.zeros_(net.quant_conv.bias)
    with pytest.raises(ConfigError, match='a spread of 0'): latent_statistics(net, [images(2, 1, 16, 16)], seed=None)
    torch.nn.init.constant_(net.quant_conv.bias, float('nan'))
    with pytest.raises(ConfigError, match='a spread of nan'): latent_statistics(net, [images(2, 1, 16, 16)], seed=None)

def test_bound_equals_the_metric_of_each_reconstruction():
    net, x = build(n_channels=2), images(3, 2, 16, 24)
    bound = reconstruction_bound(net, x, decibels)
    assert bound.values.shape == (3, 2) and bound.reconstruction.shape == x.shape and not bound.reconstruction.requires_grad
    for i, c in itertools.product(range(3), range(2)):
        assert float(bound.values[i, c]) == pytest.approx(psnr(x[i, c], bound.reconstruction[i, c], data_range=2), abs=1e-3)
    by_ssim = reconstruction_bound(net, x, lambda a, b: ssim(a, b, data_range=2)).values
    assert float(by_ssim[2, 1]) == pytest.approx(ssim(x[2, 1], bound.reconstruction[2, 1], data_range=2), abs=1e-5)

def test_bound_of_a_perfect_autoencoder_is_infinite():
    class Perfect(torch.nn.Module):
        def forward(self, x): return x.clone()
    assert reconstruction_bound(Perfect(), images(2, 1, 8, 8), decibels).values.isinf().all()

def test_measuring_changes_nothing_in_the_network():
    net, x = build().train(), images(2, 1, 16, 16)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    reconstruction_bound(net, x, decibels), latent_statistics(net, [x])
    assert net.training and all(torch.equal(v, before[n]) for n, v in net.state_dict().items()) and torch.is_grad_enabled()

def test_a_few_steps_raise_the_bound():
    net, x = build(), torch.cat([brain_slice(48, z) for z in (40, 50)])
    adam, first = torch.optim.Adam(net.parameters(), 5e-3), reconstruction_bound(net, x, decibels).values.mean()
    for _ in range(40): adam.zero_grad(), (net.decode(sample(net.encode(x), torch_rng(0)))-x).square().mean().backward(), adam.step()
    assert reconstruction_bound(net, x, decibels).values.mean() > first+5

def test_weights_round_trip(tmp_path):
    net, x = build(), images(1, 1, 16, 16)
    save_file(net.state_dict(), tmp_path/'w.safetensors')
    again = build(seed=5)
    again.load_state_dict(load_file(tmp_path/'w.safetensors'))
    assert torch.equal(again(x), net(x)) and Autoencoder(**net.config).config == net.config

def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for on in (False, True):
        net = activation_checkpointing(build(), on)
        net(images(2, 1, 16, 24)).square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True): torch.testing.assert_close(a, b)

def test_switches_change_names_or_shapes_and_output():
    record, x = network('autoencoder'), images(1, 1, 16, 32)
    assert record.kind == 'autoencoder' and {'f2', 'f8', 'no_attention'} <= set(record.ablations)
    plain = build()
    assert set(record.ablations) == {'f2', 'f8', 'no_attention', 'latent_3'}
    for name, switch in record.ablations.items():
        other = build(**switch)
        if name == 'no_attention': assert {n for n, _ in other.named_parameters()} < {n for n, _ in plain.named_parameters()}
        assert {n: p.shape for n, p in other.named_parameters()} != {n: p.shape for n, p in plain.named_parameters()}
        assert not torch.allclose(other(x), plain(x))
    assert not any('attention' in n for n, _ in build(attention=False).named_parameters())

def test_errors_say_what_to_do():
    for wrong, said in [(dict(f=1), '2, 4 or 8'), (dict(f=3), '2, 4 or 8'), (dict(f=True), 'whole number'), (dict(f='4'), 'whole'),
            (dict(latent_channels=0), 'latent_channels of'), (dict(n_channels=-1), 'n_channels'), (dict(n_blocks=1.5), 'n_blocks'),
            (dict(attention='no'), "attention of Autoencoder.*'no'.*True or False"), (dict(attention=1), 'attention'),
            (dict(attention=None), 'attention')]:
        with pytest.raises(ConfigError, match=said): Autoencoder(**wrong)
    with pytest.raises(ConfigError, match="Did you mean 'latent_channels'"): network('autoencoder').build(latent_chanels=3)
    net = build(f=8)
    for wrong, said in [(torch.zeros(1, 2, 16, 16), 'expected 1 channels'), (torch.zeros(1, 1, 20, 16), 'divisible by 8'),
            (torch.zeros(1, 1, 8, 16), 'at least 16'), (torch.zeros(1, 16, 16), 'batch axis'),
            (torch.zeros(1, 1, 16, 16).long(), 'floating')]:
        for call in (net, net.encode):
            with pytest.raises(ShapeError, match=said): call(wrong)
    with pytest.raises(ShapeError, match='the decoder of Autoencoder.*expected 4 channels'): net.decode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ShapeError, match='the decoder of Autoencoder.*floating'): net.decode(torch.zeros(1, 4, 2, 2).long())

def test_the_chapter_has_no_eaten_backslashes():
    "Control characters where a formula had a backslash show as nothing"
    import json
    from pathlib import Path
    for name in ('4_blocks/46_wavelet', '4_blocks/47_conditioning', '5_models/54_cola_diff', '5_models/57_autoencoder'):
        cells = json.loads((Path(__file__).parents[1]/'nbs'/f'{name}.ipynb').read_text())['cells']
        text = ''.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        assert not [ch for ch in text if ord(ch) < 32 and ch != '\n'] and '\\\\alpha' not in text, name
