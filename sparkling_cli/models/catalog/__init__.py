"""Layouts of known transformers classes that come with the package, proved when it was made.

An entry answers for a config only if everything that inference would look at was proved: the config as
the class itself completes it (``filled``), the tiny model that it shrinks to (``structure``), and from
these the layout and the parameters in real sizes (``template``). When in doubt there is no answer, and
inference does what it always did. ``teach`` writes the entries.
"""

from sparkling_cli.models.catalog.lookup import Known, known
from sparkling_cli.models.catalog.template import Parameters

__all__ = ["Known", "Parameters", "known"]
