"Volumes, cohorts, folders and slices: damaged files, geometry, leakage, bytes that do not depend on the worker"
import errno
import gzip
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from i2i_mamba_nb.core import CohortError, ConfigError, DiskError, ShapeError, numpy_rng
from i2i_mamba_nb.data import volume as volume_module
from i2i_mamba_nb.data.cohort import Cohort, Subject, check_leakage, read_manifest, require, split_hash, split_patients, write_manifest
from i2i_mamba_nb.data.prepare import ALIASES, modality_name, propose_manifest
from i2i_mamba_nb.data.slices import (SlicePairs, fit_to, from_images, load_subject, restore, tissue_slices, to_image, to_images,
    unfit)
from i2i_mamba_nb.data.volume import (Volume, VolumeError, from_canonical, read_grid, read_volume, same_grid, to_canonical,
    write_volume)

SHAPE = (9, 11, 7)
OBLIQUE = np.array([[.9, .1, .05, -3.], [-.12, 1.1, .2, 4.], [.03, -.15, 1.7, 5.], [0, 0, 0, 1.]])

def voxels(shape=SHAPE, key=0): return (100+20*numpy_rng(0, 'voxels', key).standard_normal(shape)).astype(np.float32)

def raw(data=None, *, version=1, order='<', **fields):
    "Bytes of a NIfTI file with header fields overridden"
    data = voxels() if data is None else data
    cls = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    h = cls(endianness=order)
    h.set_data_dtype(data.dtype), h.set_data_shape(data.shape), h.set_sform(OBLIQUE, 1), h.set_qform(OBLIQUE, 1)
    h['vox_offset'], h['scl_slope'], h['scl_inter'] = (352 if version == 1 else 544), 1, 0
    for name, value in fields.items(): h[name] = value
    return h.binaryblock+b'\0\0\0\0'+data.astype(data.dtype.newbyteorder(order)).tobytes(order='F')

def put(folder, content, name='v.nii'):
    path = folder/name
    path.write_bytes(gzip.compress(content, 1) if name.endswith('.gz') else content)
    return path

# ---- malformed volumes ----------------------------------------------------------------------------------------------------------
GOOD = raw()
PLANE = np.diag([1, 1, 0, 1.])
def at(block, position, value): return block[:position]+value+block[position+len(value):]
def bad_voxel(value, dtype='f4'):
    data = voxels().astype(dtype)
    data[4, 5, 3] = value
    return raw(data)
def srow(matrix): return dict(zip(('srow_x', 'srow_y', 'srow_z'), np.asarray(matrix, float)[:3], strict=True))
def with_nan(k): return srow(np.where(np.arange(16).reshape(4, 4) == k, np.nan, OBLIQUE))
QFORM = dict(sform_code=0, qform_code=1)
BLANK = dict(sform_code=0, qform_code=0)
BASE = [1, 1, 1, 1, 1, 1, 1, 1]

MALFORMED = {
    'empty': b'', 'one byte': b'\x5c', 'half a header': GOOD[:200], '347 bytes': GOOD[:347], 'header only': GOOD[:352],
    'one voxel short': GOOD[:-4], 'one byte short': GOOD[:-1], 'half the voxels': GOOD[:352+4*99], 'one byte more': GOOD+b'\0',
    'twice the voxels': GOOD+GOOD[352:], 'all zero': bytes(4000), 'all 0xff': b'\xff'*4000, 'noise': numpy_rng(1, 'x').bytes(5000),
    'text': b'This is not the image you are looking for.\n'*50, 'web page': b'<!DOCTYPE html><html><body>404</body></html>'*20,
    'git-LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:'+b'a'*64+b'\nsize 12345\n',
    'git-annex pointer': b'/annex/objects/MD5E-s123--abc.nii\n', 'DICOM': bytes(128)+b'DICM'+bytes(3000), 'NRRD': b'NRRD0004\n'+bytes(900),
    'zip': b'PK\x03\x04'+bytes(900), 'gzip without .gz': gzip.compress(GOOD), 'PNG': b'\x89PNG\r\n\x1a\n'+bytes(900),
    'Analyze 7.5': at(GOOD, 344, bytes(4)), 'pair magic alone': at(GOOD, 344, b'ni1\0'), 'wrong header size': at(GOOD, 0, b'\x5d\1\0\0'),
    'NIfTI-2 size in NIfTI-1': at(GOOD, 0, b'\x1c\2\0\0'), 'NIfTI-2 cut': raw(version=2)[:500],
    'NIfTI-2 magic': at(raw(version=2), 8, b'xxxx'),
    'no axes': raw(dim=[0]*8), 'two axes': raw(dim=[2, 99, 7, 1, 1, 1, 1, 1]), 'eight axes': raw(dim=[8, *SHAPE, 1, 1, 1, 1]),
    'negative axes': raw(dim=[-3, *SHAPE, 1, 1, 1, 1]), 'zero x': raw(dim=[3, 0, 11, 7, 1, 1, 1, 1]),
    'zero z': raw(dim=[3, 9, 11, 0, 1, 1, 1, 1]),
    'negative y': raw(dim=[3, 9, -11, 7, 1, 1, 1, 1]), 'zero fourth': raw(dim=[4, *SHAPE, 0, 1, 1, 1]),
    'four frames': raw(voxels((9, 11, 7, 4))), 'five axes': raw(voxels((3, 3, 3, 1, 2))), 'wrong shape': raw(dim=[3, 9, 12, 7, 1, 1, 1, 1]),
    '1024 cubed': raw(dim=[3, 1024, 1024, 1024, 1, 1, 1, 1]), '32767 cubed': raw(dim=[3, *[32767]*3, 1, 1, 1, 1]),
    'NIfTI-2 2^62': raw(version=2, dim=[3, 2**62, 4, 4, 1, 1, 1, 1]),
    'NIfTI-2 overflow to 0': raw(version=2, dim=[3, 2**32, 2**32, 1, 1, 1, 1, 1]),
    'RGB': raw(datatype=128, bitpix=24), 'RGBA': raw(datatype=2304, bitpix=32), 'complex64': raw(voxels().astype('c8')),
    'complex128': raw(voxels().astype('c16')), 'float128': raw(datatype=1536, bitpix=128), 'binary': raw(datatype=1, bitpix=1),
    'type 0': raw(datatype=0), 'type 9999': raw(datatype=9999), 'bits do not fit': raw(bitpix=16), 'zero bits': raw(bitpix=0),
    'infinite slope': raw(scl_slope=np.inf), 'NaN slope': raw(scl_slope=np.nan), 'infinite intercept': raw(scl_inter=-np.inf),
    'NaN intercept': raw(scl_inter=np.nan), 'slope overflows': raw(scl_slope=3e38), 'offset into header': raw(vox_offset=100),
    'offset zero': raw(vox_offset=0), 'negative offset': raw(vox_offset=-352), 'NaN offset': raw(vox_offset=np.nan),
    'infinite offset': raw(vox_offset=np.inf), 'huge offset': raw(vox_offset=1e30), 'offset behind the end': raw(vox_offset=5000),
    'odd offset': raw(vox_offset=352.5), 'NaN voxel': bad_voxel(np.nan), 'infinite voxel': bad_voxel(np.inf),
    'minus infinity': bad_voxel(-np.inf),
    'NaN double': bad_voxel(np.nan, 'f8'), 'double beyond float32': bad_voxel(1e39, 'f8'), 'NaN in sform': raw(**with_nan(1)),
    'infinite origin': raw(**srow(np.where(np.arange(16).reshape(4, 4) == 3, np.inf, OBLIQUE))), 'singular sform': raw(**srow(PLANE)),
    'zero sform': raw(**srow(np.zeros((4, 4)))), 'parallel axes': raw(**srow([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]])),
    'nearly flat sform': raw(**srow([[1, 1, 0, 0], [1, 1.0001, 0, 0], [0, 0, 1, 0]])), 'spacing 1e-5': raw(**srow(np.eye(4)*1e-5)),
    'spacing 1e5': raw(**srow(np.eye(4)*1e5)), 'origin 1e9': raw(**srow(np.eye(4)+1e9*np.eye(4, k=3))), 'sform code 99': raw(sform_code=99),
    'negative code': raw(sform_code=-1), 'quaternion too long': raw(**QFORM, quatern_b=1, quatern_c=1),
    'NaN quaternion': raw(**QFORM, quatern_b=np.nan),
    'qfac 3': raw(**QFORM, pixdim=[3, *BASE[1:]]), 'infinite qoffset': raw(**QFORM, qoffset_x=np.inf),
    'zero pixdim': raw(**QFORM, pixdim=[1, 1, 0, 1, 1, 1, 1, 1]),
    'negative pixdim': raw(**BLANK, pixdim=[1, 1, -1, 1, 1, 1, 1, 1]), 'NaN pixdim': raw(**BLANK, pixdim=[1, 1, np.nan, 1, 1, 1, 1, 1]),
    'infinite pixdim': raw(**QFORM, pixdim=[1, 1, 1, np.inf, 1, 1, 1, 1]),
}

def refused(path, *words):
    "The VolumeError of a file, complete and naming it"
    with pytest.raises(VolumeError) as e: read_volume(path)
    e = e.value
    assert str(path) in str(e) and e.what and e.hint and 'given' in str(e) and 'expected' in str(e)
    assert str(e.path).startswith(str(path)[:-8]) and e.expected is not None and e.got is not None
    for w in words: assert w in str(e)
    return e

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', MALFORMED)
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_malformed(tmp_path, name, suffix): refused(put(tmp_path, MALFORMED[name], f'v{suffix}'))

def test_enough_malformed(): assert len(MALFORMED) >= 60

def test_the_sound_file_is_read(tmp_path):
    for suffix in ('.nii', '.nii.gz', '.NII', '.Nii.GZ'):
        path = tmp_path/f'v{suffix}'
        path.write_bytes(gzip.compress(GOOD) if suffix.lower().endswith('gz') else GOOD)
        v = read_volume(path)
        assert v.data.dtype == np.float32 and np.array_equal(v.data, voxels()) and np.allclose(v.affine, OBLIQUE, atol=1e-6)

MESSAGES = {
    'git-LFS pointer': ('git-LFS', 'git lfs pull'), 'DICOM': ('DICOM', 'dcm2niix'), 'RGB': ('RGB', 'real number'), 'empty': ('0 bytes',),
    'four frames': ('(9, 11, 7, 4)', 'frame'), 'NaN voxel': ('nan at voxel (4, 5, 3)',),
    'one voxel short': (f'{len(GOOD)} bytes', f'{len(GOOD)-4} bytes'),
    'parallel axes': ('affine', 'determinant', 'sform'), 'singular sform': ('voxel size', 'sform'),
    '1024 cubed': ('134217728 voxels', 'max_voxels'), 'infinite slope': ('scl_slope',),
    'gzip without .gz': ('end in .gz',), 'text': ('text file',), 'complex64': ('complex',),
}

@pytest.mark.parametrize('name', MESSAGES)
def test_messages(tmp_path, name):
    refused(put(tmp_path, MALFORMED[name]), *MESSAGES[name])

@pytest.mark.parametrize('damage', ['cut', 'no trailer', 'checksum', 'length', 'middle', 'rubbish behind', 'second member cut',
    'not packed', 'text', 'bare magic'])
def test_gzip(tmp_path, damage):
    z, path = gzip.compress(GOOD), tmp_path/'v.nii.gz'
    path.write_bytes({'cut': z[:len(z)//2], 'no trailer': z[:-8], 'checksum': at(z, len(z)-8, b'abcd'), 'length': at(z, len(z)-4, b'abcd'),
        'middle': at(z, 1500, bytes(9)), 'rubbish behind': z+b'rubbish', 'second member cut': z+z[:20], 'not packed': GOOD,
        'text': MALFORMED['git-LFS pointer'], 'bare magic': b'\x1f\x8b'}[damage])
    refused(path)

def test_gzip_members(tmp_path):
    path = tmp_path/'v.nii.gz'
    path.write_bytes(gzip.compress(GOOD[:900])+gzip.compress(b'')+gzip.compress(GOOD[900:])+bytes(512))
    assert np.array_equal(read_volume(path).data, voxels())
    path.write_bytes(gzip.compress(GOOD)+gzip.compress(GOOD))
    refused(path, 'more data')

def test_paths(tmp_path):
    os.mkfifo(tmp_path/'pipe.nii')
    (tmp_path/'folder.nii').mkdir()
    (tmp_path/'loop.nii').symlink_to(tmp_path/'loop.nii')
    for name, word in (('pipe.nii', 'device or pipe'), ('folder.nii', 'a folder'), ('loop.nii', 'links'),
        ('missing.nii.gz', 'No such file')):
        refused(tmp_path/name, word)
    for path in ('/dev/zero.nii', 'a\0b.nii', 'x'*5000+'.nii', ''):
        with pytest.raises(VolumeError): read_volume(path)
    for name in ('v.mgz', 'v.mnc', 'v.nrrd', 'v.dcm', 'v', 'v.gz', 'nii'): refused(put(tmp_path, GOOD, name), '.nii.gz')
    put(tmp_path, GOOD, 'real.nii')
    (tmp_path/'link.nii').symlink_to('real.nii')
    assert read_volume(tmp_path/'link.nii').shape == SHAPE

def test_pairs(tmp_path):
    head, body = at(raw(vox_offset=0)[:348], 344, b'ni1\0'), GOOD[352:]
    put(tmp_path, head, 'v.hdr'), put(tmp_path, body, 'v.img')
    for name in ('v.hdr', 'v.img'): assert np.array_equal(read_volume(tmp_path/name).data, voxels())
    put(tmp_path, head, 'z.hdr.gz'), put(tmp_path, body, 'z.img.gz')
    assert np.array_equal(read_volume(tmp_path/'z.img.gz').data, voxels())
    refused(put(tmp_path, head, 'lone.hdr'), '.img')
    refused(put(tmp_path, body, 'only.img'), '.hdr')
    for content in (body[:-4], body+b'\0', b''):
        put(tmp_path, content, 'v.img')
        with pytest.raises(VolumeError, match='v.img|v.hdr'): read_volume(tmp_path/'v.hdr')

@pytest.mark.parametrize('dtype', ['u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'u8', 'i8', 'f4', 'f8'])
@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('order', ['<', '>'])
def test_types_against_nibabel(tmp_path, dtype, version, order):
    path = put(tmp_path, raw(voxels().astype(dtype), version=version, order=order, scl_slope=.5, scl_inter=-7), 'v.nii.gz')
    ours, theirs = read_volume(path), nib.load(path)
    assert np.array_equal(ours.data, theirs.get_fdata().astype(np.float32)) and np.array_equal(ours.affine, theirs.affine)
    again = read_volume(write_volume(tmp_path/'w.nii', ours))
    assert again.data.tobytes() == ours.data.tobytes() and np.array_equal(again.affine,
        ours.affine) and type(again.header) is type(ours.header)

@pytest.mark.parametrize('fields', [QFORM, BLANK, dict(sform_code=2, qform_code=0), dict(QFORM, pixdim=[-1, *BASE[1:]]),
    dict(QFORM, pixdim=[0, *BASE[1:]])])
def test_affine_sources(tmp_path, fields):
    path = put(tmp_path, raw(**fields))
    ours = read_volume(path)
    assert np.array_equal(ours.affine, nib.load(path).affine)
    path = write_volume(tmp_path/'w.nii.gz', ours)
    assert np.array_equal(read_volume(path).affine, ours.affine) and np.array_equal(nib.load(path).affine, ours.affine)

def test_slope_zero_means_unscaled_and_a_last_axis_of_one_is_dropped(tmp_path):
    assert np.array_equal(read_volume(put(tmp_path, raw(scl_slope=0, scl_inter=3))).data, voxels())
    assert read_volume(put(tmp_path, raw(voxels((9, 11, 7, 1))))).shape == SHAPE

# ---- random damage --------------------------------------------------------------------------------------------------------------
def survives(path):
    "The volume of a damaged file if it is inside all bounds, None where it was refused; anything else raises"
    try: v = read_volume(path)
    except VolumeError: return None
    spacing = np.linalg.norm(v.affine[:3, :3], axis=0)
    assert v.data.ndim == 3 and v.data.dtype == np.float32 and np.isfinite(v.data).all() and np.isfinite(v.affine).all()
    assert 1e-3 <= spacing.min() and spacing.max() <= 1e3 and abs(np.linalg.det(v.affine[:3, :3])) > 0
    return v

def test_2000_header_mutations(tmp_path):
    rng, read = numpy_rng(0, 'mutations'), 0
    for k in range(2000):
        block = bytearray(raw(version=1+k % 2)[:352] if k % 2 == 0 else raw(version=2))
        for place in rng.integers(0, 348, rng.integers(1, 6)): block[place] = rng.integers(256)
        v = survives(put(tmp_path, bytes(block)+(GOOD[352:] if k % 2 == 0 else b''), ('v.nii', 'v.nii.gz')[k//2 % 2]))
        read += v is not None
    assert 100 < read < 1900

def test_1000_flips_of_a_packed_file_change_nothing(tmp_path):
    z, rng, same = gzip.compress(raw(voxels((5, 6, 4)))), numpy_rng(0, 'flips'), 0
    sound = read_volume(put(tmp_path, raw(voxels((5, 6, 4)))))
    for k in range(1000):
        place = k//8 if k < 80 else int(rng.integers(len(z)))
        (tmp_path/'v.nii.gz').write_bytes(at(z, place, bytes([z[place] ^ 1 << (k % 8)])))
        v = survives(tmp_path/'v.nii.gz')
        if v is None: continue
        same += 1
        assert v.data.tobytes() == sound.data.tobytes() and np.array_equal(v.affine, sound.affine) and v.header == sound.header
    assert 0 < same < 200

def test_300_flips_of_a_plain_file(tmp_path):
    rng = numpy_rng(0, 'plain')
    for place in rng.integers(0, 352, 300): survives(put(tmp_path, at(GOOD, int(place), bytes([GOOD[place] ^ 1 << int(rng.integers(8))]))))

def test_500_truncations(tmp_path):
    rng, z = numpy_rng(0, 'cuts'), gzip.compress(GOOD)
    for k in range(500):
        source = (GOOD, z)[k % 2]
        (tmp_path/('v.nii', 'v.nii.gz')[k % 2]).write_bytes(source[:rng.integers(len(source))])
        assert survives(tmp_path/('v.nii', 'v.nii.gz')[k % 2]) is None

BOMBS = """
import resource, sys
import nibabel
from i2i_mamba_nb.data.volume import VolumeError, read_volume
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try: read_volume(path)
    except VolumeError: continue
    sys.exit(path+' was read')
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)//1024)
"""

def packed_zeros(header, megabytes):
    "A gzip stream of a header and that many megabytes of zeros"
    z = zlib.compressobj(9, zlib.DEFLATED, 31)
    return z.compress(header)+b''.join(z.compress(bytes(2**20)) for _ in range(megabytes))+z.flush()

def test_bombs_are_refused_in_little_memory(tmp_path):
    claims = [[3, 1024, 1024, 1024], [3, 512, 512, 512], [3, 32767, 32767, 1], [3, 2, 2, 2], [3, 32767, 1, 4096], [7, 99, 99, 99]]
    heads = [raw(dim=[*c, *[1]*(8-len(c))])[:352] for c in claims]
    big = packed_zeros(b'', 100)
    paths = [put(tmp_path, h+bytes(100), f'a{k}.nii') for k, h in enumerate(heads)]+[put(tmp_path, h+bytes(100), f'b{k}.nii.gz') for k,
        h in enumerate(heads)]
    for k, h in enumerate([*heads, bytes(352)]): paths.append(tmp_path/f'c{k}.nii.gz'); paths[-1].write_bytes(gzip.compress(h)+big)
    paths.append(tmp_path/'d.nii.gz')  # passes the test of sizes, and ends a little early
    bytewise = raw(datatype=2, bitpix=8, dim=[3, 512, 512, 512, 1, 1, 1, 1])[:352]
    paths[-1].write_bytes(packed_zeros(bytewise, 127)+gzip.compress(numpy_rng(0, 'filler').bytes(20000)))
    refused(put(tmp_path, heads[1]+bytes(100), 'b.nii.gz'), 'bytes by its header', 'bytes of gzip')
    assert len(paths) >= 10
    out = subprocess.run([sys.executable, '-c', BOMBS, *map(str, paths)], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stdout+out.stderr
    assert int(out.stdout) < 64

def test_a_large_volume_is_read(tmp_path):
    head = raw(datatype=2, bitpix=8, dim=[3, 257, 257, 257, 1, 1, 1, 1])[:352]
    stream = bytearray(257**3)
    stream[-1] = 7
    v = read_volume(put(tmp_path, head+bytes(stream), 'v.nii.gz'))
    assert v.shape == (257, 257, 257) and v.data[-1, -1, -1] == 7 == v.data.sum()
    with pytest.raises(VolumeError, match='at most 1000 voxels'): read_volume(tmp_path/'v.nii.gz', max_voxels=1000)

# ---- writing --------------------------------------------------------------------------------------------------------------------
def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    v = Volume(voxels(), OBLIQUE)
    path = write_volume(tmp_path/'new'/'v.nii.gz', v)
    before = path.read_bytes()
    assert write_volume(path, v).read_bytes() == before
    class Full:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *e): self.f.close()
        def write(self, b):
            self.f.write(b[:100])
            raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(volume_module, '_created', lambda p, packed: Full(open(p, 'wb')))
    with pytest.raises(DiskError, match=r'v\.nii\.gz.*disk is full, \d+ bytes free'): write_volume(path, Volume(voxels(key=1), OBLIQUE))
    assert path.read_bytes() == before and os.listdir(path.parent) == ['v.nii.gz']

def test_a_file_size_limit_leaves_nothing(tmp_path):
    code = ('import resource, signal, sys, numpy as np\nfrom i2i_mamba_nb.core import DiskError\nfrom i2i_mamba_nb.data.volume import *\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n'
        'try: write_volume(sys.argv[1], Volume(np.random.default_rng(0).random((30, 30, 30)), np.eye(4)))\n'
        'except DiskError as e: print(e)')
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path/'v.nii')], capture_output=True, text=True, timeout=60)
    assert 'v.nii' in out.stdout and 'bytes free' in out.stdout and os.listdir(tmp_path) == []

@pytest.mark.parametrize('data,affine', [(np.full(SHAPE, np.nan), OBLIQUE), (np.full(SHAPE, 1e39), OBLIQUE), (voxels()+1j, OBLIQUE),
    (voxels((3, 4)), OBLIQUE), (voxels((3, 4, 5, 2)), OBLIQUE), (voxels((3, 0, 5)), OBLIQUE), (voxels(), PLANE), (voxels(), np.eye(3)),
    (voxels(), np.full((4, 4), np.nan)), (voxels(), None), (np.array([[['a']]]), OBLIQUE)])
def test_what_cannot_be_written(tmp_path, data, affine):
    with pytest.raises(VolumeError, match='v.nii'): write_volume(tmp_path/'v.nii', Volume(data, affine))
    assert os.listdir(tmp_path) == []

def test_suffix_and_like(tmp_path):
    v = read_volume(put(tmp_path, GOOD))
    for name in ('v.img', 'v.mgz', 'v'):
        with pytest.raises(VolumeError, match='.nii.gz'): write_volume(tmp_path/name, v)
    with pytest.raises(VolumeError, match=r'\(9, 11, 7\)'): write_volume(tmp_path/'x.nii', voxels((9, 11, 8)), like=v)
    with pytest.raises(VolumeError, match='like'): write_volume(tmp_path/'x.nii', voxels())
    assert np.array_equal(read_volume(write_volume(tmp_path/'x.nii', voxels(key=2), like=v)).affine, v.affine)

def test_no_volume_is_made_up(tmp_path):
    edge = np.array([0., -0., 1e-45, -1e-38, 3.4e38, -3.4e38, np.pi, 16777217], np.float32).reshape(2, 2, 2)
    for name in ('v.nii', 'v.nii.gz'): assert read_volume(write_volume(tmp_path/name,
        Volume(edge, np.eye(4)))).data.tobytes('F') == edge.tobytes('F')

def test_a_long_axis_is_written_as_nifti2(tmp_path):
    v = read_volume(write_volume(tmp_path/'v.nii', Volume(np.ones((40000, 1, 2)), np.eye(4))))
    assert v.shape == (40000, 1, 2) and isinstance(v.header, nib.Nifti2Header)

# ---- orientation and grids --------------------------------------------------------------------------------------------------------
AFFINES = [(p, f) for p in permutations(range(3)) for f in product((1, -1), repeat=3)]

def turned(order, flips, base=OBLIQUE):
    "Affine whose axes are those of `base`, permuted and flipped"
    out = base.copy()
    out[:3, :3] = base[:3, order]*np.array(flips)
    return out

@pytest.mark.parametrize('order,flips', AFFINES)
def test_48_orientations_there_and_back(tmp_path, order, flips):
    path = put(tmp_path, raw())
    v = read_volume(write_volume(path, Volume(voxels(), turned(order, flips))))
    canonical, ornt = to_canonical(v)
    assert nib.aff2axcodes(canonical.affine) == ('R', 'A', 'S')
    theirs = nib.as_closest_canonical(nib.Nifti1Image(v.data, v.affine))
    assert np.array_equal(theirs.get_fdata(dtype=np.float32), canonical.data) and np.allclose(theirs.affine, canonical.affine, atol=1e-9)
    stack = from_images(to_images(canonical.data), canonical.shape)
    back = restore(v, stack)
    again = read_volume(write_volume(tmp_path/'w.nii.gz', back))
    assert again.data.tobytes('F') == v.data.tobytes('F') and np.array_equal(again.affine, v.affine)
    assert np.array_equal(from_canonical(canonical.data, ornt), v.data)

def test_pictures_show_the_front_up_and_the_left_on_the_left():
    v = np.zeros((5, 7, 3))
    v[0, 6, 1], v[4, 0, 1] = 1, 2
    assert to_image(v, 1)[0, 0] == 1 and to_image(v, 1)[6, 4] == 2 and np.array_equal(to_images(v)[1], to_image(v, 1))
    with pytest.raises(ShapeError): from_images(np.zeros((3, 7, 5)), (5, 7, 4))

def shifted(k):
    a = OBLIQUE.copy()
    a[:3, 3] += a[:3, k % 3]*(1 if k < 3 else -1)
    return a

@pytest.mark.parametrize('k', range(6))
def test_a_shift_of_one_voxel_is_another_grid(k):
    a, b = Volume(voxels(), OBLIQUE), Volume(voxels(), shifted(k))
    assert same_grid(a, a) and not same_grid(a, b) and not same_grid(a, Volume(voxels((9, 11, 8)), OBLIQUE))
    assert same_grid(a, Volume(voxels(), OBLIQUE+1e-6)) and not same_grid(a, Volume(voxels(), turned((0, 1, 2), (-1, 1, 1))))

# ---- cohorts --------------------------------------------------------------------------------------------------------------------
def head(shape=(24, 28, 13), key=0):
    "An ellipsoid with a gradient, a bright core and noise, zero outside"
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij')
    r = (x/.8)**2+(y/.85)**2+(z/.9)**2
    texture = numpy_rng(0, 'head', key).standard_normal(shape)
    return np.where(r < 1, 200+60*x+40*y*y+80*(r < .2)+5*texture, 0).astype(np.float32)

def build(folder, patients=('p1', 'p2', 'p3'), modalities=('T1', 'T2', 'PD'), affine=OBLIQUE, pattern='{p}/{m}.nii.gz'):
    for k, (p, m) in enumerate(product(patients, modalities)):
        write_volume(folder/pattern.format(p=p, m=m), Volume(head(key=k), affine))
    return folder

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp('cohort'))
    return propose_manifest(folder, splits=dict(p1='train', p2='validation', p3='test'))

def test_manifest_round_trip(cohort, tmp_path):
    for place in (cohort.root/'manifest.csv', tmp_path/'elsewhere'/'m.csv'):
        again = read_manifest(write_manifest(place, cohort))
        assert again.modalities == cohort.modalities and split_hash(again) == split_hash(cohort)
        assert [(s.patient, s.split) for s in again.subjects] == [(s.patient, s.split) for s in cohort.subjects]
        assert all(s.paths[m].samefile(t.paths[m]) for s, t in zip(cohort.subjects, again.subjects, strict=True) for m in s.paths)
        side = json.loads(place.with_suffix('.json').read_text())
        assert len(side['sha256']) == 9 and side['simulated'] is False
        assert place.read_text().splitlines()[0] == 'patient,split,PD,T1,T2'
        place.unlink(), place.with_suffix('.json').unlink()

def test_manifest_in_a_linked_folder(cohort, tmp_path):
    (tmp_path/'deep'/'er').mkdir(parents=True)
    (tmp_path/'link').symlink_to(tmp_path/'deep'/'er')
    assert len(read_manifest(write_manifest(tmp_path/'link'/'m.csv', cohort)).subjects) == 3

TABLES = {
    'no file': None, 'empty': '', 'binary': b'\xff\xfe\x00\x00', 'no split column': 'patient,T1\np1,a.nii\n',
    'twice a column': 'patient,split,T1,T1\np1,train,a.nii,a.nii\n',
    'unknown split': 'patient,split,T1\np1,training,a.nii\n', 'ragged': 'patient,split,T1\np1,train\n',
    'no such file': 'patient,split,T1\np1,train,b.nii\n',
    'empty name': 'patient,split,T1\n,train,a.nii\n', 'two splits': 'patient,split,session,T1\np1,train,1,a.nii\np1,test,2,c.nii\n',
    'twice a row': 'patient,split,T1\np1,train,a.nii\np1,train,c.nii\n',
    'same content': 'patient,split,T1\np1,train,a.nii\np2,test,copy.nii\n',
    'semicolons': 'patient;split;T1\np1;train;a.nii\n', 'open quote': 'patient,split,T1\np1,train,"a.nii\n',
}

@pytest.mark.parametrize('name', TABLES)
def test_bad_manifests(tmp_path, name):
    put(tmp_path, GOOD, 'a.nii'), put(tmp_path, GOOD, 'copy.nii'), put(tmp_path, raw(voxels(key=1)), 'c.nii')
    if TABLES[name] is not None: (tmp_path/'m.csv').write_bytes(TABLES[name] if isinstance(TABLES[name], bytes) else TABLES[name].encode())
    with pytest.raises(CohortError) as e: read_manifest(tmp_path/'m.csv')
    assert 'm.csv' in str(e.value) or 'p1' in str(e.value)

@pytest.mark.parametrize('side', ['[]', '3', '{"sha256": 3}', '{"modalities": "T1"}', '{broken'])
def test_bad_sidecars(tmp_path, side):
    put(tmp_path, GOOD, 'a.nii')
    (tmp_path/'m.csv').write_text('patient,split,T1\np1,train,a.nii\n'), (tmp_path/'m.json').write_text(side)
    with pytest.raises((CohortError, ConfigError), match='m.json'): read_manifest(tmp_path/'m.csv')

def test_a_bare_table_is_enough(tmp_path):
    put(tmp_path, GOOD, 'a.nii'), put(tmp_path, raw(voxels(key=1)), 'c.nii')
    (tmp_path/'m.csv').write_bytes('\ufeffpatient, split ,T1,lesion\r\np1,train,a.nii,c.nii\r\n\r\np2,test,c.nii,\r\n'.encode())
    c = read_manifest(tmp_path/'m.csv')
    assert c.modalities == ('T1',) and c.patient('p2').paths == {'T1': tmp_path/'c.nii'} and len(c.split('train')) == 1

def random_rows(k):
    "1 to 12 patients in 1 to 3 sessions with files of their own, and whether a patient is in two splits"
    rng = numpy_rng(0, 'rows', k)
    rows = [(f'p{i}', f's{j}', str(rng.choice(['train', 'validation', 'test']))) for i in range(rng.integers(1,
        13)) for j in range(rng.integers(1, 4))]
    if k % 2: split = {p: s for p, _, s in rows}; rows = [(p, j, split[p]) for p, j, _ in rows]
    return rows, any(len({s for q, _, s in rows if q == p}) > 1 for p, _, _ in rows)

def test_1000_random_manifests_and_no_leak(tmp_path):
    found = 0
    for k in range(1000):
        rows, leak = random_rows(k)
        subjects = tuple(Subject(p, s, {'T1': tmp_path/f'{p}{j}'}, j) for p, j, s in rows)
        c = Cohort(subjects, ('T1',), tmp_path, {'sha256': {f'{p}{j}': f'{p}{j}' for p, j, _ in rows}})
        if leak:
            with pytest.raises(CohortError, match='one split'): check_leakage(c)
        else: assert check_leakage(c).subjects == subjects
        found += leak
    assert 300 < found < 500

def test_the_same_file_under_two_names(cohort, tmp_path):
    copy = tmp_path/'other.nii.gz'
    copy.write_bytes(cohort.patient('p1').paths['T2'].read_bytes())
    stranger = Subject('stranger', 'test', {'T1': copy})
    with pytest.raises(CohortError, match='p1.*other.nii.gz.*stranger'): check_leakage(replace(cohort,
        subjects=(*cohort.subjects, stranger)))
    check_leakage(replace(cohort, subjects=(*cohort.subjects, replace(stranger, split='train'))))

def test_300_random_splits():
    for k in range(300):
        rng = numpy_rng(1, 'split', k)
        names, f = [f'p{i}' for i in range(rng.integers(1, 60))], rng.dirichlet([2, 1, 1])
        split = split_patients(names+names[::2], fractions=f, seed=k)
        assert sorted(split) == sorted(names) and split == split_patients(names[::-1], fractions=f, seed=k)
        if len(names) >= 3: assert set(split.values()) == {'train', 'validation', 'test'}
        for s, share in zip(('train', 'validation', 'test'), f,
            strict=True): assert abs(list(split.values()).count(s)-share*len(names)) <= 2
    assert split_patients(['a']) == {'a': 'train'} and split_patients([]) == {}
    assert len({json.dumps(split_patients(map(str, range(20)), seed=k)) for k in range(9)}) > 5
    for bad in ((.5, .5), (.5, .5, .5), (1.5, -.5, 0), (np.nan, .5, .5)):
        with pytest.raises(ConfigError): split_patients(['a'], fractions=bad)

def test_require(cohort):
    short = replace(cohort.subjects[0], paths={'T1': cohort.subjects[0].paths['T1']})
    lacking = replace(cohort, subjects=(short, *cohort.subjects[1:]))
    with pytest.raises(CohortError, match='T2 of patient p1 .*given T1'): require(lacking, ['T1', 'T2'])
    assert require(lacking, ['T1', 'T2'], 'test') == cohort.split('test')
    with pytest.raises(CohortError, match='no subject'): require(replace(cohort, subjects=()), ['T1'], 'train')
    with pytest.raises(ConfigError, match='validation'): cohort.split('valid')
    with pytest.raises(CohortError, match="'p1'"): cohort.patient('p11')

# ---- folders --------------------------------------------------------------------------------------------------------------------
TREES = {
    'sub-{p}/anat/sub-{p}_{m}.nii.gz': ('T1w', 'T2w', 'FLAIR'), 'sub-{p}/anat/sub-{p}_acq-iso_{m}.nii.gz': ('T1w', 'PDw'),
    'sub-{p}/ses-1/anat/sub-{p}_ses-1_{m}.nii.gz': ('T1w', 'T2w'), '{p}/{m}.nii.gz': ('T1', 'T2', 'PD'), '{p}/{m}.nii': ('t1', 'ct'),
    '{p}/{p}_{m}.nii.gz': ('t1', 't1ce', 't2', 'flair', 'seg'),
    'BraTS-GLI-{p}-000/BraTS-GLI-{p}-000-{m}.nii.gz': ('t1n', 't1c', 't2w', 't2f', 'seg'),
    'IXI-{m}/IXI{p}-Guys-0828-{m}.nii.gz': ('T1', 'T2', 'PD'), 'IXI{p}-HH-1234-{m}.nii.gz': ('T1', 'T2', 'PD'),
    '{m}/{p}.nii.gz': ('T1', 'FLAIR'),
    '{p}_{m}.nii.gz': ('T1', 'T1POST'), '{p}/{m}_N4_brain.nii.gz': ('T1', 'T1POST', 'GOLD_STANDARD'),
}

@pytest.mark.parametrize('tree', TREES)
def test_common_layouts(tmp_path, tree):
    names = TREES[tree]
    for k, (p, m) in enumerate(product(('007', '019'), names)): write_volume(tmp_path/tree.format(p=p, m=m),
        Volume(head((6, 7, 5), k), np.eye(4)))
    c = propose_manifest(tmp_path)
    assert len(c.subjects) == 2 and c.info['unmatched'] == [] and all('07' in s.patient or '19' in s.patient for s in c.subjects)
    assert set(c.subjects[0].paths) == {modality_name(m) for m in names} <= set(ALIASES) and not {'lesion',
        'segmentation'} & set(c.modalities)

def test_a_pattern_and_what_it_leaves(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'), pattern='{p}/{m}_N4_x_N4_y.nii.gz')
    for name in ('notes.txt', 'a/T1_raw.nii.gz', 'b/scan.dcm'): put(tmp_path, GOOD, name)
    (tmp_path/'linked').symlink_to(tmp_path/'a')
    c = propose_manifest(tmp_path, '{patient}/{modality}_N4*.nii.gz', splits=dict(a='train', b='test'))
    assert c.modalities == ('T1', 'T2') and c.info['unmatched'] == ['a/T1_raw.nii.gz', 'b/scan.dcm', 'linked', 'notes.txt']
    assert c.info['grids']['a'] == dict(shape=[24, 28, 13], spacing=c.info['grids']['a']['spacing'], orientation='RAS')

def test_known_words_end_a_patients_name(tmp_path):
    build(tmp_path, ('IXI002-Guys-0828', 'IXI012-HH-1211'), ('T1', 'PD'), pattern='{p}-{m}.nii.gz')
    c = propose_manifest(tmp_path, '{patient}-{modality}.nii.gz')
    assert [s.patient for s in c.subjects] == ['IXI002-Guys-0828', 'IXI012-HH-1211'] and c.modalities == ('PD', 'T1')
    assert propose_manifest(tmp_path, '{patient}-Guys-{session}-{modality}.nii.gz').subjects[0].session == '0828'

def test_refusals_of_prepare(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'))
    for pattern, word in (('{patient}/x.nii.gz', 'modality'), ('{modality}.nii.gz', 'patient'),
        ('{patiant}/{modality}.nii.gz', "'patient'")):
        with pytest.raises(ConfigError, match=word): propose_manifest(tmp_path, pattern)
    with pytest.raises(CohortError, match='a/T1.nii.gz'): propose_manifest(tmp_path, 'q/{patient}/{modality}.nii.gz')
    with pytest.raises(CohortError, match='no files'): propose_manifest(tmp_path/'nothing')
    with pytest.raises(CohortError, match='none for b'): propose_manifest(tmp_path, splits=dict(a='train'))
    with pytest.raises(ConfigError, match='validation'): propose_manifest(tmp_path, splits=dict(a='train', b='valid'))
    put(tmp_path, raw(voxels(key=5)), 'a/t1w.nii.gz')
    with pytest.raises(CohortError, match='(?s)T1.nii.gz.*t1w.nii.gz'): propose_manifest(tmp_path)

def test_prepare_reports_grids_and_gaps(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'))
    write_volume(tmp_path/'a'/'T2.nii.gz', Volume(head(key=77), shifted(0)))
    (tmp_path/'b'/'T2.nii.gz').unlink()
    info = propose_manifest(tmp_path).info
    assert list(info['mismatched']) == ['a'] and info['mismatched']['a'][1].endswith('T2.nii.gz') and info['missing'] == {'b': ['T2']}
    put(tmp_path, b'', 'b/T1.nii.gz')
    with pytest.raises(VolumeError, match='T1.nii.gz'): propose_manifest(tmp_path)

# ---- slices ---------------------------------------------------------------------------------------------------------------------
def test_load_subject(cohort):
    loaded = load_subject(cohort.patient('p1'), ['T1', 'PD', 'T1'])
    assert set(loaded.images) == {'T1', 'PD'} and loaded.mask.dtype == bool and 0 < loaded.mask.mean() < 1
    for m, image in loaded.images.items():
        assert image.dtype == np.float32 and image.min() == -1 and image.max() == 1
        canonical = to_canonical(read_volume(cohort.patient('p1').paths[m]))[0].data
        window = loaded.windows[m]
        assert np.allclose(image, 2*np.clip((canonical-window.low)/(window.high-window.low), 0, 1)-1, atol=1e-6)
    fixed = load_subject(cohort.patient('p1'), ['T1'], windows=dict(T1=(0, 1000)))
    assert fixed.windows['T1'] == (0, 1000) and fixed.images['T1'].max() < 0
    with pytest.raises(ConfigError, match='low below high'): load_subject(cohort.patient('p1'), ['T1'], windows=dict(T1=(5, 5)))

def test_ct_has_its_fixed_window(tmp_path):
    write_volume(tmp_path/'ct.nii', Volume(np.where(head() > 0, 40, -1000), np.eye(4)))
    assert load_subject(Subject('p', 'test', dict(CT=tmp_path/'ct.nii')), ['CT']).windows['CT'] == (-1024, 3071)

PAIRS = [(shape, affine) for shape, affine in [((24, 28, 12), OBLIQUE), ((28, 24, 13), OBLIQUE), ((12, 14, 13), np.diag([2, 2, 1, 1.])),
    *(((24, 28, 13), shifted(k)) for k in range(6)), *(((24, 28, 13), turned(*a)) for a in AFFINES[1::6]),
    *(((24, 28, 13), OBLIQUE*np.array([s, s, s, 1])) for s in (.9, 1.1, 1.01))]]

@pytest.mark.parametrize('shape,affine', PAIRS)
def test_20_mismatched_pairs_name_both(cohort, tmp_path, shape, affine):
    assert len(PAIRS) >= 20
    path = write_volume(tmp_path/'odd.nii.gz', Volume(head(shape), affine))
    first = cohort.patient('p1').paths['T1']
    with pytest.raises(CohortError) as e: load_subject(Subject('p1', 'train', dict(T1=first, T2=path)), ['T1', 'T2'])
    assert str(first) in str(e.value) and str(path) in str(e.value) and 'Resample' in str(e.value)

def test_an_image_without_contrast_is_named(tmp_path):
    path = write_volume(tmp_path/'flat.nii.gz', Volume(np.full((9, 9, 9), 3.), np.eye(4)))
    with pytest.raises(VolumeError, match='flat.nii.gz'): load_subject(Subject('p', 'test', dict(T1=path)), ['T1'])
    with pytest.raises(CohortError, match='T2 of patient p'): load_subject(Subject('p', 'test', dict(T1=path)), ['T2'])

def test_restore_checks_the_shape(cohort):
    loaded = load_subject(cohort.patient('p1'), ['T1'])
    assert loaded.reference.data.strides == (0, 0, 0)
    with pytest.raises(ShapeError): restore(loaded, np.zeros((3, 4, 5)))

def test_fit_and_unfit_500_sizes():
    rng = numpy_rng(0, 'fit')
    for _ in range(500):
        shape, size, corner = rng.integers(1, 30, 2), rng.integers(1, 30, 2), rng.integers(-40, 40, 2)
        a = rng.standard_normal((3, *shape)).astype(np.float32)
        b, box = fit_to(a, size, -1, corner=None if rng.random() < .5 else corner)
        assert b.shape == (3, *size) and b.dtype == np.float32
        back, seen = unfit(b, box), unfit(np.ones_like(b), box) > 0
        assert np.array_equal(back[seen], a[seen]) and (back[~seen] == -1).all()
        ends = np.array([box.top, box.left])
        if (ends <= 0).all() and (ends+size >= shape).all(): assert seen.all()
    with pytest.raises(ConfigError): fit_to(a, 0)
    with pytest.raises(ConfigError): fit_to(a, (3, 2.5))
    with pytest.raises(ShapeError): unfit(np.zeros((3, 99, 99)), box)

def same(a, b): return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)

@pytest.fixture(scope='module')
def pairs(cohort): return SlicePairs(cohort, 'train', ('T1', 'T2'), 'PD', size=(17, 12), augment=True, seed=3)

def test_pairs_shapes(cohort, pairs):
    x = pairs[0]
    assert x['source'].shape == (2, 17, 12) and x['target'].shape == (1, 17, 12) and x['source'].dtype == torch.float32
    mask = load_subject(cohort.patient('p1'), ['T1', 'T2', 'PD']).mask
    assert x['patient'] == 'p1' and [pairs[k]['z'] for k in range(len(pairs))] == tissue_slices(mask).tolist()
    assert all(x['target'].abs().max() <= 1 for x in pairs)

def test_same_bytes_from_any_worker_and_order(pairs, cohort):
    keys = [(i, d) for d in range(3) for i in range(len(pairs))]
    twin = SlicePairs(cohort, 'train', ('T1', 'T2'), 'PD', size=(17, 12), augment=True, seed=3, max_bytes=0)
    expected = [pairs[k] for k in keys]
    assert all(same(a, twin[k]) for a, k in zip(expected[::-1], keys[::-1], strict=True)) and isinstance(twin.blocks[0], np.memmap)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(pairs, batch_size=None, sampler=keys, num_workers=workers)
        assert all(same(a, b) for a, b in zip(expected, loader, strict=True))
    assert not same(pairs[3, 0], pairs[3, 1])
    assert not all(same(pairs[k], SlicePairs(cohort, 'train', ('T1', 'T2'), 'PD', size=(17, 12), augment=True, seed=4)[k]) for k in keys)

def test_source_and_target_stay_aligned(cohort):
    d = SlicePairs(cohort, 'train', ('T1',), 'T1', size=11, augment=True)
    for k in range(len(d)):
        for draw in range(5): assert torch.equal(d[k, draw]['source'], d[k, draw]['target']) and d[k, draw]['target'].max() > -1

def test_without_augmentation_slices_are_the_volume(cohort):
    d = SlicePairs(cohort, 'test', ('T1',), 'T2', size=(28, 24))
    loaded = load_subject(cohort.patient('p3'), ['T1', 'T2'])
    for k, x in enumerate(d):
        assert np.array_equal(x['target'][0].numpy(), to_image(loaded.images['T2'], x['z'])) and same(x, d[k, 9])
    wide, box = fit_to(to_image(loaded.images['T1'], d[0]['z']), 40)
    assert np.array_equal(SlicePairs(cohort, 'test', ('T1',), 'T2', size=40)[0]['source'][0].numpy(), wide) and box.top < 0

def test_without_augmentation_all_slices_are_cut_at_one_place(tmp_path):
    leaning = np.stack([np.roll(head()[..., k], (k-6)//2, 0) for k in range(13)], 2)
    for m in ('T1', 'T2'): write_volume(tmp_path/f'{m}.nii', Volume(leaning, np.eye(4)))
    c = Cohort((Subject('p', 'test', {m: tmp_path/f'{m}.nii' for m in ('T1', 'T2')}),), ('T1', 'T2'), tmp_path)
    d, image = SlicePairs(c, 'test', ('T1',), 'T2', size=14), load_subject(c.subjects[0], ['T1', 'T2']).images['T2']
    def corners(x): return {k for k in np.ndindex(15, 11) if np.array_equal(fit_to(to_image(image, x['z']), 14, corner=k)[0],
        x['target'][0])}
    assert len(set.intersection(*map(corners, d))) == 1 and len(d) > 5

def test_limit_and_missing(cohort):
    d = SlicePairs(cohort, 'train', ('T1',), 'T2', size=8, limit=3)
    full = SlicePairs(cohort, 'train', ('T1',), 'T2', size=8)
    assert len(d) == 3 and d[0]['z'] == full[0]['z'] and d[2]['z'] == full[len(full)-1]['z']
    with pytest.raises(CohortError, match='FLAIR of patient p1'): SlicePairs(cohort, 'train', ('T1',), 'FLAIR', size=8)
    with pytest.raises(ConfigError): SlicePairs(cohort, 'train', ('T1',), 'T2', size=8, limit=0)

def test_flips_happen_and_only_when_augmenting(cohort):
    d = SlicePairs(cohort, 'train', ('T1',), 'T2', size=(28, 24), augment=True)
    plain, flipped = d.blocks[0][0], d.blocks[0][0][..., ::-1]
    seen = {(np.array_equal(x['source'][0], plain[0]), np.array_equal(x['source'][0], flipped[0])) for x in (d[0, k] for k in range(20))}
    assert seen == {(True, False), (False, True)}

def test_a_full_disk_while_slices_are_spooled(cohort, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr('tempfile.TemporaryFile', full)
    with pytest.raises(DiskError, match='bytes free'): SlicePairs(cohort, 'train', ('T1',), 'T2', size=8, max_bytes=0)

# ---- real volumes ---------------------------------------------------------------------------------------------------------------
REAL = Path(__file__).resolve().parent.parent.parent/'shared'/'data'

@pytest.mark.skipif(not REAL.exists(), reason='the real volumes are not here')
def test_real_folders(tmp_path):
    c = propose_manifest(REAL/'ms', '{patient}/{modality}_N4*.nii.gz', splits=dict(patient07='train', patient19='test'))
    assert c.modalities == ('FLAIR', 'T1', 'T1POST', 'T2') and c.info['unmatched'] == [] and 'lesion' in c.subjects[0].paths
    assert propose_manifest(REAL/'ms').modalities == c.modalities
    assert [s.patient for s in propose_manifest(REAL, '{patient}/{modality}.nii.gz').subjects] == ['cstar']
    path = REAL/'cstar'/'T2.nii.gz'
    v, theirs = read_volume(path), nib.load(path)
    assert np.array_equal(v.data, theirs.get_fdata(dtype=np.float32)) and np.array_equal(v.affine, theirs.affine)
    assert read_grid(path).shape == v.shape
    back = restore(v, from_images(to_images(to_canonical(v)[0].data)))
    again = nib.load(write_volume(tmp_path/'t2.nii.gz', back))
    assert np.array_equal(again.get_fdata(dtype=np.float32), v.data) and np.array_equal(again.affine, v.affine)
