"""A complete run small enough for tests: two small networks, smooth pictures, the real loop.
`python tests/tiny_run.py OUT [key=value ...]` is the command that the resume tests kill and repeat."""
import json
import os
import signal
import sys

import torch
from torch import nn

from i2i_mamba_nb.core import torch_rng
from i2i_mamba_nb.engine.train import TrainConfig, fit
from i2i_mamba_nb.learn.adversarial import PairedAdversarial

SETTINGS = dict(sources=['T1', 'T2'], target='PD', size=[12, 20], batch_size=2, max_steps=24, checkpoint_every=4, seed=5)

def layers(n_in, last, norm):
    "Convolution, normalisation, dropout, convolution: has weights, buffers and randomness"
    first = nn.Conv2d(n_in, 6, 3, padding=1, bias=False)
    return nn.Sequential(first, norm(6), nn.ReLU(), nn.Dropout(.1), nn.Conv2d(6, 1, 3, padding=1), last)

def tiny_recipe(config, norm=nn.BatchNorm2d):
    "The paper's recipe on networks of a few hundred weights"
    i = len(config.sources)
    return PairedAdversarial(layers(i, nn.Tanh(), norm), layers(i+1, nn.Identity(), norm), **config.recipe_args)

def plain_recipe(config):
    "Without normalisation over the batch and without dropout: the curve does not depend on who holds which picture"
    recipe = tiny_recipe(config, lambda c: nn.InstanceNorm2d(c, affine=True))
    for net in recipe.networks.values(): net[3] = nn.Identity()
    return recipe

class Blobs(torch.utils.data.Dataset):
    "Pictures that depend on item and draw only"
    def __init__(self, n=11, broken=()): self.n, self.broken = n, broken
    def __len__(self): return self.n
    def __getitem__(self, key):
        i, draw = key if isinstance(key, tuple) else (key, 0)
        x = nn.functional.avg_pool2d(torch.randn(2, 16, 24, generator=torch_rng(0, i, draw)), 5, 1)*3
        y = torch.tanh(x[:1]*x[1:])*(float('nan') if i in self.broken else 1.)
        return dict(source=x.clamp(-1, 1), target=y, patient=f'p{i}', z=i)

class Deadly(Blobs):
    "Kills its process with SIGKILL when it is asked for its n-th picture"
    def __init__(self, at): super().__init__(); self.left = at
    def __getitem__(self, key):
        self.left -= 1
        if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)

def settings(**change): return TrainConfig(**(SETTINGS | change))

def value(word):
    "A word of the command line as JSON where it is JSON"
    try: return json.loads(word)
    except ValueError: return word

if __name__ == '__main__':
    torch.set_num_threads(1)
    change = {k: value(v) for k, v in (word.split('=', 1) for word in sys.argv[2:])}
    build = plain_recipe if change.pop('plain', False) else tiny_recipe
    dies_at = int(os.environ.get('TINY_RUN_DIES_AT', 0))
    print(fit(settings(**change), Deadly(dies_at) if dies_at else Blobs(), sys.argv[1], validation=Blobs(3), build=build))
