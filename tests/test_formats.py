"Volumes of other formats: MGH, NRRD, MHA, DICOM; damage, oracles, what is written, crops"
import gzip
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from samples import AFFINES, OBLIQUE, SHAPE, put, raw, turned, voxels

from i2i_mamba_nb.core import DiskError, ShapeError, numpy_rng
from i2i_mamba_nb.data import volume as volume_module
from i2i_mamba_nb.data.volume import (SUFFIXES, Volume, VolumeError, _dicom_fields, crop, described, list_series, read_grid, read_volume,
    same_grid, uncrop, write_volume)

sitk.ProcessObject.SetGlobalWarningDisplay(False)
SMALL = voxels((5, 6, 4))
LPS = np.diag([-1, -1, 1, 1.])
TURN = np.linalg.qr(np.array([[.9, .1, .05], [-.12, 1.1, .2], [.03, -.15, 1.7]]))[0]
RIGID = np.eye(4)
RIGID[:3, :3], RIGID[:3, 3] = TURN*[.9, 1.1, 1.7], (-3, 4, 5)

def ours(path): v = read_volume(path); return v.data.tobytes(), v.affine

def oracle(path):
    "Voxels and RAS affine as SimpleITK sees them"
    image = sitk.ReadImage([str(p) for p in path] if isinstance(path, list) else str(path))
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = np.reshape(image.GetDirection(), (3, 3))*image.GetSpacing(), image.GetOrigin()
    return sitk.GetArrayFromImage(image).T.astype(np.float32), LPS@matrix

def agree(path, atol=1e-12):
    data, affine = oracle(path)
    v = read_volume(path)
    assert np.array_equal(v.data, data) and np.allclose(v.affine, affine, atol=atol)
    return v

# ---- files made by hand ---------------------------------------------------------------------------------------------------------
def mgh(data=SMALL, affine=OBLIQUE, footer=b'', **fields):
    "Bytes of an MGH file with header fields overridden"
    h = nib.MGHImage(np.asarray(data, np.float32), affine).header
    h['type'] = {'u1': 0, 'i4': 1, 'f4': 3, 'i2': 4, 'u2': 10}[data.dtype.str[1:]]
    for name, value in fields.items(): h[name] = value
    return h.binaryblock[:90]+bytes(194)+data.astype(data.dtype.newbyteorder('>')).tobytes(order='F')+footer

NRRD = dict(type='float', dimension='3', sizes='5 6 4', encoding='raw', endian='little', space='left-posterior-superior')
NRRD |= {'space directions': '(0.9,0.1,0) (-0.1,1.1,0.2) (0,0,1.7)', 'space origin': '(-3,4,5)', 'kinds': 'domain domain domain'}
BODY = SMALL.astype('<f4').tobytes(order='F')

def nrrd(body=BODY, first='NRRD0005', extra='', drop=(), **fields):
    "Bytes of an NRRD file; underscores in names are blanks"
    given = NRRD | {k.replace('_', ' '): v for k, v in fields.items()}
    return (first+'\n'+''.join(f'{k}: {v}\n' for k, v in given.items() if k not in drop)+extra+'\n').encode()+body

MHA = dict(ObjectType='Image', NDims='3', BinaryData='True', BinaryDataByteOrderMSB='False', CompressedData='False',
    TransformMatrix='0 1 0 -1 0 0 0 0 1', Offset='-3 4 5', ElementSpacing='0.9 1.1 1.7', DimSize='5 6 4', ElementType='MET_FLOAT')

def mha(body=BODY, last='ElementDataFile = LOCAL\n', extra='', drop=(), **fields):
    "Bytes of an MHA file"
    return (''.join(f'{k} = {v}\n' for k, v in (MHA | fields).items() if k not in drop)+extra+last).encode()+body

ZLIB = zlib.compress(BODY)
PACKED = dict(CompressedData='True', CompressedDataSize=str(len(ZLIB)))
NAN = np.where(np.arange(120).reshape(5, 6, 4) == 57, np.nan, SMALL).astype('<f4')
NANS = NAN.tobytes(order='F')
SOUND = {'.mgh': mgh(), '.mgz': gzip.compress(mgh()), '.nrrd': nrrd(gzip.compress(BODY), encoding='gzip'), '.mha': mha(ZLIB, **PACKED)}
HUGE = '9'*40

def m(**fields): return mgh(**fields)
MALFORMED = {
    '.mgh': {'empty': b'', '100 bytes': mgh()[:100], '283 bytes': mgh()[:283], 'header only': mgh()[:284], 'one byte short': mgh()[:-1],
        'text': b'no image\n'*99, 'gzip': gzip.compress(mgh()), 'zeros': bytes(9000), 'noise': numpy_rng(0, 'n').bytes(9000),
        'NIfTI': raw(),
        'LFS': b'version https://git-lfs.github.com/spec/v1\n'+b'x'*400, 'DICOM': bytes(128)+b'DICM'+bytes(900), 'version 2': m(version=2),
        'zero x': m(dims=[0, 6, 4, 1]), 'negative y': m(dims=[5, -6, 4, 1]), 'two frames': m(dims=[5, 6, 2, 2]),
        'no frame': m(dims=[5, 6, 4, 0]),
        '1024 cubed': m(dims=[1024, 1024, 1024, 1]), 'overflow': m(dims=[2**31-1, 2**31-1, 2**31-1, 1]), 'type 2': m(type=2),
        'bitmap': m(type=5), 'tensor': m(type=6), 'type -1': m(type=-1), 'wider type': m(type=1, dims=[5, 6, 8, 1]),
        'flag 7': m(goodRASFlag=7),
        'NaN delta': m(delta=[1, np.nan, 1]), 'zero delta': m(delta=[1, 0, 1]), 'negative delta': m(delta=[1, -1, 1]),
        'delta 1e9': m(delta=[1, 1, 1e9]), 'NaN axes': m(Mdc=np.full((3, 3), np.nan)), 'singular axes': m(Mdc=np.ones((3, 3))),
        'zero axes': m(Mdc=np.zeros((3, 3))), 'infinite centre': m(Pxyz_c=[0, 0, np.inf]), 'centre 1e9': m(Pxyz_c=[0, 0, 1e9]),
        'NaN voxel': mgh(NAN), 'long tail': mgh(footer=bytes(2**24+1))},
    '.mgz': {'not packed': mgh(), 'cut': gzip.compress(mgh())[:-9], 'no trailer': gzip.compress(mgh())[:-8], 'long tail':
        gzip.compress(mgh(footer=bytes(2**24+1))), 'rubbish': gzip.compress(mgh())+b'rubbish', 'short': gzip.compress(mgh()[:-4]),
        'header only':
        gzip.compress(mgh()[:284]), 'bare magic': b'\x1f\x8b', 'checksum': gzip.compress(mgh())[:-8]+b'abcd'+gzip.compress(mgh())[-4:]},
    '.nrrd': {'empty': b'', 'magic only': b'NRRD0005', 'no blank line': nrrd(b'', extra='')[:-1], 'no magic': nrrd(first='NERD0005'),
    'web page':
        b'<!DOCTYPE html>\n\n'+bytes(99), 'NIfTI': raw(), 'gzip': gzip.compress(nrrd()),
        'long line': b'NRRD0005\ncontent: '+b'x'*2**21+b'\n\n',
        'many lines': b'NRRD0005\n'+b'# x\n'*30000+b'\n', 'long line that ends': nrrd(content='x'*2**20), 'no type': nrrd(drop=['type']),
        'no sizes': nrrd(drop=['sizes']), 'no dimension': nrrd(drop=['dimension']), 'no encoding': nrrd(drop=['encoding']),
        'no endian': nrrd(drop=['endian']), 'endian pdp': nrrd(endian='pdp'), 'ascii': nrrd(encoding='ascii'), 'hex': nrrd(encoding='hex'),
        'bzip2': nrrd(encoding='bzip2'), 'block': nrrd(type='block'), 'unknown type': nrrd(type='float16'),
        'detached': nrrd(data_file='v.raw'),
        'path outside': nrrd(data_file='/etc/passwd'), 'line skip': nrrd(line_skip='1'), 'byte skip': nrrd(byte_skip='-1'),
        '2-D': nrrd(dimension='2', sizes='5 24'), '5-D': nrrd(dimension='5', sizes='5 6 4 1 1'), 'two frames': nrrd(BODY*2, dimension='4',
        sizes='5 6 4 2'), 'vector': nrrd(dimension='4', sizes='3 5 6 4'), 'dimension x': nrrd(dimension='x'), 'huge dimension':
        nrrd(dimension=HUGE), 'huge size': nrrd(sizes='5 6 '+HUGE), 'size zero': nrrd(sizes='5 0 4'), 'size negative': nrrd(sizes='5 -6 4'),
        'size fraction': nrrd(sizes='5 6.5 4'), 'size in words': nrrd(sizes='five 6 4'), 'Arabic digits': nrrd(sizes='٥ 6 4'), 'four sizes':
        nrrd(sizes='5 6 4 1'), '1024 cubed': nrrd(sizes='1024 1024 1024'), '10 digits': nrrd(sizes='9999999999 9999999999 9999999999'),
        'field twice': nrrd(extra='type: float\n'), 'unknown field': nrrd(extra='spacinks: 1 2 3\n'), 'no colon': nrrd(extra='hello\n'),
        'no blank after colon': nrrd(extra='content:x\n'), 'scanner space': nrrd(space='scanner-xyz'), 'unknown space': nrrd(space='right'),
        'space of 4': nrrd(extra='space dimension: 4\n'), 'in cm': nrrd(space_units='"cm" "cm" "cm"'), 'axis mins': nrrd(axis_mins='1 2 3'),
        'no voxel size': nrrd(drop=['space directions']), 'two directions': nrrd(space_directions='(1,0,0) (0,1,0)'), 'none':
        nrrd(space_directions='(1,0,0) (0,1,0) none'), 'flat': nrrd(space_directions='(1,0,0) (0,1,0) (1,1,0)'), 'NaN direction':
        nrrd(space_directions='(1,0,0) (0,nan,0) (0,0,1)'), 'short direction': nrrd(space_directions='(1,0) (0,1,0) (0,0,1)'),
        'infinite origin':
        nrrd(space_origin='(0,0,inf)'), 'overflow in origin': nrrd(space_origin='(0,0,1e999)'),
        'far origin': nrrd(space_origin='(0,0,1e9)'),
        'short origin': nrrd(space_origin='(0,0)'), 'spacing 1e-9': nrrd(space_directions='(1e-9,0,0) (0,1,0) (0,0,1)'), 'spacings NaN':
        nrrd(drop=['space directions'], spacings='1 2 nan'), 'voxel short': nrrd(BODY[:-4]), 'voxel more': nrrd(BODY+bytes(4)), 'NaN voxel':
        nrrd(NANS), 'gzip cut': nrrd(gzip.compress(BODY)[:-9], encoding='gzip'), 'gzip rubbish': nrrd(gzip.compress(BODY)+b'x',
        encoding='gzip'),
        'gzip short': nrrd(gzip.compress(BODY[:-4]), encoding='gzip'), 'gzip long': nrrd(gzip.compress(BODY+bytes(9)), encoding='gzip'),
        'not gzip': nrrd(encoding='gzip'), 'zlib': nrrd(ZLIB, encoding='gzip')},
    '.mha': {'empty': b'', 'text': b'hello world\n'*9, 'binary': numpy_rng(1, 'm').bytes(5000), 'no end': mha(b'', last=''), 'long line':
        b'ObjectType = Image\nComment = '+b'x'*2**21, 'many lines': b'A = b\n'*30000, 'no dims': mha(drop=['NDims']),
        'no size': mha(drop=['DimSize']),
        'no type': mha(drop=['ElementType']), 'detached': mha(last='ElementDataFile = v.raw\n'),
        'list': mha(last='ElementDataFile = LIST\nv.raw\n'),
        'path outside': mha(last='ElementDataFile = /etc/passwd\n'), 'tube': mha(ObjectType='Tube'), '2-D': mha(NDims='2', DimSize='5 24'),
        '10 axes': mha(NDims='10'), 'NDims 1e30': mha(NDims=HUGE), 'two frames': mha(BODY*2, NDims='4', DimSize='5 6 4 2'), 'RGB':
        mha(BODY*3, ElementNumberOfChannels='3'), 'array type': mha(ElementType='MET_FLOAT_ARRAY'),
        'other type': mha(ElementType='MET_OTHER'),
        'ascii': mha(BinaryData='False'), 'header size': mha(HeaderSize='4'), 'slope': mha(ElementToIntensityFunctionSlope='2'),
        'slope NaN':
        mha(ElementToIntensityFunctionSlope='nan'), 'order': mha(BinaryDataByteOrderMSB='Perhaps'), 'huge size': mha(DimSize='5 6 '+HUGE),
        'size zero': mha(DimSize='5 0 4'), 'size negative': mha(DimSize='5 -6 4'), 'size fraction': mha(DimSize='5 6.0 4'), 'two sizes':
        mha(DimSize='5 6'), '1024 cubed': mha(DimSize='1024 1024 1024'), 'key twice': mha(extra='NDims = 3\n'),
        'no equals': mha(extra='hello\n'),
        'misspelt': mha(drop=['TransformMatrix'], extra='TransfprmMatrix = 1 0 0 0 1 0 0 0 1\n'), 'misspelt offset': mha(drop=['Offset'],
        extra='Offseu = 1 2 3\n'), 'spacing zero': mha(ElementSpacing='1 0 1'), 'spacing negative': mha(ElementSpacing='1 -1 1'),
        'spacing NaN':
        mha(ElementSpacing='1 nan 1'), 'spacing 1e9': mha(ElementSpacing='1 1 1e9'), 'two spacings': mha(ElementSpacing='1 1'), 'flat':
        mha(TransformMatrix='1 0 0 1 0 0 0 0 1'), 'zero matrix': mha(TransformMatrix='0 0 0 0 0 0 0 0 0'), 'short matrix':
        mha(TransformMatrix='1 0 0 0 1 0 0 0'), 'NaN matrix': mha(TransformMatrix='1 0 0 0 1 0 0 0 nan'), 'infinite offset':
        mha(Offset='0 0 inf'), 'far offset': mha(Offset='0 0 1e9'), 'in cm': mha(DistanceUnits='cm'), 'voxel short': mha(BODY[:-4]),
        'voxel more': mha(BODY+bytes(4)), 'NaN voxel': mha(NANS), 'zlib cut': mha(ZLIB[:-9], CompressedData='True'),
        'no checksum': mha(ZLIB[:-4], CompressedData='True'),
        'half a checksum': mha(ZLIB[:-1], CompressedData='True'), 'zlib checksum':
        mha(ZLIB[:-4]+b'abcd', **PACKED), 'zlib rubbish': mha(ZLIB+b'x', CompressedData='True'), 'wrong packed size': mha(ZLIB,
        CompressedData='True', CompressedDataSize='99'), 'gzip': mha(gzip.compress(BODY), CompressedData='True'), 'zlib short':
        mha(zlib.compress(BODY[:-4]), CompressedData='True'), 'zlib long': mha(zlib.compress(BODY+bytes(9)), CompressedData='True'),
        'not packed':
        mha(CompressedData='True'), 'packed 2': mha(ZLIB, CompressedData='Maybe')},
}
CASES = [(suffix, name) for suffix, files in MALFORMED.items() for name in files]

def refused(path, *words, **options):
    "The VolumeError of a path, complete and naming it"
    with pytest.raises(VolumeError) as e: read_volume(path, **options)
    e = e.value
    assert str(path) in str(e) and e.what and e.hint and 'given' in str(e) and 'expected' in str(e) and len(str(e)) < 4000
    for w in words: assert w in str(e)
    return e

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('suffix,name', CASES)
def test_malformed(tmp_path, tally, suffix, name):
    (tmp_path/f'v{suffix}').write_bytes(MALFORMED[suffix][name])
    began = time.perf_counter()
    refused(tmp_path/f'v{suffix}')
    tally.most('slowest malformed file, seconds', time.perf_counter()-began)
    tally.add(suffix, malformed=1, refused=1)

def test_enough_malformed(): assert len(CASES) >= 150 and min(map(len, MALFORMED.values())) >= 9

@pytest.mark.parametrize('name', ['v.nhdr', 'v.mhd'])
def test_detached_headers_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path/name).write_bytes(nrrd() if 'nhdr' in name else mha())
    refused(tmp_path/name, 'in the same file', {'v.nhdr': '.nrrd', 'v.mhd': '.mha'}[name])

@pytest.mark.parametrize('suffix', SOUND)
def test_sound_files_are_read(tmp_path, suffix):
    for name in (f'v{suffix}', f'V{suffix.upper()}'):
        (tmp_path/name).write_bytes(SOUND[suffix])
        v = read_volume(tmp_path/name)
        assert np.array_equal(v.data, SMALL) and v.data.dtype == np.float32 and read_grid(tmp_path/name).shape == SMALL.shape
        with pytest.raises(VolumeError, match='at most 99 voxels'): read_volume(tmp_path/name, max_voxels=99)
        refused(tmp_path/name, 'series', series='1.2.3')

# ---- oracles --------------------------------------------------------------------------------------------------------------------
TYPES = {'u1': ('uchar', 'MET_UCHAR'), 'i1': ('int8', 'MET_CHAR'), 'i2': ('short', 'MET_SHORT'), 'u2': ('unsigned short', 'MET_USHORT'),
    'i4': ('int', 'MET_INT'), 'u4': ('uint32', 'MET_UINT'), 'f4': ('float', 'MET_FLOAT'), 'f8': ('double', 'MET_DOUBLE'),
    'i8': ('long long', 'MET_LONG_LONG'), 'u8': ('uint64_t', 'MET_ULONG_LONG')}

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('kind', TYPES)
def test_types_against_simpleitk(tmp_path, kind, order, packed):
    body = SMALL.astype(kind).astype(order+kind).tobytes(order='F')
    gz, z = (gzip.compress(body), zlib.compress(body)) if packed else (body, body)
    (tmp_path/'v.nrrd').write_bytes(nrrd(gz, type=TYPES[kind][0], endian={'<': 'little', '>': 'big'}[order],
        encoding='gzip' if packed else 'raw'))
    (tmp_path/'v.mha').write_bytes(mha(z, ElementType=TYPES[kind][1], BinaryDataByteOrderMSB=str(order == '>'),
        **(dict(CompressedData='True', CompressedDataSize=str(len(z))) if packed else {})))
    for path in (tmp_path/'v.nrrd', tmp_path/'v.mha'):
        v = agree(path)
        again = read_volume(write_volume(tmp_path/f'w{path.suffix}', v))
        assert np.array_equal(v.data, SMALL.astype(kind).astype(np.float32)) and again.data.tobytes() == v.data.tobytes()
        assert np.array_equal(again.affine, v.affine) and np.dtype(again.header['dtype']) == np.dtype(order+kind)
        agree(tmp_path/f'w{path.suffix}')

@pytest.mark.parametrize('kind', ['u1', 'i2', 'i4', 'f4', 'u2'])
@pytest.mark.parametrize('suffix', ['.mgh', '.mgz'])
def test_mgh_types_against_nibabel(tmp_path, kind, suffix):
    footer = np.array([2300, .5, 3, 900, 256], '>f4').tobytes()
    content = mgh(SMALL.astype(kind), footer=footer+b'tags and a user name')
    (tmp_path/f'v{suffix}').write_bytes(gzip.compress(content) if suffix == '.mgz' else content)
    v, image = read_volume(tmp_path/f'v{suffix}'), nib.load(tmp_path/f'v{suffix}')
    assert np.array_equal(v.data, image.get_fdata(dtype=np.float32)) and np.array_equal(v.affine, image.affine)
    assert v.header['te'] == 3 and v.header['fov'] == 256 and v.header == image.header
    path = write_volume(tmp_path/f'w{suffix}', v)
    again, image = read_volume(path), nib.load(path)
    assert again.data.tobytes() == v.data.tobytes() and np.array_equal(again.affine, v.affine) and again.header == v.header
    assert np.array_equal(image.get_fdata(dtype=np.float32), v.data) and image.get_data_dtype() == np.dtype(kind).newbyteorder('>')
    content = gzip.decompress(path.read_bytes()) if suffix == '.mgz' else path.read_bytes()
    assert b'user name' not in content and len(content) == 284+v.data.size*np.dtype(kind).itemsize+20

def test_mgh_without_good_geometry_takes_the_default_of_freesurfer(tmp_path):
    (tmp_path/'v.mgh').write_bytes(mgh(goodRASFlag=0))
    assert np.array_equal(read_volume(tmp_path/'v.mgh').affine, nib.load(tmp_path/'v.mgh').affine)

@pytest.mark.parametrize('change', [{}, dict(space='right-anterior-superior'), dict(space='RAS'), dict(space='Left-Anterior-Superior'),
    dict(space='LAS'),
    dict(space='lps'), dict(drop=['space', 'space directions', 'space origin'],
        extra='space dimension: 3\nspace directions: (0,2,0) (3,0,0) (0,1,4)\nspace origin: (1,2,3)\n'), dict(drop=['space origin']),
        dict(drop=['kinds']),
    dict(drop=['space', 'space directions', 'space origin'], spacings='0.9 1.1 1.7'), dict(space_units='"mm" "mm" "mm"'),
    dict(extra='# a comment\nDICOM_0010_0010:=somebody\n'), dict(space_directions='(0.9, 0.1, 0) (-0.1,1.1,0.2) ( 0 ,0,1.7 )'),
    dict(first='NRRD0004'), dict(endian='Little', encoding='RAW', type='FLOAT')])
def test_nrrd_geometry_against_simpleitk(tmp_path, change):
    (tmp_path/'v.nrrd').write_bytes(nrrd(**change))
    v = agree(tmp_path/'v.nrrd')
    assert b'somebody' not in write_volume(tmp_path/'w.nrrd', v).read_bytes()
    again = agree(tmp_path/'w.nrrd')
    assert np.array_equal(again.affine, v.affine) and again.header['fields'].get('space') == v.header['fields'].get('space')

def test_nrrd_line_ends_of_windows(tmp_path):
    head, body = nrrd(b''), BODY
    (tmp_path/'v.nrrd').write_bytes(head.replace(b'\n', b'\r\n')+body)
    assert np.array_equal(read_volume(tmp_path/'v.nrrd').data, SMALL)

@pytest.mark.parametrize('change', [{}, dict(drop=['TransformMatrix']), dict(drop=['Offset', 'ElementSpacing']),
    dict(drop=['BinaryData', 'ObjectType']),
    dict(drop=['TransformMatrix'], Rotation='0 1 0 -1 0 0 0 0 1'), dict(drop=['Offset'], Position='1 2 3'),
    dict(drop=['Offset'], Origin='1 2 3'),
    dict(drop=['ElementSpacing'], ElementSize='2 3 4'), dict(AnatomicalOrientation='LPS', CenterOfRotation='9 9 9'),
    dict(DistanceUnits='mm'), dict(BinaryData='true', BinaryDataByteOrderMSB='F', CompressedData='false'),
    dict(TransformMatrix='0.6 0.8 0 -0.8 0.6 0 0 0 1'), dict(extra='0010|0010 = somebody\nInstitutionName = some place\n')])
def test_mha_geometry_against_simpleitk(tmp_path, change):
    (tmp_path/'v.mha').write_bytes(mha(**change))
    v = agree(tmp_path/'v.mha')
    assert b'some' not in write_volume(tmp_path/'w.mha', v).read_bytes()
    assert np.array_equal(agree(tmp_path/'w.mha').affine, v.affine)

def test_mha_line_ends_of_windows(tmp_path):
    (tmp_path/'v.mha').write_bytes(mha(b'').replace(b'\n', b'\r\n')+BODY)
    assert np.array_equal(agree(tmp_path/'v.mha').data, SMALL)

@pytest.mark.parametrize('content', [nrrd(dimension='4', sizes='5 6 4 1', space_directions=NRRD['space directions']+' none',
    kinds='domain domain domain time'),
    nrrd(dimension='4', sizes='1 5 6 4', space_directions='none '+NRRD['space directions'], kinds='vector domain domain domain'),
    mha(NDims='4', DimSize='5 6 4 1', TransformMatrix='0 1 0 0 -1 0 0 0 0 0 1 0 0 0 0 1', Offset='-3 4 5 0',
    ElementSpacing='0.9 1.1 1.7 1')])
def test_a_fourth_axis_of_one_is_dropped(tmp_path, content):
    kind = '.nrrd' if content.startswith(b'NRRD') else '.mha'
    (tmp_path/f'v{kind}').write_bytes(content)
    (tmp_path/f'w{kind}').write_bytes(nrrd() if kind == '.nrrd' else mha())
    v, w = read_volume(tmp_path/f'v{kind}'), read_volume(tmp_path/f'w{kind}')
    assert np.array_equal(v.data, w.data) and np.array_equal(v.affine, w.affine)
    assert np.array_equal(agree(write_volume(tmp_path/f'x{kind}', v)).affine, v.affine)

@pytest.mark.parametrize('suffix', ['.nrrd', '.mha', '.mgz', '.hdr', '.img.gz', '.nii.gz'])
def test_48_orientations_to_every_format(tmp_path, suffix):
    for order, flips in AFFINES:
        v = Volume(SMALL, turned(order, flips, RIGID))
        path = write_volume(tmp_path/f'v{suffix}', v)
        again = read_volume(path)
        assert again.data.tobytes() == SMALL.tobytes('C') and np.allclose(again.affine, v.affine, rtol=0, atol=1e-6)
        if suffix in ('.nrrd', '.mha'):
            data, affine = oracle(path)
            assert np.array_equal(data, SMALL) and np.allclose(affine, v.affine, atol=1e-12)
        else: assert np.allclose(nib.load(path).affine, v.affine, atol=1e-6)
        assert same_grid(again, v, tolerance=1e-5)

@pytest.mark.parametrize('suffix', ['.nrrd', '.mha', '.mgz', '.mgh', '.hdr', '.nii'])
def test_a_sheared_grid_to_every_format(tmp_path, suffix):
    v = Volume(SMALL, OBLIQUE)
    assert np.allclose(read_volume(write_volume(tmp_path/f'v{suffix}', v)).affine, OBLIQUE, atol=1e-6)

# ---- random damage --------------------------------------------------------------------------------------------------------------
def survives(path):
    "The volume of a damaged file if it is inside all bounds, None where it was refused; anything else raises"
    try: v = read_volume(path)
    except VolumeError: return None
    spacing = np.linalg.norm(v.affine[:3, :3], axis=0)
    assert v.data.ndim == 3 and v.data.dtype == np.float32 and np.isfinite(v.data).all() and np.isfinite(v.affine).all()
    assert 1e-3 <= spacing.min() and spacing.max() <= 1e3 and abs(np.linalg.det(v.affine[:3, :3])) > 0 and v.data.size <= 2**27
    return v

def start_of(suffix, content):
    "Byte where the packed stream begins"
    return {'.mgz': lambda: 0, '.nrrd': lambda: content.index(b'\n\n')+2, '.mha': lambda: content.index(b'LOCAL\n')+6}[suffix]()
FUZZED = ['.mgz', '.nrrd', '.mha']

def mutated(rng, content, low, high):
    "The content with one to five bytes between low and high changed"
    out = bytearray(content)
    for place in rng.integers(low, high, rng.integers(1, 6)): out[place] = rng.integers(256)
    return bytes(out)

@pytest.mark.parametrize('suffix', FUZZED)
def test_2000_header_mutations(tmp_path, tally, suffix):
    rng, path, read, content = numpy_rng(0, 'mutations', suffix), tmp_path/f'v{suffix}', 0, SOUND[suffix]
    plain = {'.mgz': mgh(), '.nrrd': nrrd(), '.mha': mha()}[suffix]
    for k in range(2000):
        if suffix == '.mgz': path.write_bytes(gzip.compress(mutated(rng, plain, 0, 90), 1))
        else:
            source = (plain, content)[k % 2]
            path.write_bytes(mutated(rng, source, 0, start_of(suffix, source)))
        read += survives(path) is not None
    assert 0 < read < 1900
    tally.add(suffix, mutations=2000, refused=2000-read)

@pytest.mark.parametrize('suffix', FUZZED)
def test_1000_flips_of_packed_voxels_change_nothing(tmp_path, tally, suffix):
    content, rng, path, same = SOUND[suffix], numpy_rng(0, 'flips', suffix), tmp_path/f'v{suffix}', 0
    path.write_bytes(content)
    sound, low = read_volume(path), start_of(suffix, content)
    for k in range(1000):
        place = low+k//8 if k < 80 else int(rng.integers(low, len(content)))
        path.write_bytes(content[:place]+bytes([content[place] ^ 1 << (k % 8)])+content[place+1:])
        v = survives(path)
        if v is None: continue
        same += 1
        assert v.data.tobytes() == sound.data.tobytes() and np.array_equal(v.affine, sound.affine) and v.header == sound.header
    assert same < 200
    tally.add(suffix, flips=1000, refused=1000-same, unchanged=same)

@pytest.mark.parametrize('suffix', ['.mgh', '.nrrd', '.mha'])
def test_500_flips_of_plain_headers_stay_inside_all_bounds(tmp_path, tally, suffix):
    content = {'.mgh': mgh(), '.nrrd': nrrd(), '.mha': mha()}[suffix]
    rng, path, read = numpy_rng(0, 'header flips', suffix), tmp_path/f'v{suffix}', 0
    for place in rng.integers(0, 90 if suffix == '.mgh' else start_of(suffix, content), 500):
        path.write_bytes(content[:place]+bytes([content[place] ^ 1 << int(rng.integers(8))])+content[place+1:])
        read += survives(path) is not None
    tally.add(suffix, flips=500, refused=500-read)

@pytest.mark.parametrize('suffix', ['.mgh', *FUZZED])
def test_500_truncations(tmp_path, tally, suffix):
    content, rng, path = SOUND[suffix], numpy_rng(0, 'cuts', suffix), tmp_path/f'v{suffix}'
    for k in range(500):
        path.write_bytes(content[:k if k < 50 else rng.integers(len(content))])
        assert survives(path) is None
    tally.add(suffix, truncations=500, refused=500)

BOMBS = """
import sys, time
import nibabel.freesurfer.mghformat
from i2i_mamba_nb.data.volume import VolumeError, read_volume
def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
before, slowest = peak(), 0
for path in sys.argv[1:]:
    began = time.perf_counter()
    try: read_volume(path)
    except VolumeError: slowest = max(slowest, time.perf_counter()-began)
    else: sys.exit(path+' was read')
print((peak()-before)//1024, slowest)
"""

def zeros(megabytes, wbits):
    "That many megabytes of zeros, packed"
    z = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b''.join(z.compress(bytes(2**20)) for _ in range(megabytes))+z.flush()

def test_bombs_are_refused_in_little_memory(tmp_path, tally):
    gz, z, wide = zeros(150, 31), zeros(150, 15), '512 512 512'
    bytewise = mgh(np.zeros((2, 2, 2), 'u1'), dims=[512, 512, 512, 1])[:284]
    files = {'.mgh': [mgh(dims=[1024]*3+[1]), mgh(dims=[512]*3+[1])], '.mgz': [gzip.compress(mgh(dims=[512]*3+[1])[:284]),
        gzip.compress(mgh())+gz,
        gzip.compress(bytewise)+zeros(127, 31)+gzip.compress(numpy_rng(0, 'filler').bytes(20000))],
        '.nrrd': [nrrd(sizes=wide), nrrd(gz, sizes='5 6 4', encoding='gzip'), nrrd(gz, sizes=wide, encoding='gzip'),
        nrrd(gz, sizes='1024 1024 1024',
            encoding='gzip', type='uchar'), nrrd(sizes='1 1 '+HUGE), b'NRRD0005\ncontent: '+b'x'*10**8],
        '.mha': [mha(DimSize=wide), mha(z, CompressedData='True'), mha(z, DimSize=wide, CompressedData='True'),
        mha(z, DimSize='1024 1024 1024',
            CompressedData='True', ElementType='MET_CHAR'), mha(DimSize='1 1 '+HUGE), b'Comment = '+b'x'*10**8]}
    paths = []
    for suffix, contents in files.items():
        for k, content in enumerate(contents):
            paths.append(tmp_path/f'{k}{suffix}')
            paths[-1].write_bytes(content)
        tally.add(suffix, bombs=len(contents), refused=len(contents))
    out = subprocess.run([sys.executable, '-c', BOMBS, *map(str, paths)], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stdout+out.stderr
    memory, slowest = out.stdout.split()
    assert int(memory) < 64
    tally.most('memory for a bomb, MB', int(memory)), tally.most('slowest bomb, seconds', float(slowest))

def test_a_header_of_many_unknown_keys_ends_soon(tmp_path):
    (tmp_path/'v.mha').write_bytes(mha(extra=''.join(f'ElementXyz{k} = {k}\n' for k in range(9000))))
    read_volume(tmp_path/'v.mha')

# ---- DICOM ----------------------------------------------------------------------------------------------------------------------
ROW, COLUMN = TURN[:, 0], TURN[:, 1]
IMPLICIT, EXPLICIT, BIG = pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ExplicitVRBigEndian
STORED = numpy_rng(0, 'dicom').integers(0, 4096, (5, 6, 7))     # slices, rows, columns

def dicom(path, k=0, *, stored=None, uid='1.2.3', syntax=EXPLICIT, drop=(), sequence=False, **fields):
    "Write slice k of a made-up series"
    stored = STORED[k % 5] if stored is None else stored
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPInstanceUID = syntax, f'{uid}.{k+1}'
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID = f'{uid}.{k+1}', uid, '1'
    ds.Modality, ds.SeriesDescription = 'CT', 'made up'
    ds.PatientName, ds.PatientID = 'Nobody', 'none'
    ds.ImagePositionPatient = [round(float(x), 6) for x in np.array([10, 20, 30])+np.cross(ROW, COLUMN)*2.5*k]
    ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [round(float(x), 9) for x in (*ROW, *COLUMN)], [.9, 1.1], 2.5
    bits = 8*stored.dtype.itemsize if stored.dtype.itemsize < 8 else 16
    (ds.Rows, ds.Columns), ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.shape[-2:], bits, min(bits, 12), min(bits, 12)-1
    ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 0, 1, 'MONOCHROME2'
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    if sequence:
        inner, outer = pydicom.Dataset(), pydicom.Dataset()
        inner.CodeValue, outer.ReferencedSOPInstanceUID, outer.PurposeOfReferenceCodeSequence = '1', '1.2', pydicom.Sequence([inner])
        ds.ReferencedImageSequence = pydicom.Sequence([outer, outer])
        for s in (ds['ReferencedImageSequence'], outer['PurposeOfReferenceCodeSequence']): s.is_undefined_length = sequence == 'open'
        outer.is_undefined_length_sequence_item = sequence == 'open'
        ds.add_new(0x00091001, 'UN', b'private'*3), ds.add_new(0x00090010, 'LO', 'somebody')
    for name, value in fields.items(): setattr(ds, name, value)
    body = stored.astype(f'<{"ui"[ds.PixelRepresentation]}{ds.BitsAllocated//8}').tobytes()
    ds.PixelData = body+b'\0'*(len(body) % 2)
    for name in drop: del ds[name]
    ds.save_as(path, enforce_file_format=True, **(dict(little_endian=False, implicit_vr=False) if syntax == BIG else {}))
    return path

def series(folder, n=5, **options):
    "A folder with a series, names in another order than positions; the paths in the order of positions"
    folder.mkdir(exist_ok=True)
    return [dicom(folder/f'im{(3 if n % 3 else 2)*k % n}.dcm', k, **options) for k in range(n)]

@pytest.mark.parametrize('options', [{}, dict(syntax=IMPLICIT), dict(sequence='closed'), dict(sequence='open'),
    dict(syntax=IMPLICIT, sequence='open'),
    dict(RescaleSlope=.5, RescaleIntercept=7), dict(BitsStored=16, HighBit=15), dict(PixelRepresentation=1, BitsStored=12),
    dict(drop=['RescaleSlope',
    'RescaleIntercept']), dict(stored=STORED[0].astype('u1'), BitsStored=8, HighBit=7), dict(BitsAllocated=32, BitsStored=32, HighBit=31)])
def test_dicom_against_simpleitk(tmp_path, options):
    names = series(tmp_path/'s', **options)
    if 'stored' in options: data = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(n)))[0].T for n in names], -1)
    else: data = oracle(names)[0]
    for path in (tmp_path/'s', str(tmp_path/'s'), names[2]):
        v = read_volume(path)
        assert np.array_equal(v.data, data) and np.allclose(v.affine, oracle(names)[1], atol=1e-4)
        assert same_grid(v, read_grid(path)) and v.header['fields']['Modality'] == 'CT' and 'Nobody' not in str(v.header)

def test_bytes_behind_the_voxels_of_a_slice(tmp_path):
    names = series(tmp_path/'s', stored=STORED[0][:5].astype('u1'), BitsStored=8, HighBit=7, RescaleSlope='', RescaleIntercept='')
    for name in names: name.write_bytes(name.read_bytes()+b'\xfc\xff\xfc\xffOB\0\0\4\0\0\0'+bytes(4))
    v = read_volume(tmp_path/'s')
    assert v.shape == (7, 5, 5) and np.array_equal(v.data[..., 3], STORED[0][:5].astype('u1').T) and isinstance(v.header, dict)

def test_a_dicom_file_without_an_image_is_no_series(tmp_path):
    series(tmp_path/'s')
    dicom(tmp_path/'s'/'plan.dcm', uid='7.7', drop=['PixelData', 'Rows'])
    refused(tmp_path/'s'/'plan.dcm', 'without')
    assert read_volume(tmp_path/'s').shape == (7, 6, 5)

def test_the_axes_of_a_dicom_series(tmp_path):
    v = read_volume(series(tmp_path/'s')[0])
    assert np.allclose(v.affine[:3, 0], LPS[:3, :3]@ROW*1.1) and np.allclose(v.affine[:3, 1], LPS[:3, :3]@COLUMN*.9)
    assert np.allclose(v.affine[:3, 3], LPS[:3, :3]@[10, 20, 30]) and np.isclose(np.linalg.norm(v.affine[:3, 2]), 2.5)
    assert v.data[6, 5, 4] == STORED[4, 5, 6]-1024

def test_a_slope_of_its_own_per_slice(tmp_path):
    (tmp_path/'s').mkdir()
    for k in range(5): dicom(tmp_path/'s'/f'{k}', k, RescaleSlope=1+k, RescaleIntercept=-k)
    v = read_volume(tmp_path/'s')
    assert np.array_equal(v.data, (STORED*np.arange(1, 6)[:, None, None]-np.arange(5)[:, None, None]).T) and v.header['dtype'] == '<f4'

def test_a_tilted_gantry_shears_the_affine(tmp_path):
    (tmp_path/'s').mkdir()
    step = np.cross(ROW, COLUMN)*2.5+COLUMN*.7
    for k in range(5): dicom(tmp_path/'s'/f'{k}', k, ImagePositionPatient=[round(float(x), 6) for x in step*k])
    assert np.allclose(read_volume(tmp_path/'s').affine[:3, 2], LPS[:3, :3]@step, atol=1e-5)

def test_a_single_slice_has_its_thickness(tmp_path):
    series(tmp_path/'s', 1)
    v = read_volume(tmp_path/'s')
    assert v.shape == (7, 6, 1) and np.isclose(np.linalg.norm(v.affine[:3, 2]), 2.5)
    series(tmp_path/'s', 1, drop=['SliceThickness'])
    refused(tmp_path/'s', 'slice thickness')

@pytest.mark.parametrize('compressor', ['RLE', 'JPEG2000', 'JPEG'])
def test_compressed_voxels(tmp_path, compressor):
    stored = np.kron(STORED, np.ones((1, 12, 10), int))
    names = [dicom(tmp_path/f'{k}.dcm', k, stored=stored[k]) for k in range(3)]
    whole = read_volume(tmp_path)
    for name in names:
        ds = pydicom.dcmread(name)
        if compressor == 'RLE': ds.compress(pydicom.uid.RLELossless)
        else:
            writer, image = sitk.ImageFileWriter(), sitk.GetImageFromArray(ds.pixel_array)
            writer.SetImageIO('GDCMImageIO'), writer.UseCompressionOn(), writer.SetCompressor(compressor)
            writer.SetFileName(str(tmp_path/'x.dcm')), writer.Execute(image)
            packed = pydicom.dcmread(tmp_path/'x.dcm')
            ds.file_meta.TransferSyntaxUID, ds.PixelData = packed.file_meta.TransferSyntaxUID, packed.PixelData
            ds['PixelData'].is_undefined_length, ds.BitsStored, ds.HighBit = True, packed.BitsStored, packed.HighBit
            (tmp_path/'x.dcm').unlink()
        ds.save_as(name)
    v = read_volume(tmp_path)
    assert np.array_equal(v.data, whole.data) and np.array_equal(v.affine, whole.affine)
    names[1].write_bytes(names[1].read_bytes()[:1400])
    refused(tmp_path, 'GDCM')

def test_several_series_are_listed_never_guessed(tmp_path):
    series(tmp_path/'s'), series(tmp_path/'t', 3, uid='1.9', SeriesDescription='scout', Modality='MR')
    for p in (tmp_path/'t').iterdir(): p.rename(tmp_path/'s'/f't{p.name}')
    assert [(s.uid, s.description, s.modality, len(s.files)) for s in list_series(tmp_path/'s')] == [('1.2.3', 'made up', 'CT', 5),
        ('1.9', 'scout', 'MR', 3)]
    e = refused(tmp_path/'s', '1.2.3 (made up, CT, 5 images)', '1.9 (scout, MR, 3 images)', 'series=')
    assert e.what == 'series'
    assert read_volume(tmp_path/'s', series='1.9').shape == (7, 6, 3) and read_grid(tmp_path/'s', series='1.2.3').shape == (7, 6, 5)
    assert read_volume(tmp_path/'s'/'tim0.dcm').shape == (7, 6, 3)
    refused(tmp_path/'s', 'series=', series='1.2')
    with pytest.raises(VolumeError, match='at most 100 voxels'): read_volume(tmp_path/'s', series='1.9', max_voxels=100)

def test_other_files_stay_aside(tmp_path):
    series(tmp_path/'s')
    sound = ours(tmp_path/'s')
    for name, content in (('notes.txt', b'text'), ('.hidden.dcm', b'x'), ('README', b'some text\n'),
        ('report.pdf', b'%PDF'+bytes(range(256))),
        ('thumb.png', b'\x89PNG')): (tmp_path/'s'/name).write_bytes(content)
    dicom(tmp_path/'s'/'report.dcm', uid='7.7', drop=['PixelData', 'Rows'])
    (tmp_path/'s'/'deeper').mkdir()
    again = ours(tmp_path/'s')
    assert again[0] == sound[0] and np.array_equal(again[1], sound[1]) and len(list_series(tmp_path/'s')) == 1
    for name in ('cut.dcm', 'IMAGE.IMA'):
        (tmp_path/'s'/name).write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
        assert name in str(refused(tmp_path/'s'/name if name == 'none' else tmp_path/'s', 'another file'))
        (tmp_path/'s'/name).unlink()

def folder_without(tmp_path, **options): series(tmp_path/'s', **options); return tmp_path/'s'
def cut(path, n): path.write_bytes(path.read_bytes()[:n])
def damage(folder, kind):
    "Spoil the series in one way; the words expected in the message"
    files, f = sorted(folder.iterdir()), folder/'im1.dcm'      # im1 is slice 2 of 5
    again = lambda **o: dicom(f, 2, **o)
    if kind == 'missing slice': (folder/'im3.dcm').unlink(); return 'distance of slices'
    if kind == 'uneven': again(ImagePositionPatient=[round(float(x), 6) for x in np.array([10, 20, 30])+np.cross(ROW,
        COLUMN)*5.3]); return 'distance'
    if kind == 'sideways': again(ImagePositionPatient=[12, 20, 30]); return 'one place|distance'
    if kind == 'twice': dicom(folder/'im9.dcm', 2); return 'one place'
    if kind == 'size': again(stored=STORED[0][:5]); return 'size of'
    if kind == 'orientation': again(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]); return 'orientation of'
    if kind == 'spacing': again(PixelSpacing=[1, 1]); return 'orientation of'
    if kind == 'type': again(BitsAllocated=32); return 'voxel type of'
    if kind == 'frames': again(NumberOfFrames=2, stored=STORED[:2]); return 'one in a file|bytes'
    if kind == 'RGB': again(SamplesPerPixel=3, PhotometricInterpretation='RGB', PlanarConfiguration=0); return 'colours'
    if kind == 'inverted': again(PhotometricInterpretation='MONOCHROME1'); return 'colours'
    if kind == 'no position': again(drop=['ImagePositionPatient']); return 'ImagePositionPatient'
    if kind == 'no orientation': again(drop=['ImageOrientationPatient']); return 'ImageOrientationPatient'
    if kind == 'no spacing': again(drop=['PixelSpacing']); return 'PixelSpacing'
    if kind == 'no bits': again(drop=['BitsStored']); return 'BitsStored'
    if kind == 'bits': again(BitsStored=12, HighBit=15); return 'bits'
    if kind == 'slope 0': again(RescaleSlope=0); return 'RescaleSlope'
    if kind == 'zero spacing': again(PixelSpacing=[0, 1]); return 'PixelSpacing'
    if kind == 'skew': again(ImageOrientationPatient=[1, 0, 0, .5, 1, 0]); return 'right angles'
    if kind == 'big endian': again(syntax=BIG); return 'big endian'
    if kind == 'truncated': cut(f, f.stat().st_size-10); return 'left|bytes'
    if kind == 'header only': cut(f, 400); return 'left|8 bytes'
    if kind == 'preamble': cut(f, 132); return 'transfer syntax'
    if kind == 'no mark': f.write_bytes(bytes(132)+f.read_bytes()[132:]); return 'another file'
    if kind == 'empty': f.write_bytes(b''); return 'another file'
    end = folder/'im2.dcm'
    if kind == 'end cut': cut(end, end.stat().st_size-STORED[0].size*2-12); return 'part of an image'
    if kind == 'end without size': dicom(end, 4, drop=['Rows']); return 'part of an image'
    if kind == 'end without voxels': dicom(end, 4, drop=['PixelData']); return 'part of an image'
    if kind == 'end without both': dicom(end, 4, drop=['PixelData', 'Rows']); return 'part of an image'
    if kind == 'end cut early': cut(end, end.read_bytes().index(b'\x20\0\x0d\0')); return 'part of an image'
    if kind == 'end with a long value':
        at, content = end.read_bytes().index(b'\x18\0\x50\0DS')+6, end.read_bytes()
        end.write_bytes(content[:at]+b'\xf0\xff'+content[at+2:])
        return 'left'
    if kind == 'all gone':
        for p in files: p.unlink()
        return 'folder without DICOM images'
DAMAGE = ['missing slice', 'uneven', 'sideways', 'twice', 'size', 'orientation', 'spacing', 'type', 'frames', 'RGB', 'inverted',
    'no position', 'no orientation',
    'no spacing', 'no bits', 'bits', 'slope 0', 'zero spacing', 'skew', 'big endian', 'truncated', 'header only', 'preamble', 'no mark',
    'empty', 'all gone', 'end cut', 'end without size',
    'end without voxels', 'end without both', 'end cut early', 'end with a long value']

@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_series(tmp_path, tally, kind):
    folder = folder_without(tmp_path)
    words = damage(folder, kind)
    with pytest.raises(VolumeError, match=words) as e: read_volume(folder)
    assert str(folder) in str(e.value) and e.value.hint
    tally.add('DICOM', malformed=1, refused=1)

def test_1000_damaged_dicom_files(tmp_path, tally):
    rng, folder = numpy_rng(0, 'dicom damage'), folder_without(tmp_path, sequence='open')
    path, read = folder/'im2.dcm', 0     # the last slice: without it the stack would be even, and short
    content = path.read_bytes()
    for k in range(1000):
        broken = mutated(rng, content, 128, len(content)-84) if k < 700 else content[:rng.integers(len(content))]
        path.write_bytes(broken)
        v = survives(folder)
        read += v is not None
        assert v is None or v.shape == (7, 6, 5)
    assert 0 < read < 500
    path.write_bytes(content)
    tally.add('DICOM', mutations=700, truncations=300, refused=1000-read)

def test_dicom_bombs(tmp_path, tally):
    head = dicom(tmp_path/'x.dcm').read_bytes()
    at = head.index(b'\x28\0\x10\0US')+8
    contents = [head[:at]+b'\xff\xff'+head[at+2:], head[:132]+b'\2\0\x10\0UI\xff\xff'+bytes(99),
        head[:132]+b'\x08\0\x08\0OB\0\0\xff\xff\xff\x7f',
        head[:132]+b'\x08\0\x08\0SQ\0\0\xff\xff\xff\xff'+b'\xfe\xff\0\xe0\xff\xff\xff\xff\x08\0\x09\0SQ\0\0\xff\xff\xff\xff'*50000,
        head[:132]+b'\x08\0\x08\0SQ\0\0\xff\xff\xff\xff'+b'\xfe\xff\0\xe0\0\0\0\0'*300000]
    (tmp_path/'x.dcm').unlink()
    for k, content in enumerate(contents):
        (tmp_path/f'b{k}').mkdir()
        (tmp_path/f'b{k}'/'x.dcm').write_bytes(content)
    out = subprocess.run([sys.executable, '-c', BOMBS, *(str(tmp_path/f'b{k}') for k in range(len(contents)))], capture_output=True,
        text=True, timeout=60)
    assert out.returncode == 0, out.stdout+out.stderr
    assert int(out.stdout.split()[0]) < 64 and float(out.stdout.split()[1]) < 20
    tally.add('DICOM', bombs=len(contents), refused=len(contents))

@pytest.mark.filterwarnings('ignore:Expected explicit VR')
def test_the_walk_reads_what_pydicom_reads():
    same, other = 0, []
    for name in sorted((Path(pydicom.__file__).parent/'data'/'test_files').glob('*.dcm')):
        try:
            ds, fields = pydicom.dcmread(name, stop_before_pixels=True), None
            fields = _dicom_fields(name)
        except VolumeError as e: other.append((Path(name).name, e.what)); continue
        except Exception: continue
        for key in ('Rows', 'Columns', 'BitsStored', 'PixelRepresentation'): assert fields.get(key) == ds.get(key), (name, key)
        assert fields.get('SeriesInstanceUID', '') == str(ds.get('SeriesInstanceUID', '')), name
        same += 1
    assert same > 40, (same, other)

# ---- what is written ------------------------------------------------------------------------------------------------------------
WRITTEN = ['.nii', '.nii.gz', '.hdr', '.img', '.hdr.gz', '.img.gz', '.mgh', '.mgz', '.nrrd', '.mha']

def sources(folder):
    "One volume of each format, whole numbers in 16 bits where there is a choice"
    data = np.rint(SMALL).astype('i2')
    put(folder, raw(data), 'a.nii.gz'), put(folder, raw(SMALL), 'b.nii')
    (folder/'c.mgh').write_bytes(mgh(data))
    (folder/'d.nrrd').write_bytes(nrrd(data.astype('<i2').tobytes(order='F'), type='short'))
    (folder/'e.mha').write_bytes(mha(data.astype('<i2').tobytes(order='F'), ElementType='MET_SHORT'))
    series(folder/'f')
    return [folder/n for n in ('a.nii.gz', 'b.nii', 'c.mgh', 'd.nrrd', 'e.mha', 'f')]

def stored_kind(path):
    "Voxel type on the disk, by another program"
    if path.suffix in ('.nrrd', '.mha'): return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).dtype
    return nib.load(path).get_data_dtype().newbyteorder('=')

@pytest.mark.parametrize('suffix', WRITTEN)
def test_every_format_to_every_suffix(tmp_path, suffix):
    assert set(WRITTEN) == set(SUFFIXES)
    for source in sources(tmp_path):
        v, path = read_volume(source), tmp_path/'out'/f'{source.name[0]}{suffix}'
        again = read_volume(write_volume(path, v))
        assert again.data.tobytes() == v.data.tobytes() and np.allclose(again.affine, v.affine, rtol=1e-6, atol=1e-5)
        files = {p: p.read_bytes() for p in path.parent.iterdir()}
        write_volume(path, v)
        assert files == {p: p.read_bytes() for p in path.parent.iterdir()}
        wanted = np.float32 if source.name == 'b.nii' else np.uint16 if source.name == 'f' and suffix[:3] in ('.ni', '.hd',
            '.im') else np.int16
        assert stored_kind(path) == wanted
        write_volume(path, v._replace(data=v.data+np.float32(.3)))
        assert stored_kind(path) == np.float32 and np.array_equal(read_volume(path).data, v.data+np.float32(.3))

@pytest.mark.parametrize('kind', ['u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'u8', 'i8', 'f4', 'f8'])
@pytest.mark.parametrize('scale', [(1, 0), (1, 3), (.5, -7), (0, 3), (.003, 11.7), (-2, 1e6)])
@pytest.mark.parametrize('version,order', [(1, '<'), (1, '>'), (2, '<')])
def test_nifti_keeps_type_scale_order_and_header(tmp_path, kind, scale, version, order):
    path = put(tmp_path, raw(voxels().astype(kind), version=version, order=order, scl_slope=scale[0], scl_inter=scale[1],
        descrip=b'as it was',
        cal_max=0, slice_duration=2.5, toffset=1.5, pixdim=[1, .9, 1.1, 1.7, 2530, 0, 3, 0], intent_name=b'x', aux_file=b'y',
        xyzt_units=10))
    v = read_volume(path)
    again = read_volume(write_volume(tmp_path/'w.nii', v))
    assert again.data.tobytes() == v.data.tobytes() and again.header == v.header and again.header.endianness == order
    v2 = v._replace(data=v.data+np.float32(.01)*np.arange(7, dtype=np.float32))
    again = read_volume(write_volume(tmp_path/'w.nii', v2))
    h = again.header
    assert np.array_equal(again.data, v2.data)
    if kind[0] != 'f': assert stored_kind(tmp_path/'w.nii') == np.float32 and (h['scl_slope'], h['scl_inter']) == (1,
        0) and h['descrip'] == b'as it was'

@pytest.mark.parametrize('kind', ['u8', 'i8', 'u4', 'i4', 'u2', 'i1'])
def test_the_ends_of_integer_types_are_kept(tmp_path, kind):
    info = np.iinfo(kind)
    data = np.array([info.min, info.max, 0, 1, info.max//2, 5, 6, 7], kind).reshape(2, 2, 2)
    v = read_volume(put(tmp_path, raw(data)))
    assert read_volume(write_volume(tmp_path/'w.nii',
        v)).data.tobytes() == v.data.tobytes() and stored_kind(tmp_path/'w.nii') == np.dtype(kind)

def test_a_header_of_nibabel_whose_slope_was_never_set(tmp_path):
    h = nib.Nifti1Header()
    h.set_data_dtype(np.int16)
    h['scl_slope'] = h['scl_inter'] = np.nan
    for data, kind in ((np.rint(SMALL), np.int16), (SMALL, np.float32)):
        again = read_volume(write_volume(tmp_path/'v.nii', Volume(data, RIGID, h)))
        assert np.array_equal(again.data, data) and stored_kind(tmp_path/'v.nii') == kind
    for code in (128, 32, 2304, 1536):
        h['datatype'] = code
        assert np.array_equal(read_volume(write_volume(tmp_path/'v.nii', Volume(SMALL, RIGID, h))).data, SMALL)

def test_negative_zero_and_tiny_values_are_not_lost(tmp_path):
    edge = np.array([0., -0., 1e-45, -1e-38, 3.4e38, -3.4e38, np.pi, 16777217], np.float32).reshape(2, 2, 2)
    for source in sources(tmp_path):
        for suffix in ('.nii', '.mgz', '.nrrd', '.mha'):
            v = Volume(edge, RIGID, read_volume(source).header)
            assert read_volume(write_volume(tmp_path/f'v{suffix}', v)).data.tobytes('F') == edge.tobytes('F')

@pytest.mark.parametrize('low,high', [(90, 110), (0, 0), (-1e6, 1e6)])
def test_display_limits_stay_where_they_make_sense(tmp_path, low, high):
    v = read_volume(put(tmp_path, raw(cal_min=low, cal_max=high)))
    h = read_volume(write_volume(tmp_path/'w.nii', v)).header
    assert (h['cal_min'], h['cal_max']) == ((low, high) if low == 90 else (0, 0))
    h = read_volume(write_volume(tmp_path/'w.nii', v._replace(data=v.data/1000))).header
    assert (h['cal_min'], h['cal_max']) == (0, 0)

def test_a_description_goes_with_the_volume_to_every_format(tmp_path):
    for source in sources(tmp_path):
        v = described(read_volume(source), 'simulated\nT2 = 1: research only é'+'x'*200)
        for suffix in ('.nii.gz', '.nrrd', '.mha', '.hdr'):
            path = write_volume(tmp_path/f'v{suffix}', v)
            again = read_volume(path).header['descrip']
            again = again if isinstance(again, str) else again.item().decode('utf-8', 'replace')
            assert again.startswith('simulated T2 = 1: research only') or suffix in ('.nii.gz', '.hdr') and again.startswith('simulated')
            if suffix in ('.nrrd', '.mha'): agree(path)

def test_a_dict_takes_the_description_that_engine_predict_writes(tmp_path):
    (tmp_path/'v.nrrd').write_bytes(nrrd())
    v = read_volume(tmp_path/'v.nrrd')
    header = v.header.copy()
    header['descrip'] = b'synthetic T2'
    assert nib.load(write_volume(tmp_path/'w.nii', v._replace(header=header))).header['descrip'] == b'synthetic T2'
    assert 'descrip' in v.header and v.header['descrip'] == ''

def test_pairs_are_never_mixed(tmp_path, monkeypatch):
    v, w = Volume(SMALL, RIGID), Volume(SMALL+1, RIGID)
    write_volume(tmp_path/'v.hdr.gz', v), write_volume(tmp_path/'v.img', w)
    assert sorted(os.listdir(tmp_path)) == ['v.hdr', 'v.img'] and np.array_equal(read_volume(tmp_path/'v.hdr').data, w.data)
    assert np.array_equal(nib.load(tmp_path/'v.hdr').get_fdata(dtype=np.float32), w.data)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    real = volume_module._stored
    calls = []
    def full(values, layout):
        calls.append(1)
        if len(calls) > 1: raise OSError(28, 'No space left on device')
        return real(values, layout)
    monkeypatch.setattr(volume_module, '_stored', full)
    with pytest.raises(DiskError): write_volume(tmp_path/'v.hdr', Volume(voxels((300, 300, 30)), RIGID))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before

def test_a_crash_between_the_halves_of_a_pair_leaves_no_mixture(tmp_path, monkeypatch):
    write_volume(tmp_path/'v.hdr', Volume(SMALL, RIGID))
    real, calls = os.replace, []
    def stopped(a, b):
        calls.append(b)
        if len(calls) == 2: raise OSError(5, 'stopped')
        return real(a, b)
    monkeypatch.setattr(os, 'replace', stopped)
    with pytest.raises(DiskError): write_volume(tmp_path/'v.hdr', Volume(SMALL+1, RIGID))
    with pytest.raises(VolumeError, match='.hdr half'): read_volume(tmp_path/'v.img')

FULL = """
import resource, signal, sys, numpy as np
from i2i_mamba_nb.core import DiskError
from i2i_mamba_nb.data.volume import SUFFIXES, Volume, write_volume
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for suffix in SUFFIXES:
    try: write_volume(sys.argv[1]+suffix, Volume(np.random.default_rng(0).random((30, 30, 30)), np.eye(4)))
    except DiskError as e: print(e)
"""

def test_a_full_disk_leaves_nothing(tmp_path):
    out = subprocess.run([sys.executable, '-c', FULL, str(tmp_path/'v')], capture_output=True, text=True, timeout=60)
    assert out.stdout.count('bytes free') == len(SUFFIXES) and os.listdir(tmp_path) == []

@pytest.mark.parametrize('suffix', ['.mgz', '.nrrd', '.mha', '.img'])
@pytest.mark.parametrize('data,affine', [(np.full((3, 4, 5), np.nan), RIGID), (SMALL+1j, RIGID), (SMALL[0], RIGID),
    (SMALL, np.diag([1, 1, 0, 1.])),
    (SMALL, np.full((4, 4), np.inf)), (SMALL, None)])
def test_what_cannot_be_written(tmp_path, suffix, data, affine):
    with pytest.raises(VolumeError, match=f'v{suffix}'): write_volume(tmp_path/f'v{suffix}', Volume(data, affine))
    assert os.listdir(tmp_path) == []

# ---- crops ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('order,flips', AFFINES[::5])
def test_crops_and_their_inverse(order, flips):
    v, rng = Volume(voxels(), turned(order, flips)), numpy_rng(0, 'crops', *order, *flips)
    for _ in range(40):
        start, size = rng.integers(-4, 6, 3), rng.integers(1, 14, 3)
        if np.any(start+size <= 0) or np.any(start >= SHAPE): continue
        c = crop(v, start, size, fill=-5)
        assert c.shape == tuple(size) and c.data.dtype == np.float32
        for index in rng.integers(0, size, (5, 3)):
            place = index+start
            inside = np.all((place >= 0) & (place < SHAPE))
            assert c.data[tuple(index)] == (v.data[tuple(place)] if inside else -5)
            assert np.allclose(c.affine@[*index, 1], v.affine@[*place, 1], rtol=0, atol=1e-9)
        back = uncrop(c.data, start, SHAPE, fill=np.nan)
        inside = ~np.isnan(back)
        assert np.array_equal(back[inside], v.data[inside]) and inside.sum() == np.prod(np.minimum(start+size, SHAPE)-np.maximum(start, 0))
        again = crop(c, -start, SHAPE)
        assert np.allclose(again.affine, v.affine, atol=1e-9) and np.array_equal(again.data[inside], v.data[inside])

def test_a_padded_volume_comes_back_whole(tmp_path):
    v = Volume(voxels(), OBLIQUE, None)
    wide = crop(v, (-3, -1, -2), (16, 16, 12))
    assert np.array_equal(uncrop(wide.data, (-3, -1, -2), SHAPE), v.data)
    again = read_volume(write_volume(tmp_path/'v.nii', wide))
    assert np.allclose(again.affine, wide.affine, atol=1e-6) and np.array_equal(again.data, wide.data)
    labels = uncrop(np.ones((2, 2, 2), np.uint8), (0, 0, 0), SHAPE)
    assert labels.dtype == np.uint8 and labels.sum() == 8

@pytest.mark.parametrize('start,size', [((9, 0, 0), (1, 1, 1)), ((0, 0, -1), (1, 1, 1)), ((0, 0, 0), (0, 1, 1)), ((0, 0), (1, 1)),
    ((0, 0, .5), (1, 1, 1)),
    ((0, 0, 0), (1, 1, -1))])
def test_crops_outside_are_refused(start, size):
    with pytest.raises(ShapeError, match='a box that meets the volume'): crop(Volume(voxels(), OBLIQUE), start, size)
