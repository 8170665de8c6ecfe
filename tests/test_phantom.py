"The simulated cohort: seeds, physics, geometry, statistics, cache"
import json
import shutil

import numpy as np
import pytest

from i2i_mamba_nb.core import CohortError, ConfigError, numpy_rng
from i2i_mamba_nb.data import phantom as ph
from i2i_mamba_nb.data.cohort import read_manifest
from i2i_mamba_nb.data.volume import read_volume

QUICK = dict(spacing=(4., 4., 5.))
COHORT = dict(counts=dict(train=2, validation=1, test=2), spacing=(5., 5., 8.))

@pytest.fixture(scope='module')
def person():
    "One subject in all contrasts with both kinds of lesion"
    return ph.simulate_subject(21, site=1, spacing=(2., 2., 3.), contrasts=ph.CONTRASTS, pathology='both')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A small cohort and its folder"
    folder = tmp_path_factory.mktemp('cohort')
    return folder, ph.simulate_cohort(folder, **COHORT)

def mean(person, contrast, tissue, least=.9): return float(person.images[contrast][person.labels[tissue] > least].mean())

# seeds

def test_same_seed_same_bytes_other_seed_other():
    a, b, c = [ph.simulate_subject(s, contrasts=('T1', 'CT'), **QUICK) for s in (5, 5, 6)]
    for k in a.images:
        assert a.images[k].tobytes() == b.images[k].tobytes()
        assert not np.array_equal(a.images[k], c.images[k])
    assert a.parameters == b.parameters != c.parameters
    assert not np.array_equal(a.labels['gm'], c.labels['gm'])

def test_a_contrast_does_not_depend_on_the_others_asked_for():
    a, b = [ph.simulate_subject(5, contrasts=c, **QUICK).images['T2'] for c in (('T2',), ('FLAIR', 'PD', 'T2'))]
    assert np.array_equal(a, b)

def test_seed_is_the_same_person_on_every_grid():
    fine, coarse = [ph.simulate_subject(5, spacing=s, pathology='glioma').labels for s in (2., 4.)]
    volume = lambda labels, h: h**3*float(labels['wm'].sum())
    assert abs(volume(fine, 2)/volume(coarse, 4)-1) < .03
    assert ph.simulate_subject(5, spacing=2., pathology='none').labels['lesion'].max() == 0 < fine['lesion'].max()

def test_the_thread_setting_does_not_change_a_byte():
    from threadpoolctl import threadpool_limits
    with threadpool_limits(2, 'blas'): two = ph.simulate_subject(9, **QUICK).images['PD']
    with threadpool_limits(1, 'blas'): one = ph.simulate_subject(9, **QUICK).images['PD']
    assert np.array_equal(one, two)

# physics

def test_signal_equations_by_hand():
    assert ph.spin_echo(600, 80, .77, tr=500, te=15) == pytest.approx(.77*(1-.434598209)*.829029118, rel=1e-6)
    ernst = .8*.5*.0487705755/(1-.8660254038*.9512294245)*.904837418
    assert ph.gradient_echo(600, 40, .8, tr=30, te=4, flip=30) == pytest.approx(ernst, rel=1e-6)
    recovered = (1-2*.1353352832+.0003354626)*.3678794412
    assert ph.inversion_recovery(1000, 100, 1., tr=8000, te=100, ti=2000) == pytest.approx(recovered, rel=1e-6)
    assert ph.null_time(4300, 9000) == pytest.approx(4300*np.log(2/1.123271), rel=1e-3)

def test_missed_flip_angles():
    assert ph.spin_echo(1., 1., 1., tr=1e3, te=0, b1=.5) == pytest.approx(np.sin(np.pi/4)**3)
    half, full = [ph.gradient_echo(900, 1e9, 1., tr=15, te=0, flip=f, b1=b) for f, b in ((40, .5), (20, 1.))]
    assert half == pytest.approx(full)

@pytest.mark.parametrize('tesla', [1.5, 3.])
def test_relaxation_tables(tesla):
    rows = ph.RELAXATION[tesla]
    assert set(rows) == set(ph.TISSUES) == set(ph.HOUNSFIELD)
    assert rows['csf'][0] > rows['gm'][0] > rows['wm'][0] and rows['csf'][1] > rows['gm'][1] > rows['wm'][1]
    assert rows['csf'][2] > rows['gm'][2] > rows['wm'][2]
    own = ph.draw_relaxation(3, tesla)
    for k in (0, 1): assert own['plaque'][k]/rows['plaque'][k] == pytest.approx(own['vascular'][k]/rows['vascular'][k])
    assert own['plaque'][2] > 1.15*own['vascular'][2] and own['gm'] != ph.draw_relaxation(4, tesla)['gm']

@pytest.mark.parametrize('site', range(len(ph.SITES)))
def test_contrast_orderings_at_every_site(site):
    p = ph.simulate_subject(30+site, site=site, spacing=(3., 3., 4.), contrasts=('T1', 'T2', 'FLAIR'), pathology='none')
    t1, t2, flair = [[mean(p, c, t) for t in ('csf', 'gm', 'wm')] for c in ('T1', 'T2', 'FLAIR')]
    assert t1[2] > 1.1*t1[1] > 1.1*1.3*t1[0]
    assert t2[0] > 1.5*t2[1] > 1.5*t2[2]
    assert flair[0] < .35*min(flair[1:])

def test_enhancement_and_lookalike_lesions(person):
    ratio = [mean(person, c, 'rim', .7)/mean(person, c, 'wm') for c in ('T1', 'T1POST')]
    assert ratio[1] > 1.3*ratio[0]
    assert mean(person, 'PD', 'plaque', .8) > 1.1*mean(person, 'PD', 'vascular', .8)
    for c in ('T1', 'T2'): assert abs(mean(person, c, 'plaque', .8)/mean(person, c, 'vascular', .8)-1) < .15

def test_hounsfield_numbers(person):
    ct, labels = person.images['CT'], person.labels
    assert -1024 <= ct.min() and ct.max() <= 3071
    assert ct[labels['background'] == 1].mean() == pytest.approx(-1000, abs=8)
    assert np.percentile(ct[labels['bone']+labels['marrow'] > .99], 10) > 300
    assert ct[labels['bone'] > .9].mean() > 800
    assert 15 < mean(person, 'CT', 'wm') < mean(person, 'CT', 'gm') < 50 and -5 < mean(person, 'CT', 'csf') < 20

def test_two_sites_differ_in_contrast_not_in_anatomy():
    a, b = [ph.simulate_subject(8, site=s, contrasts=('T2',), pathology='none', **QUICK) for s in (2, 3)]
    assert np.array_equal(a.labels['wm'], b.labels['wm'])
    ratio = [mean(p, 'T2', 'csf', .8)/mean(p, 'T2', 'wm', .8) for p in (a, b)]
    assert ratio[0] > 1.15*ratio[1]

def test_own_site():
    quiet = ph.replace(ph.SITES[0], name='mine', sequences={'PD': ph.replace(ph.SITES[0].sequences['PD'], snr=1e6, bias=0., coil=0.)})
    p = ph.simulate_subject(8, site=quiet, contrasts=('PD',), **QUICK)
    assert p.parameters['site'] == 'mine' and p.images['PD'][p.labels['background'] == 1].max() < 1e-2*p.images['PD'].max()

# statistics

def test_rician_statistics():
    for level, sigma in ((0., 2.), (1., 2.), (40., 2.)):
        x = ph.rician(np.full(400_000, level), sigma, numpy_rng(0, level)).astype(float)
        assert (x**2).mean() == pytest.approx(level**2+2*sigma**2, rel=.01) and x.min() >= 0
    air = ph.rician(np.zeros(400_000), 2., numpy_rng(1, 'air'))
    assert air.mean() == pytest.approx(2*np.sqrt(np.pi/2), rel=.01) and air.std() == pytest.approx(2*np.sqrt(2-np.pi/2), rel=.01)

def test_noise_of_an_image_is_what_its_sequence_says(person):
    air = person.images['T2'][person.labels['background'] == 1]
    level = person.images['T2'][person.labels['brain'] > .9].mean()
    sigma = level/person.parameters['sequences']['T2']['snr']
    assert air.mean() == pytest.approx(sigma*np.sqrt(np.pi/2), rel=.1)

def test_bias_fields_differ_by_modality():
    base = ph.SITES[0].sequences
    flat = {c: ph.replace(base[c], snr=1e6, bias=0., coil=0.) for c in ('T1', 'T2')}
    shaded = {c: ph.replace(flat[c], bias=.07) for c in flat}
    a, b = [ph.simulate_subject(4, site=ph.replace(ph.SITES[0], sequences=s), contrasts=('T1', 'T2'), pathology='none', **QUICK)
        for s in (flat, shaded)]
    inside = a.labels['wm'] > .5
    field = {c: np.log(b.images[c][inside]/a.images[c][inside]) for c in flat}
    assert all(.02 < f.std() < .2 for f in field.values())
    assert abs(np.corrcoef(field['T1'], field['T2'])[0, 1]) < .9

def test_smooth_field_statistics_and_slices():
    axis = np.arange(-90, 91, 1.5)
    f = ph.smooth_field(numpy_rng(2, 'f'), (axis,)*3, 6.)
    assert abs(f.mean()) < .05 and abs(f.std()-1) < .05
    near, far = [np.corrcoef(f[:-k].ravel(), f[k:].ravel())[0, 1] for k in (1, 16)]
    assert near > .9 and abs(far) < .1
    m = ph.slice_matrix(9, 1., 3, 4.)
    assert m.shape == (3, 9) and np.allclose(m.sum(1), 1) and np.allclose(m[1], np.array([0, 0, .5, 1, 1, 1, .5, 0, 0])/4)

def test_thick_slices_are_averages_of_thin_ones():
    thick, thin = [ph.simulate_subject(4, spacing=(4., 4., h), pathology='none').labels['gm'] for h in (4., 1.)]
    assert np.abs(thick-thin.reshape(*thick.shape, 4).mean(-1)).max() < 1e-5

# geometry

@pytest.mark.parametrize('seed', range(4))
def test_warps_are_invertible(seed):
    warp, least = ph.draw_warp(seed, (((20., 10., 10.), 20., .3),))
    assert ph.jacobian(warp).min()/warp.scale.prod() == pytest.approx(least) and least > .15
    t, first = ph.warp_points(warp), np.array([a[0] for a in warp.axes])[:, None]
    at = lambda x: ph.sample(t, (x-first)/3, border='nearest')
    x = numpy_rng(seed, 'x').uniform(-55, 55, (3, 100))
    goal, guess = at(x), x+numpy_rng(seed, 'y').normal(0, 4, x.shape)
    for _ in range(150): guess = guess+.5*(goal-at(guess))/warp.scale[:, None]
    assert np.abs(guess-x).max() < .1

def test_displacement_moves_as_far_as_it_says():
    warp, _ = ph.draw_warp(0)
    assert 2 < warp.shift.std() < 4 and np.abs(warp.shift.mean((1, 2, 3))).max() < 2
    still = warp._replace(shift=0*warp.shift, angles=np.zeros(3), pushes=())
    moved = still._replace(shift=still.shift+np.float32([2, 0, -1])[:, None, None, None])
    x = np.stack(np.meshgrid(*warp.axes, indexing='ij'))+np.array([0, 0, ph.LOWER])[:, None, None, None]
    assert np.allclose(ph.warp_points(still), x*warp.scale[:, None, None, None], atol=1e-3)
    step = (ph.warp_points(moved)-ph.warp_points(still)).reshape(3, -1)
    assert np.allclose(step, (np.array([2, 0, -1])*warp.scale)[:, None], atol=1e-3)

def test_folding_displacement_is_damped(monkeypatch):
    monkeypatch.setattr(ph, 'LEVELS', ((12., 6.),))
    warp, least = ph.draw_warp(0)
    assert least > .15
    wild = warp._replace(shift=6*warp.shift)
    assert ph.jacobian(wild).min() < 0

def test_shares_add_up_and_lesions_lie_in_the_brain(person):
    shares = np.stack([person.labels[n] for n in (*ph.TISSUES, 'background')])
    assert shares.min() >= -1e-6 and np.abs(shares.sum(0)-1).max() < 1e-4
    partial = (shares > .1) & (shares < .9)
    assert partial.any(0).mean() > .05
    lesion = person.labels['lesion']
    assert set(np.unique(lesion)) == set(range(6)) and person.labels['brain'][lesion > 0].min() > .3
    assert np.array_equal(person.labels['glioma'], lesion >= 3) and person.labels['glioma'].any()

def test_people_differ_in_volumes():
    v = np.array([[float(p.labels[t].sum()) for t in ('csf', 'gm', 'wm')] for p in
        (ph.simulate_subject(s, contrasts=('PD',), pathology='none', whole_head=False, **QUICK) for s in range(5))])
    assert (np.ptp(v/v.sum(1, keepdims=True), 0) > (.02, .02, .005)).all() and np.ptp(v.sum(1))/v.sum(1).mean() > .01

def test_full_size_grid():
    grid = ph.make_grid(1.)
    assert grid.shape == (160, 192, 160) and grid.cuts == 1
    assert np.allclose(ph.affine_of(grid)@[79.5, 95.5, 79.5, 1], [0, 0, 0, 1])
    assert ph.make_grid((1.5, 1.5, 3.)).shape[:2] == (107, 128)

def test_brain_extracted_images():
    p = ph.simulate_subject(2, contrasts=('T1', 'CT'), whole_head=False, **QUICK)
    assert (p.images['T1'][p.labels['brain'] <= .5] == 0).all() and (p.images['T1'][p.labels['brain'] > .5] > 0).all()
    assert p.images['CT'].max() > 300

# bad input

@pytest.mark.parametrize('bad, text', [(dict(contrasts=('T3',)), 'contrast'), (dict(site=4), 'site'), (dict(spacing=0.), '0.5 to 8 mm'),
    (dict(spacing=(1., 2.)), '0.5 to 8 mm'), (dict(spacing=float('nan')), '0.5 to 8 mm'), (dict(pathology='stroke'), 'pathology')])
def test_illegal_settings(bad, text):
    with pytest.raises(ConfigError, match=text): ph.simulate_subject(0, **bad)

@pytest.mark.parametrize('bad', [dict(counts=dict(training=2)), dict(counts=dict(train=0)), dict(counts=dict(train=-1)),
    dict(counts=dict(train=1.5)), dict(contrasts=()), dict(contrasts=('MRA',)), dict(sites=()), dict(spacing=20.)])
def test_illegal_cohorts_leave_no_file(bad, tmp_path):
    with pytest.raises(ConfigError): ph.simulate_cohort(tmp_path/'c', **bad)
    assert not (tmp_path/'c').exists()

# cohort

def test_cohort_on_the_disk(made):
    folder, cohort = made
    assert [len(cohort.split(s)) for s in ('train', 'validation', 'test')] == [2, 1, 2]
    assert cohort.modalities == ('T1', 'T2', 'PD') and cohort.info['simulated'] is True and 'SIMULATED' in cohort.info['notice']
    used = {s.split: set() for s in cohort.subjects}
    for s in cohort.subjects:
        used[s.split].add(cohort.info['subjects'][s.patient]['site'])
        volume, lesion = read_volume(s.paths['T1']), read_volume(s.paths['lesion'])
        assert b'SIMULATED' in volume.header['descrip'].item() and volume.shape == lesion.shape and lesion.data.max() > 0
    assert used['test'] <= used['train']
    assert {v['pathology'] for v in cohort.info['subjects'].values()} == {'ms', 'glioma'}
    json.dumps(cohort.info, allow_nan=False)

def test_a_file_holds_what_simulate_subject_gives(made):
    folder, cohort = made
    s = cohort.split('test')[1]
    record = cohort.info['subjects'][s.patient]
    again = ph.simulate_subject(record['seed'], site=1, spacing=COHORT['spacing'], pathology=record['pathology'])
    volume = read_volume(s.paths['PD'])
    assert np.array_equal(volume.data, again.images['PD']) and np.allclose(volume.affine, again.affine)

def test_cache_is_reused_and_rewritten(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path/'c')
    files = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    def refuse(done, total): raise AssertionError('simulated again')
    ph.simulate_cohort(folder, progress=refuse, **COHORT)
    assert files == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    calls = []
    smaller = dict(COHORT, counts=dict(train=1, validation=0, test=0), seed=1)
    other = ph.simulate_cohort(folder, progress=lambda *a: calls.append(a), **smaller)
    assert calls == [(1, 1)] and len(other.subjects) == 1 and read_manifest(folder/'manifest.csv').info == other.info
    assert len(list(folder.iterdir())) == 4+2, 'files of the older cohort are left over'

def test_damaged_cache_is_made_again(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path/'c')
    victim, whole = folder/'simulated01_T1.nii.gz', (made[0]/'simulated01_T1.nii.gz').read_bytes()
    for damage in (lambda: victim.write_bytes(whole[:-9]), victim.unlink):
        damage()
        ph.simulate_cohort(folder, **COHORT)
        assert victim.read_bytes() == whole

def test_somebody_elses_manifest_is_refused(tmp_path):
    (tmp_path/'manifest.csv').write_text('patient,split,T1\n')
    with pytest.raises(CohortError, match='simulated cohort'): ph.simulate_cohort(tmp_path, **COHORT)
    assert [p.name for p in tmp_path.iterdir()] == ['manifest.csv']

# the task

def test_pixels_alone_do_not_tell_pd():
    "Voxels alike in T1 and T2 differ in PD by much more than PD's own noise: the surroundings must help"
    p = ph.simulate_subject(3, spacing=(2., 2., 3.), pathology='ms')
    head = p.labels['background'] < .5
    def window(c):
        low, high = np.percentile(p.images[c][head], [.5, 99.5])
        return np.clip((p.images[c][head]-low)/(high-low), 0, .999)
    t1, t2, pd = [window(c) for c in ('T1', 'T2', 'PD')]
    pair = (t1*40).astype(int)*40+(t2*40).astype(int)
    count = np.bincount(pair, minlength=1600)
    expected = np.bincount(pair, pd, 1600)/np.maximum(count, 1)
    shares = np.stack([p.labels[n][head] for n in ph.TISSUES], 1)
    floor = pd-shares@np.linalg.lstsq(shares, pd, rcond=None)[0]
    pixel = pd-expected[pair]
    assert 10*np.log10((pixel**2).mean()/(floor**2).mean()) > 5
