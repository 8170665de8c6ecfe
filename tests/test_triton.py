"The Triton kernels: values and gradients in Triton's interpreter, compiled ahead of time for GPUs that are not here, launched dry"
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import triton_cases

from i2i_mamba_nb.core import BackendError
from i2i_mamba_nb.ssm import gpu_kernels
from i2i_mamba_nb.ssm.gpu_kernels import KERNELS, How, compile_kernel, triton_available, triton_backward, triton_forward, triton_takes
from i2i_mamba_nb.ssm.recurrence import ScanInputs

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(not find_spec('triton'), reason="triton is not installed (extra 'triton')")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = ('bfloat16', 'float16')

def python(*args, **env):
    "A Python process of its own"
    return subprocess.run([sys.executable, *args], env=dict(os.environ, OMP_NUM_THREADS='1', **env), cwd=HERE.parent,
        capture_output=True, text=True)

# ---------------------------------------------------------------- values, in the interpreter
@pytest.fixture(scope='module')
def interpreted():
    "What triton_cases.py prints: errors of all cases, properties, extremes"
    done = python(str(HERE/'triton_cases.py'), TRITON_INTERPRET='1')
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)

@needs_triton
@pytest.mark.parametrize('case', [*triton_cases.CASES, 'strided', 'strided, fixed'])
def test_values_and_gradients(interpreted, case):
    found = interpreted['errors'][case]
    for name, error in found.items():
        exact = name == 'last' or case not in HALF
        assert error < (1e-5 if name in ('y', 'last') else 1e-4) if exact else error < 2e-2, (name, error)
    assert {'y', 'last', 'u', 'delta', 'A', 'B', 'C'} <= set(found)

@needs_triton
def test_the_cases_cover_the_forms():
    cases = triton_cases.CASES.values()
    assert {c[4] for c in cases} >= {'1', '2', '3', 'd'} and {c[5] for c in cases} >= {'1', '2', '3', 'd'}
    assert {c[3] for c in cases} >= {1, 3, 5, 16} and {c[7] for c in cases} >= {4, 8, 16} and {c[9] for c in cases} == set(DTYPES)
    assert all({letter in c[6] for c in cases} == {True, False} for letter in 'Dzbh') and {c[10] for c in cases} == {True, False}

@needs_triton
def test_chunk_lengths_and_splits_do_not_matter(interpreted): assert interpreted['split'] < 1e-5 and interpreted['lengths'] < 1e-5

@needs_triton
def test_extremes_are_finite(interpreted): assert len(interpreted['extremes']) == 8 and all(interpreted['extremes'].values())

@needs_triton
@pytest.mark.parametrize('name', ['linear', 'causal', 'changed', 'still', 'none', 'repeatable'])
def test_properties(interpreted, name): assert interpreted['properties'][name]

# ---------------------------------------------------------------- ahead of time
@needs_triton
@pytest.mark.parametrize('capability', [80, 90, 100])
@pytest.mark.parametrize('name', list(KERNELS))
def test_compiles_for_a_gpu_that_is_not_here(name, capability):
    for dtype in DTYPES:
        for varies, reverse in ((True, False), (False, True)):
            needs = compile_kernel(name, dtype, capability, How(16, 16, 16, varies, varies, varies, reverse), z=varies)
            assert 16 <= needs.registers <= 255 and needs.spilled == 0 and 0 <= needs.shared <= 48*1024 and needs.threads == 256

@needs_triton
@pytest.mark.parametrize('states, block', [(1, 64), (4, 64), (64, 4)])
def test_other_state_sizes_compile(states, block):
    assert all(compile_kernel(k, torch.float32, 90, How(16, states, block, True, True, True)).spilled <= 64 for k in KERNELS)

class DryDriver:
    "A driver of a GPU that compiles and never launches"
    def get_current_target(self): return gpu_kernels.triton.backends.compiler.GPUTarget('cuda', 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

class DryKernel:
    "A kernel whose launch only binds its arguments and compiles"
    def __init__(self, kernel, seen): self.kernel, self.seen = kernel, seen
    def __getitem__(self, grid):
        def launch(*args, **options):
            self.seen.append((self.kernel.__name__, grid, options['num_warps']))
            assert self.kernel.warmup(*args, grid=grid, **options).asm['cubin']
        return launch

@needs_triton
@pytest.mark.parametrize('dtype, form', [(torch.float32, 'all'), (torch.bfloat16, 'few')])
def test_the_launch_path_binds_and_compiles(monkeypatch, dtype, form):
    seen, driver = [], gpu_kernels.triton.runtime.driver
    monkeypatch.setattr(driver, '_active', DryDriver(), raising=False)
    monkeypatch.setattr(gpu_kernels, 'triton_takes', lambda x: None)
    for name, kernel in KERNELS.items(): monkeypatch.setattr(gpu_kernels, name, DryKernel(kernel, seen))
    r = lambda *s: torch.randn(*s).to(dtype)
    b, d, l, n = (2, 48, 200, 5) if form == 'all' else (1, 32, 256, 16)
    rest = (r(d), r(b, d, l), r(d), r(b, d, n)) if form == 'all' else (None,)*4
    x = ScanInputs(r(b, d, l), r(b, d, l).float(), r(d, n).float(), r(b, 2, n, l), r(d, n) if form == 'all' else r(b, 2, n, l), *rest)
    for reach in (0, 100):
        y, last, borders = triton_forward(x, True, reach=reach)
        grads = triton_backward(y, None if reach else last, x, borders, True, reach=reach)
        assert [None if g is None else (g.shape, g.dtype) for g in grads] == [None if k is None else (k.shape, k.dtype) for k in x]
    assert [k for k, _, _ in seen] == ['chunk_ends', 'carry', 'chunk_outputs', 'chunk_ends', 'carry', 'chunk_gradients', 'chunk_outputs',
        'chunk_gradients']
    assert all(warps in (1, 2, 4, 8) and min(grid) >= 1 for _, grid, warps in seen)

# ---------------------------------------------------------------- what is refused, and import
def test_importing_without_triton_is_no_error():
    code = ('import sys; sys.modules["triton"] = None; from i2i_mamba_nb.ssm import gpu_kernels as g; import i2i_mamba_nb.ssm\n'
        'print(g.triton_available(), g.mamba_ssm_available()[0])')
    done = python('-c', code)
    assert done.stdout.strip() == "(False, 'triton is not installed') False", done.stderr

@needs_triton
def test_the_interpreter_counts_as_available():
    code = 'from i2i_mamba_nb.ssm.gpu_kernels import triton_available; print(*triton_available())'
    assert python('-c', code, TRITON_INTERPRET='1').stdout.startswith('True Triton\'s interpreter')

@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is here')
def test_a_tensor_on_the_cpu_is_refused():
    assert triton_available()[0] is False
    x = triton_cases.inputs(triton_cases.CASES['everything'])
    with pytest.raises(BackendError, match='tensors on cpu'): triton_forward(x, True)
    with pytest.raises(BackendError, match='tensors on cpu'): triton_backward(x.u, None, x, torch.empty(0), True)

def test_what_the_kernels_do_not_take_is_named():
    x = triton_cases.inputs(triton_cases.CASES['everything'])
    assert 'float64' in triton_takes(x._replace(D=x.D.double()))
    assert '257 states' in triton_takes(x._replace(A=torch.ones(3, 257)))
    assert '65535' in triton_takes(x._replace(A=torch.ones(70000, 1)))

def test_symbolic_sizes_pass_the_empty_borders():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    x = triton_cases.inputs(triton_cases.CASES['fixed C'])._replace(delta_bias=None)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = ScanInputs(*(None if k is None else mode.from_tensor(k) for k in x))
        assert gpu_kernels.triton_empty_borders(fake).shape == (2, 2, 3, 4)
        assert gpu_kernels.mamba_ssm_empty_borders(fake._replace(initial_state=None)).shape == (8*2*4*3+4*2*4*17,)
