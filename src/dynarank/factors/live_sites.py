"""The current sites of a model, surveyed again only after a form has changed."""

from __future__ import annotations

from torch import nn

from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.sites import Site, survey

__all__ = ["LiveSites"]


class LiveSites:
    """The current sites of a model; traverses the model again only after a change of form.

    Every change replaces the table of forms of a module, so comparing these tables is enough to
    notice changes. Modules inserted into the model later are noticed at the next change.

    Args:
        model: the model.
        layers: a filter or glob patterns; None: every supported weight.
    """

    def __init__(self, model: nn.Module, layers: LayerFilter = None) -> None:
        self._model, self._layers = model, layers
        self._sites: list[Site] = []
        self._seen: list[tuple[nn.Module, object]] = []
        self()

    def __call__(self) -> list[Site]:
        """The sites; each reads its parameters from the module on access."""
        if not self._seen or any(_forms(module) is not forms for module, forms in self._seen):
            sites = survey(self._model)
            chosen = sites if self._layers is None else select(sites, self._layers)
            self._sites = [site for site in chosen if site.form is not None]
            self._seen = [(site.module, _forms(site.module)) for site in sites]
        return self._sites


def _forms(module: nn.Module) -> object:
    return module.__dict__.get("_forms")
