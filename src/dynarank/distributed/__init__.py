"""Several processes that train one model: which they are, what they agree on, their wrappers.

``processes`` says who trains together and how they agree; each other file deals with one kind of
wrapper. Nothing here knows layers or forms.
"""

from typing import TYPE_CHECKING

from dynarank.files.lazy_names import lazy_names

if TYPE_CHECKING:
    from dynarank.distributed.joining import init_process_group
    from dynarank.distributed.processes import (
        DisagreementError,
        PeerError,
        Processes,
        independent,
        processes_of,
    )

__all__ = [
    "DisagreementError",
    "PeerError",
    "Processes",
    "independent",
    "init_process_group",
    "processes_of",
]

_HOMES = dict.fromkeys(__all__, "processes") | {"init_process_group": "joining"}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
