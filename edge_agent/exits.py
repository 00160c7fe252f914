"""Exit codes that say what to do (sysexits.h), and how an error is told to a person: a line and a hint."""

import sys

from edge_agent.errors import Fatal, OutriderError, Retry

EX_RETRY, EX_REFUSED, EX_FATAL, EX_MISSING = 75, 78, 70, 69
"""Try again; change the settings; look at the machine; install something."""


def tell(error: Exception) -> int:
    """Print the error on stderr and give the exit code it means."""
    message, hint = (error.message, error.hint) if isinstance(error, OutriderError) else (str(error), "")
    print(f"error: {message}" + (f"\nhint:  {hint}" if hint else ""), file=sys.stderr, flush=True)
    return EX_RETRY if isinstance(error, Retry) else EX_FATAL if isinstance(error, Fatal) else EX_REFUSED
