"""The adapter to mamba-ssm's CUDA operator, against a stand-in that has its signatures and its demands.

The demands are those of csrc/selective_scan/selective_scan.cpp of state-spaces/mamba: dtypes, last axes, groups, shapes.
"""
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import triton_cases

from i2i_mamba_nb.core import BackendError
from i2i_mamba_nb.ssm.gpu_kernels import (mamba_ssm_available, mamba_ssm_backward, mamba_ssm_empty_borders, mamba_ssm_forward,
    mamba_ssm_takes)
from i2i_mamba_nb.ssm.recurrence import ScanInputs, reference

PIECE = 2048
# b, d, l, n, B, C, what else, dtype, softplus
CASES = {
    'plain': (2, 3, 7, 5, '1', '1', '', torch.float32, True),
    'everything': (2, 3, 21, 5, '1', '1', 'Dzb', torch.float32, True),
    'no softplus': (1, 4, 9, 3, '2', '2', 'Dz', torch.float32, False),
    'groups': (2, 6, 17, 3, '3', '3', 'Dzb', torch.float32, True),
    'fixed both': (2, 3, 13, 4, 'd', 'd', 'zb', torch.float32, True),
    'fixed B': (2, 3, 13, 4, 'd', '1', 'D', torch.float32, True),
    'fixed C, groups': (2, 4, 13, 3, '2', 'd', 'Dz', torch.float32, True),
    'more than one piece': (1, 2, 2050, 1, '1', '1', 'Dz', torch.float32, True),
    'bfloat16': (2, 3, 17, 3, '1', '1', 'Dzb', torch.bfloat16, True),
    'float16': (2, 4, 17, 3, '2', 'd', 'Dzb', torch.float16, True),
}

def demands(u, delta, A, B, C, D, z, bias):
    "What the operator checks before it runs"
    assert u.dtype in (torch.float32, torch.float16, torch.bfloat16) and A.dtype == torch.float32 and delta.dtype == u.dtype
    b, d, l = u.shape
    for w in (B, C):
        assert w.dtype == (torch.float32 if w.dim() == 2 else u.dtype) and w.dim() in (2, 4)
        groups = B.shape[1] if B.dim() == 4 else 1
        assert w.shape == ((d, A.shape[1]) if w.dim() == 2 else (b, groups, A.shape[1], l)) and (w.dim() == 2 or w.stride(-1) == 1)
    for row in (D, bias): assert row is None or (row.dtype == torch.float32 and row.shape == (d,) and row.stride(-1) == 1)
    for x in (u, delta, z): assert x is None or (x.dtype == u.dtype and x.shape == u.shape and (x.stride(-1) == 1 or l == 1))
    assert A.shape[0] == d and A.shape[1] <= 256

@torch.enable_grad()
def scan(u, delta, A, B, C, D, bias, softplus):
    y, last = reference(*(None if x is None else x.float() for x in (u, delta, A, B, C, D)), None,
        None if bias is None else bias.float(), softplus, True)
    return y, last

def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    demands(u, delta, A, B, C, D, z, delta_bias)
    (b, d, l), n = u.shape, A.shape[1]
    x = torch.full((b, d, -(-l//PIECE), 2*n), 7.)   # decay products lie in the even places
    for i in range(x.shape[2]):
        e = min(l, (i+1)*PIECE)
        some = [w if w.dim() == 2 else w[..., :e] for w in (B, C)]
        x[:, :, i, 1::2] = scan(u[..., :e], delta[..., :e], A, *some, None, delta_bias, delta_softplus)[1]
    out, _ = scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [out.to(u.dtype), x] if z is None else [out.to(u.dtype), x, (out*F.silu(z.float())).to(u.dtype)]

@torch.enable_grad()
def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    demands(u, delta, A, B, C, D, z, delta_bias)
    assert dout.dtype == u.dtype and dout.shape == u.shape and (dout.stride(-1) == 1 or u.shape[-1] == 1) and dz is None
    assert x.is_contiguous() and x.dtype == torch.float32 and x.shape == (*u.shape[:2], -(-u.shape[-1]//PIECE), 2*A.shape[1])
    assert recompute_out_z is False and isinstance(delta_softplus, bool) and (x[..., ::2] == 7).all()
    leaves = [None if k is None else k.detach().float().requires_grad_() for k in (u, delta, A, B, C, D, delta_bias)]
    y, last = scan(*leaves, delta_softplus)
    assert torch.allclose(x[:, :, -1, 1::2], last, atol=1e-5)
    given = dout.float()
    if z is not None:
        assert out.dtype == u.dtype and torch.equal(out, y.to(u.dtype))   # the output before the gate
        s = torch.sigmoid(z.float())
        dz = (given*out.float()*s*(1+z.float()*(1-s))).to(z.dtype)
        given = given*F.silu(z.float())
    found = iter(torch.autograd.grad(y, [k for k in leaves if k is not None], given))
    du, ddelta, dA, dB, dC, dD, dbias = (None if k is None else next(found) for k in leaves)
    result = [du.to(u.dtype), ddelta.to(u.dtype), dA, dB.to(B.dtype), dC.to(C.dtype), dD, dbias]
    return result if z is None else [*result, dz]

@pytest.fixture
def official(monkeypatch):
    "The stand-in, importable under the operator's name"
    monkeypatch.setitem(sys.modules, 'selective_scan_cuda', types.SimpleNamespace(fwd=fwd, bwd=bwd))

def case_inputs(name, **kwargs):
    *sizes, dtype, softplus = CASES[name]
    return triton_cases.inputs((*sizes, 0, 0, dtype, softplus), **kwargs), softplus

def compared(x, softplus, gy, gl):
    "Errors of y, last state and gradients, after checks of shapes and dtypes"
    y, last, borders = mamba_ssm_forward(x, softplus)
    room = mamba_ssm_empty_borders(x)
    assert room.shape == borders.shape and room.dtype == borders.dtype and y.dtype == x.u.dtype and last.dtype == torch.float32
    grads = mamba_ssm_backward(gy, gl, x, borders, softplus)
    exact_y, exact_last, exact = triton_cases.wanted(x, gy, torch.zeros_like(last) if gl is None else gl, softplus)
    for g, k in zip(grads, x, strict=True):
        assert (g is None) == (k is None)
        assert k is None or (g.shape == k.shape and g.dtype == k.dtype and g.is_contiguous())
    pairs = [(g, w) for g, w in zip(grads, exact, strict=True) if g is not None]
    return triton_cases.off(y, exact_y), triton_cases.off(last, exact_last), max(triton_cases.off(*p) for p in pairs)

@pytest.mark.parametrize('last', [False, True], ids=['', 'last state'])
@pytest.mark.parametrize('strided', [False, True], ids=['', 'strided'])
@pytest.mark.parametrize('name', list(CASES))
def test_values_and_gradients(official, name, strided, last):
    x, softplus = case_inputs(name, strided=strided)
    g = torch.Generator().manual_seed(1)
    gy = torch.randn(x.u.mT.shape, generator=g).mT.to(x.u.dtype)
    gl = torch.randn(len(x.u), *x.A.shape, generator=g) if last else None
    y, h, grads = compared(x, softplus, gy, gl)
    exact = x.u.dtype == torch.float32
    assert y < (1e-5 if exact else 2e-2) and h < 1e-5 and grads < (1e-4 if exact else 2e-2)

def test_three_dimensional_weights_and_mixed_dtypes(official):
    x, _ = case_inputs('everything')
    half = x._replace(u=x.u.bfloat16(), B=x.B[:, 0].bfloat16(), C=x.C[:, 0], A=x.A.bfloat16(), D=x.D.half())
    y, last, grads = compared(half, True, x.u.bfloat16(), torch.ones(2, 3, 5))
    assert y < 2e-2 and last < 1e-5 and grads < 2e-2

def test_a_wide_weight_beside_narrow_sequences_is_not_rounded(official):
    x, _ = case_inputs('everything')
    half = x._replace(u=x.u.bfloat16(), delta=x.delta.bfloat16(), z=x.z.bfloat16())
    assert compared(half, True, x.u.bfloat16(), None)[1] < 1e-5

def test_a_zero_gradient_of_the_last_state_costs_nothing(official, monkeypatch):
    from i2i_mamba_nb.ssm import gpu_kernels
    monkeypatch.setattr(gpu_kernels, 'chunked_backward', None)
    x, softplus = case_inputs('plain')
    assert compared(x, softplus, x.u, torch.zeros(2, 3, 5))[2] < 1e-4

def test_what_it_does_not_take_is_named(official):
    x, _ = case_inputs('groups')
    assert mamba_ssm_takes(x) is None
    for bad, word in ((x._replace(initial_state=torch.zeros(2, 6, 3)), 'initial state'), (x._replace(z=x.z.double()), 'float64'),
            (x._replace(B=torch.ones(6, 3)), 'groups'), (x._replace(A=torch.ones(6, 257)), '257 states')):
        assert word in mamba_ssm_takes(bad)
        with pytest.raises(BackendError, match=word): mamba_ssm_forward(bad, True)

def test_another_version_is_refused(official, monkeypatch):
    other = types.SimpleNamespace(fwd=lambda *a: [a[0], torch.zeros(2, 3, 9, 10)], bwd=bwd)
    monkeypatch.setitem(sys.modules, 'selective_scan_cuda', other)
    with pytest.raises(BackendError, match='not known here'): mamba_ssm_forward(case_inputs('plain')[0], True)

def test_availability_says_why(monkeypatch, tmp_path):
    if 'selective_scan_cuda' not in sys.modules and not torch.cuda.is_available():
        assert mamba_ssm_available() == (False, "mamba-ssm's compiled module selective_scan_cuda is not installed")
    (tmp_path/'selective_scan_cuda.py').write_text('raise ImportError("undefined symbol: _ZN3c10")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'selective_scan_cuda', raising=False)
    assert mamba_ssm_available() == (False, "mamba-ssm's compiled module does not load: undefined symbol: _ZN3c10")

def test_with_the_module_only_the_gpu_is_missing(official, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert mamba_ssm_available() == (False, 'torch sees no CUDA device')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert mamba_ssm_available()[0]

def test_the_order_of_the_gradients_is_that_of_the_inputs(official):
    x, _ = case_inputs('everything')
    _, _, borders = mamba_ssm_forward(x, True)
    found = dict(zip(ScanInputs._fields, mamba_ssm_backward(x.u, None, x, borders, True), strict=True))
    assert found['initial_state'] is None and found['D'].shape == found['delta_bias'].shape == (3,)
    assert not torch.equal(found['D'], found['delta_bias']) and not torch.equal(found['B'], found['C'])
