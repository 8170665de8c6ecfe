"Shapes written in signatures are what runs: jaxtyping and beartype check every call of a forward and backward pass"
import subprocess
import sys

import pytest

CHECKED = '''
import torch
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook('i2i_mamba_nb', 'beartype.beartype'):
    from i2i_mamba_nb.core import network, networks, recipe
    from i2i_mamba_nb.ssm import selective_scan
    from i2i_mamba_nb.ssm.mixers import ES2D, SS2D, BiMamba, Mamba, trace
    from i2i_mamba_nb.ssm.scan_orders import ORDERS, cross_merge, cross_scan, inverse, locality, orders, reversed_order, skip_orders
'''
PASSES = dict(
    scan='''
b, d, n, l = 2, 3, 5, 7
u, delta, B, C = torch.randn(b, d, l), torch.randn(b, d, l), torch.randn(b, n, l), torch.randn(b, n, l)
y, last = selective_scan(u, delta, -torch.rand(d, n), B, C, torch.ones(d), torch.randn(b, d, l), torch.zeros(d), True, True)
assert y.shape == (b, d, l) and last.shape == (b, d, n)''',
    mixers='''
assert Mamba(6, d_state=3)(torch.randn(2, 7, 6)).shape == (2, 7, 6)
assert SS2D(6, d_state=3)(torch.randn(2, 6, 3, 5)).shape == (2, 6, 3, 5)
assert ES2D(6, d_state=3)(torch.randn(2, 6, 3, 5)).shape == (2, 6, 3, 5)
two, one, x = BiMamba(6, d_state=3, order='hilbert'), Mamba(6, d_state=3, order='snake'), torch.randn(2, 15, 6)
assert two(x, size=(3, 5)).shape == one(x, size=(3, 5)).shape == (2, 15, 6)
y, state = one.step(x[:, 0], one.start(2))
for m, kind in ((two, dict(size=(3, 5))), (one, dict(size=(3, 5))), (ES2D(6, d_state=3), {})):
    trace(m, x if kind else x.mT.unflatten(2, (3, 5)), **kind)''',
    orders='''
rows = orders(tuple(ORDERS), 3, 5)
assert cross_merge(cross_scan(torch.randn(2, 4, 3, 5), rows), 3, 5, rows).shape == (2, 4, 15)
inverse(rows), inverse(rows[0]), reversed_order(rows), reversed_order(rows[0]), locality(rows[0], 3, 5)
parts = skip_orders(3, 5)
assert cross_merge(cross_scan(torch.randn(2, 4, 3, 5), parts), 3, 5, parts).shape == (2, 4, 15)''',
    networks='''
for record, switch in ((r, s) for r in networks().values() for s in ({}, *r.ablations.values())):
    config, wanted = record.smallest | switch, record.inputs
    multiple, smallest = wanted.sides(config)
    side = -(-smallest//multiple)*multiple
    size = (side, side+multiple)
    more = [f(config, 1, size, torch.Generator().manual_seed(0)) for f in wanted.further.values()]
    out = record.build(**config)(torch.randn(1, wanted.channels(config), *size), *more)
    shape = wanted.shape(config, size)
    maps, shapes = [v if isinstance(v, list) else [v] for v in (list(out) if isinstance(out, tuple) else out, shape)]
    assert [tuple(m.shape[1:]) for m in maps] == shapes, record.name''',
    recipe='''
made = recipe('paired_adversarial').build(generator=network('i2i_mamba').build(**network('i2i_mamba').presets['smoke']),
    discriminator=network('patchgan').build(n_channels=3, base_channels=4))
memory, batch = None, dict(source=torch.randn(1, 2, 32, 32), target=torch.randn(1, 1, 32, 32))
for phase in made.phases:
    named, memory = made.losses(phase, batch, memory)
    named['total'].backward()''',
    a_wrong_shape_is_seen='''
from i2i_mamba_nb.ssm import scan_orders
try: scan_orders.cross_scan(torch.randn(2, 3, 5))
except TypeCheckError: pass
else: raise AssertionError('three axes passed for four')''')

@pytest.mark.parametrize('name', PASSES)
def test_signatures(name):
    done = subprocess.run([sys.executable, '-c', CHECKED+PASSES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
