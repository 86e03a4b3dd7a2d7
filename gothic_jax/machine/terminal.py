"""What may be written to a terminal."""

import os
from typing import Any


def styled(stream: Any) -> bool:
    """Whether escape codes (colours, a progress bar) may be written to a stream.

    Only to a terminal that understands them, and not if the user has set NO_COLOR.
    """
    return (
        stream.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        and not os.environ.get("NO_COLOR")
    )
