"""Options of a runtime: known names with defaults, everything else refused."""

from collections.abc import Mapping
from typing import Any

from edgedistill.errors import ConfigError


def accept(runtime: str, options: Mapping[str, Any], **known: Any) -> dict[str, Any]:
    """Lay options over their defaults.

    Args:
        runtime: For the message.
        options: What the caller gave.
        **known: Every option of the runtime with its default.

    Raises:
        ConfigError: If an option is unknown.
    """
    if unknown := sorted(set(options) - set(known)):
        msg = f"Runtime {runtime!r} has no option {', '.join(map(repr, unknown))}; it takes: {', '.join(known)}."
        raise ConfigError(msg)
    return {**known, **options}
