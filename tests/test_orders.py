"Scan orders against nested loops, on many sizes; the matrices of paths; gather and scatter; what a caller or a tracer may do to them"
import itertools
import math
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from i2i_mamba_nb.core import ConfigError, ShapeError
from i2i_mamba_nb.ssm import scan_orders as so

NAMES = [*so.ORDERS, *(f'{n}_reverse' for n in so.ORDERS), 'window:1', 'window:3', 'window:50', 'skip:3', 'skip:4_reverse', 'skip:50']
SIZES = [(1, n) for n in range(1, 16)]+[(n, 1) for n in range(2, 16)]+[(h, w) for h in (2, 3, 4, 5, 8) for w in (2, 3, 6, 7, 16)]
SIZES += [(2*i+3, i+2) for i in range(24)]+[(i+2, 3*i+3) for i in range(15)]+[(i+9, i+9) for i in range(15)]
few = pytest.mark.parametrize('h, w', [(1, 1), (1, 7), (7, 1), (2, 2), (5, 7), (8, 8), (6, 9), (13, 4)])

def pixel(r, c, w): return r*w+c

def walked_spiral(h, w):
    "A walker that turns right at the border and at what it has seen"
    seen, order, r, c, turn = set(), [], 0, 0, 0
    moves = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    while len(order) < h*w:
        order.append(pixel(r, c, w)), seen.add((r, c))
        for _ in range(4):
            y, x = r+moves[turn][0], c+moves[turn][1]
            if 0 <= y < h and 0 <= x < w and (y, x) not in seen: break
            turn = (turn+1) % 4
        r, c = y, x
    return order

def looped(name, h, w):
    "The path written as plain loops"
    rows, columns = range(h), range(w)
    if name == 'raster': return [pixel(r, c, w) for r in rows for c in columns]
    if name == 'column': return [pixel(r, c, w) for c in columns for r in rows]
    if name == 'reverse': return looped('raster', h, w)[::-1]
    if name == 'column_reverse': return looped('column', h, w)[::-1]
    if name == 'snake': return [pixel(r, c, w) for r in rows for c in (columns if r % 2 == 0 else reversed(columns))]
    if name == 'spiral_in': return walked_spiral(h, w)
    if name == 'spiral_out': return walked_spiral(h, w)[::-1]
    if name in ('diagonal', 'zigzag'):
        lines = [[pixel(r, s-r, w) for r in rows if 0 <= s-r < w] for s in range(h+w-1)]
        return [p for s, line in enumerate(lines) for p in (line if name == 'diagonal' or s % 2 else line[::-1])]
    if name == 'window':
        corners = itertools.product(range(0, h, 4), range(0, w, 4))
        return [pixel(r, c, w) for a, b in corners for r in range(a, min(a+4, h)) for c in range(b, min(b+4, w))]
    return [pixel(r, c, w) for a in (0, 1) for b in (0, 1) for r in range(a, h, 2) for c in range(b, w, 2)]

# ---------------------------------------------------------------- single paths
def test_there_are_a_hundred_sizes():
    assert len(set(SIZES)) >= 100 and len(so.ORDERS) == 12

@pytest.mark.parametrize('name', NAMES)
def test_permutation_whose_inverse_restores_the_image(name):
    for h, w in SIZES:
        order = so.scan_order(name, h, w)
        assert order.dtype == torch.long and order.shape == (h*w,) and sorted(order.tolist()) == list(range(h*w)), (name, h, w)
        image = torch.randn(2, h*w)
        assert torch.equal(image[:, order][:, so.inverse(order)], image) and torch.equal(image[:, so.inverse(order)][:, order], image)

@pytest.mark.parametrize('name', [n for n in so.ORDERS if n != 'hilbert'])
def test_the_path_is_the_looped_one(name):
    for h, w in SIZES: assert so.ORDERS[name](h, w).tolist() == looped(name, h, w), (h, w)

@pytest.mark.parametrize('name', so.ORDERS)
def test_reversal(name):
    for h, w in SIZES[::7]:
        back = so.scan_order(name+'_reverse', h, w)
        assert back.tolist() == so.scan_order(name, h, w).tolist()[::-1] == so.reversed_order(so.scan_order(name, h, w)).tolist()

def steps(order, w): return (order//w).diff().abs(), (order % w).diff().abs()

@pytest.mark.parametrize('name', ['snake', 'spiral_in', 'spiral_out', 'hilbert'])
def test_successive_pixels_touch(name):
    for h, w in SIZES:
        down, right = steps(so.scan_order(name, h, w), w)
        assert (torch.maximum(down, right) == 1).all()
        assert (down+right == 2).sum() <= (name == 'hilbert')

@pytest.mark.parametrize('k', [1, 2, 3, 4, 5])
def test_hilbert_finishes_every_quarter_before_the_next(k):
    n = 2**k
    order = so.hilbert(n, n)
    assert (sum(steps(order, n)) == 1).all()
    for level in range(1, k):
        side = 2**level
        boxes = (order//n//side)*n+(order % n)//side
        assert (boxes.view(-1, side*side) == boxes.view(-1, side*side)[:, :1]).all()

def test_hilbert_is_more_local_than_the_restricted_square():
    def classical(h, w):
        "The classical curve through the enclosing power of two, point by point, restricted"
        n = 2**math.ceil(math.log2(max(h, w, 2)))
        for d in range(n*n):
            x = y = 0
            s, t = 1, d
            while s < n:
                rx, ry = 1 & (t//2), 1 & (t ^ (t//2))
                if ry == 0: x, y = (s-1-x, s-1-y)[::-1] if rx else (y, x)
                x, y, t, s = x+s*rx, y+s*ry, t//4, 2*s
            if y < h and x < w: yield y*w+x
    for h, w in [(31, 17), (24, 20), (9, 30), (33, 33)]:
        ours, other = so.locality(so.hilbert(h, w), h, w), so.locality(torch.tensor(list(classical(h, w))), h, w)
        assert ours.step <= other.step and ours.jump <= other.jump and ours.gap < other.gap
        if h != w: assert ours.step < other.step and ours.jump < other.jump
    assert so.locality(torch.tensor(list(classical(16, 16))), 16, 16) == so.locality(so.hilbert(16, 16), 16, 16)

@pytest.mark.parametrize('size', [1, 2, 3, 5, 40])
@pytest.mark.parametrize('h, w', [(1, 9), (5, 7), (6, 4)])
def test_sizes_of_windows_and_steps(size, h, w):
    corners = itertools.product(range(0, h, size), range(0, w, size))
    windows = [pixel(r, c, w) for a, b in corners for r in range(a, min(a+size, h)) for c in range(b, min(b+size, w))]
    skipped = [pixel(r, c, w) for a in range(size) for b in range(size) for r in range(a, h, size) for c in range(b, w, size)]
    assert so.scan_order(f'window:{size}', h, w).tolist() == so.scan_order('window', h, w, size=size).tolist() == windows
    assert so.scan_order(f'skip:{size}', h, w).tolist() == so.skip(h, w, np.int64(size)).tolist() == skipped

# ---------------------------------------------------------------- names, sizes, errors
@pytest.mark.parametrize('name, said', [('hilbrt', "Did you mean 'hilbert'"), ('Raster', "Did you mean 'raster'"), ('spiral', 'spiral_in'),
    ('window:0', 'positive integer'), ('window:x', "given 'x'"), ('window:', "given ''"), ('window:-2', "given '-2'"),
    ('snake:3', 'have a size'), ('skip:2.5', "given '2.5'"), ('', 'scan order'), (None, 'scan order'), (3, 'scan order')])
def test_a_wrong_name_is_refused(name, said):
    for call in (lambda: so.scan_order(name, 3, 5), lambda: so.orders(('raster', name), 3, 5), lambda: so.skip_orders(3, 5, 2, (name,))):
        with pytest.raises(ConfigError) as e: call()
        assert said in str(e.value)

@pytest.mark.parametrize('h, w, said', [(0, 5, 'h: given 0'), (3, -1, 'w: given -1'), (2.5, 3, 'h: given 2.5'), ('3', 3, "h: given '3'"),
    (3, None, 'w: given None'), (True, 3, 'h: given True')])
def test_a_wrong_size_is_refused(h, w, said):
    calls = [lambda f=f: f(h, w) for f in so.ORDERS.values()]
    calls += [lambda: so.scan_order('hilbert', h, w), lambda: so.orders(h=h, w=w), lambda: so.skip_orders(h, w)]
    calls.append(lambda: so.locality(so.raster(2, 2), h, w))
    for call in calls:
        with pytest.raises(ShapeError) as e: call()
        assert str(e.value).startswith(said+', expected a positive integer')

@pytest.mark.parametrize('backend', ['auto', 'chunked'])
@pytest.mark.parametrize('order, said', [([0, 1, 6], 'values from 0 to 6'), ([0, -1, 2], '-1 between pixels'), ([4, 1, 1], 'a pixel twice'),
    ([-2, 0, 1], 'values from -2 to 1'), (torch.arange(3, dtype=torch.int32), 'torch.int32'), (torch.arange(3.), 'torch.float32')])
def test_an_order_that_leaves_the_image_is_refused(backend, order, said):
    "Compiled code goes where it is told: such an order would read and write memory of others"
    order = torch.as_tensor(order)[None]
    x = [torch.ones(1, 6, 2), torch.ones(1, 1, 6, 2), -torch.ones(2, 3), torch.ones(1, 1, 6, 3), torch.ones(1, 1, 6, 3)]
    with pytest.raises(ShapeError, match=said): so.ordered_scan(*x, order=order, backend=backend)

@pytest.mark.parametrize('step', [0, -2, 2.5, '2', None, True])
def test_a_wrong_step_is_refused(step):
    for call in (lambda: so.skip_orders(3, 5, step), lambda: so.window(3, 5, step), lambda: so.skip(3, 5, step)):
        with pytest.raises(ConfigError, match='positive integer'): call()

def test_no_directions_are_refused_and_one_name_will_do():
    with pytest.raises(ConfigError, match='directions: given none'): so.orders((), 3, 5)
    assert torch.equal(so.orders('snake', 3, 5), so.orders(('snake',), 3, 5)) and so.orders(['snake', 'raster'], 3, 5).shape == (2, 15)
    assert torch.equal(so.orders('snake', np.int64(3), np.int32(5)), so.orders('snake', 3, 5))

@pytest.mark.parametrize('order', [[0, 0, 1], [0, 1, 3], [-1, 0, 1], [[0, 1, 2], [2, 1, 1]]])
def test_what_is_no_permutation_has_no_inverse(order):
    with pytest.raises(ShapeError, match='expected a permutation'): so.inverse(torch.tensor(order))

def test_several_paths_have_their_inverses_row_by_row():
    rows = so.orders(NAMES, 5, 7)
    assert torch.equal(so.inverse(rows), torch.stack([so.inverse(r) for r in rows]))
    assert torch.equal(so.inverse(so.inverse(rows)), rows)

# ---------------------------------------------------------------- a caller cannot spoil the kept ones
def test_results_are_copies():
    for call in (lambda: so.scan_order('hilbert', 6, 5), lambda: so.orders(h=6, w=5), lambda: so.skip_orders(6, 5)):
        before, spoilt = call().clone(), call()
        spoilt.fill_(7)
        assert torch.equal(call(), before) and call().data_ptr() != call().data_ptr()

def test_first_use_in_odd_places_leaves_no_trace():
    with torch.inference_mode(): so.orders(('snake', 'hilbert'), 9, 11)
    again = so.orders(('snake', 'hilbert'), 9, 11)
    assert not again.is_inference()
    torch.randn(1, 2, 99, requires_grad=True)[:, :, again].sum().backward()
    with FakeTensorMode(): fake = so.orders(('snake', 'hilbert'), 9, 13)
    assert fake.shape == (2, 117) and type(so.orders(('snake', 'hilbert'), 9, 13)) is torch.Tensor
    with torch.device('meta'): real = so.orders('zigzag', 9, 17), so.hilbert(3, 5), so.skip_orders(9, 17)
    assert not any(x.is_meta for x in real) and so.orders('zigzag', 3, 5, 'meta').is_meta
    assert so.skip_orders(3, 5, 2, device='meta').shape == so.skip_orders(3, 5, 2).shape
    torch.set_default_dtype(torch.float64)
    try: assert so.hilbert(3, 5).dtype == so.orders(h=3, w=5).dtype == torch.long
    finally: torch.set_default_dtype(torch.float32)

def test_two_threads_get_the_same():
    found = []
    def work():
        for n in range(20, 40): found.append((n, so.orders(('hilbert', 'spiral_in'), n, n-3)))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 80 and all(torch.equal(x, so.orders(('hilbert', 'spiral_in'), n, n-3)) for n, x in found)

# ---------------------------------------------------------------- many paths at once
@few
def test_default_directions_are_vmambas(h, w):
    x = torch.randn(2, 3, h, w)
    forward = torch.stack([x.flatten(2), x.mT.flatten(2)], 1)
    wanted = torch.cat([forward, forward.flip(-1)], 1)
    assert torch.equal(so.cross_scan(x), wanted)
    back = wanted[:, :2]+wanted[:, 2:].flip(-1)
    merged = back[:, 0]+back[:, 1].unflatten(2, (w, h)).mT.flatten(2)
    torch.testing.assert_close(so.cross_merge(wanted, h, w), merged)

@few
@pytest.mark.parametrize('names', [tuple(so.ORDERS), ('hilbert_reverse', 'window:3', 'window:3'), ('skip:3',)])
def test_gather_and_scatter_by_names(h, w, names):
    x, rows = torch.randn(2, 3, h, w), so.orders(names, h, w)
    seen = so.cross_scan(x, names)
    for i, row in enumerate(rows.tolist()):
        for t in (0, h*w//2, h*w-1): assert torch.equal(seen[:, i, :, t], x[:, :, row[t]//w, row[t] % w])
    y, wanted = torch.randn(2, len(names), 3, h*w), torch.zeros(2, 3, h*w)
    for i, row in enumerate(rows.tolist()):
        for t, p in enumerate(row): wanted[:, :, p] += y[:, i, :, t]
    torch.testing.assert_close(so.cross_merge(y, h, w, names), wanted)
    torch.testing.assert_close(so.cross_merge(y, h, w, rows), wanted)

@few
@pytest.mark.parametrize('step', [1, 2, 3, 9])
def test_gather_and_scatter_are_adjoint_with_padded_rows(h, w, step):
    rows = so.skip_orders(h, w, step)
    x, y = torch.randn(2, 3, h*w).double(), torch.randn(2, step**2, 3, rows.shape[1]).double()
    seen, spread = so.gather_paths(x, rows), so.scatter_paths(y, rows, h*w)
    assert ((seen*y).sum()-(x*spread).sum()).abs() < 1e-10 and not seen.transpose(1, 2)[:, :, rows < 0].any()
    assert torch.equal(so.scatter_paths(seen, rows, h*w), x)
    one_each = x.mT[:, None].expand(-1, step**2, -1, -1)
    assert torch.equal(so.gather_each(one_each, rows), seen)
    each = torch.randn(2, step**2, h*w, 3)
    own = torch.stack([so.gather_paths(v.mT, row[None])[:, 0] for v, row in zip(each.unbind(1), rows, strict=True)], 1)
    assert torch.equal(so.gather_each(each, rows), own)

def test_gradients_of_gather_and_scatter():
    rows = torch.cat([so.skip_orders(3, 4, 2), so.skip_orders(3, 4, 2).flip(0)])
    x = torch.randn(1, 2, 12, dtype=torch.float64, requires_grad=True)
    each = torch.randn(1, 8, 12, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 8, 2, rows.shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: so.gather_paths(v, rows), x)
    assert torch.autograd.gradcheck(lambda v: so.gather_each(v, rows), each)
    assert torch.autograd.gradcheck(lambda v: so.scatter_paths(v, rows, 12), y)

@pytest.mark.parametrize('h, w', [(1, 1), (1, 8), (8, 1), (5, 7), (8, 8), (6, 9)])
@pytest.mark.parametrize('step', [1, 2, 3, 5])
@pytest.mark.parametrize('names', [so.DIRECTIONS, ('snake',), ('raster', 'column')])
def test_sub_grids(h, w, step, names):
    rows = so.skip_orders(h, w, step, names)
    assert rows.shape == (step**2, -(-h//step)*-(-w//step)) and sorted(rows[rows >= 0].tolist()) == list(range(h*w))
    for i, row in enumerate(rows.tolist()):
        grid = [[pixel(r, c, w) for c in range(i//step, w, step)] for r in range(i % step, h, step)]
        flat = [p for line in grid for p in line]
        path = looped(names[i % len(names)], len(grid), len(grid[0])) if flat else []
        assert row == [flat[p] for p in path]+[-1]*(rows.shape[1]-len(flat))

def test_sub_grids_of_the_released_code_on_even_sizes():
    x = torch.randn(2, 3, 6, 8)
    turned = x.mT
    wanted = [x[:, :, ::2, ::2], turned[:, :, ::2, 1::2], x[:, :, ::2, 1::2], turned[:, :, 1::2, 1::2]]
    seen = so.cross_scan(x, so.skip_orders(6, 8, 2, ('raster', 'column')))
    assert torch.equal(seen, torch.stack([v.flatten(2) for v in wanted], 1))

def test_reversed_rows_keep_their_padding_behind():
    rows = so.skip_orders(5, 7, 2)
    for row, back in zip(rows.tolist(), so.reversed_order(rows).tolist(), strict=True):
        real = [p for p in row if p >= 0]
        assert back == real[::-1]+[-1]*(len(row)-len(real))

# ---------------------------------------------------------------- locality
@few
@pytest.mark.parametrize('name', ['raster', 'hilbert', 'skip', 'spiral_in'])
def test_locality_by_brute_force(h, w, name):
    order = so.scan_order(name, h, w).tolist()
    places = [(p//w, p % w) for p in order]
    time = {p: t for t, p in enumerate(places)}
    jumps = [math.dist(a, b) for a, b in itertools.pairwise(places)] or [0]
    gaps = [abs(time[r, c]-time[q]) for r, c in places for q in ((r+1, c), (r, c+1)) if q in time] or [0]
    near = sum(g <= 8 for g in gaps)/len(gaps) if len(places) > 1 else 0
    wanted = sum(jumps)/len(jumps), max(jumps), sum(gaps)/len(gaps), near, max(gaps)
    assert so.locality(torch.tensor(order), h, w) == pytest.approx(wanted)

def test_no_order_is_near_both_ways():
    for h, w in [(32, 32), (31, 17)]:
        table = {n: so.locality(so.scan_order(n, h, w), h, w) for n in so.ORDERS}
        for v in table.values(): assert v.worst >= min(h, w)
        assert not [n for n, v in table.items() if v.jump < 1.5 and v.worst <= min(h, w)]

# ---------------------------------------------------------------- tracing
class Merge(torch.nn.Module):
    def __init__(self, names, step=0):
        super().__init__()
        self.names, self.step = names, step

    def forward(self, x):
        h, w = x.shape[2:]
        rows = so.skip_orders(h, w, self.step, self.names, x.device) if self.step else so.orders(self.names, h, w, x.device)
        seen = so.cross_scan(x, rows)
        return so.cross_merge(seen*torch.arange(1., len(rows)+1).view(-1, 1, 1), h, w, rows)

@pytest.mark.parametrize('names, step', [(tuple(so.ORDERS), 0), (so.DIRECTIONS, 2), (('hilbert',), 3)])
def test_compiled_and_exported_with_open_sizes(names, step):
    module, x = Merge(names, step), torch.randn(1, 2, 5, 7)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend='aot_eager')(x), module(x))
    side = {2: torch.export.Dim('h', min=2, max=100), 3: torch.export.Dim('w', min=2, max=100)}
    program = torch.export.export(module, (x,), dynamic_shapes=(side,))
    for size in ((5, 7), (8, 3), (12, 12)):
        x = torch.randn(1, 2, *size)
        torch.testing.assert_close(program.module()(x), module(x))

def test_the_operator_keeps_its_promises():
    for args in (('raster,hilbert', 5, 7, 0), ('raster,column', 5, 7, 2)):
        assert set(torch.library.opcheck(so.scan_paths, (*args, torch.device('cpu'))).values()) == {'SUCCESS'}

def test_picture_of_the_paths():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig = so.show_orders({n: so.scan_order(n, 5, 7) for n in so.ORDERS}, 5, 7, torch.rand(20, 28))
    assert len(fig.axes) == 12 and [a.get_title() for a in fig.axes] == list(so.ORDERS)
    line = fig.axes[9].collections[0].get_segments()
    points = [tuple(p) for p in np.concatenate([[line[0][0]], [s[1] for s in line]])]
    assert [int(y)*7+int(x) for x, y in points] == so.hilbert(5, 7).tolist()
    assert len(so.show_orders({'raster': so.raster(1, 1)}, 1, 1).axes) == 1
    plt.close('all')
