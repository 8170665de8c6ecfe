"The simulated pelvis: shapes, people, MR, CT, and that the task is more than a table"
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from i2i_mamba_nb.core import ConfigError, numpy_rng
from i2i_mamba_nb.data import pelvis as pv
from i2i_mamba_nb.data.phantom import Sequence, Site, replace

QUICK = dict(spacing=(6., 6., 10.))
CODE = {n: k for k, n in enumerate(pv.TISSUES, 1)}

@pytest.fixture(scope='module')
def person():
    "One subject in all contrasts with all shares"
    return pv.simulate_pelvis(11, spacing=(2.5, 2.5, 5.), keep='all')

def mean(p, contrast, tissue, least=.95): return float(p.images[contrast][p.labels[tissue] > least].mean())
def middle(p, tissue): return (p.affine@[*np.argwhere(p.labels['tissue'] == CODE[tissue]).mean(0), 1])[:3]

# shapes

@pytest.mark.parametrize('centre, shape', [((3, -2, 5), lambda p: pv.ellipsoid(p, (3, -2, 5), (20, 9, 14), 25)),
    ((0, 0, 0), lambda p: pv.capsule(p, (-9, 3, 0), (15, -4, 12), (5, 8))), ((100, 0, -5), pv.femur), ((85, -5, 5), pv.hip),
    ((10, -88, 70), pv.sacrum)])
def test_distances_have_unit_slope_at_the_surface(centre, shape):
    axes = [c+np.arange(-30, 30.1, 1.) for c in centre]
    p = np.stack(np.meshgrid(*axes, indexing='ij')).astype(np.float32)
    d = shape(p)
    slope = np.sqrt(sum(g**2 for g in np.gradient(d, 1.)))[np.abs(d) < 1.5]
    assert len(slope) > 500 and abs(np.median(slope)-1) < .12 and np.isfinite(d).all()

def test_capsule_against_dense_sampling():
    a, b, ends = np.array([-8., 3, 1]), np.array([11., -5, 9]), (3., 3.)
    points = numpy_rng(0, 'p').uniform(-25, 25, (3, 400)).astype(np.float32)
    rod = a[:, None]+(b-a)[:, None]*np.linspace(0, 1, 2001)
    near = np.sqrt(((points[:, :, None]-rod[:, None])**2).sum(0)).min(1)-3
    assert np.abs(pv.capsule(points, a, b, ends)-near).max() < 1e-2

def test_profile_and_mirror():
    z = np.float32(np.linspace(-150, 150, 999))
    assert np.abs(pv.profile(z, ((-32, 1), (45, 38), (140, 40)))-np.interp(z, (-32, 45, 140), (1, 38, 40))).max() < .05
    p = numpy_rng(1, 'p').uniform(-120, 120, (3, 500)).astype(np.float32)
    m = pv.draw_person(1)
    one, other = [pv.bones(np.stack([s*p[0], p[1], p[2]]), m, 2.) for s in (1, -1)]
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(one, other, strict=True))

def test_compose_keeps_the_body():
    rng = numpy_rng(2, 'c')
    stack = [(pv.TISSUES[k], rng.random((4, 5, 3), dtype=np.float32)) for k in rng.integers(0, 13, 20)]
    body = rng.random((4, 5, 3), dtype=np.float32)
    shares = pv.compose(stack, body)
    assert np.allclose(shares.sum(0), body, atol=1e-5) and shares.min() >= 0
    few = pv.compose(stack[:2], body)
    assert np.allclose(few.sum(0), body, atol=1e-6) and few[0].max() > .1, 'what no layer covers is skin'
    top = pv.TISSUES.index(stack[-1][0])
    assert (shares[top] >= body*stack[-1][1]-1e-6).all()

# seeds

def test_same_seed_same_bytes_other_seed_other():
    a, b, c = [pv.simulate_pelvis(s, **QUICK) for s in (5, 5, 6)]
    for k in a.images:
        assert a.images[k].tobytes() == b.images[k].tobytes() and not np.array_equal(a.images[k], c.images[k])
    assert a.parameters == b.parameters != c.parameters and not np.array_equal(a.labels['tissue'], c.labels['tissue'])

def test_one_contrast_does_not_depend_on_the_others():
    a, b = [pv.simulate_pelvis(5, contrasts=c, **QUICK).images['T2'] for c in (('T2',), ('CT', 'T2', 'T1'))]
    assert np.array_equal(a, b)

def test_threads_do_not_change_a_byte(monkeypatch):
    with threadpool_limits(2, 'blas'): two = pv.simulate_pelvis(9, **QUICK).images
    pool = pv.ThreadPoolExecutor
    monkeypatch.setattr(pv, 'ThreadPoolExecutor', lambda n: pool(1))
    with threadpool_limits(1, 'blas'): one = pv.simulate_pelvis(9, **QUICK).images
    assert all(one[c].tobytes() == two[c].tobytes() for c in one)

def test_a_seed_is_the_same_person_on_every_grid():
    names = 'urine', 'marrow', 'fat'
    fine, coarse = [pv.simulate_pelvis(5, spacing=s, contrasts=('CT',), keep=names) for s in ((3., 3., 5.), (6., 6., 7.5))]
    for n in names:
        a, b = [float(p.labels[n].sum()*v) for p, v in ((fine, 45.), (coarse, 270.))]
        assert abs(a/b-1) < .08, n

# anatomy

def test_shares_and_labels(person):
    shares = np.stack([person.labels[n] for n in pv.TISSUES])
    assert shares.min() >= -1e-5 and shares.sum(0).max() <= 1+1e-4
    assert ((shares > .1) & (shares < .9)).any(0).mean() > .03, 'no partial volume'
    body = shares.sum(0) > .5
    assert np.array_equal(body, person.labels['body']) and np.array_equal(person.labels['tissue'] > 0, body)
    assert np.array_equal(person.labels['tissue'][body], shares.argmax(0)[body]+1)

@pytest.mark.parametrize('seed', [1, 2, 3])
def test_where_organs_lie(seed):
    p = pv.simulate_pelvis(seed, spacing=(3., 3., 5.), contrasts=('CT',))
    assert middle(p, 'prostate')[2] < middle(p, 'urine')[2] and abs(middle(p, 'urine')[0]) < 20
    low = range(int((-15-15)/5+22), int((20-15)/5+22))
    slices = [p.labels['tissue'][..., k] for k in low]
    where = lambda s, tissue: np.argwhere(s == CODE[tissue])
    assert all(where(s, 'muscle').size and where(s, 'cortex').size for s in slices)
    for s in slices:
        gas, stool, urine = where(s, 'gas'), where(s, 'stool'), where(s, 'urine')
        if len(gas) > 4 and len(stool) > 4: assert gas[:, 1].mean() > stool[:, 1].mean(), 'gas below the contents'
        if len(urine) > 9 and len(stool): assert urine[:, 1].mean() > stool[:, 1].mean(), 'bladder behind the rectum'

def test_both_femora_and_the_sacrum(person):
    from scipy.ndimage import label
    z = lambda mm: int(round((mm-15)/5+(person.images['CT'].shape[2]-1)/2))
    bone = np.isin(person.labels['tissue'], [CODE['cortex'], CODE['marrow']])
    parts, n = label(bone[..., z(-55)])
    sides = {np.sign(np.argwhere(parts == k)[:, 0].mean()-bone.shape[0]/2) for k in range(1, n+1)}
    assert n >= 4 and sides == {-1, 1}
    high = np.argwhere(bone[..., z(90)])
    assert (np.abs(high[:, 0]-bone.shape[0]/2) < 8).any() and bone[..., z(0)].sum() > 200

def test_slices_differ_and_no_side_is_a_mirror(person):
    t = person.labels['tissue']
    assert all((t[..., k] != t[..., k+1]).mean() > .005 for k in range(t.shape[2]-1))
    assert (t != t[::-1]).mean() > .03

def test_people_differ():
    people = [pv.simulate_pelvis(s, contrasts=('CT',), keep=('urine', 'fat', 'gas', 'cortex'), **QUICK) for s in range(8)]
    volume = lambda n: np.array([float(p.labels[n].sum()) for p in people])
    body = np.array([p.labels['body'].sum() for p in people])
    assert body.std()/body.mean() > .04 and (volume('fat')/body).std() > .02
    for n in ('urine', 'gas', 'cortex'): assert volume(n).std()/volume(n).mean() > .1, n

@pytest.mark.parametrize('seed', range(12))
def test_space_does_not_fold(seed):
    axes = [np.arange(-200., 201, 8), np.arange(-150., 151, 8), np.arange(-104., 105, 8)]
    p = pv.place(pv.draw_person(seed), axes)
    J = np.stack([np.stack(np.gradient(p[k], 8.), -1) for k in range(3)], -2)
    assert np.linalg.det(J).min() > .3

# physics

@pytest.mark.parametrize('site', range(len(pv.PELVIS_SITES)))
def test_contrasts_at_every_site(site):
    p = pv.simulate_pelvis(20+site, site=site, spacing=(4., 4., 7.5), keep='all')
    assert mean(p, 'T1', 'fat') > 1.25*mean(p, 'T1', 'muscle', .9) > 1.25*mean(p, 'T1', 'urine')
    assert mean(p, 'T2', 'urine') > mean(p, 'T2', 'fat') > 1.8*mean(p, 'T2', 'muscle', .9)
    for c in ('T1', 'T2'): assert mean(p, c, 'cortex', .9) < .2*mean(p, c, 'fat')
    assert mean(p, 'T2', 'peripheral', .9) > mean(p, 'T2', 'prostate', .9)

def test_hounsfield_numbers(person):
    bounds = dict(fat=(-115, -80), muscle=(40, 75), urine=(-12, 22), cortex=(800, 1250), marrow=(100, 300), gas=(-1000, -850))
    for n, (low, high) in bounds.items(): assert low < mean(person, 'CT', n, .9 if n == 'muscle' else .97) < high, n
    ct = person.images['CT']
    assert ct.min() >= -1024 and ct.max() <= 3071 and (ct[:3] == -1000).all()
    fat = ct[person.labels['fat'] > .999]
    assert 8 < fat.std() < 30

def test_noise_is_rician_and_what_the_sequence_says():
    p = pv.simulate_pelvis(3, contrasts=('T2',), **QUICK)
    air = p.images['T2'][:5]
    assert (air**2).mean() == pytest.approx((air.mean()/np.sqrt(np.pi/2))**2*2, rel=.03) and air.min() >= 0
    quiet = replace(pv.PELVIS_SITES[0], name='mine', sequences=dict(T2=replace(pv.PELVIS_SITES[0].sequences['T2'], snr=1e6)))
    calm = pv.simulate_pelvis(3, site=quiet, contrasts=('T2',), **QUICK)
    assert calm.images['T2'][:5].max() < 1e-4*calm.images['T2'].max() and calm.parameters['site'] == 'mine'

def test_noise_is_new_in_every_slice_and_contrast():
    p = pv.simulate_pelvis(3, contrasts=('T1', 'T2'), **QUICK)
    air = [p.images[c][:5, :, k].ravel() for c in ('T1', 'T2') for k in (3, 4, 9)]
    assert np.abs(np.corrcoef(air)-np.eye(6)).max() < .3

def test_signal_equation_by_hand():
    s = Sequence('spin_echo', 500., 20.)
    assert pv.tissue_signal(s, (500/np.log(2), 20/np.log(2), .8), 3.) == pytest.approx(.8/4)
    g = Sequence('gradient_echo', 500., 0., flip=90.)
    assert pv.tissue_signal(g, (500/np.log(2), 50., 1.), 1.5) == pytest.approx(.5)

def test_thick_slices_are_averages_of_thin_ones():
    settings = dict(extent=(448., 448., 48.), contrasts=('CT',), keep=('fat',))
    thick, thin = [pv.simulate_pelvis(4, spacing=(6., 6., h), **settings).labels['fat'] for h in (8., 2.)]
    assert np.abs(thick-thin.reshape(*thick.shape, 4).mean(-1)).max() < .02

def test_couch_is_for_ct_only():
    with_it, without = [pv.simulate_pelvis(6, couch=c, **QUICK) for c in (True, False)]
    assert all(np.array_equal(with_it.images[c], without.images[c]) for c in ('T1', 'T2'))
    differ = with_it.images['CT'] != without.images['CT']
    assert 50 < differ.sum() and not (differ & with_it.labels['body']).any() and with_it.images['CT'][differ].max() > -500
    low = np.argwhere(differ)[:, 1].mean() < np.argwhere(with_it.labels['body'])[:, 1].mean()
    assert low, 'the couch lies in front of the patient'

def test_paper_grid_without_voxels():
    g = pv.pelvis_grid((.875, .875, 2.5))
    assert g.shape == (512, 512, 180) and g.cuts == 2
    assert np.allclose(pv.affine_of(g)@[255.5, 255.5, 44.5, 1], [0, 0, 0, 1])

def test_labels_are_small_by_default():
    p = pv.simulate_pelvis(1, **QUICK)
    assert set(p.labels) == {'tissue', 'body'} and p.labels['tissue'].dtype == np.uint8 and p.labels['body'].dtype == bool
    assert all(i.dtype == np.float32 and np.isfinite(i).all() for i in p.images.values())

# the task

def test_pixels_alone_do_not_tell_ct(person):
    "Bone and gas are equally dark; marrow, and fat mixed with others, overlap: the best table leaves what shares would explain"
    body = person.labels['body']
    t1, t2 = [np.clip(person.images[c][body]/np.percentile(person.images[c][body], 99.5), 0, .999) for c in ('T1', 'T2')]
    ct = person.images['CT'][body]
    pair = (t1*40).astype(int)*40+(t2*40).astype(int)
    table = np.bincount(pair, ct, 1600)/np.maximum(np.bincount(pair, minlength=1600), 1)
    shares = np.stack([person.labels[n][body] for n in pv.TISSUES], 1)
    floor = ct-shares@np.linalg.lstsq(shares, ct, rcond=None)[0]
    assert 10*np.log10(((ct-table[pair])**2).mean()/(floor**2).mean()) > 5
    dark = (t1 < .12) & (t2 < .12)
    assert np.percentile(ct[dark], 5) < -600 and np.percentile(ct[dark], 95) > 600

def test_surroundings_are_worth_a_decibel():
    from scipy.ndimage import gaussian_filter
    from sklearn.ensemble import HistGradientBoostingRegressor
    def data(p, wide):
        body, out = p.labels['body'], []
        for c in ('T1', 'T2'):
            v = p.images[c]/np.percentile(p.images[c][body], 99.5)
            out += [v]+[gaussian_filter(v, (r, r, 0)) for r in (1, 2, 4)]*wide
        return np.stack([o[body] for o in out], 1), p.images['CT'][body]
    people = [pv.simulate_pelvis(s, site=s % 3, spacing=(5., 5., 9.)) for s in range(30, 36)]
    def error(wide):
        x, y = [np.concatenate(v)[::4] for v in zip(*(data(p, wide) for p in people[:5]), strict=True)]
        model = HistGradientBoostingRegressor(max_iter=40, random_state=0).fit(x, y)
        x, y = data(people[5], wide)
        return np.mean((model.predict(x)-y)**2)
    gain = 10*np.log10(error(False)/error(True))
    assert gain > 1, gain

# bad input

@pytest.mark.parametrize('bad, text', [(dict(contrasts=('PD',)), 'contrast'), (dict(site=3), 'site'), (dict(site='x'), 'site'),
    (dict(spacing=0.), '0.5 to 10'), (dict(spacing=(1., 2.)), '0.5 to 10'), (dict(spacing=float('nan')), '0.5 to 10'),
    (dict(extent=(900., 448., 225.)), 'extent'), (dict(extent=5.), 'extent'), (dict(keep=('lung',)), 'tissue')])
def test_illegal_settings(bad, text):
    with pytest.raises(ConfigError, match=text): pv.simulate_pelvis(0, **bad)

def test_a_site_without_the_contrast_is_refused():
    with pytest.raises(ConfigError, match='T1'): pv.simulate_pelvis(0, site=Site('bare', 3., .1, .1, {}), contrasts=('T1',), **QUICK)
