"Weights trained with the public code: names, shapes and meaning, written down here independently of the package"
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from i2i_mamba_nb.models.discriminators import PatchGAN
from i2i_mamba_nb.models.i2i_mamba import I2IMamba, load_released

NORM = dict(weight='c', bias='c', running_mean='c', running_var='c', num_batches_tracked='')
MAMBA = {'A_log': (512, 16), 'D': (512,), 'in_proj.weight': (1024, 256), 'conv1d.weight': (512, 1, 4), 'conv1d.bias': (512,),
    'x_proj.weight': (48, 512), 'dt_proj.weight': (512, 16), 'dt_proj.bias': (512,), 'out_proj.weight': (256, 512)}
VIT = {'attention_norm.weight': (768,), 'attention_norm.bias': (768,), 'ffn_norm.weight': (768,), 'ffn_norm.bias': (768,),
    'ffn.fc1.weight': (3072, 768), 'ffn.fc1.bias': (3072,), 'ffn.fc2.weight': (768, 3072), 'ffn.fc2.bias': (768,)}
VIT |= {f'attn.{n}.{p}': (768, 768) if p == 'weight' else (768,) for n in ('query', 'key', 'value', 'out') for p in ('weight', 'bias')}

def norm(name, c): return {f'{name}.{k}': (c,) if v else () for k, v in NORM.items()}

def released_shapes(n_sources):
    "Every name of the released generator with its shape"
    s = {'encoder_1.1.weight': (64, n_sources, 7, 7), 'encoder_2.0.weight': (128, 64, 3, 3), 'encoder_3.0.weight': (256, 128, 3, 3),
        'decoder_1.0.weight': (512, 128, 3, 3), 'decoder_2.0.weight': (256, 64, 3, 3), 'decoder_3.1.weight': (1, 128, 7, 7),
        'decoder_3.1.bias': (1,)}
    ends = {'encoder_1.2': 64, 'encoder_2.1': 128, 'encoder_3.1': 256, 'decoder_1.1': 128, 'decoder_2.1': 64}
    for name, c in ends.items(): s |= norm(name, c)
    for j in range(1, 10):
        for conv, bn in ((1, 2), (5, 6)):
            block = f'bottleneck_{j}.residual_cnn.0.conv_block'
            s |= {f'{block}.{conv}.weight': (256, 256, 3, 3), **norm(f'{block}.{bn}', 256)}
    for j in (1, 5, 9):
        s |= {f'bottleneck_{j}.mamba_layer.mamba.{k}': v for k, v in MAMBA.items()}
        s |= {f'bottleneck_{j}.mamba_layer.norm.{k}': (256,) for k in ('weight', 'bias')}
        s |= {f'bottleneck_{j}.cc.skip.0.weight': (256, 512, 1, 1), **norm(f'bottleneck_{j}.cc.skip.1', 256)}
        s |= {f'bottleneck_{j}.cc.block.0.weight': (256, 512, 3, 3), **norm(f'bottleneck_{j}.cc.block.1', 256)}
        s |= {f'bottleneck_{j}.cc.block.3.weight': (256, 256, 3, 3), **norm(f'bottleneck_{j}.cc.block.4', 256)}
    return s

def transformer_shapes():
    "The vision transformer that the released generator carries and never runs"
    s = {f'transformer_encoder.layer.{i}.{k}': v for i in range(12) for k, v in VIT.items()}
    return s | {f'transformer_encoder.encoder_norm.{k}': (768,) for k in ('weight', 'bias')}

def synthetic(n_sources=2, seed=0):
    "A state_dict as the public code would save it, random values (the transformer without memory of its own)"
    g, state = torch.Generator().manual_seed(seed), {}
    for k, shape in released_shapes(n_sources).items():
        if k.endswith('num_batches_tracked'): state[k] = torch.tensor(7)
        elif k.endswith('running_var') or k.endswith('A_log'): state[k] = torch.rand(shape, generator=g)+.5
        else: state[k] = torch.randn(shape, generator=g)*(.2 if len(shape) < 2 else (torch.Size(shape[1:]).numel())**-.5)
    return state | {k: torch.zeros(()).expand(v) for k, v in transformer_shapes().items()}

def by_hand(state, x):
    "The released generator's forward pass as functions of its weights; statistics of the image at every normalisation"
    def bn(x, n): return F.batch_norm(x, None, None, state[n+'.weight'], state[n+'.bias'], True, 0., 1e-5)
    def conv(x, n, stride=1, pad=0, reflect=0):
        x = F.pad(x, [reflect]*4, mode='reflect') if reflect else x
        return F.conv2d(x, state[n+'.weight'], state.get(n+'.bias'), stride, pad)
    def up(x, n): return F.relu(bn(F.conv_transpose2d(x, state[n+'.0.weight'], None, 2, 1, 1), n+'.1'))
    def res(x, n):
        n += '.residual_cnn.0.conv_block'
        return x+bn(conv(F.relu(bn(conv(x, n+'.1', reflect=1), n+'.2')), n+'.5', reflect=1), n+'.6')
    def mamba(x, n):
        w = lambda k: state[f'{n}.mamba_layer.mamba.{k}']
        b, c, h, q = x.shape
        t = F.layer_norm(x.flatten(2).transpose(1, 2), (c,), state[n+'.mamba_layer.norm.weight'], state[n+'.mamba_layer.norm.bias'])
        u, z = (t @ w('in_proj.weight').T).chunk(2, 2)
        u = F.conv1d(F.pad(u.transpose(1, 2), (3, 0)), w('conv1d.weight'), w('conv1d.bias'), groups=512)
        u = F.silu(u).transpose(1, 2)
        dt, B, C = (u @ w('x_proj.weight').T).split([16, 16, 16], 2)
        delta = F.softplus(dt @ w('dt_proj.weight').T+w('dt_proj.bias'))
        A, state_h, ys = -w('A_log').exp(), torch.zeros(b, 512, 16, dtype=x.dtype), []
        for k in range(u.shape[1]):
            state_h = (delta[:, k, :, None]*A).exp()*state_h+delta[:, k, :, None]*B[:, k, None]*u[:, k, :, None]
            ys.append((state_h*C[:, k, None]).sum(2)+w('D')*u[:, k])
        return ((torch.stack(ys, 1)*F.silu(z)) @ w('out_proj.weight').T).transpose(1, 2).view(b, c, h, q)
    def stage(x, n):
        if n+'.cc.skip.0.weight' not in state: return res(x, n)
        x = torch.cat([x, mamba(x, n)], 1)
        block = bn(conv(F.relu(bn(conv(x, n+'.cc.block.0', pad=1), n+'.cc.block.1')), n+'.cc.block.3', pad=1), n+'.cc.block.4')
        return res(F.relu(block+bn(conv(x, n+'.cc.skip.0'), n+'.cc.skip.1')), n)
    x1 = F.relu(bn(conv(x, 'encoder_1.1', reflect=3), 'encoder_1.2'))
    x2 = F.relu(bn(conv(x1, 'encoder_2.0', 2, 1), 'encoder_2.1'))
    x3 = f = F.relu(bn(conv(x2, 'encoder_3.0', 2, 1), 'encoder_3.1'))
    for j in range(1, 10): f = stage(f, f'bottleneck_{j}')
    y = up(torch.cat([f, x3], 1), 'decoder_1')
    y = up(torch.cat([y, x2], 1), 'decoder_2')
    return conv(torch.cat([y, x1], 1), 'decoder_3.1', reflect=3).tanh()

@pytest.fixture(scope='module')
def state(): return synthetic()

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return I2IMamba(2, 'released').eval()

@pytest.mark.parametrize('n_sources', [1, 2])
def test_names_and_shapes_are_the_released_ones(n_sources):
    with torch.device('meta'): net = I2IMamba(n_sources, 'released')
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == released_shapes(n_sources)
    assert sum(p.numel() for p in net.parameters()) == {1: 18_763_713, 2: 18_766_849}[n_sources]

def test_the_unused_transformer_has_its_published_size():
    assert sum(torch.Size(v).numel() for v in transformer_shapes().values()) == 85_056_000

def test_a_released_file_maps_one_to_one(model, state, tmp_path):
    save_file({k: v.clone() if 'transformer' not in k else torch.zeros(1) for k, v in state.items()}, tmp_path/'G.safetensors')
    did = load_released(model, load_file(tmp_path/'G.safetensors'))
    assert set(did.loaded) == set(released_shapes(2)) and set(did.dropped) == set(transformer_shapes()) and did.kept == ()
    for k, v in model.state_dict().items(): assert torch.equal(v, state[k]), k

def test_what_is_computed_is_what_the_released_network_computes(model, state):
    load_released(model, state)
    x = torch.randn(1, 2, 16, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        ours = model.double()(x)
        expected = by_hand({k: v.double() if v.is_floating_point() else v for k, v in state.items() if 'transformer' not in k}, x)
    model.float()
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-8)

def test_released_weights_run_with_running_averages_too(state):
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    out = {}
    for at_test in ('batch_statistics', 'running'):
        net = I2IMamba(2, 'released', norm_at_test=at_test).eval()
        load_released(net, state)
        with torch.no_grad(): out[at_test] = net(x)
    assert out['running'].isfinite().all() and not torch.allclose(*out.values(), atol=1e-3)

def test_plain_load_state_dict_takes_the_names(model, state):
    model.load_state_dict({k: v for k, v in state.items() if 'transformer' not in k}, strict=True)

def test_a_prefix_of_parallel_training_is_taken_off(model, state):
    assert len(load_released(model, {'module.'+k: v for k, v in state.items()}).loaded) == len(released_shapes(2))

def test_counters_may_be_missing(model, state):
    did = load_released(model, {k: v for k, v in state.items() if 'num_batches' not in k})
    assert did.kept and all(k.endswith('num_batches_tracked') for k in did.kept)

def test_instance_norm_drops_the_running_averages(state):
    net = I2IMamba(2, 'released', norm='instance')
    did = load_released(net, state)
    assert {k.rsplit('.', 1)[1] for k in did.dropped if 'transformer' not in k} == {'running_mean', 'running_var', 'num_batches_tracked'}

def without(state, name): return {k: v for k, v in state.items() if k != name}

@pytest.mark.parametrize('change, said', [
    (lambda s: without(s, 'decoder_3.1.bias'), '1 missing: decoder_3.1.bias'),
    (lambda s: s | {'decoder_4.0.weight': torch.ones(1)}, '1 unknown: decoder_4.0.weight'),
    (lambda s: s | {'decoder_3.1.bias': torch.ones(2)}, 'decoder_3.1.bias (2,) for (1,)'),
    (lambda s: s | {'decoder_3.1.bias': torch.tensor([float('nan')])}, '1 not finite: decoder_3.1.bias'),
    (lambda s: s | {'decoder_3.1.bias': 'text'}, '1 no tensor: decoder_3.1.bias'),
    (lambda s: {'state_dict': s}, 'unknown: state_dict'),
    (lambda s: {}, 'missing: '),
    (lambda s: list(s), 'a mapping of names to tensors'),
    (lambda s: synthetic(1), 'encoder_1.1.weight (64, 1, 7, 7) for (64, 2, 7, 7)'),
])
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(model, state, change, said):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as e: load_released(model, change(state))
    assert said in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

@pytest.mark.parametrize('other', [dict(variant='paper'), *(dict(variant='released', mixer=m) for m in ('none', 'matched'))])
def test_only_the_released_network_takes_them(other, state):
    with pytest.raises(ValueError, match="variant='released', mixer='mamba'"): load_released(I2IMamba(2, base_channels=4, **other), state)

def test_the_discriminator_has_the_released_names():
    convs, norms = {0: (64, 3), 2: (128, 64), 5: (256, 128), 8: (512, 256), 11: (1, 512)}, {3: 128, 6: 256, 9: 512}
    want = {f'model.{k}.weight': (*v, 4, 4) for k, v in convs.items()} | {'model.0.bias': (64,), 'model.11.bias': (1,)}
    for k, c in norms.items(): want |= norm(f'model.{k}', c)
    with torch.device('meta'): net = PatchGAN(3)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == want
