"""A layer of your own that can change form: a linear layer on inputs of length one."""

import torch
import torch.nn.functional as F
from torch import nn

import dynarank as dr
from dynarank.layers import RankedLayer, WeightSpec, effective


class Cosine(nn.Linear):
    """``y = W x / |x| + b``."""

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)


class RankedCosine(RankedLayer, Cosine):
    """The same in any form: say what the weight is, and multiply by it."""

    plain, weight = Cosine, effective("weight")

    @classmethod
    def specs(cls, module):
        return (WeightSpec("weight", (module.out_features, module.in_features)),)

    def forward(self, x):
        return self.multiply(self.resolved(), F.normalize(x, dim=-1), self.bias)


dr.layers.register_layer(Cosine, RankedCosine)
model = dr.factorize(nn.Sequential(Cosine(32, 32), nn.ReLU(), Cosine(32, 8)), rank=4)
optimizer = torch.optim.AdamW(model.parameters())
for x in torch.randn(2, 64, 32):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
before = model(x)
print(torch.allclose(dr.merge(model, optimizer=optimizer)(x), before, atol=1e-6), model)
