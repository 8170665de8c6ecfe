"Stacks of pictures: MATLAB, NumPy and PNG files, sound and damaged, into volumes and manifests"
import functools
import json
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from i2i_mamba_nb.core import CohortError, ConfigError, I2IError, numpy_rng, sha256
from i2i_mamba_nb.data.cohort import read_manifest, require
from i2i_mamba_nb.data.imports import (
    Stack,
    detect_import,
    import_folder,
    import_mat,
    import_npy,
    import_pngs,
    open_mat,
    open_npy,
    open_pngs,
    pairing,
    read_png,
)
from i2i_mamba_nb.data.slices import SlicePairs, to_images
from i2i_mamba_nb.data.volume import VolumeError, read_grid, read_volume

h5py = pytest.importorskip('h5py')
SHARED = Path(__file__).resolve().parent.parent.parent/'shared'/'data'/'ixi_slices'
UNKNOWN = pytest.mark.filterwarnings('ignore:patients unknown')

@functools.cache
def heads(n=12, h=17, w=13, key=0):
    "n upright pictures of an ellipse that shrinks, bright in front and on the left"
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing='ij')
    grow = np.linspace(.95, .3, n)[:, None, None]
    noise = numpy_rng(0, 'heads', key).uniform(0, .1, (n, h, w))
    return (((x/.8)**2+(y/.95)**2 < grow)*(.6-.2*y-.1*x+noise)).astype('f4')

def hdf5(path, data, key='data_fs', **options):
    with h5py.File(path, 'w') as f: f.create_dataset(key, data=data, **options)
    return path

def png(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data).save(path)
    return path
grey = lambda x: (255*x/x.max()).astype('u1')

# ---- sound files ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('options', [{}, dict(compression='gzip'), dict(key='images'),
    dict(compression='gzip', shuffle=True, fletcher32=True, chunks=(5, 4, 7))])
@pytest.mark.parametrize('dtype', ['f4', 'f8', '>f4', 'u1', 'i2', 'u2'])
def test_hdf5(tmp_path, options, dtype):
    x = (200*heads()).astype(dtype)
    stack = open_mat(hdf5(tmp_path/'a.mat', x.transpose(0, 2, 1), **options))
    assert stack.shape == x.shape
    for a, b in ((0, 12), (3, 5), (11, 12)): assert np.array_equal(stack.pictures(a, b), x[a:b].astype('f4'))

@pytest.mark.parametrize('packed', [False, True])
def test_both_versions_of_matlab_agree(tmp_path, packed):
    "One array as MATLAB sees it (h, w, n): version 5 holds it in its order, version 7.3 shows its axes reversed"
    matlab = heads().transpose(1, 2, 0)
    savemat(tmp_path/'five.mat', dict(data_fs=matlab, text='x', cell=np.array([1, 'a'], object)), do_compression=packed)
    hdf5(tmp_path/'seven.mat', matlab.T)
    a, b = open_mat(tmp_path/'five.mat'), open_mat(tmp_path/'seven.mat')
    assert a.shape == b.shape == heads().shape and np.array_equal(a.pictures(0, 12), b.pictures(0, 12))
    assert np.array_equal(a.pictures(2, 3), heads()[2:3])

def test_matlab_header_before_hdf5(tmp_path):
    hdf5(tmp_path/'a.mat', heads().transpose(0, 2, 1))
    with h5py.File(tmp_path/'b.mat', 'w', userblock_size=512) as f: f['data_fs'] = heads().transpose(0, 2, 1)
    raw = bytearray((tmp_path/'b.mat').read_bytes())
    raw[:128] = b'MATLAB 7.3 MAT-file, Platform: GLNXA64'.ljust(124)+b'\0\2IM'
    (tmp_path/'b.mat').write_bytes(raw)
    assert np.array_equal(open_mat(tmp_path/'b.mat').pictures(0, 12), heads())

def test_a_single_picture_and_a_contrast_axis(tmp_path):
    savemat(tmp_path/'a.mat', dict(data_fs=heads()[0]))
    assert open_mat(tmp_path/'a.mat').shape == (1, 17, 13) and np.array_equal(open_mat(tmp_path/'a.mat').pictures(0, 1), heads()[:1])
    assert open_mat(hdf5(tmp_path/'b.mat', heads().transpose(0, 2, 1)[None])).shape == (12, 17, 13)
    with pytest.raises(VolumeError, match='one contrast'): open_mat(hdf5(tmp_path/'c.mat', np.zeros((2, 12, 13, 17))))

@pytest.mark.parametrize('dtype', ['f4', '>f8', 'u1', 'i4', '?', 'f2'])
@pytest.mark.parametrize('axes', ['nhw', 'whn'])
def test_npy(tmp_path, dtype, axes):
    x = (200*heads()).astype(dtype)
    for save in (np.ascontiguousarray, np.asfortranarray):
        np.save(tmp_path/'a.npy', save(x.transpose(['nhw'.index(c) for c in axes])))
        assert np.array_equal(open_npy(tmp_path/'a.npy', axes=axes).pictures(1, 9), x[1:9].astype('f4'))

def test_png_kinds(tmp_path):
    one = grey(heads()[0])
    for name, data in dict(L=one, wide=one.astype('u2')*200, bit=one > 99, rgb=np.stack([one]*3, 2), rgba=np.stack([one]*3+[one*0+255], 2),
        la=np.stack([one, one*0+255], 2)).items():
        assert np.array_equal(read_png(png(tmp_path/f'{name}.png', data)), data if data.ndim == 2 else one), name
    Image.fromarray(one).convert('P').save(tmp_path/'p.png')
    Image.fromarray(one).save(tmp_path/'i.png', optimize=True)
    assert np.array_equal(read_png(tmp_path/'p.png'), one) and np.array_equal(read_png(tmp_path/'i.png'), one)

# ---- damaged files --------------------------------------------------------------------------------------------------------------
def matfile(elements, text=b'MATLAB 5.0 MAT-file', version=b'\0\1IM'): return text.ljust(124)+version+elements
def element(kind, data): return struct.pack('<II', kind, len(data))+data+bytes(-len(data) % 8)
def matrix(shape, data, kind=7, stored=7, flags=0):
    parts = [element(6, struct.pack('<II', kind | flags, 0)), element(5, struct.pack(f'<{len(shape)}i', *shape)), element(1, b'data_fs'),
        element(stored, data)]
    return element(14, b''.join(parts))
def packed(data, more=b''): z = zlib.compress(data)+more; return struct.pack('<II', 15, len(z))+z
FOUR = np.arange(4, dtype='<f4').tobytes()
BOMB = packed(matrix((512, 512, 256), bytes(4*2**20)))

MATS = {
    'empty': b'', 'text': b'<!DOCTYPE html><html>', 'zip': b'PK\3\4'+bytes(600), 'pointer': b'version https://git-lfs.github.com/spec/v1',
    'version 4': struct.pack('<5I', 0, 1, 1, 0, 2)+b'x\0'+bytes(600), 'header alone': matfile(b''),
    'byte order': matfile(b'', version=b'\0\1XX'),
    'cut': matfile(matrix((2, 2), FOUR))[:-9], 'length beyond': matfile(element(14, b'')[:4]+b'\xff\xff\xff\x7f'),
    'no parts': matfile(element(14, b'')), 'class': matfile(matrix((2, 2), FOUR, kind=1)), 'opaque': matfile(matrix((2, 2), FOUR, kind=17)),
    'complex': matfile(matrix((2, 2), FOUR, flags=0x800)), 'too few numbers': matfile(matrix((3, 2), FOUR)),
    'type of numbers': matfile(matrix((2, 2), FOUR, stored=99)), 'negative': matfile(matrix((-2, -2), FOUR)),
    'zero': matfile(matrix((0, 2), b'')), 'giant': matfile(matrix((2**20, 2**20), FOUR)), 'overflow': matfile(matrix((2**31-1,)*4, FOUR)),
    'bad zlib': matfile(struct.pack('<II', 15, 8)+b'notzlib!'), 'zlib cut': matfile(packed(matrix((2, 2), FOUR)))[:-3],
    'zlib and more': matfile(packed(matrix((2, 2), FOUR), b'more')),
    'zlib of text': matfile(packed(b'just some text, no element')), 'bomb': matfile(BOMB), 'nan': matfile(matrix((2, 2), struct.pack('<4f',
    1, 2, float('nan'), 3))), 'HDF5 signature alone': b'\x89HDF\r\n\x1a\n'+bytes(2000), 'signature at 512': bytes(512)+b'\x89HDF\r\n\x1a\n',
}

@pytest.mark.parametrize('name', MATS)
def test_damaged_matlab(tmp_path, name):
    (tmp_path/'bad.mat').write_bytes(MATS[name])
    tracemalloc.start()
    try:
        with pytest.raises(VolumeError, match='bad.mat') as e:
            stack = open_mat(tmp_path/'bad.mat')
            stack.pictures(0, stack.shape[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert e.value.path == tmp_path/'bad.mat' and e.value.hint and peak < 2**24

def hostile(folder):
    "name -> HDF5 file that must not be read"
    x, out = heads(), {}
    def new(name): out[name] = folder/f'{name}.mat'; return h5py.File(out[name], 'w')
    with new('external link') as f: f['data_fs'] = h5py.ExternalLink('/etc/passwd', '/x')
    with new('soft link') as f: f['data_fs'] = h5py.SoftLink('/elsewhere')
    with new('group') as f: f.create_group('data_fs')
    with new('empty') as f: f.attrs['x'] = 1
    with new('null') as f: f.create_dataset('data_fs', dtype='f4', shape=None)
    with new('scalar') as f: f['data_fs'] = 3.
    with new('complex') as f: f['data_fs'] = x+1j
    with new('text') as f: f['data_fs'] = 'hello'
    with new('references') as f: f.create_dataset('data_fs', (2, 2, 2), dtype=h5py.ref_dtype)
    with new('records') as f: f['data_fs'] = np.zeros((2, 2, 2), [('real', 'f4'), ('imag', 'f4')])
    with new('five axes') as f: f['data_fs'] = np.zeros((1, 1, 2, 2, 2))
    with new('zero') as f: f.create_dataset('data_fs', (0, 5, 5), 'f4')
    with new('never written') as f: f.create_dataset('data_fs', (9, 5, 5), 'f4')
    with new('chunks missing') as f: f.create_dataset('data_fs', (9, 5, 5), 'f4', chunks=(1, 5, 5), compression='gzip')[3] = 1
    with new('giant claim') as f:
        f.create_dataset('data_fs', (2**16, 4096, 4096), 'f4', chunks=(1, 64, 64), compression='gzip')[0, 0, 0] = 1
    with new('giant picture') as f: f.create_dataset('data_fs', (2, 2**14, 2**14), 'u1', chunks=True, compression='gzip')[0, 0, 0] = 1
    with new('lzf') as f: f.create_dataset('data_fs', data=x, compression='lzf')
    with new('two arrays') as f: f['a'], f['b'] = x, x
    with new('nan') as f: f['data_fs'] = np.where(x > .5, np.nan, x)
    with new('infinite') as f: f['data_fs'] = np.where(x > .5, 1e300, x.astype('f8'))
    with new('external storage') as f: f.create_dataset('data_fs', (4, 5, 5), 'u1', external=[('/etc/hostname', 0, 100)])
    with h5py.File(folder/'source.h5', 'w') as f: f['x'] = x
    with new('link that works') as f: f['data_fs'], f['#room'] = h5py.ExternalLink(folder/'source.h5', '/x'), x
    virtual = h5py.VirtualLayout(x.shape, 'f4')
    virtual[:] = h5py.VirtualSource(folder/'source.h5', 'x', x.shape)
    with new('virtual') as f: f.create_virtual_dataset('data_fs', virtual)
    return out

def test_hostile_hdf5(tmp_path):
    files = hostile(tmp_path)
    for name, path in files.items():
        tracemalloc.start()
        with pytest.raises(VolumeError, match=path.name):
            stack = open_mat(path)
            stack.pictures(0, stack.shape[0])
        assert tracemalloc.get_traced_memory()[1] < 2**24, name
        tracemalloc.stop()
    assert len(files) == 23

def npy_bytes(header, data=b'', version=(1, 0), magic=b'\x93NUMPY'):
    text = header.encode().ljust(118)+b'\n'
    return magic+bytes(version)+struct.pack('<H' if version[0] == 1 else '<I', len(text))+text+data

def told(dtype, shape): return str(dict(descr=dtype, fortran_order=False, shape=shape))

NPYS = {
    'empty': b'', 'text': b'1,2,3\n',
    'magic': npy_bytes(told('<f4', (1, 2, 2)), FOUR*4, magic=b'\x93NUMPX'),
    'version': npy_bytes(told('<f4', (1, 2, 2)), FOUR, (9, 0)), 'half': b'\x93NUMPY\1',
    'code': npy_bytes("__import__('os').mkdir('hacked')"), 'no dictionary': npy_bytes('[1, 2]'),
    'objects': npy_bytes(told('|O', (1, 2, 2)), FOUR*2),
    'text type': npy_bytes(told('<U1', (1, 2, 2)), FOUR),
    'complex': npy_bytes(told('<c8', (1, 2, 1)), FOUR),
    'dates': npy_bytes(told('<M8[s]', (1, 2, 1)), FOUR),
    'records': npy_bytes("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 2, 2), }", FOUR),
    'short': npy_bytes(told('<f4', (1, 2, 3)), FOUR),
    'long': npy_bytes(told('<f4', (1, 2, 2)), FOUR+b'x'),
    'giant': npy_bytes(told('<f4', (9999999, 9999999, 9999)), FOUR),
    'negative': npy_bytes(told('<f4', (-1, -2, 2)), FOUR),
    'zero': npy_bytes(told('<f4', (0, 2, 2))),
    'one axis': npy_bytes(told('<f4', (4,)), FOUR),
    'no axis': npy_bytes(told('<f4', ()), FOUR[:4]),
    'five axes': npy_bytes(told('<f4', (1, 1, 1, 2, 2)), FOUR),
    'nan': npy_bytes(told('<f4', (1, 2, 2)), struct.pack('<4f', 1, 2, float('inf'), 3)),
}

@pytest.mark.parametrize('name', NPYS)
def test_damaged_npy(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'bad.npy').write_bytes(NPYS[name])
    with pytest.raises(VolumeError, match='bad.npy'):
        stack = open_npy(tmp_path/'bad.npy')
        stack.pictures(0, stack.shape[0])
    assert not Path('hacked').exists()

def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
def png_bytes(w=4, h=3, bits=8, colour=0, pixels=None, extra=b'', end=True):
    rows = bytes(h*(1+w)) if pixels is None else pixels
    first = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, colour, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n'+first+extra+chunk(b'IDAT', zlib.compress(rows))+(chunk(b'IEND', b'') if end else b'')
SOUND = png_bytes()
PNGS = {
    'empty': b'', 'text': b'<html>', 'jpeg': b'\xff\xd8\xff\xe0'+bytes(99), 'signature alone': SOUND[:8], 'no end': png_bytes(end=False),
    'cut': SOUND[:-20], 'behind': SOUND+b'x', 'checksum of the head': SOUND[:20]+b'\1'+SOUND[21:], 'zero': png_bytes(w=0, pixels=b''),
    'checksum of pixels': SOUND[:-25]+bytes([SOUND[-25] ^ 1])+SOUND[-24:], 'bomb': png_bytes(4096, 4096, pixels=bytes(999)),
    'giant': png_bytes(2**20, 2**20, pixels=b''), 'largest': png_bytes(2**31-1, 2**31-1, pixels=b''),
    'rows missing': png_bytes(pixels=bytes(6)),
    'no pixels': b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 3, 8, 0, 0, 0, 0))+chunk(b'IEND', b''),
    'colour 7': png_bytes(colour=7), '16-bit colours': png_bytes(bits=16, colour=2, pixels=bytes(3*25)), 'bits 3': png_bytes(bits=3),
    'filter 9': png_bytes(pixels=b'\x09'*15), 'head twice': png_bytes(extra=SOUND[8:33]),
    'head late': SOUND[:8]+chunk(b'tEXt', b'a\0b')+SOUND[8:],
    'not zlib': SOUND[:33]+chunk(b'IDAT', b'rubbish!')+chunk(b'IEND', b''),
    'transparent': png_bytes(w=2, colour=4, pixels=bytes(15)), 'palette missing': png_bytes(colour=3),
}

@pytest.mark.parametrize('name', PNGS)
def test_damaged_png(tmp_path, name):
    assert read_png(write(tmp_path/'good.png', SOUND)).shape == (3, 4)
    tracemalloc.start()
    try:
        with pytest.raises(VolumeError, match='bad.png'): read_png(write(tmp_path/'bad.png', PNGS[name]))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally: tracemalloc.stop()

def write(path, data): path.write_bytes(data); return path

def damaged(good, rng, k):
    "One of: a few bits flipped, cut, a stretch of zeros"
    b = bytearray(good)
    if k % 3 == 0: return bytes(b[:rng.integers(0, len(b))])
    if k % 3 == 1:
        for at in rng.integers(0, len(b), rng.integers(1, 4)): b[at] ^= 1 << rng.integers(8)
    else: at = rng.integers(0, len(b)-8); b[at:at+8] = bytes(8)
    return bytes(b)

def fuzz(path, good, read, want, n):
    "(refused, changed): every damaged copy is refused with a VolumeError, or read inside all bounds"
    refused = changed = 0
    for k in range(n):
        path.write_bytes(damaged(good, numpy_rng(0, path.name, k), k))
        try: got = read(path)
        except VolumeError: refused += 1
        else:
            assert got.ndim in (2, 3) and np.isfinite(got).all() and got.size <= 4*want.size
            changed += not np.array_equal(got, want)
    return refused, changed

def everything(stack): return stack.pictures(0, min(stack.shape[0], 40))

def test_fuzz(tmp_path):
    "Checksums: no silent change in PNG and packed MAT-file 5; NPY and plain HDF5 have none, so numbers may differ, never more"
    x = heads().transpose(0, 2, 1)
    savemat(tmp_path/'z.mat', dict(data_fs=x.T), do_compression=True), savemat(tmp_path/'p.mat', dict(data_fs=x.T))
    hdf5(tmp_path/'h.mat', x), hdf5(tmp_path/'g.mat', x, compression='gzip', fletcher32=True), np.save(tmp_path/'n.npy', heads())
    png(tmp_path/'i.png', grey(heads()[0]))
    mat = lambda p: everything(open_mat(p))
    rows = {f: fuzz(tmp_path/f, (tmp_path/f).read_bytes(), read, want, n) for f, read, want, n in (('z.mat', mat, heads(), 300),
        ('p.mat', mat, heads(), 150), ('h.mat', mat, heads(), 300), ('g.mat', mat, heads(), 200),
        ('n.npy', lambda p: everything(open_npy(p)), heads(), 150), ('i.png', read_png, grey(heads()[0]), 300))}
    assert rows['z.mat'][1] == rows['i.png'][1] == 0 and rows['i.png'][0] > 280 and rows['z.mat'][0] > 230
    assert all(refused > 50 for refused, _ in rows.values())

def test_without_h5py(tmp_path, monkeypatch):
    path = hdf5(tmp_path/'a.mat', heads())
    savemat(tmp_path/'five.mat', dict(data_fs=heads()))
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(VolumeError, match=r'pip install "i2i_mamba_nb\[matlab\]"'): open_mat(path)
    assert open_mat(tmp_path/'five.mat').shape == (13, 12, 17)

# ---- cohorts --------------------------------------------------------------------------------------------------------------------
def mats(folder, splits=('train', 'val', 'test'), names=('T1', 'T2'), n=12):
    folder.mkdir(exist_ok=True)
    for j, s in enumerate(splits):
        for m in names: hdf5(folder/f'data_{s}_{m}.mat', (heads(n, key=j)**(1+(m != 'T1'))).transpose(0, 2, 1))
    return folder

@UNKNOWN
def test_syndiffs_files(tmp_path):
    "data_{train,val,test}_{contrast}.mat: one patient per split, upright, stored values, loudly unknown"
    mats(tmp_path)
    assert detect_import(tmp_path) == 'mat'
    with pytest.warns(UserWarning, match='leakage between splits cannot be checked'): path = import_folder(tmp_path, tmp_path/'out')
    c = read_manifest(path)
    assert [(s.patient, s.split) for s in c.subjects] == [(f'unknown-{s}', s) for s in ('train', 'validation', 'test')]
    for j, s in enumerate(c.subjects):
        for m in ('T1', 'T2'): assert np.array_equal(to_images(read_volume(s.paths[m]).data), heads(key=j)**(1+(m != 'T1')))
        assert 'patients unknown' in s.notes and 'geometry unknown' in s.notes
        assert b'geometry unknown' in read_grid(s.paths['T1']).header['descrip'].item()
    assert c.info['patients_known'] is False and c.info['unpaired'] is False and c.info['assumed_spacing'] == [1, 1, 1]
    assert c.info['sources']['data_val_T1.mat'] == sha256(tmp_path/'data_val_T1.mat') and c.info['imported'] == 'mat'
    assert len(SlicePairs(c, 'train', ['T1'], 'T2', size=16)) > 6 and len(require(c, ['T1', 'T2'])) == 3

@UNKNOWN
def test_same_files_same_bytes(tmp_path):
    mats(tmp_path)
    runs = [import_folder(tmp_path, tmp_path/f'out{k}', spacing=(.9, .9, 1.5)).parent for k in (0, 1)]
    files = sorted(p.relative_to(runs[0]) for p in runs[0].rglob('*') if p.is_file())
    assert len(files) == 9 and all((runs[0]/f).read_bytes() == (runs[1]/f).read_bytes() for f in files)
    assert np.allclose(np.diag(read_grid(runs[0]/'unknown-train'/'T1.nii.gz').affine), [.9, .9, 1.5, 1])

@UNKNOWN
def test_a_killed_or_failed_import_leaves_the_last_one(tmp_path):
    mats(tmp_path/'in')
    out = import_folder(tmp_path/'in', tmp_path/'in'/'out').parent
    (out/'.part'/'unknown-train').mkdir(parents=True), (out/'.part'/'unknown-train'/'T1.nii.gz').write_bytes(b'half')
    before = {p: p.read_bytes() for p in out.rglob('*.*') if p.is_file() and '.part' not in p.parts}
    assert detect_import(tmp_path/'in') == 'mat' and len(before) == 9
    hdf5(tmp_path/'in'/'data_test_T2.mat', heads(12, key=1).transpose(0, 2, 1)**2)
    with pytest.raises(CohortError, match='T2 slice 0 of test'): import_folder(tmp_path/'in', out)
    assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()} == before and not (out/'.part').exists()
    mats(tmp_path/'in')
    assert import_folder(tmp_path/'in', out) == out/'manifest.csv' and len(read_manifest(out/'manifest.csv').subjects) == 3

def test_slices_per_patient(tmp_path):
    mats(tmp_path)
    c = read_manifest(import_folder(tmp_path, tmp_path/'out', slices_per_patient=4))
    assert [s.patient for s in c.split('validation')] == ['validation-001', 'validation-002', 'validation-003'] and c.info['patients_known']
    assert np.array_equal(to_images(read_volume(c.patient('test-003').paths['T2']).data), heads(key=2)[8:]**2)
    with pytest.raises(CohortError, match='given 12, expected a multiple of slices_per_patient=5'):
        import_folder(tmp_path, tmp_path/'x', slices_per_patient=5)
    one = read_manifest(import_mat(dict(T1=tmp_path/'data_train_T1.mat'), tmp_path/'one', slices_per_patient=3, seed=4))
    assert sorted(s.split for s in one.subjects) == ['test', 'train', 'train', 'validation'] and len({s.patient for s in one.subjects}) == 4

@UNKNOWN
def test_a_long_stack_is_read_in_pieces(tmp_path):
    "230 pictures: three volumes of one patient in one split; memory as for one of them"
    big = np.repeat(heads(46, 96, 80), 5, 0)+np.arange(230, dtype='f4')[:, None, None]
    np.save(tmp_path/'T1.npy', big)
    tracemalloc.start()
    path = import_npy(dict(T1=dict(train=tmp_path/'T1.npy')), tmp_path/'out')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    c = read_manifest(path)
    assert [(s.patient, s.session) for s in c.subjects] == [('unknown-train', k) for k in ('01', '02', '03')] and peak < 8*big.nbytes/3
    assert np.array_equal(np.concatenate([to_images(read_volume(s.paths['T1']).data) for s in c.subjects]), big)

@UNKNOWN
def test_a_stack_without_splits_is_cut_in_order(tmp_path):
    np.save(tmp_path/'T1.npy', heads(25)), np.save(tmp_path/'T2.npy', heads(25)**2)
    c = read_manifest(import_folder(tmp_path, tmp_path/'out'))
    assert {s.split: read_grid(s.paths['T1']).shape[2] for s in c.subjects} == dict(train=18, validation=2, test=5)
    assert c.info['slices'] == {'unknown-train': [0, 18], 'unknown-validation': [18, 20], 'unknown-test': [20, 25]}
    assert np.array_equal(np.concatenate([to_images(read_volume(s.paths['T2']).data) for s in c.subjects]), heads(25)**2)

def test_a_slice_in_two_splits(tmp_path):
    x = heads(24)
    for s, part in dict(train=x[:13], test=x[12:]).items(): np.save(tmp_path/f'T1_{s}.npy', part)
    with pytest.raises(CohortError, match='T1 slice 0 of test: given that of slice 12 of train'): import_folder(tmp_path, tmp_path/'out')
    for s, part in dict(train=x[:12], test=x[12:]).items(): np.save(tmp_path/f'T1_{s}.npy', np.concatenate([0*part[:2], part]))
    with pytest.warns(UserWarning): import_folder(tmp_path, tmp_path/'out')

@pytest.mark.parametrize('shuffle', [False, True])
def test_unpaired_stacks_are_noticed(tmp_path, shuffle):
    order = np.random.default_rng(0).permutation(30) if shuffle else np.arange(30)
    np.save(tmp_path/'T1.npy', heads(30)), np.save(tmp_path/'CT.npy', (3000*heads(30, key=5)**2-1000)[order])
    with pytest.warns(UserWarning): c = read_manifest(import_folder(tmp_path, tmp_path/'out'))
    assert c.info['unpaired'] is shuffle and any('unpaired' in n for n in c.info['notes']) is shuffle

def test_refusals(tmp_path):
    mats(tmp_path, names=('T1',))
    for options, error, word in ((dict(slice_per_patient=4), ConfigError, "Did you mean 'slices_per_patient'"),
        (dict(axes='nxy'), ConfigError, 'axes'), (dict(spacing=(1, 1)), ConfigError, 'spacing'), (dict(most=0), ConfigError, 'most'),
        (dict(spacing=(0, 1, 1)), ConfigError, 'spacing'), (dict(slices_per_patient=0), CohortError, 'slices_per_patient=0')):
        with pytest.raises(error, match=word): import_folder(tmp_path, tmp_path/'out', **options)
    with pytest.raises(CohortError, match='T2 of test'): import_mat(dict(T1={s: tmp_path/f'data_{s}_T1.mat' for s in ('train', 'test')},
        T2=dict(train=tmp_path/'data_val_T1.mat')), tmp_path/'out')
    with pytest.raises(CohortError, match='name'): import_mat({'../T1': tmp_path/'data_train_T1.mat'}, tmp_path/'out')
    with pytest.raises(ConfigError, match='split'): import_mat(dict(T1=dict(trian=tmp_path/'data_train_T1.mat')), tmp_path/'out')
    with pytest.raises(CohortError, match='nothing to import'): import_folder(tmp_path/'none', tmp_path/'out')
    np.save(tmp_path/'x.npy', heads(5)), np.save(tmp_path/'y.npy', heads(6))
    with pytest.raises(CohortError, match='x.npy: given 5 pictures'):
        import_npy(dict(T1=tmp_path/'y.npy', T2=tmp_path/'x.npy'), tmp_path/'out')
    assert not (tmp_path/'out').exists() or not list((tmp_path/'out').iterdir())

# ---- pictures -------------------------------------------------------------------------------------------------------------------
def aligned(folder, n=(10, 2, 4), bits=8):
    "pix2pix's train, val, test with source | target, numbered from 1"
    k = 0
    for s, count in zip(('train', 'val', 'test'), n, strict=True):
        for _ in range(count):
            x = np.concatenate([heads(16)[k], heads(16)[k]**2], 1)
            png(folder/s/f'{k+1}.png', (x*(255 if bits == 8 else 65535)).astype('u1' if bits == 8 else 'u2'))
            k += 1
    return folder

@pytest.mark.parametrize('bits', [8, 16])
@UNKNOWN
def test_pairs_side_by_side(tmp_path, bits):
    folder = aligned(tmp_path/'T1_T2', bits=bits)
    assert detect_import(folder) == 'png'
    c = read_manifest(import_folder(folder, tmp_path/'out'))
    assert c.modalities == ('T1', 'T2') and [(s.split, read_grid(s.paths['T1']).shape) for s in c.subjects] == [('train', (13, 17, 10)),
        ('validation', (13, 17, 2)), ('test', (13, 17, 4))]
    for s, (a, b) in zip(c.subjects, ((0, 10), (10, 12), (12, 16)), strict=True):
        want = (heads(16)[a:b]**2*(255 if bits == 8 else 65535)).astype('u2').astype('f4')
        assert np.array_equal(to_images(read_volume(s.paths['T2']).data), want)

@UNKNOWN
def test_two_sources_in_red_and_green(tmp_path):
    "As I2I-Mamba's dataprep_many_to_one.py writes them with OpenCV: blue empty, green second and target, red first and zeros"
    x = [(255*heads(9, key=k)).astype('u1') for k in range(3)]
    for k in range(9):
        red, green = np.concatenate([x[0][k], 0*x[0][k]], 1), np.concatenate([x[1][k], x[2][k]], 1)
        png(tmp_path/'T1_PD__T2'/'train'/f'{k}.png', np.stack([red, green, 0*red], 2))
        png(tmp_path/'grey'/'train'/f'{k}.png', np.concatenate([v[k] for v in x], 1))
    one = read_manifest(import_pngs(tmp_path/'T1_PD__T2', tmp_path/'a')).subjects[0]
    two = read_manifest(import_pngs(tmp_path/'grey', tmp_path/'b', modalities=('T1', 'PD', 'T2'))).subjects[0]
    for j, m in enumerate(('T1', 'PD', 'T2')):
        assert np.array_equal(to_images(read_volume(one.paths[m]).data), x[j].astype('f4'))
        assert np.array_equal(read_volume(one.paths[m]).data, read_volume(two.paths[m]).data)

def test_patients_in_file_names(tmp_path):
    for k in range(12): png(tmp_path/f'IXI{k % 3+8}_{k}.png', grey(heads(12)[k]))
    c = read_manifest(import_pngs(tmp_path, tmp_path/'out', modalities=['T1'], pattern='{patient}_*.png'))
    assert [s.patient for s in c.subjects] == ['IXI8', 'IXI9', 'IXI10']
    assert sorted(s.split for s in c.subjects) == ['test', 'train', 'validation']
    want = np.stack([grey(heads(12)[k]) for k in (2, 5, 8, 11)])
    assert np.array_equal(to_images(read_volume(c.patient('IXI10').paths['T1']).data), want)
    with pytest.raises(CohortError, match='pattern'): import_pngs(tmp_path, tmp_path/'x', modalities=['T1'], pattern='{patient}-*.png')
    png(tmp_path/'s'/'train'/'p1_1.png', grey(heads()[0])), png(tmp_path/'s'/'test'/'p1_2.png', grey(heads()[1]))
    with pytest.raises(CohortError, match='splits of patient p1'):
        import_pngs(tmp_path/'s', tmp_path/'x', modalities=['T1'], pattern='{patient}_*.png')

def test_refused_pictures(tmp_path):
    aligned(tmp_path/'T1_T2')
    with pytest.raises(VolumeError, match='png: width: given 26, expected a multiple of 3'):
        import_pngs(tmp_path/'T1_T2', tmp_path/'x', modalities=('T1', 'T2', 'PD'))
    with pytest.raises(ConfigError, match='modalities of'): import_pngs(tmp_path/'T1_T2'/'train', tmp_path/'x')
    with pytest.raises(CohortError, match='folders train, val and test'): import_pngs(tmp_path, tmp_path/'x', modalities=('T1', 'T2'))
    with pytest.raises(CohortError, match='given none'): import_pngs(tmp_path/'T1_T2'/'none', tmp_path/'x', modalities=('T1',))
    for data in (np.zeros((17, 28), 'u1'), np.zeros((17, 26), 'u2'), None):
        bad = tmp_path/'T1_T2'/'val'/'99.png'
        if data is None: bad.write_bytes((tmp_path/'T1_T2'/'val'/'11.png').read_bytes()[:-30])
        else: png(bad, data)
        with pytest.raises(VolumeError, match='99.png'): import_pngs(tmp_path/'T1_T2', tmp_path/'x')

def test_pictures_are_decoded_in_pieces(tmp_path, monkeypatch):
    files = [png(tmp_path/f'{k}.png', np.concatenate([grey(h), grey(h)], 1)) for k, h in enumerate(heads(9))]
    stacks, asked = open_pngs(files, ('T1', 'T2')), []
    real = sys.modules['i2i_mamba_nb.data.imports'].read_png
    monkeypatch.setattr('i2i_mamba_nb.data.imports.read_png', lambda p: asked.append(p) or real(p))
    for m in ('T1', 'T2'): stacks[m].pictures(3, 6)
    assert asked == files[3:6]

# ---- the real sample ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not SHARED.exists(), reason='no real slices at hand')
@UNKNOWN
def test_syndiffs_sample(tmp_path):
    "25 slices of T1 and T2: upright (eyes in front in the low slices), unpaired, and a cohort that trains"
    c = read_manifest(import_folder(SHARED, tmp_path))
    assert [(s.split, read_grid(s.paths['T1']).shape) for s in c.subjects] == [('train', (152, 256, 18)), ('validation', (152, 256, 2)),
        ('test', (152, 256, 5))]
    assert c.info['unpaired'] and c.info['pairing']['all']['T2'] < .65 and c.modalities == ('T1', 'T2')
    low = to_images(read_volume(c.patient('unknown-test').paths['T2']).data)[2]
    rows, columns = np.nonzero(low > .7)
    assert (rows < 85).sum() > 2*(rows > 170).sum() and (rows < 85).sum() > 200 and abs(columns[rows < 85].mean()-76) < 12
    assert 15 <= len(SlicePairs(c, 'train', ['T1'], 'T2', size=128)) <= 18
    json.dumps(c.info)

def test_errors_are_of_the_family():
    assert issubclass(VolumeError, I2IError) and issubclass(CohortError, I2IError)

def test_pairing_of_noise_and_of_few():
    "Strangers lie around one half, and a stack that is too short says nothing"
    noise = np.random.default_rng(0).random((40, 17, 13)).astype('f4')
    stack = lambda x: Stack(Path('x'), x.shape, lambda a, b: x[a:b])
    assert .35 < pairing(stack(heads(40)), stack(noise)) < .65 and pairing(stack(heads(40)), stack(heads(40, key=1)**2)) > .9
    assert pairing(stack(heads(7)), stack(heads(7))) is None and pairing(stack(0*noise), stack(0*noise)) == .5
