"""What the user wants: the expansion spec and where it may come from.

``model`` the frozen schema, ``sources`` options and YAML/TOML/JSON files.
"""

from sparkling_cli.spec.model import AxisSpec, BaselineSpec, ExpansionSpec, RewarmupSpec

__all__ = ["AxisSpec", "BaselineSpec", "ExpansionSpec", "RewarmupSpec"]
