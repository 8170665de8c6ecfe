"models.adapter: every registered generator under the specification of every recipe, and what the adapter adds, keeps and refuses"
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2i_mamba_nb.blocks.conv import activation_checkpointing
from i2i_mamba_nb.core import ConfigError, ShapeError, Spec, network, networks, plain_fit
from i2i_mamba_nb.models.adapter import SPECS, adapted, input_slots, time_map
from i2i_mamba_nb.models.baselines import AttentionGAN, UNet
from i2i_mamba_nb.ssm.mixers import set_backend

GENERATORS = list(networks('generator'))
FURTHER_SPECS = {'no source': Spec(sources=0, noise=4, targets=4, steps=1000),
    'three out, one step': Spec(sources=2, noise=1, targets=3, steps=1), 'latent without time': Spec(sources=4, targets=2, latent=5)}
ALL = {**SPECS, **FURTHER_SPECS}

def small(name, spec, seed=0, **config):
    torch.manual_seed(seed)
    return adapted(name, spec, **{**network(name).presets['smoke'], **config})

def given(net, b=2, wider=1, seed=0):
    "What the recipe gives: images not square, times, random vectors"
    rng, spec, m = torch.Generator().manual_seed(seed), net.spec, net.multiple
    h = m*-(-net.smallest//m)
    x = torch.randn(b, spec.sources+spec.noise, h, h+wider*m, generator=rng)
    t = torch.randint(0, spec.steps, (b,), generator=rng) if spec.steps else None
    return x, t, torch.randn(b, spec.latent, generator=rng) if spec.latent else None

def stir(net, size=.05):
    "Weights away from starts that are nearly zero"
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters(): p += size*torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return net

def test_there_is_a_matrix():
    assert {'i2i_mamba', 'hmf_mambainr', 'cravim', 'mm2ct', 'cola_diff'} <= set(GENERATORS)
    assert {'resnet9', 'resnet6', 'attention_gan', 'syndiff', 'ldm', 'unet'} <= set(GENERATORS)
    assert {(s.sources, s.noise, s.targets, s.steps > 0) for s in SPECS.values()} >= {(1, 0, 1, False), (4, 0, 1, False), (1, 1, 2, False),
        (1, 1, 2, True), (1, 1, 1, True), (2, 1, 1, True), (1, 4, 4, True), (1, 4, 8, True)}
    assert all(network(n).fits is not None for n in GENERATORS)

@pytest.mark.parametrize('spec', ALL, ids=lambda s: s.replace(' ', '_'))
@pytest.mark.parametrize('name', GENERATORS)
def test_matrix(name, spec):
    net = small(name, ALL[spec])
    x, t, z = given(net)
    x.requires_grad_()
    y = stir(net)(x, t, z)
    assert y.shape == (2, ALL[spec].targets, *x.shape[2:]) and y.dtype == x.dtype and y.isfinite().all()
    y.square().sum().backward()
    assert (x.grad.abs().amax((0, 2, 3)) > 0).all(), 'a channel that nobody reads'
    with torch.no_grad(): assert torch.equal(net.eval()(x, t, z), net(x, t, z))

HARD = ['paired, 3 sources', 'cycle-denoise with time', 'adversarial diffusion, 2 sources', 'latent diffusion with variance']
SWITCHES = [pytest.param(n, s, id=f'{n}-{k}') for n in GENERATORS for k, s in network(n).ablations.items()]

@pytest.mark.parametrize('name, switch', SWITCHES)
def test_every_ablation_fits_too_or_is_refused_when_built(name, switch):
    for spec in HARD:
        try: net = small(name, SPECS[spec], **switch)
        except ConfigError as e:
            assert 'Leave conditioning to the record' in str(e) and switch['conditioning'] == 'cross'
            continue
        x, t, z = given(net, b=1, wider=0)
        with torch.no_grad(): assert net(x, t, z).shape == (1, SPECS[spec].targets, *x.shape[2:])

@pytest.mark.parametrize('name', GENERATORS)
def test_time_reaches_every_generator(name):
    "In double precision, where a constant map that a normalisation takes away leaves 1e-13"
    net = stir(small(name, SPECS['adversarial diffusion, 2 sources']).double()).eval()
    x, _, z = (v if v is None or v.dtype == torch.long else v.double() for v in given(net, b=3))
    with torch.no_grad(): y = [net(x[:1], torch.tensor([t]), z[:1]) for t in range(4)]
    for k in range(4):
        for i in range(k): assert (y[k]-y[i]).abs().max() > 1e-3*y[0].abs().max(), (i, k)
    with torch.no_grad(): both = net(x, torch.tensor([0, 3, 1]), z)
    torch.testing.assert_close(both[:1], y[0], atol=1e-9, rtol=1e-7)

@pytest.mark.parametrize('name', [n for n in GENERATORS if network(n).inputs.further.get('time') is None])
def test_weights_on_the_time_learn(name):
    "What the map's own pattern moves the output by, beside the first source's"
    net = stir(small(name, SPECS['adversarial diffusion, 2 sources']).double()).train()
    x, t, z = (v if v is None or v.dtype == torch.long else v.double() for v in given(net, b=1))
    inner = net.images(x, t).requires_grad_()
    net.network(inner).square().sum().backward()
    moved = (inner.grad*(inner-inner.mean((2, 3), keepdim=True))).flatten(2).abs().sum(2)[0].detach()
    assert moved[2] > 1e-2*moved[0]
    first = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels == inner.shape[1]]
    for conv in first[:1]:
        grads = conv.weight.grad.abs().amax((0, 2, 3))
        assert grads[2] > 1e-3*grads[0]

@pytest.mark.parametrize('name', GENERATORS)
def test_every_source_keeps_its_place(name):
    "Swapping two sources changes the output as it would at the network itself"
    net = stir(small(name, Spec(sources=2, noise=1, targets=1, steps=4))).eval()
    x, t, z = given(net, b=1)
    inner = net.images(x, t)
    assert torch.equal(inner[:, :2], x[:, :2]) and torch.equal(inner[:, -1], x[:, 2])
    with torch.no_grad(): assert not torch.allclose(net(x, t), net(x[:, [1, 0, 2]], t), atol=1e-7)

@pytest.mark.parametrize('name', GENERATORS)
def test_config_rebuilds_it_and_weights_fit(name, tmp_path):
    net = stir(small(name, SPECS['cycle-denoise with time']))
    config = json.loads(json.dumps(net.config))
    again = adapted(config['name'], Spec(**config['spec']), **config['settings'])
    save_file(net.state_dict(), tmp_path/'w.safetensors')
    again.load_state_dict(load_file(tmp_path/'w.safetensors'))
    x, t, z = given(net)
    with torch.no_grad(): assert torch.equal(again.eval()(x, t, z), net.eval()(x, t, z))
    assert again.config == net.config

@pytest.mark.parametrize('name', GENERATORS)
def test_recomputing_and_backends_work_through_it(name):
    net = stir(small(name, SPECS['cycle-denoise'], seed=3))
    x, t, z = given(net, wider=0)
    results = []
    for on in (False, True):
        activation_checkpointing(net, on).zero_grad()
        net(x, t, z).square().sum().backward()
        results.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    net = activation_checkpointing(net, False).double().eval()
    with torch.no_grad(): a, b = (set_backend(net, n)(x.double(), t, z) for n in ('chunked', 'reference'))
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)

@pytest.mark.parametrize('name', GENERATORS)
def test_export(name):
    net = small(name, SPECS['adversarial diffusion, 1 source']).eval()
    whole = given(net)
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(net, whole).module()(*whole), net(*whole), atol=1e-6, rtol=1e-5)

# ---------------------------------------------------------------- rules one by one
@pytest.mark.parametrize('size', [(4, 4), (5, 7), (8, 8), (64, 96), (33, 1)])
@pytest.mark.parametrize('steps', [1, 2, 4, 1000])
def test_time_map_by_hand(steps, size):
    "Half a wave of 16 rows, and half one of 16 columns that grows from nothing to full with the time"
    t, x = torch.arange(steps), torch.zeros(steps, 1, *size, dtype=torch.double)
    tau = time_map(t, steps, x)
    assert tau.shape == (steps, 1, *size) and tau.dtype == torch.double and tau.abs().max() <= 1 and tau.isfinite().all()
    wave = [math.cos(2*math.pi*(k+.5)/16) for k in range(96)]
    for k in {0, steps//2, steps-1}:
        for i, j in {(0, 0), (size[0]-1, size[1]-1)}:
            assert float(tau[k, 0, i, j]) == pytest.approx((wave[i]+k/max(steps-1, 1)*wave[j])/2, abs=1e-12)
    assert all(m.std() > .05 for m in tau[:, 0].flatten(1)) and len(tau.flatten(1).unique(dim=0)) == steps

@pytest.mark.parametrize('bad', [[-1, 0], [0, 4], [0., float('nan')], [0., 3.01], [0., float('inf')]], ids=str)
@pytest.mark.parametrize('name', ['resnet6', 'syndiff'])
def test_times_that_are_none_are_refused(name, bad):
    net = small(name, Spec(sources=1, noise=1, steps=4))
    x, _, _ = given(net)
    with pytest.raises(ShapeError, match='from 0 to 3'): net(x, torch.tensor(bad))
    assert net(x, torch.tensor([0, 3])).isfinite().all() and net(x, torch.tensor([.5, 3.])).isfinite().all()

BAD_SPECS = {'a Spec': dict(sources=1), 'sources': Spec(sources=-1), 'targets': Spec(targets=0), 'sources of': Spec(sources='2'),
    'noise': Spec(noise=1.5), 'steps': Spec(steps=True), 'latent': Spec(latent=-64), 'at least one image': Spec(sources=0)}

@pytest.mark.parametrize('said', BAD_SPECS)
@pytest.mark.parametrize('name', ['unet', 'cola_diff', 'syndiff'])
def test_specs_that_make_no_sense_are_refused(name, said):
    with pytest.raises(ConfigError, match=said): adapted(name, BAD_SPECS[said])

def test_a_network_with_time_under_a_recipe_without_gets_zero():
    net = stir(small('syndiff', Spec(sources=2))).eval()
    x, _, _ = given(net)
    assert torch.equal(net(x), net.network(x, torch.zeros(2).long(), torch.zeros(2, 64)))

def test_random_vector_is_not_used_where_none_is_taken():
    net = stir(small('unet', Spec(sources=1, latent=64)))
    x, t, z = given(net)
    assert torch.equal(net.eval()(x, t, z), net(x, t, -z))
    diffusive = stir(small('syndiff', Spec(sources=1, latent=64))).eval()
    x, t, z = given(diffusive)
    assert not torch.allclose(diffusive(x, t, z), diffusive(x, t, -z), atol=1e-7)

def test_lacking_channels_are_zeros_behind_their_kind():
    net = small('syndiff', Spec(sources=2, noise=1, targets=1), n_sources=4, n_noise=3, n_targets=2)
    x, _, _ = given(net)
    inner = net.images(x)
    assert inner.shape[1] == 7 and torch.equal(inner[:, [0, 1, 4]], x) and not inner[:, [2, 3, 5, 6]].any()
    assert torch.equal(net(x), net.network(inner, torch.zeros(2).long(), torch.zeros(2, 64))[:, 1:])

MIXING = [n for n in GENERATORS if 'n_extra' in network(n).fits(Spec())]

@pytest.mark.parametrize('spec', [*ALL.values(), Spec(sources=3, targets=5, steps=4)], ids=str)
@pytest.mark.parametrize('spare', [0, 2])
@pytest.mark.parametrize('name', MIXING)
def test_what_is_no_image_never_stands_as_one(name, spare, spec):
    "Networks that mix their input into the output: neither the time map nor an empty channel takes part"
    net = small(name, spec, **({'n_sources': spec.sources+bool(spec.steps)+spare+(spec.sources == 0)} if spare else {}))
    x, t, _ = given(net)
    inner, mixed = net.images(x, t), {k for images in net.network.partners for k in images}
    ours = {k for k in range(inner.shape[1]) if any(torch.equal(inner[:, k], c) for c in x.unbind(1))}
    assert mixed <= ours and len(net.network.partners) == spec.targets
    assert not spare or len(ours) < inner.shape[1]

@pytest.mark.parametrize('name', MIXING)
def test_spare_noise_is_refused_where_images_are_mixed(name):
    assert {'cravim', 'attention_gan'} <= set(MIXING)
    with pytest.raises(ConfigError, match='Leave n_noise'): small(name, Spec(sources=1), n_noise=1)
    with pytest.raises(ConfigError, match='n_extra'): small(name, Spec(sources=1, steps=4), n_extra=0)

def test_noise_is_a_source_for_a_network_that_knows_none():
    net = small('resnet6', Spec(sources=2, noise=1, targets=1, steps=4))
    x, t, _ = given(net)
    inner = net.images(x, t)
    assert inner.shape[1] == 4 and torch.equal(inner[:, [0, 1, 3]], x) and torch.equal(inner[:, 2:3], time_map(t, 4, x))

def test_lacking_channels_come_last_where_noise_is_a_source():
    net = small('unet', Spec(sources=1, noise=1, targets=1), n_sources=4)
    x, _, _ = given(net)
    assert torch.equal(net.images(x)[:, :2], x) and not net.images(x)[:, 2:].any() and net.images(x).shape[1] == 4

@pytest.mark.parametrize('targets', [1, 2, 3])
def test_the_last_images_come_back(targets):
    net = small('resnet9', Spec(sources=1, targets=targets), n_targets=3)
    x, _, _ = given(net)
    assert torch.equal(net(x), net.network(x)[:, 3-targets:])

VARIANCE = [n for n in GENERATORS if 'condition' in network(n).inputs.further]

@pytest.mark.parametrize('n_targets', [1, 5, 8])
@pytest.mark.parametrize('name', VARIANCE)
def test_networks_with_a_code_of_the_variance_give_what_the_recipe_asks(name, n_targets):
    "Their noise comes first and the code behind it, so that the last channels would be the code"
    assert {'cola_diff', 'ldm'} == set(VARIANCE)
    spec = SPECS['latent diffusion']
    with pytest.raises(ConfigError, match='Leave n_targets to the record'): small(name, spec, n_targets=n_targets)
    net = small(name, spec, n_targets=4)
    x, t, _ = given(net)
    inner = net.images(x, t)
    with torch.no_grad(): assert torch.equal(net(x, t), net.network(inner, t, inner.new_zeros(2, 0, *x.shape[2:])))

def test_slots():
    assert input_slots('x', dict(n_sources=5), (2, 2)) == (1, 0) and input_slots('x', dict(n_sources=2, n_noise=2), (1, 1)) == (1, 1)
    for config, wanted in ((dict(n_sources=2), (2, 1)), (dict(n_sources=1, n_noise=1), (1, 2)), (dict(n_sources=1, n_noise=4), (2, 1))):
        with pytest.raises(ConfigError, match='Leave n_sources and n_noise'): input_slots('x', config, wanted)

def test_plain_fit_is_what_networks_without_time_get():
    for name in ('i2i_mamba', 'resnet9', 'unet'):
        for spec in SPECS.values(): assert network(name).fits(spec) == plain_fit(spec)

WRONG = {'of kind discriminator': lambda: adapted('patchgan', Spec()),
    'of kind autoencoder': lambda: adapted('autoencoder', Spec()),
    'Did you mean': lambda: adapted('unett', Spec()), "Did you mean 'n_levels'": lambda: adapted('unet', Spec(), n_level=2),
    'at least 2': lambda: adapted('unet', Spec(targets=2), n_targets=1),
    'at most 1 and 0': lambda: adapted('unet', Spec(sources=2), n_sources=1),
    'a random vector of 3': lambda: small('syndiff', Spec(latent=64), n_latent=3)}

@pytest.mark.parametrize('said', WRONG)
def test_what_cannot_fit_is_refused_when_built(said):
    with pytest.raises(ConfigError, match=said): WRONG[said]()

def test_what_is_given_wrongly_is_refused_when_called():
    net = small('i2i_mamba', Spec(sources=1, noise=1, steps=4, latent=8))
    x, t, z = given(net)
    wrong = {'time for i2i_mamba under this recipe: given NoneType': (x, None, z), 'one row per image': (x, t[:1], z),
        'latent for': (x, t, z[:, :3]), '2 channels': (x[:, :1], t, z), 'divisible by 4': (x[..., :9], t, z)}
    for said, inputs in wrong.items():
        with pytest.raises(ShapeError, match=said): net(*inputs)
    plain = small('i2i_mamba', Spec(sources=1))
    for extra in ((torch.zeros(2),), (None, torch.zeros(2, 8))):
        with pytest.raises(ShapeError, match='none, as its Spec says'): plain(torch.zeros(2, 1, 8, 8), *extra)

# ---------------------------------------------------------------- baselines
BASELINES = dict(resnet9=11_365_633, resnet6=7_825_153, syndiff=33_595_842, attention_gan=11_760_211, unet=31_036_481)

@pytest.mark.parametrize('name', BASELINES)
def test_exact_counts_of_baselines(name):
    with torch.device('meta'): assert sum(p.numel() for p in network(name).build().parameters()) == BASELINES[name]

@pytest.mark.parametrize('size', [(64, 64), (96, 160), (256, 80)])
@pytest.mark.parametrize('n', [1, 2, 3, 4])
@pytest.mark.parametrize('name', ['resnet9', 'resnet6', 'attention_gan', 'unet'])
def test_baselines_on_sizes_and_sources(name, n, size):
    config = dict(n_sources=n, n_targets=5-n, base_channels=2) | ({} if name == 'unet' else dict(n_blocks=1))
    assert network(name).build(**config).eval()(torch.randn(1, n, *size)).shape == (1, 5-n, *size)

@pytest.mark.parametrize('n_targets', [1, 2, 3])
def test_attention_gan_is_its_equation(n_targets):
    net = AttentionGAN(2, n_targets, base_channels=4, n_blocks=1, n_maps=4)
    x = torch.randn(2, 2, 12, 20)
    contents, maps = net.parts(x)
    handed = x if n_targets == 2 else x.mean(1, keepdim=True).expand(-1, n_targets, -1, -1)
    by_hand = sum(maps[:, k]*contents[:, k] for k in range(3))+maps[:, 3]*handed
    torch.testing.assert_close(net(x), by_hand)
    torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]))

def test_unets_skips_carry_the_finest_detail():
    "With everything cut that comes up from below, only skips can tell one image from another"
    torch.manual_seed(0)
    with_skips, without = (UNet(1, base_channels=4, skips=s).eval() for s in (True, False))
    more, less = (sum(p.numel() for p in net.parameters()) for net in (with_skips, without))
    assert more-less == sum(9*c*c for c in (4, 8, 16, 32))
    for m in (*without.up, *with_skips.up): torch.nn.init.zeros_(m.weight), torch.nn.init.zeros_(m.bias)
    x = torch.randn(1, 1, 32, 48)
    assert not torch.allclose(with_skips(x), with_skips(-x)) and torch.allclose(without(x), without(-x))

@pytest.mark.parametrize('bad', [dict(n_levels=5), dict(n_levels=0), dict(base_channels=2.5), dict(norm='bath'), dict(n_sources=0)])
def test_impossible_unets_are_refused(bad):
    with pytest.raises(ConfigError): UNet(**bad)

@pytest.mark.parametrize('bad', [dict(n_maps=1), dict(input_term='no'), dict(input_term=0), dict(n_noise=-1), dict(n_noise=True),
    dict(n_extra=1), dict(n_extra='1'), dict(n_extra=-1)], ids=str)
def test_impossible_attention_gans_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))): AttentionGAN(**bad)

@pytest.mark.parametrize('bad', ['no', 0, 1, None])
def test_skips_are_a_yes_or_a_no(bad):
    with pytest.raises(ConfigError, match='skips of UNet'): UNet(skips=bad)

@pytest.mark.parametrize('name, switch', [('attention_gan', 'no_input'), ('unet', 'no_skips'), ('time_patchgan', 'no_spread')])
def test_a_switch_gives_its_weights_other_names(name, switch):
    "So that weights of one cannot be taken for the other's, which a message by shapes would leave to chance"
    record = network(name)
    with torch.device('meta'): a, b = (set(record.build(**{**record.smallest, **c}).state_dict()) for c in ({}, record.ablations[switch]))
    assert a-b and b-a
