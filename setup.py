"Build description: everything is read from settings.ini; the compiled scan is optional and needs no torch to build"
import hashlib
import os
import platform
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_path']

def words(key):
    "What settings.ini lists under `key`, one per line or separated by spaces"
    return shlex.split(cfg.get(key, '') or '', comments=True)

extras = {k.removesuffix('_requirements'): words(k) for k in cfg if k.endswith('_requirements') and k != 'pip_requirements'}

# One shared library per instruction set, chosen when it is loaded (ssm/cpu_kernel). -fopenmp records the name libgomp.so.1 only,
# which is also the name of torch's own copy: loaded after torch, both share one set of threads.
FLAGS = '-O3 -g0 -std=c++17 -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-signed-zeros'
BUILDS = dict(sse2='-DW=4', avx2='-DW=8 -mavx2 -mfma', avx512='-DW=16 -march=x86-64-v4 -mprefer-vector-width=512')
if platform.machine() in ('arm64', 'aarch64'): BUILDS = dict(neon='-DW=4')
if platform.machine() not in ('arm64', 'aarch64', 'x86_64', 'AMD64'): BUILDS = {}

def extension(name, flags):
    headers = sorted(str(p.relative_to(root)) for p in (root/lib/'csrc').glob('*.h'))
    return Extension(f'{lib}.csrc.scan_{name}', [f'{lib}/csrc/scan.cpp'], depends=headers, language='c++',
        optional=True, extra_compile_args=shlex.split(f'{FLAGS} {flags}'), extra_link_args=['-fopenmp'])

class BuildScan(build_ext):
    "Plain libraries, not Python modules: no tag in their name, no PyInit_, objects apart, and their SHA-256 digest as the last 32 bytes"
    def build_extension(self, ext):
        keep, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try: super().build_extension(ext)
        finally: self.build_temp = keep
        path = Path(self.get_ext_fullpath(ext.name))
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]: path.write_bytes(data+hashlib.sha256(data).digest())
    def get_ext_filename(self, name): return os.path.join(*name.split('.'))+'.so'
    def get_export_symbols(self, ext): return ext.export_symbols

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    packages=find_packages(include=[lib, lib+'.*']), include_package_data=True,
    ext_modules=[extension(k, v) for k, v in BUILDS.items()], cmdclass=dict(build_ext=BuildScan),
    install_requires=words('requirements')+words('pip_requirements'), extras_require=extras, python_requires='>='+cfg['min_python'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f'{lib}={lib}._modidx:d']})
