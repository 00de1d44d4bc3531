"""A decomposition of your own, for linear layers: ``up`` is r columns of the weight itself."""

import torch
from torch import nn

import dynarank as dr


class Columns(dr.decompositions.Decomposition):
    """``W = W[:, chosen] @ coefficients``, of the columns of the largest norms."""

    name, is_pair = "columns", True  # W is up @ down

    def limit(self, shape):
        return min(shape)

    def shapes(self, shape, rank):
        return (rank, shape[1]), (shape[0], rank)

    def split(self, weight, rank):
        up = weight[:, weight.norm(dim=0).topk(rank).indices]
        return torch.linalg.lstsq(up, weight).solution, up

    def join(self, factors):
        return factors[1] @ factors[0]

    def stages(self, geometry, rank):
        return geometry, geometry


dr.decompositions.register_decomposition(Columns())
model = dr.factorize(nn.Sequential(nn.Linear(32, 32)), rank=8, decomposition="columns")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x in torch.randn(2, 64, 32):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
before = model(x)
print(torch.allclose(dr.inflate(model, optimizer=optimizer)(x), before, atol=1e-6), model)
