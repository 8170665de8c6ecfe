"Small volumes, files and folders that several suites use"
import gzip
from itertools import permutations, product

import nibabel as nib
import numpy as np

from i2i_mamba_nb.core import numpy_rng
from i2i_mamba_nb.data.volume import Volume, write_volume

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
GOOD = raw()
AFFINES = [(p, f) for p in permutations(range(3)) for f in product((1, -1), repeat=3)]

def turned(order, flips, base=OBLIQUE):
    "Affine whose axes are those of `base`, permuted and flipped"
    out = base.copy()
    out[:3, :3] = base[:3, order]*np.array(flips)
    return out

def shifted(k):
    "OBLIQUE moved by one voxel along axis k (back for k of 3 and more)"
    a = OBLIQUE.copy()
    a[:3, 3] += a[:3, k % 3]*(1 if k < 3 else -1)
    return a

def head(shape=(24, 28, 13), key=0):
    "An ellipsoid with a gradient, a bright core and noise, zero outside"
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij')
    r = (x/.8)**2+(y/.85)**2+(z/.9)**2
    texture = numpy_rng(0, 'head', key).standard_normal(shape)
    return np.where(r < 1, 200+60*x+40*y*y+80*(r < .2)+5*texture, 0).astype(np.float32)

def build(folder, patients=('p1', 'p2', 'p3'), modalities=('T1', 'T2', 'PD'), affine=OBLIQUE, pattern='{p}/{m}.nii.gz'):
    "A folder of volumes, one per patient and modality"
    for k, (p, m) in enumerate(product(patients, modalities)):
        write_volume(folder/pattern.format(p=p, m=m), Volume(head(key=k), affine))
    return folder
