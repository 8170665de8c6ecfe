"Build description: everything is read from settings.ini"
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_path']

def words(key):
    "What settings.ini lists under `key`, one per line or separated by spaces"
    return shlex.split(cfg.get(key, '') or '', comments=True)

extras = {k.removesuffix('_requirements'): words(k) for k in cfg if k.endswith('_requirements') and k != 'pip_requirements'}

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    packages=find_packages(include=[lib, lib+'.*']), include_package_data=True,
    install_requires=words('requirements')+words('pip_requirements'), extras_require=extras, python_requires='>='+cfg['min_python'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f'{lib}={lib}._modidx:d']})
