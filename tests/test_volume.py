"Volumes: damaged files, geometry, writing"
import errno
import gzip
import os
import subprocess
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest

from i2i_mamba_nb.core import DiskError, ShapeError, numpy_rng
from i2i_mamba_nb.data import volume as volume_module
from i2i_mamba_nb.data.slices import (from_images, restore, to_image, to_images)
from samples import AFFINES, GOOD, OBLIQUE, SHAPE, put, raw, shifted, turned, voxels

from i2i_mamba_nb.data.volume import (Volume, VolumeError, from_canonical, read_volume, same_grid, to_canonical,
    write_volume)

# ---- malformed volumes ----------------------------------------------------------------------------------------------------------
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
def test_malformed(tmp_path, tally, name, suffix):
    refused(put(tmp_path, MALFORMED[name], f'v{suffix}'))
    tally.add(suffix, malformed=1, refused=1)

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
    for name in ('v.mnc', 'v.dcm', 'v', 'v.gz', 'nii'): refused(put(tmp_path, GOOD, name), '.nii.gz')
    for name in ('v.mgz', 'v.mgh', 'v.nrrd', 'v.mha'): refused(put(tmp_path, GOOD, name))
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

def test_2000_header_mutations(tmp_path, tally):
    rng, read = numpy_rng(0, 'mutations'), {'.nii': 0, '.nii.gz': 0}
    for k in range(2000):
        block = bytearray(raw(version=1+k % 2)[:352] if k % 2 == 0 else raw(version=2))
        for place in rng.integers(0, 348, rng.integers(1, 6)): block[place] = rng.integers(256)
        kind = ('.nii', '.nii.gz')[k//2 % 2]
        read[kind] += survives(put(tmp_path, bytes(block)+(GOOD[352:] if k % 2 == 0 else b''), f'v{kind}')) is not None
    for kind, n in read.items():
        assert 50 < n < 950
        tally.add(kind, mutations=1000, refused=1000-n)

def test_1000_flips_of_a_packed_file_change_nothing(tmp_path, tally):
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
    tally.add('.nii.gz', flips=1000, refused=1000-same, unchanged=same)

def test_300_flips_of_a_plain_header(tmp_path, tally):
    rng, read = numpy_rng(0, 'plain'), 0
    for place in rng.integers(0, 352, 300):
        read += survives(put(tmp_path, at(GOOD, int(place), bytes([GOOD[place] ^ 1 << int(rng.integers(8))])))) is not None
    tally.add('.nii', flips=300, refused=300-read)

def test_500_truncations(tmp_path, tally):
    rng, z = numpy_rng(0, 'cuts'), gzip.compress(GOOD)
    for k in range(500):
        source = (GOOD, z)[k % 2]
        (tmp_path/('v.nii', 'v.nii.gz')[k % 2]).write_bytes(source[:rng.integers(len(source))])
        assert survives(tmp_path/('v.nii', 'v.nii.gz')[k % 2]) is None
    for kind in ('.nii', '.nii.gz'): tally.add(kind, truncations=250, refused=250)

BOMBS = """
import sys
import nibabel
from i2i_mamba_nb.data.volume import VolumeError, read_volume
def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])  # ru_maxrss would count the parent's peak
before = peak()
for path in sys.argv[1:]:
    try: read_volume(path)
    except VolumeError: continue
    sys.exit(path+' was read')
print((peak()-before)//1024)
"""

def packed_zeros(header, megabytes):
    "A gzip stream of a header and that many megabytes of zeros"
    z = zlib.compressobj(9, zlib.DEFLATED, 31)
    return z.compress(header)+b''.join(z.compress(bytes(2**20)) for _ in range(megabytes))+z.flush()

def test_bombs_are_refused_in_little_memory(tmp_path, tally):
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
    tally.add('.nii', bombs=6, refused=6), tally.add('.nii.gz', bombs=len(paths)-6, refused=len(paths)-6)
    tally.most('memory for a bomb, MB', int(out.stdout))

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
    for name in ('v.mnc', 'v.nhdr', 'v'):
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

@pytest.mark.parametrize('k', range(6))
def test_a_shift_of_one_voxel_is_another_grid(k):
    a, b = Volume(voxels(), OBLIQUE), Volume(voxels(), shifted(k))
    assert same_grid(a, a) and not same_grid(a, b) and not same_grid(a, Volume(voxels((9, 11, 8)), OBLIQUE))
    assert same_grid(a, Volume(voxels(), OBLIQUE+1e-6)) and not same_grid(a, Volume(voxels(), turned((0, 1, 2), (-1, 1, 1))))
